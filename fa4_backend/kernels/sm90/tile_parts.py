"""Parts of a tile that was cut along KV: a warpgroup lays down its sums, and parts are added up by the one that comes last or by all.

A warpgroup's 64 rows are its own business: it has its own place in each slot and its own arrival counters, and meets nobody of its CTA.

    slot:     [warpgroup][vector][thread] of 16 bytes: O in the order of the accumulator's registers, then (row_max, row_sum) of the
              thread's two rows. Whoever reads has the fragment of whoever wrote, so no layout is involved, and accesses are coalesced.
    counters: part_arrivals[first_slot of the tile, warpgroup], and the same of the second slot (`common/part_arrivals.py`)

Where parts are many, a CTA that has no tile left waits for the others', and each adds up a share (`part_shares.py`). One that goes on with
another tile arrives and does not wait; then, and where parts are few, the warpgroup that comes last adds them up in registers, where its
own tile's sums were. Both make the same bits.

All parts are read from memory in part order, the own one too: the result does not depend on who came last. A part's `row_max` may have
been made with either scale of `fragment.ScoreScale`, as the maxima of one tile's blocks may be; it grows with the score in either, and
parts that differ in scale are so far apart that the smaller one weighs nothing. So parts are weighed as blocks are, and `true_max` comes
after them.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from fa4_backend.kernels.common.hardware import QUAD, VEC
from fa4_backend.kernels.common.part_arrivals import NOTHING, arrive, leave
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.tile_scheduler import PartTensors, TilePart
from fa4_backend.kernels.common.wgmma_fragment import RowStats, flat, quad_sum
from fa4_backend.kernels.schedule.work_list import PART_COUNTERS
from fa4_backend.kernels.sm90.config import part_floats, part_vectors
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS

VECTORS_AT_ONCE = 8  # of a part that a thread has under way: registers beside O and the next tile's weights


@dataclass(frozen=True)
class TileParts:
    """Split KV of one kernel. rO: (head_dim_v / 2,) float32, this thread's O relative to row_max, in any layout."""

    config: PrefillConfig

    @cute.jit
    def join(
        self,
        tensors: PartTensors,
        part: TilePart,
        rO: cute.Tensor,
        stats: RowStats,
        group: Int32,
        in_group: Int32,  # thread of the warpgroup
        barrier: Int32,  # named barrier of the warpgroup
        flag: cute.Pointer,  # int32 of shared memory that is this warpgroup's
    ) -> Int32:
        """Lay down a part and do not wait; 1 in the warpgroup that adds them up, whose `rO` and `stats` then are those of the whole tile.

        One thread's atomic, between barriers that carry its release and its acquire to the warpgroup (`decode/merge.py`, `arrive`).
        """
        self.lay_down(tensors, part.slot, rO, stats, group, in_group)
        share, _ = self.arrive(tensors, part, Int32(0), group, in_group, barrier, flag)
        is_whole = Int32(0)
        if share != NOTHING:
            is_whole = Int32(1)
            self._add_up(tensors, part, rO, stats, group, in_group)
        return is_whole

    @cute.jit
    def arrive(
        self, tensors: PartTensors, part: TilePart, looks: Int32, group: Int32, in_group: Int32, barrier: Int32, flag: cute.Pointer
    ) -> tuple[Int32, Int32]:
        """Arrive with a part that was laid down: what this warpgroup adds up of the tile, and what the thread tells `leave`."""
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP_THREADS)
        sFlag = cute.make_tensor(flag, cute.make_layout(1))
        stayers = Int32(0)
        if in_group == WARPGROUP_THREADS - 1:  # one of the last warp, which adds up least: it leaves while the others' loads fly
            share, stayers = arrive(self._counter(tensors, part, group), Int32(1), part.num_parts, looks)
            sFlag[0] = share
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP_THREADS)
        return sFlag[0], stayers

    def leave(self, tensors: PartTensors, part: TilePart, group: Int32, stayers: Int32) -> None:
        """This warpgroup is done with the tile's counters. stayers: what the thread had from `arrive`."""
        counter = self._counter(tensors, part, group)
        leave(counter, counter + PART_COUNTERS, Int32(1), stayers)

    def _counter(self, tensors: PartTensors, part: TilePart, group: Int32) -> cute.Pointer:
        return tensors.mArrivals.iterator + (part.first_slot * PART_COUNTERS + group)

    @cute.jit
    def lay_down(self, tensors: PartTensors, slot: Int32, rO: cute.Tensor, stats: RowStats, group: Int32, in_group: Int32):
        """This thread's vectors to a slot. Where shares are added up a row's first lane holds the sum of all four."""
        o, target = flat(rO), self._vectors(tensors, slot, group, in_group)
        for v in cutlass.range_constexpr(self.o_vectors):
            _store(target, v, [o[VEC * v + e] for e in range(VEC)])
        sums = [stats.row_sum[i] for i in range(2)]
        if const_expr(self.config.share_parts > 0):
            sums = [cutlass.select_(in_group % QUAD == 0, quad_sum(row_sum), Float32(0.0)) for row_sum in sums]
        _store(target, self.o_vectors, [stats.row_max[0], stats.row_max[1], *sums])

    @cute.jit
    def _add_up(self, tensors: PartTensors, part: TilePart, rO: cute.Tensor, stats: RowStats, group: Int32, in_group: Int32):
        """All parts of this thread's rows, in part order, to `rO` and `stats`."""
        for i in cutlass.range_constexpr(2):
            stats.row_max[i], stats.row_sum[i] = -Float32.inf, Float32(0.0)
        for p in cutlass.range(part.num_parts, unroll=4):
            numbers = _load(self._vectors(tensors, part.first_slot + p, group, in_group), self.o_vectors)
            for i in cutlass.range_constexpr(2):
                stats.row_max[i] = cute.arch.fmax(stats.row_max[i], numbers[i])
        rO.fill(0.0)
        reference = cute.make_rmem_tensor(2, Float32)
        for i in cutlass.range_constexpr(2):
            finite = cutlass.select_(stats.row_max[i] == -Float32.inf, Float32(0.0), stats.row_max[i])
            reference[i] = finite
        for first in cutlass.range_constexpr(0, self.o_vectors, VECTORS_AT_ONCE):
            for p in cutlass.range(part.num_parts, unroll=1):
                self._add(rO, stats, reference, self._vectors(tensors, part.first_slot + p, group, in_group), first)

    def _add(self, rO: cute.Tensor, stats: RowStats, reference: cute.Tensor, source: cute.Tensor, first: int) -> None:
        """Add VECTORS_AT_ONCE vectors of a part; 1 is the exact weight of a part that has the maximum over all,
        `reference`, (2,). source: `_vectors` of a part."""
        o, numbers = flat(rO), _load(source, self.o_vectors)
        weights = [cute.math.exp2(numbers[i] - reference[i], fastmath=True) for i in range(2)]
        if const_expr(first == 0):
            for i in range(2):
                stats.row_sum[i] = cute.math.fma(numbers[2 + i], weights[i], stats.row_sum[i])
        vectors = [_load(source, v) for v in range(first, min(first + VECTORS_AT_ONCE, self.o_vectors))]
        for v, values in enumerate(vectors, first):
            for e in range(VEC):
                j = VEC * v + e
                o[j] = cute.math.fma(values[e], weights[j // 2 % 2], o[j])

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
