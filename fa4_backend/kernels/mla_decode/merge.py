"""The end of a piece and of a CTA: a piece's rows go to `out` or to a split-KV slot, and slots are added up.

A slot of 64 rows is 128 KiB: one CTA that adds up n of them takes n times 1.2 us. So all CTAs that made parts of a row group add it up
(`common/part_arrivals.py`, Note [Shares]). Parts are added in slot order whoever does it, and a vector's sum knows nothing of the shares.
The counters are `mArrivals[first_slot]` and the next; a cluster's CTAs arrive apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.decode_entry import Entry, StepTensors, entry_of
from fa4_backend.kernels.common.online_softmax import finalize_row
from fa4_backend.kernels.common.part_arrivals import MINE, NOTHING, arrive, leave
from fa4_backend.kernels.common.part_sums import Part, fold, only_if
from fa4_backend.kernels.common.pending_entries import PIECES_HERE, counter_of, note_pending
from fa4_backend.kernels.common.wgmma_fragment import RowFragment, RowStats, ScoreScale, flat, quad_sum
from fa4_backend.kernels.mla_decode.config import (
    CONSUMER_THREADS,
    LATENT_DIM,
    MERGE_BYTES,
    TILE_M,
    VEC,
    WARP_ROWS,
    WARP_VECTORS,
    MlaDecodeConfig,
    slot_floats,
    tile_slot_floats,
    tile_stats_bytes,
)
from fa4_backend.kernels.mla_decode.fragments import Fragment, SlotVector
from fa4_backend.kernels.mla_decode.part_weights import PartWeights, store_columns
from fa4_backend.kernels.mla_decode.storage import SIDE_WARPS, SharedTensors
from fa4_backend.kernels.mla_decode.work import MlaWork
from fa4_backend.kernels.schedule.work_list import NUM_PIECES

CONSUMER_BARRIER = 3  # named barrier of both consumer warpgroups
ARRIVING_THREAD = 32  # first of those that arrive, one a pending entry: of another warp than that which asks for the slots
FOLD_PARTS = 8  # slots whose values are asked for before the first is added


class ResultTensors(NamedTuple):
    """Where results go."""

    mO: cute.Tensor  # (total_q, num_heads, 512)
    mLse: cute.Tensor | None  # (num_heads, total_q) float32, natural log
    mSlots: cute.Tensor  # (max_slots, slot_floats) float32: of each tile O as `fragments.py` has it, then reference and row_sum of each row
    mArrivals: cute.Tensor  # (max_slots,) int32
    mScale: cute.Tensor | None  # (1,) float32: a latent is what is stored times it; None unless latents are FP8


class Scales(NamedTuple):
    """What scores and values are multiplied by."""

    score: ScoreScale | None  # of raw scores, the latents' scale included; None: a row's reference is what it says
    value: Float32 | None  # the latents' scale; None: they have none

    def true_max(self, row_max: Float32) -> Float32:
        """A row's reference maximum in log2 units."""
        return row_max if self.score is None else self.score.true_max(row_max)

    def of_value(self, o_scale: Float32) -> Float32:
        """What an accumulated O is multiplied by."""
        return o_scale if self.value is None else o_scale * self.value


