"""Finished rows of O from a warpgroup's registers to `out`: 8 elements a thread and 32 a quad, without shared memory.

A quad holds a row of 16-bit O in words: lane p has columns 8 g + 2 p and the next of every group g of eight columns. Four groups make a
4 x 4 matrix of words (lane, group), which two rounds of shuffles transpose: lane p then has group p whole. In FP8 a word is half empty.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common.fp8 import float32_to_e4m3
from fa4_backend.kernels.common.hardware import ACCESS_BYTES, QUAD
from fa4_backend.kernels.common.pack_gqa import PackedRow
from fa4_backend.kernels.common.wgmma_fragment import flat


@cute.jit
def store_fragment(
    mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v)
    rO: cute.Tensor,  # (head_dim_v / 2,) of 16 bits, a thread's fragment of 64 x head_dim_v (`wgmma_fragment`)
    rows: cutlass.Constexpr[tuple[PackedRow, PackedRow]],  # this thread's two
    first_head: Int32,
    q_begin: Int32,  # row of `mO` of the sequence's first token
):
    """Write the rows that are valid. All lanes of a warp call."""
    o = flat(rO)
    words = cute.recast_tensor(o, Int32)
    lane = cute.arch.lane_idx() % QUAD
    groups = cute.size(o) // 4
    copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), mO.element_type, num_bits_per_copy=8 * ACCESS_BYTES)
    for i in cutlass.range_constexpr(2):
        for first in cutlass.range_constexpr(0, groups, QUAD):
            vector = cute.make_rmem_tensor(QUAD, Int32)
            for k, word in enumerate(_transpose_quad([words[2 * (first + k) + i] for k in range(QUAD)], lane)):
                vector[k] = word
            if rows[i].is_valid:
                elements = cute.recast_tensor(vector, mO.element_type)
                gO = cute.local_tile(mO[q_begin + rows[i].token, first_head + rows[i].head, None], (8,), (first + lane,))
                cute.copy(copy, elements, gO)


@cute.jit
def store_fragment_fp8(
    mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v) e4m3
    rO: cute.Tensor,  # (head_dim_v / 2,) float32, likewise
    rows: cutlass.Constexpr[tuple[PackedRow, PackedRow]],  # this thread's two
    first_head: Int32,
    q_begin: Int32,  # row of `mO` of the sequence's first token
):
    """Round to e4m3 and write the rows that are valid. All lanes of a warp call."""
    o = flat(rO)
    lane = cute.arch.lane_idx() % QUAD
    copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Int32, num_bits_per_copy=64)
    for i in cutlass.range_constexpr(2):
        for first in cutlass.range_constexpr(0, cute.size(o) // 4, QUAD):
            pairs = [float32_to_e4m3([o[4 * (first + k) + 2 * i + e] for e in range(2)]) for k in range(QUAD)]
            pairs = _transpose_quad(pairs, lane)
            vector = cute.make_rmem_tensor(2, Int32)
            for k in cutlass.range_constexpr(2):
                vector[k] = pairs[2 * k] | (pairs[2 * k + 1] << 16)
            if rows[i].is_valid:
                gO = cute.local_tile(mO[q_begin + rows[i].token, first_head + rows[i].head, None], (8,), (first + lane,))
                cute.copy(copy, vector, cute.recast_tensor(gO, Int32))


def _transpose_quad(words: list[Int32], lane: Int32) -> list[Int32]:
    """Word k of lane p becomes word p of lane k."""
    for distance in (1, 2):
        is_upper = lane // distance % 2 == 1
        for k in (k for k in range(QUAD) if k // distance % 2 == 0):
            low, high = words[k], words[k + distance]
            received = cute.arch.shuffle_sync_bfly(cutlass.select_(is_upper, low, high), distance)
            words[k] = cutlass.select_(is_upper, received, low)
            words[k + distance] = cutlass.select_(is_upper, high, received)
    return words
