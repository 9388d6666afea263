"""The end of a piece and of a CTA: a piece's rows go to `out` or to a split-KV slot, and slots are added up.

Note [Shares]. A slot of 64 rows is 128 KiB: one CTA that adds up n of them takes n times 1.2 us. So all CTAs that made parts of a row group
add it up, each a share of its vectors. A CTA that has written all its slots arrives and waits for the others; it looks at the counter
`arrival_looks` times and then leaves, which it notes in the counter (one compare-and-swap, so whoever comes last knows); the last one
then adds up the whole row group. So no CTA depends on another one's running beside it. Parts are added in slot order whoever does it, and
a vector's sum knows nothing of the shares.

Counters: `mArrivals[first_slot]` parts that came, and CTAs that left in units of `GAVE_UP`; `mArrivals[first_slot + 1]` parts whose CTAs
are done with the first counter. The last one clears both for the next launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.decode_entry import Entry, StepTensors, entry_of
from fa4_backend.kernels.common.fragment_store import store_fragment
from fa4_backend.kernels.common.online_softmax import finalize_row
from fa4_backend.kernels.common.wgmma_fragment import RowFragment, RowStats, ScoreScale, flat, quad_sum, row_of_thread
from fa4_backend.kernels.mla_decode.config import (
    KV_STAGE,
    LATENT_DIM,
    ROW_VECTORS,
    TILE_ELEMS,
    TILE_M,
    VEC,
    MlaDecodeConfig,
    slot_floats,
    tile_slot_floats,
)
from fa4_backend.kernels.mla_decode.storage import COMBINE_STATS, SIDE_WARPS, SIDES, SharedTensors
from fa4_backend.kernels.mla_decode.work import MlaWork
from fa4_backend.kernels.schedule.work_list import (
    DECODE_INTS,
    FIRST_SLOT,
    KV_HEAD_IDX,
    NUM_PIECES,
    PARTIAL_SLOT,
    Q_BEGIN,
    QUERY_LEN,
    TOTAL_Q,
)

CONSUMER_THREADS = SIDES * SIDE_WARPS * 32
CONSUMER_BARRIER = 3  # named barrier of both consumer warpgroups
PIECES_HERE = DECODE_INTS - 1  # int of a pending entry: pieces that this CTA wrote; none of the work list's
GAVE_UP = 1 << 16  # of a counter: CTAs that left before all parts came
NOTHING, MINE, ALL = range(3)  # what of a row group this CTA adds up
FOLD_PARTS = 8  # slots whose values are asked for before the first is added
assert PIECES_HERE > TOTAL_Q, "the work list's last int"


class ResultTensors(NamedTuple):
    """Where results go."""

    mO: cute.Tensor  # (total_q, num_heads, 512)
    mLse: cute.Tensor | None  # (num_heads, total_q) float32, natural log
    mSlots: cute.Tensor  # (max_slots, slot_floats) float32: of each tile rows of O, then reference and row_sum of each row
    mArrivals: cute.Tensor  # (max_slots,) int32
    mScale: cute.Tensor | None  # (1,) float32: a latent is what is stored times it; None unless latents are FP8


class Scales(NamedTuple):
    """What scores and values are multiplied by."""

    score: ScoreScale  # of raw scores, the latents' scale included
    value: Float32 | None  # the latents' scale; None: they have none


class Part(NamedTuple):
    """One vector of a row, of some of its keys."""

    o: list[Float32]  # VEC values, relative to row_max
    row_max: Float32  # reference, log2; -inf: no key
    row_sum: Float32


@dataclass(frozen=True)
class Merge:
    """What follows the main loop, for one kernel."""

    config: MlaDecodeConfig
    work: MlaWork

    @cute.jit
    def finish_piece(
        self,
        side: cutlass.Constexpr[int],
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
        """A piece's rows to `out` or to its slot. Both sides call and meet."""
        thread = cute.arch.thread_idx()[0] % (32 * SIDE_WARPS)
        lane_in_quad = thread % 4
        for i in cutlass.range_constexpr(2):
            total = quad_sum(stats.row_sum[i])
            if lane_in_quad == 0:
                shared.sRowSum[turn, side, row_of_thread(thread, i)] = total
        self._barrier()
        for i in cutlass.range_constexpr(2):
            row = row_of_thread(thread, i)
            stats.row_sum[i] = shared.sRowSum[turn, 0, row] + shared.sRowSum[turn, 1, row]
        if entry.partial_slot >= 0:
            self._store_slot(side, entry, entry.partial_slot + piece_in_entry, rO, stats, thread, results)
        elif const_expr(self.config.has_pieces):
            self._fold_whole(side, entry, piece_in_entry, is_last, rO, stats, totals, scales, thread, results)
        else:
            self._write_fragment(side, entry, rO, stats, scales, thread, results)

    @cute.jit
    def _write_fragment(
        self,
        side: cutlass.Constexpr[int],
        entry: Entry,
        rO: cute.Tensor,
        stats: RowStats,
        scales: Scales,
        thread: Int32,
        results: ResultTensors,
    ):
        """Finished rows from registers."""
        first_row = self.work.first_row(entry)
        o_scales = cute.make_rmem_tensor(2, Float32)
        rows = tuple(self.work.row(first_row + row_of_thread(thread, i), entry.seqlen) for i in range(2))
        for i in cutlass.range_constexpr(2):
            result = finalize_row(scales.score.true_max(stats.row_max[i]), stats.row_sum[i], None)
            o_scales[i] = _value_scale(result.o_scale, scales)
            if const_expr(results.mLse is not None and side == 0):
                if rows[i].is_valid and thread % 4 == 0:
                    results.mLse[rows[i].head, entry.seqlen.q_begin + rows[i].token] = result.lse
        RowFragment(LATENT_DIM // SIDES, 0.0).rescale(rO, o_scales)
        rOut = cute.make_rmem_tensor_like(rO, results.mO.element_type)
        rOut.store(rO.load().to(results.mO.element_type))
        columns = const_expr(LATENT_DIM // SIDES)
        half = cute.make_tensor((results.mO.iterator + side * columns).align(16), results.mO.layout)
        store_fragment(half, rOut, rows, Int32(0), entry.seqlen.q_begin)

    @cute.jit
    def _store_slot(
        self,
        side: cutlass.Constexpr[int],
        entry: Entry,
        slot: Int32,
        rO: cute.Tensor,
        stats: RowStats,
        thread: Int32,
        results: ResultTensors,
    ):
        """Rows of a piece that are valid, to its slot: pairs of columns, a quad 32 bytes."""
        c = self.config
        first_row = self.work.first_row(entry)
        base = self._tile_slot(results, slot)
        o = flat(rO)
        for i in cutlass.range_constexpr(2):
            row = row_of_thread(thread, i)
            if self.work.row(first_row + row, entry.seqlen).is_valid:
                target = base + (row * LATENT_DIM + side * (LATENT_DIM // SIDES) + 2 * (thread % 4))
                for group in cutlass.range_constexpr(LATENT_DIM // SIDES // 8):
                    pair = cute.make_rmem_tensor(2, Float32)
                    pair[0], pair[1] = o[4 * group + 2 * i], o[4 * group + 2 * i + 1]
                    cute.autovec_copy(pair, cute.make_tensor((target + 8 * group).align(8), cute.make_layout(2)))
                if const_expr(side == 0):
                    if thread % 4 == 0:
                        pair = cute.make_rmem_tensor(2, Float32)
                        pair[0], pair[1] = stats.row_max[i], stats.row_sum[i]
                        where = base + (c.tile_rows * LATENT_DIM + 2 * row)
                        cute.autovec_copy(pair, cute.make_tensor(where.align(8), cute.make_layout(2)))

    @cute.jit
    def _fold_whole(
        self,
        side: cutlass.Constexpr[int],
        entry: Entry,
        piece_in_entry: Int32,
        is_last: Boolean,
        rO: cute.Tensor,
        stats: RowStats,
        totals: RowStats,
        scales: Scales,
        thread: Int32,
        results: ResultTensors,
    ):
        """Add a piece to a whole row group's totals, whose O stands in a slot of this CTA's: registers hold one O. A thread keeps to its
        own elements, so nobody waits for anybody; the arithmetic is that of parts (`fold`)."""
        c = self.config
        base = self._tile_slot(results, results.mSlots.shape[0] - 1 - self.work.list_idx())
        o = flat(rO)
        for i in cutlass.range_constexpr(2):
            row = row_of_thread(thread, i)
            if row < c.tile_rows:
                target = base + (row * LATENT_DIM + side * (LATENT_DIM // SIDES) + 2 * (thread % 4))
                before = cute.make_rmem_tensor(2, Float32)
                before[0], before[1] = totals.row_max[i], totals.row_sum[i]
                for group in cutlass.range_constexpr(LATENT_DIM // SIDES // 8):
                    at = cute.make_tensor((target + 8 * group).align(8), cute.make_layout(2))
                    pair = cute.make_rmem_tensor(2, Float32)
                    pair.fill(0.0)
                    if piece_in_entry > 0:
                        cute.autovec_copy(at, pair)
                    j = const_expr(4 * group + 2 * i)
                    part = Part([o[j], o[j + 1]], stats.row_max[i], stats.row_sum[i])
                    total = fold(Part([pair[0], pair[1]], before[0], before[1]), [part])
                    pair[0], pair[1] = total.o
                    o[j], o[j + 1] = total.o
                    if not is_last:
                        cute.autovec_copy(pair, at)
                    if const_expr(group == 0):
                        totals.row_max[i], totals.row_sum[i] = total.row_max, total.row_sum
        if is_last:
            self._write_fragment(side, entry, rO, totals, scales, thread, results)

    def _tile_slot(self, results: ResultTensors, slot: Int32) -> cute.Pointer:
        """Where this CTA's tile begins in a slot."""
        offset = Int64(slot) * slot_floats(self.config) + self.work.rank() * tile_slot_floats(self.config)
        return results.mSlots.iterator + offset

    @cute.jit
    def postpone(self, entry: Entry, pieces_here: Int32, place: Int32, shared: SharedTensors, thread: Int32):
        """Note an entry whose slots are written; its arrival waits until the CTA is done: who waits for others has nothing else to do."""
        if thread == 0:
            q = entry.seqlen
            fields = (
                (KV_HEAD_IDX, entry.kv_head_idx), (PARTIAL_SLOT, entry.partial_slot), (FIRST_SLOT, entry.first_slot),
                (NUM_PIECES, entry.num_pieces), (Q_BEGIN, q.q_begin), (QUERY_LEN, q.seqlen_q), (PIECES_HERE, pieces_here),
            )  # fmt: skip
            for field, value in fields:
                shared.sPending[place, field] = value

    # -- adding up -------------------------------------------------------------------------------------------------------------------

    @cute.jit
    def join_parts(
        self,
        side: cutlass.Constexpr[int],
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
        thread = side * (32 * SIDE_WARPS) + cute.arch.thread_idx()[0] % (32 * SIDE_WARPS)
        self._barrier()
        if const_expr(side == 0):
            if thread < num_pending:
                shared.sShare[thread] = self._arrive(thread, shared, results)
        self._barrier()
        phase = Int32(0)
        for place in cutlass.range(num_pending, unroll=1):
            share = shared.sShare[place]
            if share != NOTHING:
                phase = self._add_up(place, share, phase, step, scales, thread, shared, results)
        self._barrier()
        if const_expr(side == 0):
            if thread < num_pending:
                self._leave(thread, shared, results)

    @cute.jit
    def _arrive(self, place: Int32, shared: SharedTensors, results: ResultTensors) -> Int32:
        """Arrive at a row group's counter and wait for the other parts; what this CTA is to add up. One thread an entry."""
        counter = results.mArrivals.iterator + shared.sPending[place, FIRST_SLOT]
        here = shared.sPending[place, PIECES_HERE]
        expected = shared.sPending[place, NUM_PIECES] * self.config.cluster_size
        seen = cute.arch.atomic_add(counter, here, sem="acq_rel", scope="gpu") + here
        share = Int32(NOTHING)
        if seen % GAVE_UP == expected:
            share = cutlass.select_(seen >= GAVE_UP, Int32(ALL), Int32(MINE))
        else:
            looks = Int32(self.config.arrival_looks)
            while looks > 0:
                looks -= 1
                if looks > 0:
                    seen = Int32(cute.arch.load(counter, Int32, sem="acquire", scope="gpu"))
                else:
                    # One look more that is an atomic: either all parts have come, or the last one will know.
                    before = seen
                    seen = cute.arch.atomic_cas(counter, cmp=before, val=before + GAVE_UP, sem="acq_rel", scope="gpu")
                    if seen != before and seen % GAVE_UP != expected:
                        looks = Int32(1)
                if seen % GAVE_UP == expected:
                    looks = Int32(0)
                    if seen < GAVE_UP:
                        share = Int32(MINE)
        return share

    @cute.jit
    def _leave(self, place: Int32, shared: SharedTensors, results: ResultTensors):
        """This CTA will not look at the counter again; the last one clears both."""
        first_slot = shared.sPending[place, FIRST_SLOT]
        here = shared.sPending[place, PIECES_HERE]
        left = cute.arch.atomic_add(results.mArrivals.iterator + (first_slot + 1), here, sem="acq_rel", scope="gpu")
        if left + here == shared.sPending[place, NUM_PIECES] * self.config.cluster_size:
            results.mArrivals[first_slot] = Int32(0)
            results.mArrivals[first_slot + 1] = Int32(0)

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
        group_rows = entry.kv_head_idx * (c.cluster_size * TILE_M)
        rows = cutlass.min(cutlass.max(entry.seqlen.seqlen_q * c.num_heads - group_rows, 0), c.group_rows)
        begin, end = Int32(0), rows * ROW_VECTORS
        if share == MINE:
            here = shared.sPending[place, PIECES_HERE]
            unit = (entry.partial_slot - entry.first_slot) * c.cluster_size + self.work.rank() * here
            begin, end = (rows * ROW_VECTORS * x // (pieces * c.cluster_size) for x in (unit, unit + here))
        # A chunk's vectors lie in one tile, since a tile's numbers stand behind its rows.
        chunk = cutlass.min(KV_STAGE * TILE_ELEMS * 2 // (4 * VEC) // pieces, (COMBINE_STATS // pieces - 2) * ROW_VECTORS)
        at = begin
        while at < end:
            tile = at // (c.tile_rows * ROW_VECTORS)
            first = at - tile * (c.tile_rows * ROW_VECTORS)
            count = cutlass.min(cutlass.min(chunk, end - at), c.tile_rows * ROW_VECTORS - first)
            self._fetch(entry, tile, first, count, thread, shared, results)
            first_row, last_row = first // ROW_VECTORS, (first + count - 1) // ROW_VECTORS
            self._fetch_stats(entry, tile, first_row, last_row - first_row + 1, thread, shared, results)
            cute.arch.mbarrier_wait(shared.barriers.slots_full, phase)
            phase ^= 1
            self._barrier()
            for i in cutlass.range(thread, count, CONSUMER_THREADS, unroll=1):
                row = (first + i) // ROW_VECTORS
                total = self._sum_vector(i, count, row - first_row, last_row - first_row + 1, pieces, shared)
                packed = self.work.row(group_rows + tile * TILE_M + row, entry.seqlen)
                self._write_vector(entry, packed, (first + i) % ROW_VECTORS, total, scales, results)
            at += count
            self._barrier()
        return phase

    @cute.jit
    def _fetch(self, entry: Entry, tile: Int32, first: Int32, count: Int32, thread: Int32, shared: SharedTensors, results: ResultTensors):
        """Start the copies of a chunk of every slot, by the first warp, a slot a lane."""
        c = self.config
        if thread < 32:
            num_bytes = count * (4 * VEC)
            barrier = shared.barriers.slots_full
            # Other CTAs' stores, seen since the arrival, come before what the copies read, and this CTA's reads before what they write.
            cute.arch.fence_proxy("async")
            if thread == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, num_bytes * entry.num_pieces)
            cute.arch.sync_warp()
            for slot in cutlass.range(thread, entry.num_pieces, 32, unroll=1):
                at = Int64(entry.first_slot + slot) * const_expr(slot_floats(c)) + (tile * const_expr(tile_slot_floats(c)) + first * VEC)
                ptx.bulk_load((results.mSlots.iterator + at).align(16), shared.kv.toint() + slot * num_bytes, barrier, num_bytes)

    @cute.jit
    def _fetch_stats(
        self, entry: Entry, tile: Int32, first_row: Int32, count: Int32, thread: Int32, shared: SharedTensors, results: ResultTensors
    ):
        """Reference and row_sum of a chunk's rows of every slot to shared memory: slot after slot."""
        c = self.config
        for i in cutlass.range(thread, entry.num_pieces * count, CONSUMER_THREADS, unroll=1):
            slot = i // count
            at = Int64(entry.first_slot + slot) * const_expr(slot_floats(c)) + (
                tile * const_expr(tile_slot_floats(c)) + c.tile_rows * LATENT_DIM + 2 * (first_row + i - slot * count)
            )
            pair = cute.make_rmem_tensor(2, Float32)
            cute.autovec_copy(cute.make_tensor((results.mSlots.iterator + at).align(8), cute.make_layout(2)), pair)
            shared.sStats[i, 0], shared.sStats[i, 1] = pair[0], pair[1]

    @cute.jit
    def _sum_vector(self, i: Int32, count: Int32, row: Int32, rows: Int32, pieces: Int32, shared: SharedTensors) -> Part:
        """The sum over all slots of a chunk's i-th vector, in slot order."""
        o = cute.make_rmem_tensor(VEC, Float32)
        numbers = cute.make_rmem_tensor(2, Float32)
        o.fill(0.0)
        numbers[0], numbers[1] = -Float32.inf, Float32(0.0)
        base = shared.kv.toint() + i * (4 * VEC)
        stats = shared.sStats.iterator.toint() + 8 * row
        for first in cutlass.range(0, pieces, FOLD_PARTS, unroll=1):
            parts = [self._slot_vector(base, stats, count, rows, first + k, pieces) for k in range(FOLD_PARTS)]
            total = fold(Part([o[e] for e in range(VEC)], numbers[0], numbers[1]), parts)
            for e in cutlass.range_constexpr(VEC):
                o[e] = total.o[e]
            numbers[0], numbers[1] = total.row_max, total.row_sum
        return Part([o[e] for e in range(VEC)], numbers[0], numbers[1])

    def _slot_vector(self, base: Int32, stats: Int32, count: Int32, rows: Int32, index: Int32, pieces: Int32) -> Part:
        """A vector of the `index`-th slot; past the last slot nothing, without weight."""
        slot, is_part = cutlass.min(index, pieces - 1), index < pieces
        row_max, row_sum = ptx.load_shared_f32x2(stats + 8 * rows * slot)
        values = ptx.load_shared_f32x4(base + 4 * VEC * count * slot)
        return Part(
            [cutlass.select_(is_part, value, Float32(0.0)) for value in values],
            cutlass.select_(is_part, row_max, -Float32.inf),
            cutlass.select_(is_part, row_sum, Float32(0.0)),
        )

    @cute.jit
    def _write_vector(self, entry: Entry, packed, at: Int32, total: Part, scales: Scales, results: ResultTensors):
        """One vector of a finished row, and the row's lse."""
        result = finalize_row(scales.score.true_max(total.row_max), total.row_sum, None)
        o_scale = _value_scale(result.o_scale, scales)
        r = cute.make_rmem_tensor(VEC, results.mO.element_type)
        for e in cutlass.range_constexpr(VEC):
            r[e] = results.mO.element_type(total.o[e] * o_scale)
        target = results.mO[entry.seqlen.q_begin + packed.token, packed.head, None].iterator + at * VEC
        cute.autovec_copy(r, cute.make_tensor(target.align(VEC * results.mO.element_type.width // 8), cute.make_layout(VEC)))
        if const_expr(results.mLse is not None):
            if at == 0:
                results.mLse[packed.head, entry.seqlen.q_begin + packed.token] = result.lse

    def _barrier(self) -> None:
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=CONSUMER_THREADS)


def _value_scale(o_scale: Float32, scales: Scales) -> Float32:
    """What an accumulated O is multiplied by."""
    return o_scale if scales.value is None else o_scale * scales.value


def fold(total: Part, parts: list[Part]) -> Part:
    """Add parts to a total, one after the other: the same arithmetic whether they come at once or one by one."""
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
