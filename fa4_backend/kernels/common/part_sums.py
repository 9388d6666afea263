"""Parts of a row's KV are added up: O and row_sum of each relative to its own reference, in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from fa4_backend.kernels.common import ptx_ops as ptx


class Part(NamedTuple):
    """Some elements of a row of O, of some of its keys."""

    o: list[Float32]  # relative to row_max
    row_max: Float32  # reference, log2 units; -inf: no key
    row_sum: Float32


def fold(total: Part, parts: list[Part]) -> Part:
    """Add parts to a total, one after the other.

    The same arithmetic whether they come at once or one by one. At once, all weights are computed before the first is needed: a part then
    costs a multiplication and an FMA of latency instead of two exponentials too.
    """
    maxima = [total.row_max]
    for part in parts:
        maxima.append(cute.arch.fmax(maxima[-1], part.row_max))
    finite = [cutlass.select_(row_max == -Float32.inf, Float32(0.0), row_max) for row_max in maxima[1:]]
    old_weights = [cute.math.exp2(before - zero, fastmath=True) for before, zero in zip(maxima, finite, strict=False)]
    weights = [cute.math.exp2(part.row_max - zero, fastmath=True) for part, zero in zip(parts, finite, strict=True)]
    o, row_sum = list(total.o), total.row_sum
    for part, old_weight, weight in zip(parts, old_weights, weights, strict=True):
        o = [cute.math.fma(value, weight, ptx.mul_rn(before, old_weight)) for value, before in zip(part.o, o, strict=True)]
        row_sum = cute.math.fma(part.row_sum, weight, ptx.mul_rn(row_sum, old_weight))
    return Part(o, maxima[-1], row_sum)


def fold_lanes(part: Part, offset: int) -> Part:
    """Add the part of the lane `offset` away; the lower lane's order counts. All lanes of the warp call."""
    other = [cute.arch.shuffle_sync_bfly(x, offset) for x in (*part.o, part.row_max, part.row_sum)]
    return fold(part, [Part(other[:-2], other[-2], other[-1])])


def only_if(condition: object, part: Part) -> Part:
    """A part, or one without a key: its O then counts nothing, whatever memory held."""
    o = [cutlass.select_(condition, value, Float32(0.0)) for value in part.o]
    return Part(o, cutlass.select_(condition, part.row_max, -Float32.inf), cutlass.select_(condition, part.row_sum, Float32(0.0)))