@dataclass(frozen=True)
class Merge:
    """What follows the main loop, for one kernel."""

    config: MlaDecodeConfig
    work: MlaWork

    @cute.jit
    def finish_piece(
        self,
        fragment: cutlass.Constexpr[Fragment],
        entry: Entry,
        piece_in_entry: Int32,
        is_last: Boolean,
        turn: Int32,  # 0 or 1, another one each piece
        rO: cute.Tensor,
        stats: RowStats,
        totals: RowStats,  # of an entry's pieces so far, where it has several
        scales: Scales,
        shared: SharedTensors,
        results: ResultTensors,
    ):
        """A piece's rows to `out` or to its slot. All consumers call and meet."""
        for i in cutlass.range_constexpr(2):
            total = quad_sum(stats.row_sum[i])
            if cute.arch.lane_idx() % 4 == 0:
                shared.sRowSum[turn, fragment.sum_index(), fragment.row(i)] = total
        if entry.partial_slot >= 0:
            self._store_vectors(fragment, entry, entry.partial_slot + piece_in_entry, rO, results)
        self.meet()
        for i in cutlass.range_constexpr(2):
            sums = [shared.sRowSum[turn, k, fragment.row(i)] for k in range(fragment.num_sums)]
            stats.row_sum[i] = _sum(sums)
        if entry.partial_slot >= 0:
            self._complete_slot(fragment, entry, entry.partial_slot + piece_in_entry, rO, stats, results)
        elif const_expr(self.config.has_pieces):
            self._fold_whole(fragment, entry, piece_in_entry, is_last, rO, stats, totals, scales, results)
        else:
            self._write_fragment(fragment, entry, rO, stats, scales, results)

    @cute.jit
    def _write_fragment(
        self,
        fragment: cutlass.Constexpr[Fragment],
        entry: Entry,
        rO: cute.Tensor,
        stats: RowStats,
        scales: Scales,
        results: ResultTensors,
    ):
        """Finished rows from registers."""
        first_row = self.work.first_row(entry)
        o_scales = cute.make_rmem_tensor(2, Float32)
        rows = tuple(self.work.row(first_row + fragment.row(i), entry.seqlen) for i in range(2))
        for i in cutlass.range_constexpr(2):
            result = finalize_row(scales.true_max(stats.row_max[i]), stats.row_sum[i], None)
            o_scales[i] = scales.of_value(result.o_scale)
            if const_expr(results.mLse is not None):
                if rows[i].is_valid & fragment.writes_statistics():
                    results.mLse[rows[i].head, entry.seqlen.q_begin + rows[i].token] = result.lse
        RowFragment(2 * fragment.num_values, 0.0).rescale(rO, o_scales)
        fragment.store(results.mO, self._rounded(rO, results.mO.element_type), rows, entry.seqlen.q_begin)

    def _rounded(self, rO: cute.Tensor, dtype: type[cutlass.Numeric]) -> cute.Tensor:
        """Finished elements in the type of `out`."""
        rOut = cute.make_rmem_tensor_like(rO, dtype)
        rOut.store(rO.load().to(dtype))
        return rOut

    @cute.jit
    def _store_vectors(self, fragment: cutlass.Constexpr[Fragment], entry: Entry, slot: Int32, rO: cute.Tensor, results: ResultTensors):
        """A piece's O to its slot, of warps that have a row, before their rows' row_sum is known."""
        if self._has_row(fragment, entry):
            base, o = self._tile_slot(results, slot), flat(rO)
            for k in cutlass.range_constexpr(fragment.num_values // VEC):
                ptx.store_global_f32x4(base + fragment.place(k), [o[value].ir_value() for value in fragment.values(k)])

    @cute.jit
    def _complete_slot(
        self,
        fragment: cutlass.Constexpr[Fragment],
        entry: Entry,
        slot: Int32,
        rO: cute.Tensor,
        stats: RowStats,
        results: ResultTensors,
    ):
        """A piece's reference and row_sum of each row to its slot, where O is."""
        if self._has_row(fragment, entry):
            self._store_statistics(fragment, self._tile_slot(results, slot), stats)

    def _has_row(self, fragment: Fragment, entry: Entry) -> Boolean:
        """Whether this thread's warp has a row."""
        first_row, row = self.work.first_row(entry), fragment.row(0)
        return self.work.row(first_row + row // WARP_ROWS * WARP_ROWS, entry.seqlen).is_valid

    @cute.jit
    def _store_statistics(self, fragment: cutlass.Constexpr[Fragment], base: cute.Pointer, stats: RowStats):
        """Behind a tile's O in its slot, which begins at `base`."""
        if fragment.writes_statistics():
            for i in cutlass.range_constexpr(2):
                pair = cute.make_rmem_tensor(2, Float32)
                pair[0], pair[1] = stats.row_max[i], stats.row_sum[i]
                where = base + (self.config.tile_warps * WARP_ROWS * LATENT_DIM + 2 * fragment.row(i))
                cute.autovec_copy(pair, cute.make_tensor(where.align(8), cute.make_layout(2)))

    def _at(self, base: cute.Pointer, fragment: Fragment, vector: int) -> cute.Tensor:
        """A thread's vector of a tile's slot."""
        return cute.make_tensor((base + fragment.place(vector)).align(4 * VEC), cute.make_layout(VEC))

    @cute.jit
    def _fold_whole(
        self,
        fragment: cutlass.Constexpr[Fragment],
        entry: Entry,
        piece_in_entry: Int32,
        is_last: Boolean,
        rO: cute.Tensor,
        stats: RowStats,
        totals: RowStats,
        scales: Scales,
        results: ResultTensors,
    ):
        """Add a piece to a whole row group's totals, whose O stands in a slot of this CTA's: registers hold one O. A thread keeps to its
        own elements, so nobody waits for anybody; the arithmetic is that of parts (`fold`)."""
        o = flat(rO)
        if fragment.row(0) < self.config.tile_warps * WARP_ROWS:
            slot = results.mSlots.shape[0] - 1 - self.work.list_idx()
            base = self._tile_slot(results, slot)
            before = cute.make_rmem_tensor(4, Float32)
            for i in cutlass.range_constexpr(2):
                before[i], before[2 + i] = totals.row_max[i], totals.row_sum[i]
            for k in cutlass.range_constexpr(fragment.num_values // VEC):
                vector = cute.make_rmem_tensor(VEC, Float32)
                vector.fill(0.0)
                if piece_in_entry > 0:
                    cute.autovec_copy(self._at(base, fragment, k), vector)
                for i in cutlass.range_constexpr(2):
                    first, second = const_expr(fragment.values(k)[2 * i : 2 * i + 2])
                    part = Part([o[first], o[second]], stats.row_max[i], stats.row_sum[i])
                    total = fold(Part([vector[2 * i], vector[2 * i + 1]], before[i], before[2 + i]), [part])
                    vector[2 * i], vector[2 * i + 1] = total.o
                    o[first], o[second] = total.o
                    if const_expr(k == 0):
                        totals.row_max[i], totals.row_sum[i] = total.row_max, total.row_sum
                if not is_last:
                    cute.autovec_copy(vector, self._at(base, fragment, k))
        if is_last:
            self._write_fragment(fragment, entry, rO, totals, scales, results)

    def _tile_slot(self, results: ResultTensors, slot: Int32) -> cute.Pointer:
        """Where this CTA's tile begins in a slot."""
        offset = Int64(slot) * slot_floats(self.config) + self.work.rank() * tile_slot_floats(self.config)
        return results.mSlots.iterator + offset

    @cute.jit
    def postpone(self, entry: Entry, pieces_here: Int32, place: Int32, shared: SharedTensors):
        """Note an entry whose slots are written; its arrival waits until the CTA is done: who waits for others has nothing else to do."""
        if consumer_thread() == 0:
            note_pending(shared.sPending, place, entry, pieces_here)

    # -- adding up -------------------------------------------------------------------------------------------------------------------

    @cute.jit
    def join_parts(
        self,
        num_pending: Int32,
        step: StepTensors,
        scales: Scales,
        shared: SharedTensors,
        results: ResultTensors,
    ):
        """Arrive at the slots of every pending entry, and add up this CTA's shares: Note [Shares].

        The barriers before and after carry the release and the acquire of one thread's atomics to all consumers (PTX ISA, "Causality
        order").
        """
        thread = consumer_thread()
        self.meet()
        mine, stayers = thread - ARRIVING_THREAD, Int32(0)
        if mine >= 0 and mine < num_pending:
            counter, here = counter_of(shared.sPending, mine, results.mArrivals)
            expected = shared.sPending[mine, NUM_PIECES] * self.config.cluster_size
            share, stayers = arrive(counter, here, expected, Int32(self.config.arrival_looks))
            shared.sShare[mine] = share
        self.meet()
        # A round trip to L2 that nobody waits for.
        if stayers > 0:
            counter, here = counter_of(shared.sPending, mine, results.mArrivals)
            leave(counter, counter + 1, here, stayers)
        phase = Int32(0)
        for place in cutlass.range(num_pending, unroll=1):
            share = shared.sShare[place]
            if share != NOTHING:
                phase = self._add_up(place, share, phase, step, scales, thread, shared, results)

    @cute.jit
    def _add_up(
        self,
        place: Int32,
        share: Int32,
        phase: Int32,
        step: StepTensors,
        scales: Scales,
        thread: Int32,
        shared: SharedTensors,
        results: ResultTensors,
    ) -> Int32:
        """Add up a share of a row group's vectors and write them. Parts come by bulk copies to where KV tiles were, a chunk of vectors
        of all slots at a time. Returns the phase of the copies' barrier."""
        c = self.config
        entry = entry_of(lambda field: shared.sPending[place, field], step.bounds)
        pieces = entry.num_pieces
        first_row = entry.kv_head_idx * (c.cluster_size * TILE_M)
        rows = cutlass.min(cutlass.max(entry.seqlen.seqlen_q * c.num_heads - first_row, 0), c.cluster_size * TILE_M)
        vectors = (rows + WARP_ROWS - 1) // WARP_ROWS * WARP_VECTORS
        begin, end = Int32(0), vectors
        if share == MINE:
            here = shared.sPending[place, PIECES_HERE]
            unit = (entry.partial_slot - entry.first_slot) * c.cluster_size + self.work.rank() * here
            begin, end = (vectors * x // (pieces * c.cluster_size) for x in (unit, unit + here))
        # A chunk's vectors lie in one tile.
        tile_vectors = const_expr(c.tile_warps * WARP_VECTORS)
        chunk = (MERGE_BYTES // pieces - tile_stats_bytes(self.config)) // (4 * VEC)
        at = begin
        while at < end:
            tile = at // tile_vectors
            first = at - tile * tile_vectors
            count = cutlass.min(cutlass.min(chunk, end - at), tile_vectors - first)
            self._fetch(entry, tile, first, count, thread, shared, results)
            barriers = shared.barriers
            if const_expr(barriers.statistics_full is None):
                cute.arch.mbarrier_wait(barriers.slots_full, phase)
            else:
                cute.arch.mbarrier_wait(barriers.statistics_full, phase)
            phase ^= 1
            tile_row, memory = first_row + tile * TILE_M, shared.kv.toint()
            if const_expr(c.has_pieces):
                self._await_vectors(phase ^ 1, shared)
                for i in cutlass.range(thread, count, CONSUMER_THREADS, unroll=1):
                    self._sum_vector(entry, tile_row, first, i, count, scales, shared, results)
            else:
                weights = PartWeights(c, self.work)
                weights.weigh(pieces, first, first + count, memory, thread, scales.true_max, scales.of_value)
                self.meet()
                self._await_vectors(phase ^ 1, shared)
                for i in cutlass.range(thread, count, CONSUMER_THREADS, unroll=1):
                    weights.sum_vector(entry, tile_row, first, i, count, memory, results.mO, results.mLse)
            at += count
            self.meet()
        return phase

    def _await_vectors(self, phase: Int32, shared: SharedTensors) -> None:
        """The chunk's vectors, where they come apart from statistics, which were waited for."""
        if shared.barriers.statistics_full is not None:
            cute.arch.mbarrier_wait(shared.barriers.slots_full, phase)

    @cute.jit
    def _fetch(self, entry: Entry, tile: Int32, first: Int32, count: Int32, thread: Int32, shared: SharedTensors, results: ResultTensors):
        """Start the copies of every slot's statistics of a tile and of a chunk of its vectors, by the first warp, a slot a lane."""
        c = self.config
        if thread < 32:
            num_bytes, stats_bytes = count * (4 * VEC), tile_stats_bytes(self.config)
            barrier, statistics, memory = shared.barriers.slots_full, shared.barriers.statistics_full, shared.kv.toint()
            # Other CTAs' stores, seen since the arrival, come before what the copies read, and this CTA's reads before what they write.
            cute.arch.fence_proxy("async")
            if thread == 0:
                if const_expr(statistics is None):
                    cute.arch.mbarrier_arrive_and_expect_tx(barrier, (num_bytes + stats_bytes) * entry.num_pieces)
                else:
                    cute.arch.mbarrier_arrive_and_expect_tx(statistics, stats_bytes * entry.num_pieces)
                    cute.arch.mbarrier_arrive_and_expect_tx(barrier, num_bytes * entry.num_pieces)
            cute.arch.sync_warp()
            for slot in cutlass.range(thread, entry.num_pieces, 32, unroll=1):
                at = Int64(entry.first_slot + slot) * slot_floats(c) + tile * tile_slot_floats(c)
                source = results.mSlots.iterator + at
                stats = (source + c.tile_warps * WARP_ROWS * LATENT_DIM).align(16)
                ptx.bulk_load(stats, memory + slot * stats_bytes, barrier if statistics is None else statistics, Int32(stats_bytes))
                where = memory + entry.num_pieces * stats_bytes + slot * num_bytes
                ptx.bulk_load((source + first * VEC).align(16), where, barrier, num_bytes)

    @cute.jit
    def _sum_vector(
        self,
        entry: Entry,
        tile_row: Int32,  # first packed row of the tile
        first: Int32,  # of the tile's vectors that are here
        i: Int32,
        count: Int32,
        scales: Scales,
        shared: SharedTensors,
        results: ResultTensors,
    ):
        """Add up the i-th of `count` vectors over all slots, in slot order, and write it: two columns of two rows."""
        where = SlotVector.at(first + i)
        row = where.row
        pieces = entry.num_pieces
        sums = cute.make_rmem_tensor(8, Float32)  # of each row: O, reference, row_sum
        for r in cutlass.range_constexpr(2):
            sums[4 * r], sums[4 * r + 1], sums[4 * r + 2], sums[4 * r + 3] = Float32(0.0), Float32(0.0), -Float32.inf, Float32(0.0)
        stats = shared.kv.toint() + 8 * row
        values = shared.kv.toint() + pieces * tile_stats_bytes(self.config) + i * (4 * VEC)
        for slot in cutlass.range(0, pieces, FOLD_PARTS, unroll=1):
            parts = [self._slot_vector(values, stats, count, slot + k, pieces) for k in range(FOLD_PARTS)]
            for r in cutlass.range_constexpr(2):
                total = fold(Part([sums[4 * r], sums[4 * r + 1]], sums[4 * r + 2], sums[4 * r + 3]), [part[r] for part in parts])
                sums[4 * r], sums[4 * r + 1] = total.o
                sums[4 * r + 2], sums[4 * r + 3] = total.row_max, total.row_sum
        column = where.column
        for r in cutlass.range_constexpr(2):
            packed = self.work.row(tile_row + row + 8 * r, entry.seqlen)
            if packed.is_valid:
                result = finalize_row(scales.true_max(sums[4 * r + 2]), sums[4 * r + 3], None)
                o_scale = scales.of_value(result.o_scale)
                store_columns(results.mO, entry, packed, column, [sums[4 * r + e] * o_scale for e in range(2)])
                if const_expr(results.mLse is not None):
                    if column == 0:
                        results.mLse[packed.head, entry.seqlen.q_begin + packed.token] = result.lse

    def _slot_vector(self, values: Int32, stats: Int32, count: Int32, index: Int32, pieces: Int32) -> list[Part]:
        """A vector of the `index`-th slot, a part of each row; past the last slot nothing, without weight."""
        slot, is_part = cutlass.min(index, pieces - 1), index < pieces
        o = ptx.load_shared_f32x4(values + 4 * VEC * count * slot)
        parts = []
        for r in range(2):
            row_max, row_sum = ptx.load_shared_f32x2(stats + slot * tile_stats_bytes(self.config) + 64 * r)
            parts.append(only_if(is_part, Part(o[2 * r : 2 * r + 2], row_max, row_sum)))
        return parts

    def meet(self) -> None:
        """All consumers."""
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=CONSUMER_THREADS)


def consumer_thread() -> Int32:
    """Number of a thread among the consumers, who are the warpgroups behind the first."""
    return cute.arch.thread_idx()[0] - 32 * SIDE_WARPS


def _sum(values: list[Float32]) -> Float32:
    """In order."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
