"""Arithmetic of the online softmax, one row at a time: reference maximum, rescale factor, final denominator.

All values are in the domain of the exponent: `row_max` of raw scores, `scale_log2` multiplies a raw score so that
exp2(score * scale_log2 - row_max * scale_log2) is its weight. `row_sum` sums those weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class MaxUpdate(NamedTuple):
    """What a new block does to a row's reference maximum."""

    row_max: Float32  # the new reference
    offset: Float32  # row_max * scale_log2, subtracted in the exponent; 0 for a row that saw no key yet
    factor: Float32  # multiplies row_sum and O of earlier blocks


def update_max(
    block_max: Float32,
    row_max: Float32,
    scale_log2: Float32,
    *,
    may_be_empty: bool,
    is_first: bool,
    threshold: float,
    exact_factor: bool,
) -> MaxUpdate:
    """Move a row's reference maximum to `block_max`, or keep it while the growth is at most `threshold` (log2 units).

    Keeping it is exact in the end, since row_sum and O refer to the same value; weights then reach 2 ** threshold.
    (FlashAttention-4, "conditional rescaling".)

    Args:
        may_be_empty: the row may have seen no key so far, and its maximum may be -inf.
        exact_factor: the factor is exactly 1 where the reference stays, so that a block of which a row sees nothing leaves its bits alone.
    """
    if const_expr(is_first):
        new_max = block_max
    else:
        new_max = cute.arch.fmax(block_max, row_max)
        if const_expr(threshold > 0):
            # -inf - -inf is NaN, compares false and keeps the old value: -inf as well.
            new_max = cutlass.select_((new_max - row_max) * scale_log2 > threshold, new_max, row_max)
    finite_max = new_max
    if const_expr(may_be_empty):
        finite_max = cutlass.select_(new_max == -Float32.inf, Float32(0.0), new_max)
    offset = finite_max * scale_log2
    factor = Float32(1.0)
    if const_expr(not is_first):
        # ptxas makes one FMA of product and difference, which is off 0 by the rounding of `offset` where the maximum stayed, and the factor
        # off 1. The difference first has no such rounding, but takes 2 to 5 % more time (sm90 prefill, H100, 32/8 d128: 8 x 4K 583 and 562
        # TFLOP/s, 1 x 32K 629 and 595), so it is for those who need it.
        log2_factor = (row_max - finite_max) * scale_log2 if exact_factor else row_max * scale_log2 - offset
        factor = cute.math.exp2(log2_factor, fastmath=True)
    return MaxUpdate(new_max, offset, factor)


class RowResult(NamedTuple):
    """How a finished row is written."""

    o_scale: Float32  # multiplies the accumulated O; 0 for an empty row
    lse: Float32  # natural log of the denominator, sink included; -inf for an empty row


def finalize_row(row_max: Float32, row_sum: Float32, scale_log2: Float32, sink: Float32 | None) -> RowResult:
    """Close a row. `sink`: a scaled logit that joins the denominator without a value, or None (compile time)."""
    is_empty = row_sum == 0.0
    max_log2 = row_max * scale_log2
    total, weight = row_sum, Float32(1.0)
    if const_expr(sink is not None):
        # A sink far above every score must not overflow: refer both to the larger of the two.
        sink_log2 = sink * LOG2_E
        reference = cute.arch.fmax(max_log2, sink_log2)
        weight = cute.math.exp2(max_log2 - reference, fastmath=True)
        total = row_sum * weight + cute.math.exp2(sink_log2 - reference, fastmath=True)
        max_log2 = reference
    o_scale = cutlass.select_(is_empty, Float32(0.0), weight * cute.arch.rcp_approx(total))
    lse = cutlass.select_(is_empty, -Float32.inf, (max_log2 + cute.math.log2(total, fastmath=True)) * LN_2)
    return RowResult(o_scale, lse)
