"""Arithmetic of the online softmax, one row at a time: reference maximum, rescale factor, final denominator.

A score times `scale_log2` is an exponent of 2. A row's reference maximum `row_max` is such an exponent, rounded to float32: a weight is
exp2(score * scale_log2 - row_max), and `row_sum` sums those weights.

Note [Contraction]. PTX lets ptxas fuse a mul and the add or sub that uses it unless one of them has a rounding modifier. A difference of
two references, of which one is such a product, would then be off by that product's rounding: at a logit of 2e4 each tile would scale
`row_sum` by up to 1 +- 2^-10, also where the maximum stays. So a reference is a product that is rounded by itself (mul.rn), which is
what every weight, factor, part and lse refers to; factors are differences of two references; and what is to be fused is an fma.
tests/emulated/test_large_logits.py holds the compiled kernels to that.

Note [Large scores]. exp2(fma(score, scale_log2, -row_max)) takes the product exactly and the reference rounded: all weights of a row
share a factor 2^r, where r is that rounding. It is in row_sum and in O alike, but 16-bit weights are rounded with it, and from a
reference of 2^31 on it overflows or leaves nothing (4 * 10^8 is a logit that fp16 can make, 10^38 one of bf16). So where a row's largest
score of a block is `MAX_FUSED` or more in size, products are rounded as the reference was, which makes the largest weight 1. That is a
function of the row alone; scores of less weigh nothing beside a reference of which r matters. Decode, whose time is not exponents, always
rounds; the Blackwell kernel takes a branch; the Hopper kernel needs neither (`wgmma_fragment.py`, Note [Huge scores]).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
MAX_FUSED = 2.0**15  # log2 units; below, r is at most 2^-10: half of what changes a weight of 1 in bfloat16


class MaxUpdate(NamedTuple):
    """What a new block does to a row's reference maximum."""

    row_max: Float32  # the new reference, log2 units; -inf: no key yet
    offset: Float32  # what is subtracted in the exponent: row_max, or 0 for a row that saw no key yet
    factor: Float32  # multiplies row_sum and O of earlier blocks; exactly 1 where the reference stays


def update_max(
    block_max: Float32,
    row_max: Float32,
    *,
    may_be_empty: bool,
    is_first: bool,
    threshold: float,
) -> MaxUpdate:
    """Move a row's reference maximum to that of a block, or keep it while the growth is at most `threshold` (log2 units).

    Keeping it is exact in the end, since row_sum and O refer to the same value; weights then reach 2 ** threshold.
    (FlashAttention-4, "conditional rescaling".)

    Args:
        block_max: largest score of the block in log2 units. Rounding keeps the order of products with a scale above 0, so this is the
            rounded product of the largest score.
        may_be_empty: the row may have seen no key so far, and its maximum may be -inf.
    """
    new_max = block_max
    if const_expr(not is_first):
        new_max = cute.arch.fmax(block_max, row_max)
        if const_expr(threshold > 0):
            # -inf - -inf is NaN, compares false and keeps the old value: -inf as well.
            new_max = cutlass.select_(new_max - row_max > threshold, new_max, row_max)
    offset = new_max
    if const_expr(may_be_empty):
        offset = cutlass.select_(new_max == -Float32.inf, Float32(0.0), new_max)
    factor = Float32(1.0) if const_expr(is_first) else cute.math.exp2(row_max - offset, fastmath=True)
    return MaxUpdate(new_max, offset, factor)


class RowResult(NamedTuple):
    """How a finished row is written."""

    o_scale: Float32  # multiplies the accumulated O; 0 for an empty row
    lse: Float32  # natural log of the denominator, sink included; -inf for an empty row


def finalize_row(row_max: Float32, row_sum: Float32, sink: Float32 | None) -> RowResult:
    """Close a row. `sink`: a scaled logit that joins the denominator without a value, or None (compile time)."""
    is_empty = row_sum == 0.0
    total, weight = row_sum, Float32(1.0)
    if const_expr(sink is not None):
        # A sink far above every score must not overflow: refer both to the larger of the two.
        sink_log2 = ptx.mul_rn(sink, Float32(LOG2_E))
        reference = cute.arch.fmax(row_max, sink_log2)
        weight = cute.math.exp2(row_max - reference, fastmath=True)
        total = cute.math.fma(row_sum, weight, cute.math.exp2(sink_log2 - reference, fastmath=True))
        row_max = reference
    o_scale = cutlass.select_(is_empty, Float32(0.0), weight * cute.arch.rcp_approx(total))
    lse = cutlass.select_(is_empty, -Float32.inf, (row_max + cute.math.log2(total, fastmath=True)) * LN_2)
    return RowResult(o_scale, lse)
