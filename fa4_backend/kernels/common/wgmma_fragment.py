"""A warpgroup's 64 x n accumulator as a thread sees it: two rows, n / 4 values each.

Value i of the fragment lies in row half (i // 2) % 2 and in column 8 * (i // 4) + 2 * (lane % 4) + i % 2 (PTX ISA, wgmma.mma_async,
D fragment). The four lanes of a quad share both rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.hardware import LANES, QUAD
from fa4_backend.kernels.common.mask import Columns
from fa4_backend.kernels.common.online_softmax import LOG2_E, update_max
from fa4_backend.kernels.common.warp_mma import quad_max

FP8_LIFT = 7.0  # of weights in float16 beside V in FP8: RowFragment.lift
HUGE = 2.0**28  # log2 units; its float32 neighbours are 32 apart
LOG2_E_REST = 1.92596299e-08  # log2(e) less its float32
FIXED_CAP = 55.0  # largest cap of which rows keep their first reference: Note [Fixed references]
HEADROOM = 40  # log2 units that the reference of a capped row in bfloat16 lies above its largest score
MOST_WEIGHT = 2.0**-32  # of a lane's columns of a row and block together, from which on the row's reference moves
MASK_BITS = 32  # scores of a row that a word says of whether they are seen
CHAINS = 2  # independent sums and maxima a row, to hide the latency of a dependent add


class RowStats(NamedTuple):
    """Running statistics of a thread's two rows."""

    row_max: cute.Tensor  # (2,) reference maximum, log2 units; the same in all four lanes of a quad
    row_sum: cute.Tensor  # (2,) sum of weights of this lane's columns only


class ScoreScale(NamedTuple):
    """From raw scores to log2 units: Note [Huge scores].

    Note [Huge scores]. A weight is exp2(fma(score, log2, -row_max)) with row_max = log2 * largest score, rounded: all weights of a row
    share a factor 2^r, where r is that rounding, in row_sum and in O alike. From a row_max of `HUGE` on, r may be 8 and more: 2^r leaves
    what a 16-bit weight holds (fp16 inputs make logits of 4 * 10^8, bf16 of 10^38). Scores of such rows are 2^-23 of that, 32 log2 units
    and more, apart: only those that equal the largest weigh anything, whatever the scale. So there the scale is the next power of two,
    whose products are exact, and r is 0; the lse alone is brought back. The rows of a warp may differ in it: a select, no branch, which
    would keep one row's exponentials from running under the other's maximum (H100, with a branch: d128 4 to 7 %, d64 7 to 15 % slower).
    """

    log2: Float32  # softmax_scale * log2(e)
    power: Float32  # the next power of two, at most twice as large
    huge: Float32 | None  # raw scores of this size and more take `power`; None: those whose product with `log2` is `HUGE` and more

    @staticmethod
    def of_call(softmax_scale: Float32) -> "ScoreScale":
        """One scale for all rows: three registers that stay."""
        return ScoreScale.of_log2(softmax_scale * LOG2_E)

    @staticmethod
    def of_log2(log2: Float32) -> "ScoreScale":
        """The same of a scale that already is in log2 units."""
        return ScoreScale(log2, _next_power(log2), Float32(HUGE) / log2)

    @staticmethod
    def of_row(log2: Float32) -> "ScoreScale":
        """The scale of a row, made where it is used: `log2` is all that a loop has to keep."""
        return ScoreScale(log2, _next_power(log2), None)

    def of(self, largest: Float32) -> Float32:
        """The scale of a row whose largest score of a block this is."""
        if const_expr(self.huge is None):
            return cutlass.select_(ptx.absolute(largest * self.log2) >= HUGE, self.power, self.log2)
        return cutlass.select_(ptx.absolute(largest) >= self.huge, self.power, self.log2)

    def of_reference(self, row_max: Float32) -> Float32:
        """The scale of a row whose reference this is: that of the score it was made of."""
        return cutlass.select_(ptx.absolute(row_max) >= HUGE, self.power, self.log2)

    def true_max(self, row_max: Float32) -> Float32:
        """A row's reference maximum in log2 units, whichever scale it was made with."""
        return cutlass.select_(ptx.absolute(row_max) >= HUGE, ptx.mul_rn(row_max, self.log2 / self.power), row_max)


