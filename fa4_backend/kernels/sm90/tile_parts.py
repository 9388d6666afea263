"""Parts of a tile that was cut along KV: a warpgroup lays down its sums, and parts are added up by the one that comes last or by all.

A warpgroup's 64 rows are its own business: it has its own place in each slot and its own arrival counters, and meets nobody of its CTA.

    slot:     [warpgroup][vector][thread] of 16 bytes: O in the order of the accumulator's registers, then (row_max, row_sum) of the
              thread's two rows. Whoever reads has the fragment of whoever wrote, so no layout is involved, and accesses are coalesced.
              Where shares are added up a row's first thread has the sum of all four; the second one, where scores have a scale a row
              (K and V in FP8), that scale in its place.
    counters: part_arrivals[first_slot of the tile, warpgroup], and the same of the second slot (`common/part_arrivals.py`)

Where parts are many, a CTA that has no tile left waits for the others', and each adds up a share (`part_shares.py`). One that goes on with
another tile arrives and does not wait; then, and where parts are few, the warpgroup that comes last adds them up in registers, where its
own tile's sums were. Both make the same bits.

All parts are read from memory in part order, the own one too: the result does not depend on who came last. Where tiles have pieces
(`tile_pieces.py`) parts are added one by one to a total with a maximum of its own, as a CTA adds up the pieces that it has; else relative
to the largest maximum. A part's `row_max` may have been made with either scale of `fragment.ScoreScale`, as the maxima of one tile's blocks
may be; it grows with the score in either, and parts that differ in scale are so far apart that the smaller one weighs nothing. So parts are
weighed as blocks are, and `true_max` comes after them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.hardware import QUAD, VEC
from fa4_backend.kernels.common.part_arrivals import NOTHING, arrive, leave
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.tile_scheduler import PartTensors, TilePart
from fa4_backend.kernels.common.wgmma_fragment import RowStats, ScoreScale, flat, quad_sum
from fa4_backend.kernels.schedule.work_list import PART_COUNTERS
from fa4_backend.kernels.sm90.config import part_floats, part_vectors
from fa4_backend.kernels.sm90.tile_pieces import is_added_up
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS

SCALE_LANE = 1  # of the four threads of a row
RowScales = tuple[ScoreScale, ScoreScale] | None  # of raw scores of a thread's rows; None: they were in log2 units

VECTORS_AT_ONCE = 8  # of a part that a thread has under way: registers beside O and the next tile's weights


class RunningWeights(NamedTuple):
    """Of a total and of what is added to it, relative to the larger maximum."""

    row_max: Float32
    old: Float32  # of the total
    new: Float32


def running_weights(total_max: Float32, part_max: Float32) -> RunningWeights:
    """1 is the exact weight of what has the larger maximum, 0 that of what saw no key."""
    row_max = cute.arch.fmax(total_max, part_max)
    finite = cutlass.select_(row_max == -Float32.inf, Float32(0.0), row_max)
    return RunningWeights(row_max, *(cute.math.exp2(x - finite, fastmath=True) for x in (total_max, part_max)))


def add_weighted(total: Float32, value: Float32, weights: RunningWeights) -> Float32:
    """One rounding of the total's weighted value and one of the sum, wherever it is done."""
    return cute.math.fma(value, weights.new, ptx.mul_rn(total, weights.old))


