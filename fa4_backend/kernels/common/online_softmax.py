"""Arithmetic of the online softmax, one row at a time: reference maximum, rescale factor, final denominator.

A score times `scale_log2` is an exponent of 2. A row's reference maximum `row_max` is such an exponent, rounded to float32: a weight is
exp2(score * scale_log2 - row_max), and `row_sum` sums those weights.

Note [Contraction]. PTX lets ptxas fuse a mul and the add or sub that uses it unless one of them has a rounding modifier. A difference of
two references, of which one is such a product, would then be off by that product's rounding: at a logit of 2e4 each tile would scale
`row_sum` by up to 1 +- 2^-10, also where the maximum stays. So a reference is a product that is rounded by itself (mul.rn), which is
what every weight, factor, part and lse refers to; factors are differences of two references; and what is to be fused is an fma.
tests/emulated/test_contraction.py holds the compiled kernels to that.
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


class MaxUpdate(NamedTuple):
    """What a new block does to a row's reference maximum."""

    row_max: Float32  # the new reference, log2 units; -inf: no key yet
    offset: Float32  # what is subtracted in the exponent: row_max, or 0 for a row that saw no key yet
    factor: Float32  # multiplies row_sum and O of earlier blocks; exactly 1 where the reference stays


def update_max(
    block_max: Float32,
    row_max: Float32,
    scale_log2: Float32 | None,
    *,
    may_be_empty: bool,
    is_first: bool,
    threshold: float,
) -> MaxUpdate:
    """Move a row's reference maximum to that of a block, or keep it while the growth is at most `threshold` (log2 units).

    Keeping it is exact in the end, since row_sum and O refer to the same value; weights then reach 2 ** threshold.
    (FlashAttention-4, "conditional rescaling".)

    Args:
        block_max: largest score of the block.
        scale_log2: factor from a score to the exponent of 2, above 0; None: scores are exponents.
        may_be_empty: the row may have seen no key so far, and its maximum may be -inf.
    """
    # Rounding keeps the order of scores: the largest product is the product of the largest score.
    new_max = block_max if const_expr(scale_log2 is None) else ptx.mul_rn(block_max, scale_log2)
    if const_expr(not is_first):
        new_max = cute.arch.fmax(new_max, row_max)
        if const_expr(threshold > 0):
            # -inf - -inf is NaN, compares false and keeps the old value: -inf as well.
            new_max = cutlass.select_(new_max - row_max > threshold, new_max, row_max)
    offset = new_max
    if const_expr(may_be_empty):
        offset = cutlass.select_(new_max == -Float32.inf, Float32(0.0), new_max)
    factor = Float32(1.0) if const_expr(is_first) else cute.math.exp2(row_max - offset, fastmath=True)
    return MaxUpdate(new_max, offset, factor)


def exponent(score: Float32, scale_log2: Float32 | None, offset: Float32) -> Float32:
    """score * scale_log2 - offset with one rounding."""
    return score - offset if const_expr(scale_log2 is None) else cute.math.fma(score, scale_log2, -offset)


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