class CapScale(NamedTuple):
    """From what `RowFragment.softcap` leaves, -1 / (1 + exp(2x)) for tanh(x), to log2 units: one fma, also in a weight's exponent."""

    slope: Float32
    bias: Float32

    @staticmethod
    def of_call(softcap: Float32) -> "CapScale":
        """cap * tanh(x) * log2(e) = bias + slope * score."""
        bias = ptx.mul_rn(softcap, Float32(LOG2_E))
        return CapScale(ptx.mul_rn(bias, Float32(2.0)), bias)


@dataclass(frozen=True)
class RowFragment:
    """Elementwise work on a fragment with `n` columns; every method works in place.

    Tensors are a thread's registers. Of all methods: rS, (n / 2,) float32 in any layout, holds scores and then weights; rO, likewise of
    head_dim_v columns, the output; `factors`, `maxima`, `totals`, (2,) float32, a number for each of the thread's rows.

    Note [Lifted weights]. A weight in float16 is subnormal below 2^-14, and loses bits where a bfloat16 would not. So beside V in FP8,
    where P is float16 whatever Q is, the reference lies 7 log2 units below the maximum, and weights reach 2^7. A weight of 2^-k beside the
    row's largest then has all bits down to k = 21, and an error of 2^-32 below. The reference is one rounded number in row_sum, O, sinks,
    parts and lse, so nothing is scaled back. It must not be lower: below `HUGE` it is rounded by up to 8, and 2^(7 + 8) still is a float16.

    Note [Fixed references]. Capped scores are bounded, so where weights have float32's exponents (P in bfloat16) and the cap is
    `FIXED_CAP` at most, a row keeps the reference of the first block in which it sees a key: blocks that all rows see whole need no
    maximum, no shuffles and no factor. That reference is the block's largest score plus `HEADROOM`: the largest weight is 2^-40, which
    bfloat16 holds exactly, and no later one is above 2^(2 * 55 log2(e) - 40) = 2^118.7, so that a lane's sum of 64 is a float32. A block
    whose sum in a lane is above `MOST_WEIGHT` is brought down before its weights are used (`lower`): the row's reference moves up by a
    whole number, and weights, row_sum and O take that power of two. So weights that are multiplied with V are 2^-32 at most, those of n
    keys add up to n * 2^-32, and |O| stays below the largest |V| for every finite V and up to 2^32 keys; parts are weighed by factors of
    at most 1 and keep that. Where the cap is larger the reference is the running maximum plus `HEADROOM`, and weights are 2^(8 - 40) at
    most: the same bound. It does not hold where the largest weight is 1: two such keys whose V is the largest bfloat16 are no float32.
    What it costs is at the lower end: products below 2^-126 are lost, that is what is below 2^-86 in out, and weights below 2^-86 of the
    first block's largest. Weights are rounded to bfloat16, so a row may end 2^-8 above the largest |V|: infinite only where that is the
    largest bfloat16 itself.
    """

    n: int
    rescale_threshold: float  # log2 units; 0: rescale whenever a maximum grows
    lift: float = 0.0  # log2 units that a row's reference lies below its maximum: Note [Lifted weights]

    def _row(self, i: int) -> list[int]:
        """Flat indices of row half `i`, in column order."""
        return [j for j in range(self.n // 2) if (j // 2) % 2 == i]

    def softmax(
        self,
        rS: cute.Tensor,
        stats: RowStats,
        scales: tuple[ScoreScale, ScoreScale] | CapScale | None,
        *,
        may_be_empty: bool,
        is_first: bool,
        maxima: tuple[Float32, Float32] | None = None,
        by_reference: bool = False,
    ) -> cute.Tensor:
        """Turn scores into weights and update the statistics. Returns (2,) factors for O of earlier blocks.

        Args:
            scales: of the raw scores of each row, or of capped ones; None: they are in log2 units already.
            maxima: largest score of each row where other warps hold more of its columns; None: that of this fragment.
            by_reference: a row's scale follows from its reference, as in `weigh`, in place of the block's largest score.
        """
        s = flat(rS)
        factors = cute.make_rmem_tensor(2, Float32)
        for i in range(2):
            row = self._row(i)
            block_max = self.row_max(rS, i) if const_expr(maxima is None) else maxima[i]
            is_capped = const_expr(isinstance(scales, CapScale))
            if is_capped:
                block_max = cute.math.fma(block_max, scales.slope, scales.bias - self.lift)
            elif const_expr(scales is not None):
                factor = scales[i].of(block_max)
                # One rounding either way.
                block_max = (
                    ptx.mul_rn(block_max, factor) if const_expr(self.lift == 0) else cute.math.fma(block_max, factor, Float32(-self.lift))
                )
            elif const_expr(self.lift != 0):
                block_max = block_max - self.lift
            update = update_max(block_max, stats.row_max[i], may_be_empty=may_be_empty, is_first=is_first, threshold=self.rescale_threshold)
            stats.row_max[i] = update.row_max
            factors[i] = update.factor
            if is_capped:
                factor, zero = scales.slope, scales.bias - update.offset
            else:
                zero = -update.offset
                if const_expr(by_reference and scales is not None):
                    factor = scales[i].of_reference(update.row_max)
            for j in row:
                exponent = s[j] + zero if const_expr(scales is None) else cute.math.fma(s[j], factor, zero)
                s[j] = cute.math.exp2(exponent, fastmath=True)
            total = _tree([s[j] for j in row], lambda a, b: a + b)
            stats.row_sum[i] = total if const_expr(is_first) else cute.math.fma(stats.row_sum[i], update.factor, total)
        return factors

    def growth(self, rS: cute.Tensor, stats: RowStats, scales: tuple[ScoreScale, ScoreScale] | None, maxima: cute.Tensor) -> Boolean:
        """Whether a lane's largest score moves the reference of one of its rows, which sees a key before; fills `maxima`, (2,)."""
        s = flat(rS)
        moves = []
        for i in range(2):
            maxima[i] = _tree([s[j] for j in self._row(i)], cute.arch.fmax)
            largest = maxima[i]
            if const_expr(scales is not None):
                largest = ptx.mul_rn(largest, scales[i].of(largest))
            moves.append(largest - stats.row_max[i] > self.rescale_threshold)
        return moves[0] | moves[1]

    def move(self, stats: RowStats, scales: tuple[ScoreScale, ScoreScale] | None, maxima: cute.Tensor, factors: cute.Tensor) -> None:
        """Move references of a warp's rows, each as `softmax` would; `maxima` of lanes, `factors` for O."""
        for i in range(2):
            largest = quad_max(maxima[i])
            if const_expr(scales is not None):
                largest = ptx.mul_rn(largest, scales[i].of(largest))
            update = update_max(largest, stats.row_max[i], may_be_empty=False, is_first=False, threshold=self.rescale_threshold)
            stats.row_max[i], factors[i] = update.row_max, update.factor

    def weigh(self, rS: cute.Tensor, stats: RowStats, scales: tuple[ScoreScale, ScoreScale] | None, factors: cute.Tensor) -> None:
        """Turn scores into weights relative to references that stand."""
        s = flat(rS)
        for i in range(2):
            row, zero = self._row(i), -stats.row_max[i]
            factor = None if scales is None else scales[i].of_reference(stats.row_max[i])
            for j in row:
                exponent = s[j] + zero if const_expr(scales is None) else cute.math.fma(s[j], factor, zero)
                s[j] = cute.math.exp2(exponent, fastmath=True)
            stats.row_sum[i] = cute.math.fma(stats.row_sum[i], factors[i], _tree([s[j] for j in row], lambda a, b: a + b))

    def bounded_softmax(
        self, rS: cute.Tensor, stats: RowStats, scale: CapScale, totals: cute.Tensor, *, finds_reference: bool, is_first: bool
    ) -> Boolean:
        """The same of capped scores, relative to a reference that stays: Note [Fixed references].

        Args:
            totals: (2,) receives the sum of this lane's weights of each row.
            finds_reference: a row may have seen no key yet.

        Returns whether a row weighs too much, so that `lower` has to follow.
        """
        s = flat(rS)
        for i in range(2):
            row = self._row(i)
            offset = stats.row_max[i]
            if const_expr(finds_reference):
                found = cute.math.fma(self.row_max(rS, i), scale.slope, scale.bias + HEADROOM)
                if const_expr(not is_first):
                    found = cutlass.select_(offset == -Float32.inf, found, offset)
                stats.row_max[i] = found
                offset = cutlass.select_(found == -Float32.inf, Float32(0.0), found)
            zero = scale.bias - offset
            for j in row:
                s[j] = cute.math.exp2(cute.math.fma(s[j], scale.slope, zero), fastmath=True)
            totals[i] = _tree([s[j] for j in row], lambda a, b: a + b)
            stats.row_sum[i] = totals[i] if const_expr(is_first) else stats.row_sum[i] + totals[i]
        return (totals[0] > MOST_WEIGHT) | (totals[1] > MOST_WEIGHT)

    def lower(self, rS: cute.Tensor, stats: RowStats, factors: cute.Tensor) -> None:
        """Move up the references of rows that weigh too much, by whole numbers: a lane's weights of the block then add up to 2^-39 at
        most. All lanes of the warp call; `factors` brings the lane's sums and receives what O of earlier blocks takes."""
        for i in range(2):
            largest = quad_max(factors[i])
            exponent = (ptx.float_to_bits(largest) >> 23) - 127
            # Twice a half: the whole factor may be 2^-164, which O of earlier blocks then takes for 0.
            half = Int32(cutlass.select_(largest > MOST_WEIGHT, (exponent + (HEADROOM + 1)) >> 1, Int32(0)))
            factor = ptx.bits_to_float((127 - half) << 23)
            stats.row_max[i] = stats.row_max[i] + (2 * half).to(Float32)
            # The next block adds to it: a product that may not be fused into that sum (`online_softmax`, Note [Contraction]).
            stats.row_sum[i] = ptx.mul_rn(ptx.mul_rn(stats.row_sum[i], factor), factor)
            factors[i] = factor * factor
            s = flat(rS)
            for j in self._row(i):
                s[j] = s[j] * factor * factor

    def row_max(self, rS: cute.Tensor, i: int) -> Float32:
        """Largest score of row half `i`."""
        s = flat(rS)
        return quad_max(_tree([s[j] for j in self._row(i)], cute.arch.fmax))

    def rescale(self, rO: cute.Tensor, factors: cute.Tensor) -> None:
        """Multiply each row by its factor."""
        o = flat(rO)
        for i in range(2):
            factor = factors[i]
            for j in [j for j in range(cute.size(rO)) if (j // 2) % 2 == i]:
                o[j] = o[j] * factor

    def to_operand(self, rS: cute.Tensor, rP: cute.Tensor) -> None:
        """Weights in 16 bits to `rP`, (n / 2,), A operand of the second product: its register order is the accumulator's.

        Pair by pair: of a vector of 40 or 56, which no power of two divides into words, LLVM makes halves and puts them together between
        the products.
        """
        p, s = flat(rP), flat(rS)
        for j in range(0, cute.size(p), 2):
            pair = cute.make_tensor(s.iterator + j, cute.make_layout(2))
            cute.make_tensor(p.iterator + j, cute.make_layout(2)).store(pair.load().to(rP.element_type))

    def scale(self, rS: cute.Tensor, softmax_scales: tuple[Float32, Float32]) -> None:
        """Scores of each row to log2 units."""
        s = flat(rS)
        factors = [scale * LOG2_E for scale in softmax_scales]
        for j in range(self.n // 2):
            s[j] = s[j] * factors[j // 2 % 2]

    def softcap(self, rS: cute.Tensor, softmax_scales: tuple[Float32, Float32], softcap: Float32) -> None:
        """cap * tanh(s * scale / cap) as `CapScale` reads it.

        Note [Soft cap]. tanh(x) = 1 - 2 / (1 + exp2(2 log2(e) x)) is exact to 6e-7, where tanh.approx has 5e-4: 0.02 in a logit at a cap
        of 50. It takes two operations of the special-function unit beside the softmax's one. What a block costs is its instructions, not
        that unit: reciprocals that four scores share (2.25 operations, 2.5 instructions more) and an odd polynomial on the FMA units (one
        operation, five more, a second form for |x| > 1) were slower (docs/sm90.md, "Soft cap").
        """
        s = flat(rS)
        for i in range(2):
            inner = softmax_scales[i] / softcap * (2.0 * LOG2_E)
            for j in self._row(i):
                s[j] = cute.arch.rcp_approx(-1.0 - cute.math.exp2(s[j] * inner, fastmath=True))

    def to_log2(self, rS: cute.Tensor, scale: CapScale) -> None:
        """Capped scores to log2 units."""
        s = flat(rS)
        for j in range(self.n // 2):
            s[j] = cute.math.fma(s[j], scale.slope, scale.bias)

    def alibi(self, rS: cute.Tensor, first_column: Int32, diagonals: tuple[Int32, Int32], slopes: tuple[Float32, Float32]) -> None:
        """Subtract slope * |column - diagonal|; scores and slopes in log2 units."""
        s = flat(rS)
        lane_column = first_column + 2 * (cute.arch.lane_idx() % QUAD)
        for i in range(2):
            distance = (lane_column - diagonals[i]).to(Float32)
            for j in self._row(i):
                far = distance + float(8 * (j // 4) + j % 2)
                s[j] = cute.math.fma(cute.arch.fmax(far, -far), -slopes[i], s[j])

    def mask(self, rS: cute.Tensor, first_column: Int32, columns: tuple[Columns, Columns]) -> None:
        """-inf where a row does not see the column."""
        s = flat(rS)
        lane_column = first_column + 2 * (cute.arch.lane_idx() % QUAD)
        for i in range(2):
            begin, end = columns[i].begin - lane_column, columns[i].end - lane_column
            for j in self._row(i):
                column = 8 * (j // 4) + j % 2
                s[j] = cutlass.select_((Int32(column) >= begin) & (Int32(column) < end), s[j], -Float32.inf)

    def mask_by_bits(self, rS: cute.Tensor, first_column: Int32, columns: tuple[Columns, Columns], *, has_begin: bool) -> None:
        """The same for kernels whose time is instructions: a word has a bit for each of `MASK_BITS` scores, which ptxas turns into
        predicates seven at once. A block of 128 columns with windows then has 547 instructions of 691 (d64).

        Args:
            has_begin: `columns` begin behind the first key.
        """
        s = flat(rS)
        lane_column = first_column + 2 * (cute.arch.lane_idx() % QUAD)
        for i in range(2):
            row = self._row(i)
            for first in range(0, len(row), MASK_BITS):
                # Value `first` of a row lies 4 * first columns behind the lane's own first one.
                word = lane_column + 4 * first
                seen = ~ptx.shift_ones(_values_below(columns[i].end - word))
                if const_expr(has_begin):
                    seen = seen & ptx.shift_ones(_values_below(columns[i].begin - word))
                for bit, j in enumerate(row[first : first + MASK_BITS]):
                    s[j] = cutlass.select_((seen & _bit(bit)) != 0, s[j], -Float32.inf)


def log2_scale(softmax_scale: Float32, k_scale: Float32) -> Float32:
    """softmax_scale * k_scale * log2(e), rounded once: an lse of 2e4 shows each rounding of what made it."""
    product = ptx.mul_rn(softmax_scale, k_scale)
    rest = cute.math.fma(softmax_scale, k_scale, -product)
    return cute.math.fma(product, Float32(LOG2_E), cute.math.fma(product, Float32(LOG2_E_REST), rest * Float32(LOG2_E)))


def _bit(i: int) -> Int32:
    """A word with bit `i` alone."""
    return Int32((1 << i) - (1 << 32) * (i == 31))


def _values_below(column: Int32) -> Int32:
    """How many of a row's values, of a lane whose first column is 0, lie below `column`: two in eight columns."""
    positive = cutlass.max(column, 0)
    return (positive >> 3) * 2 + cutlass.min(positive & 7, 2)


def _next_power(value: Float32) -> Float32:
    """The power of two at or above a positive value."""
    return ptx.bits_to_float((ptx.float_to_bits(value) + 0x007FFFFF) & 0x7F800000)


def flat(fragment: cute.Tensor) -> cute.Tensor:
    """The fragment, of any shape, as a vector in register order."""
    return cute.make_tensor(fragment.iterator, cute.make_layout(cute.size(fragment)))


def row_of_thread(thread: Int32, i: int, first_row: Int32 | int = 0) -> Int32:
    """Row of half `i` of a thread of a warpgroup whose rows begin at `first_row` (PTX ISA, wgmma.mma_async: D fragment layout)."""
    return first_row + thread // LANES * 16 + thread % LANES // QUAD + 8 * i


def quad_sum(value: Float32) -> Float32:
    """Sum over the four lanes that share a row."""
    value = value + cute.arch.shuffle_sync_bfly(value, offset=1)
    return value + cute.arch.shuffle_sync_bfly(value, offset=2)


def _tree(values: list[Float32], combine: Callable[[Float32, Float32], Float32]) -> Float32:
    """Combine in CHAINS chains, then the chains."""
    chains = values[:CHAINS]
    for position, value in enumerate(values[CHAINS:]):
        chains[position % CHAINS] = combine(chains[position % CHAINS], value)
    while len(chains) > 1:
        chains = [combine(*chains[i : i + 2]) if len(chains[i : i + 2]) == 2 else chains[i] for i in range(0, len(chains), 2)]
    return chains[0]