@dataclass(frozen=True)
class TileParts:
    """Split KV of one kernel. rO: (head_dim_v / 2,) float32, this thread's O relative to row_max, in any layout."""

    config: PrefillConfig

    @cute.jit
    def join(
        self,
        tensors: PartTensors,
        part: TilePart,
        here: Int32,  # slots that this entry of the list has filled with it
        rO: cute.Tensor,
        stats: RowStats,
        scales: RowScales,
        group: Int32,
        in_group: Int32,  # thread of the warpgroup
        barrier: Int32,  # named barrier of the warpgroup
        flag: cute.Pointer,  # int32 of shared memory that is this warpgroup's
    ) -> Int32:
        """Lay down a part and do not wait; 1 in the warpgroup that adds them up, whose `rO` and `stats` then are those of the whole tile.

        One thread's atomic, between barriers that carry its release and its acquire to the warpgroup (`decode/merge.py`, `arrive`).
        """
        self.lay_down(tensors, part.slot, rO, stats, scales, group, in_group)
        share, _ = self.arrive(tensors, part, here, Int32(0), group, in_group, barrier, flag)
        is_whole = Int32(0)
        if share != NOTHING:
            is_whole = Int32(1)
            self._add_up(tensors, part, rO, stats, group, in_group)
        return is_whole

    @cute.jit
    def add_before(self, tensors: PartTensors, rO: cute.Tensor, stats: RowStats, group: Int32, in_group: Int32):
        """Add a piece, in `rO` and `stats`, to the total of the pieces behind it, which `keep` left; the sum to `rO` and `stats`."""
        o, source = flat(rO), self._vectors(tensors, self._own_slot(tensors), group, in_group)
        numbers = _load(source, self.o_vectors)
        weights: list[RunningWeights] = []
        for i in cutlass.range_constexpr(2):
            of_row = running_weights(numbers[i], stats.row_max[i])
            stats.row_sum[i] = add_weighted(self._sum_of(numbers, i, in_group), self._row_sum(stats, in_group, i), of_row)
            stats.row_max[i] = of_row.row_max
            weights.append(of_row)
        for v in cutlass.range_constexpr(self.o_vectors):
            for e, value in enumerate(_load(source, v)):
                j = VEC * v + e
                o[j] = add_weighted(value, o[j], weights[j // 2 % 2])

    def keep(
        self, tensors: PartTensors, part: TilePart, rO: cute.Tensor, stats: RowStats, scales: RowScales, group: Int32, in_group: Int32
    ) -> None:
        """Leave a piece that another of its entry follows: in its slot, or as a total in the CTA's, where the same thread adds the next."""
        slot = cutlass.select_(is_added_up(part), self._own_slot(tensors), part.slot)
        self.lay_down(tensors, slot, rO, stats, scales, group, in_group)

    def _own_slot(self, tensors: PartTensors) -> Int32:
        """The CTA's slot, behind those of the schedule."""
        return Int32(cute.size(tensors.mSlots, mode=[0])) - cute.arch.grid_dim()[0] + cute.arch.block_idx()[0]

    @cute.jit
    def arrive(
        self,
        tensors: PartTensors,
        part: TilePart,
        here: Int32,
        looks: Int32,
        group: Int32,
        in_group: Int32,
        barrier: Int32,
        flag: cute.Pointer,
    ) -> tuple[Int32, Int32]:
        """Arrive with `here` parts that were laid down: what this warpgroup adds up of the tile, and what the thread tells `leave`."""
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP_THREADS)
        sFlag = cute.make_tensor(flag, cute.make_layout(1))
        stayers = Int32(0)
        if in_group == WARPGROUP_THREADS - 1:  # one of the last warp, which adds up least: it leaves while the others' loads fly
            share, stayers = arrive(self._counter(tensors, part, group), here, part.num_parts, looks)
            sFlag[0] = share
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP_THREADS)
        return sFlag[0], stayers

    def leave(self, tensors: PartTensors, part: TilePart, here: Int32, group: Int32, stayers: Int32) -> None:
        """This warpgroup is done with the tile's counters. stayers: what the thread had from `arrive`."""
        counter = self._counter(tensors, part, group)
        leave(counter, counter + PART_COUNTERS, here, stayers)

    def _counter(self, tensors: PartTensors, part: TilePart, group: Int32) -> cute.Pointer:
        return tensors.mArrivals.iterator + (part.first_slot * PART_COUNTERS + group)

    @cute.jit
    def lay_down(
        self, tensors: PartTensors, slot: Int32, rO: cute.Tensor, stats: RowStats, scales: RowScales, group: Int32, in_group: Int32
    ):
        """This thread's vectors to a slot. scales: of raw scores; None: they were in log2 units."""
        o, target = flat(rO), self._vectors(tensors, slot, group, in_group)
        for v in cutlass.range_constexpr(self.o_vectors):
            _store(target, v, [o[VEC * v + e] for e in range(VEC)])
        sums = [self._row_sum(stats, in_group, i) for i in range(2)]
        if const_expr(scales is not None and self.has_row_scales):  # the first says no more, but to the type checker
            sums = [cutlass.select_(in_group % QUAD == SCALE_LANE, scales[i].log2, sums[i]) for i in range(2)]
        _store(target, self.o_vectors, [stats.row_max[0], stats.row_max[1], *sums])

    def _row_sum(self, stats: RowStats, in_group: Int32, i: int) -> Float32:
        """What a thread lays down of a row's sum: its own, or where shares are added up that of all four in the row's first lane. Pieces
        are added up in the same order by threads and by shares."""
        if self.config.share_parts == 0 and not self.config.has_pieces:
            return stats.row_sum[i]
        return cutlass.select_(in_group % QUAD == 0, quad_sum(stats.row_sum[i]), Float32(0.0))

    @cute.jit
    def _add_up(self, tensors: PartTensors, part: TilePart, rO: cute.Tensor, stats: RowStats, group: Int32, in_group: Int32):
        """All parts of this thread's rows, in part order, to `rO` and `stats`."""
        for i in cutlass.range_constexpr(2):
            stats.row_max[i], stats.row_sum[i] = -Float32.inf, Float32(0.0)
        rO.fill(0.0)
        if const_expr(self.config.has_pieces):
            for first in cutlass.range_constexpr(0, self.o_vectors, VECTORS_AT_ONCE):
                stats.row_max.fill(-Float32.inf)
                for p in cutlass.range(part.num_parts, unroll=1):
                    self._add_to_total(rO, stats, self._vectors(tensors, part.first_slot + p, group, in_group), first, in_group)
        else:
            self._add_to_largest(tensors, part, rO, stats, group, in_group)

    @cute.jit
    def _add_to_largest(self, tensors: PartTensors, part: TilePart, rO: cute.Tensor, stats: RowStats, group: Int32, in_group: Int32):
        """`_add_up` relative to the largest maximum."""
        for p in cutlass.range(part.num_parts, unroll=4):
            numbers = _load(self._vectors(tensors, part.first_slot + p, group, in_group), self.o_vectors)
            for i in cutlass.range_constexpr(2):
                stats.row_max[i] = cute.arch.fmax(stats.row_max[i], numbers[i])
        reference = cute.make_rmem_tensor(2, Float32)
        for i in cutlass.range_constexpr(2):
            finite = cutlass.select_(stats.row_max[i] == -Float32.inf, Float32(0.0), stats.row_max[i])
            reference[i] = finite
        for first in cutlass.range_constexpr(0, self.o_vectors, VECTORS_AT_ONCE):
            for p in cutlass.range(part.num_parts, unroll=1):
                self._add(rO, stats, reference, self._vectors(tensors, part.first_slot + p, group, in_group), first, in_group)

    def _add(self, rO: cute.Tensor, stats: RowStats, reference: cute.Tensor, source: cute.Tensor, first: int, in_group: Int32) -> None:
        """Add VECTORS_AT_ONCE vectors of a part; 1 is the exact weight of a part that has the maximum over all,
        `reference`, (2,). source: `_vectors` of a part."""
        o, numbers = flat(rO), _load(source, self.o_vectors)
        weights = [cute.math.exp2(numbers[i] - reference[i], fastmath=True) for i in range(2)]
        if const_expr(first == 0):
            for i in range(2):
                stats.row_sum[i] = cute.math.fma(self._sum_of(numbers, i, in_group), weights[i], stats.row_sum[i])
        vectors = [_load(source, v) for v in range(first, min(first + VECTORS_AT_ONCE, self.o_vectors))]
        for v, values in enumerate(vectors, first):
            for e in range(VEC):
                j = VEC * v + e
                o[j] = cute.math.fma(values[e], weights[j // 2 % 2], o[j])

    def _add_to_total(self, rO: cute.Tensor, stats: RowStats, source: cute.Tensor, first: int, in_group: Int32) -> None:
        """Add VECTORS_AT_ONCE vectors of a part to a total relative to `stats.row_max`. source: `_vectors` of a part."""
        o, numbers = flat(rO), _load(source, self.o_vectors)
        vectors = [_load(source, v) for v in range(first, min(first + VECTORS_AT_ONCE, self.o_vectors))]
        weights = [running_weights(stats.row_max[i], numbers[i]) for i in range(2)]
        for i in range(2):
            stats.row_max[i] = weights[i].row_max
            if const_expr(first == 0):
                stats.row_sum[i] = add_weighted(stats.row_sum[i], self._sum_of(numbers, i, in_group), weights[i])
        for v, values in enumerate(vectors, first):
            for e in range(VEC):
                j = VEC * v + e
                o[j] = add_weighted(o[j], values[e], weights[j // 2 % 2])

    def _sum_of(self, numbers: list[Float32], i: int, in_group: Int32) -> Float32:
        """What a thread laid down of a row's sum, of a slot's last vector."""
        if not self.has_row_scales:
            return numbers[2 + i]
        return cutlass.select_(in_group % QUAD == SCALE_LANE, Float32(0.0), numbers[2 + i])

    @property
    def has_row_scales(self) -> bool:
        """Whether a slot has the scales of its rows."""
        c = self.config
        return c.share_parts > 0 and c.converts_kv and not c.mask.has_softcap and not c.mask.has_alibi

    @property
    def o_vectors(self) -> int:
        """Vectors of O of a thread; maxima and sums stand behind them."""
        return part_vectors(self.config) - 1

    def _vectors(self, tensors: PartTensors, slot: Int32, group: Int32, in_group: Int32) -> cute.Tensor:
        """This thread's part of a slot: (VEC, part_vectors)."""
        at = Int64(slot) * part_floats(self.config) + (group * (part_vectors(self.config) * WARPGROUP_THREADS) + in_group) * VEC
        layout = cute.make_layout((VEC, part_vectors(self.config)), stride=(1, WARPGROUP_THREADS * VEC))
        return cute.make_tensor((tensors.mSlots.iterator + at).align(4 * VEC), layout)


def _store(
    target: cute.Tensor,  # (VEC, vectors) float32
    v: int,
    values: list[Float32],
) -> None:
    r = cute.make_rmem_tensor(VEC, Float32)
    for e in range(VEC):
        r[e] = values[e]
    cute.autovec_copy(r, target[None, v])


def _load(
    source: cute.Tensor,  # (VEC, vectors) float32
    v: int,
) -> list[Float32]:
    r = cute.make_rmem_tensor(VEC, Float32)
    cute.autovec_copy(source[None, v], r)
    return [r[e] for e in range(VEC)]
