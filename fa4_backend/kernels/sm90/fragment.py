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
from fa4_backend.kernels.common.mask import Columns
from fa4_backend.kernels.common.online_softmax import LOG2_E, MAX_FUSED, update_max

CHAINS = 2  # independent sums and maxima a row, to hide the latency of a dependent add


class RowStats(NamedTuple):
    """Running statistics of a thread's two rows."""

    row_max: cute.Tensor  # (2,) reference maximum, log2 units; the same in all four lanes of a quad
    row_sum: cute.Tensor  # (2,) sum of weights of this lane's columns only


class WaitedBarrier(NamedTuple):
    """An mbarrier whose phase is over, and stays the last one that is."""

    barrier: cute.Pointer
    phase: Int32


@dataclass(frozen=True)
class RowFragment:
    """Elementwise work on a fragment with `n` columns; every method works in place."""

    n: int
    rescale_threshold: float  # log2 units; 0: rescale whenever a maximum grows

    def _row(self, i: int) -> range:
        """Flat indices of row half `i`, in column order."""
        return [j for j in range(self.n // 2) if (j // 2) % 2 == i]

    def softmax(
        self,
        rS: cute.Tensor,
        stats: RowStats,
        scale_log2: Float32 | None,
        waited: WaitedBarrier,
        *,
        may_be_empty: bool,
        is_first: bool,
    ) -> cute.Tensor:
        """Turn scores into weights and update the statistics. Returns (2,) factors for O of earlier blocks."""
        s = flat(rS)
        factors = cute.make_rmem_tensor(2, Float32)
        lane_max = [_tree([s[j] for j in self._row(i)], cute.arch.fmax) for i in range(2)]
        block_max, offsets = [], []
        for i in range(2):
            block_max.append(_quad_max(lane_max[i]))
            if const_expr(scale_log2 is not None):
                block_max[i] = ptx.mul_rn(block_max[i], scale_log2)
            update = update_max(
                block_max[i], stats.row_max[i], may_be_empty=may_be_empty, is_first=is_first, threshold=self.rescale_threshold
            )
            stats.row_max[i] = update.row_max
            factors[i] = update.factor
            offsets.append(update.offset)
        if const_expr(scale_log2 is None):
            totals = self._weigh(s, lambda score, i: score - offsets[i])
        else:
            totals = self._weigh_scaled(s, scale_log2, offsets, block_max, self._has_large(lane_max, scale_log2, may_be_empty), waited)
        for i in range(2):
            stats.row_sum[i] = totals[i] if const_expr(is_first) else cute.math.fma(stats.row_sum[i], factors[i], totals[i])
        return factors

    def _has_large(self, lane_max: list[Float32], scale_log2: Float32, may_be_empty: bool) -> Boolean:
        """Whether `MAX_FUSED` is reached by a row of this warp; asked of each lane's maxima, so that it is known before the quads' are."""
        sizes = [ptx.absolute(value) for value in lane_max]
        if not may_be_empty:
            return cute.arch.vote_any_sync(cute.arch.fmax(*sizes) * scale_log2 >= MAX_FUSED)
        # A lane that sees no key has -inf.
        sizes = [cutlass.select_(value == -Float32.inf, Float32(0.0), size) for value, size in zip(lane_max, sizes, strict=True)]
        return cute.arch.vote_any_sync(cute.arch.fmax(*sizes) * scale_log2 >= MAX_FUSED)

    def _weigh(self, s: cute.Tensor, exponent: Callable[[Float32, int], Float32]) -> list[Float32]:
        """Weights in place; returns this lane's sum of each row. `exponent` of a score and its row half."""
        totals = []
        for i in range(2):
            row = self._row(i)
            for j in row:
                s[j] = cute.math.exp2(exponent(s[j], i), fastmath=True)
            totals.append(_tree([s[j] for j in row], lambda a, b: a + b))
        return totals

    def _weigh_scaled(
        self,
        s: cute.Tensor,
        scale_log2: Float32,
        offsets: list[Float32],
        block_max: list[Float32],
        has_large: Boolean,
        waited: WaitedBarrier,
    ) -> list[Float32]:
        """`_weigh` for raw scores: Note [Large scores]."""

        def fused(score: Float32, i: int) -> Float32:
            return cute.math.fma(score, scale_log2, -offsets[i])

        def rounded(score: Float32, i: int) -> Float32:
            is_large = ptx.absolute(block_max[i]) >= MAX_FUSED
            return cutlass.select_(is_large, ptx.mul_rn(score, scale_log2) - offsets[i], fused(score, i))

        def weigh(scores: list, exponent: Callable[[Float32, int], Float32]) -> list:
            fragment = cute.make_rmem_tensor(self.n // 2, Float32)
            for j, score in enumerate(scores):
                fragment[j] = Float32(score)
            totals = self._weigh(fragment, exponent)
            return [value.ir_value() for value in (*(fragment[j] for j in range(self.n // 2)), *totals)]

        def weigh_rounded(scores: list) -> list:
            # Over at once; it keeps the branch a branch: ptxas predicates even hundreds of instructions, but no loop.
            cute.arch.mbarrier_wait(waited.barrier, waited.phase)
            return weigh(scores, rounded)

        scores = [s[j].ir_value() for j in range(self.n // 2)]
        types = [ptx.f32()] * (len(scores) + 2)
        results = ptx.either(has_large, types, lambda: weigh_rounded(scores), lambda: weigh(scores, fused))
        for j in range(self.n // 2):
            s[j] = Float32(results[j])
        return [Float32(value) for value in results[self.n // 2 :]]

    def rescale(self, rO: cute.Tensor, factors: cute.Tensor) -> None:
        """Multiply each row by its factor."""
        o = flat(rO)
        for i in range(2):
            factor = factors[i]
            for j in [j for j in range(cute.size(rO)) if (j // 2) % 2 == i]:
                o[j] = o[j] * factor

    def to_operand(self, rS: cute.Tensor, rP: cute.Tensor) -> None:
        """Weights in 16 bits as A operand of the second product: its register order is the accumulator's."""
        p = flat(rP)
        p.store(flat(rS).load().to(rP.element_type))

    def scale(self, rS: cute.Tensor, factor: Float32) -> None:
        """Multiply every score."""
        s = flat(rS)
        for j in range(self.n // 2):
            s[j] = s[j] * factor

    def softcap(self, rS: cute.Tensor, softmax_scale: Float32, softcap: Float32) -> None:
        """cap * tanh(s * softmax_scale / cap), in log2 units. tanh from exp2 and a reciprocal: 1e-7, where tanh.approx has 5e-4."""
        s = flat(rS)
        inner = softmax_scale / softcap * (2.0 * LOG2_E)
        outer = softcap * LOG2_E
        for j in range(self.n // 2):
            denominator = cute.math.exp2(s[j] * inner, fastmath=True) + 1.0
            s[j] = cute.math.fma(cute.arch.rcp_approx(denominator), -2.0 * outer, outer)

    def alibi(self, rS: cute.Tensor, first_column: Int32, diagonals: tuple[Int32, Int32], slopes: tuple[Float32, Float32]) -> None:
        """Subtract slope * |column - diagonal|; scores and slopes in log2 units."""
        s = flat(rS)
        lane_column = first_column + 2 * (cute.arch.lane_idx() % 4)
        for i in range(2):
            distance = (lane_column - diagonals[i]).to(Float32)
            for j in self._row(i):
                far = distance + float(8 * (j // 4) + j % 2)
                s[j] = cute.math.fma(cute.arch.fmax(far, -far), -slopes[i], s[j])

    def mask(self, rS: cute.Tensor, first_column: Int32, columns: tuple[Columns, Columns]) -> None:
        """-inf where a row does not see the column."""
        s = flat(rS)
        lane_column = first_column + 2 * (cute.arch.lane_idx() % 4)
        for i in range(2):
            begin, end = columns[i].begin - lane_column, columns[i].end - lane_column
            for j in self._row(i):
                column = 8 * (j // 4) + j % 2
                s[j] = cutlass.select_((Int32(column) >= begin) & (Int32(column) < end), s[j], -Float32.inf)


def flat(fragment: cute.Tensor) -> cute.Tensor:
    """The fragment as a vector in register order."""
    return cute.make_tensor(fragment.iterator, cute.make_layout(cute.size(fragment)))


def _tree(values: list, combine) -> Float32:
    """Combine in CHAINS chains, then the chains."""
    chains = values[:CHAINS]
    for position, value in enumerate(values[CHAINS:]):
        chains[position % CHAINS] = combine(chains[position % CHAINS], value)
    while len(chains) > 1:
        chains = [combine(*chains[i : i + 2]) if len(chains[i : i + 2]) == 2 else chains[i] for i in range(0, len(chains), 2)]
    return chains[0]


def _quad_max(value: Float32) -> Float32:
    """Maximum over the four lanes that share a row."""
    value = cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset=1))
    return cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset=2))
