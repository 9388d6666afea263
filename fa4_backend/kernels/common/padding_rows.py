"""Rows of the call past its last query, which a padded batch of a captured graph has: zero in `out`, -inf in `lse`.

So nothing that looks at all rows (the maximum of a dynamic quantisation) meets what the memory held before. One kernel of a call does
it: decode where the plan has it, but for a step of prefill rows alone, in which decode need not be launched; else prefill. By a warp that
has nothing else left to do.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from fa4_backend.kernels.common.hardware import ACCESS_BYTES, LANES


@cute.jit
def zero_rows(
    first: Int32,  # query tokens of the step; ALL_ROWS and more than rows of `out`: nothing is left to zero
    mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v), rows and heads at multiples of 16 bytes
    mLse: cute.Tensor | None,  # (num_q_heads, total_q) float32
):
    """Write the rows from `first` on, their 16 bytes shared among all CTAs of the grid; one whole warp of each calls."""
    cta, _, _ = cute.arch.block_idx()
    num_ctas, _, _ = cute.arch.grid_dim()
    lane = cute.arch.lane_idx()
    elems = const_expr(ACCESS_BYTES * 8 // mO.element_type.width)
    chunks = const_expr(mO.shape[2] // elems)
    copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Int32, num_bits_per_copy=8 * ACCESS_BYTES)
    zeros = cute.make_rmem_tensor(ACCESS_BYTES // 4, Int32)
    zeros.fill(0)
    first = cutlass.max(first, 0)
    heads = (mO.shape[0] - cutlass.min(first, mO.shape[0])) * mO.shape[1]
    # A row of 128 heads of 512 is 128 KiB, 3 us for one warp.
    for chunk in cutlass.range(cta * LANES + lane, heads * chunks, num_ctas * LANES, unroll=1):
        head = chunk // chunks
        row = head // mO.shape[1]
        gO = cute.local_tile(mO[first + row, head - row * mO.shape[1], None], (elems,), (chunk - head * chunks,))
        cute.copy(copy, zeros, cute.recast_tensor(gO, Int32))
    if const_expr(mLse is not None):
        for head in cutlass.range(cta * LANES + lane, heads, num_ctas * LANES, unroll=1):
            row = head // mO.shape[1]
            mLse[head - row * mO.shape[1], first + row] = -Float32.inf
