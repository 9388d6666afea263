"""The end of an entry: the key warps' results are added up, written to `out` or to a split-KV slot, and slots are combined.

Note [Order]. Sums run in a fixed order: key warps 0 to 3 within a piece, pieces by their place in the KV across pieces. A part's O and
denominator refer to its own maximum, and weigh exp2 of a difference of maxima: no rounded product or logarithm comes between, whatever the
logits' size. Whoever adds (the CTA that holds the whole row group, or the one that arrives last at its slots) does so with the same
arithmetic on the same numbers, so a row's bits depend on where its KV is cut and on nothing else. Row groups of many parts are added up by
all CTAs that made them, in an order of their own that follows from the number of parts (`shares.py`).

Work is spread over the consumer threads in vectors of four elements of a row; a thread keeps its vectors throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.decode_entry import Entry
from fa4_backend.kernels.common.fp8 import float32_to_e4m3, result_factor
from fa4_backend.kernels.common.hardware import LANES, VEC
from fa4_backend.kernels.common.kv_pieces import PieceRule, piece_begin, piece_of, short_piece
from fa4_backend.kernels.common.online_softmax import finalize_row
from fa4_backend.kernels.common.part_arrivals import arrive, leave
from fa4_backend.kernels.common.part_sums import Part, fold, only_if
from fa4_backend.kernels.common.pending_entries import counter_of, note_pending
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.decode.config import BOXES, MMA_ROWS, DecodeConfig, slot_floats, slot_vectors
from fa4_backend.kernels.decode.operands import Operands
from fa4_backend.kernels.decode.storage import SharedTensors
from fa4_backend.kernels.schedule.work_list import NUM_PIECES

CONSUMER_BARRIER = 1  # named barrier of the consumer warps
FOLD_VECTORS = 16  # vectors of slots that a thread adds up at once (4: 1 x 4K of 16/2 heads 15.8 us for 15.4, H100)


class ResultTensors(NamedTuple):
    """Where results go."""

    mO: cute.Tensor  # (total_q, num_q_heads, head_dim_v)
    mLse: cute.Tensor | None  # (num_q_heads, total_q) float32, natural log
    mSlots: cute.Tensor  # (max_slots, slot_floats) float32: rows of O, then row_max and row_sum of each row
    mArrivals: cute.Tensor  # (max_slots,) int32
    mSinks: cute.Tensor | None  # (num_q_heads,) scaled logits
    mVScale: cute.Tensor | None  # (num_kv_heads,) float32: V is the stored value times it
    mOutScale: cute.Tensor | None  # (1,) float32: the result is out times it


class RowState(NamedTuple):
    """Registers of a consumer lane for its two rows."""

    rO: cute.Tensor  # (4 * head_dim_v / 8,) float32, fragments of mma.sync
    rMax: cute.Tensor  # (2,) float32, row_max, log2
    rSum: cute.Tensor  # (2,) float32, this lane's share of row_sum


class Totals(NamedTuple):
    """Registers: sums over the pieces so far of each of the thread's vectors."""

    rO: cute.Tensor  # (vectors, VEC) float32, relative to rMax
    rMax: cute.Tensor  # (vectors,) float32, log2
    rSum: cute.Tensor  # (vectors,) float32


def scale_of(scales: cute.Tensor | None, kv_head_idx: Int32) -> Float32 | None:
    """A KV head's scale of (num_kv_heads,) float32; None where K and V have none."""
    return None if scales is None else scales[kv_head_idx]


@dataclass(frozen=True)
class Merge:
    """What follows the main loop, for one kernel."""

    config: DecodeConfig
    operands: Operands

    @property
    def num_threads(self) -> int:
        """Consumer threads."""
        return LANES * self.config.num_consumer_warps

    @property
    def row_vectors(self) -> int:
        """Vectors of a row."""
        return self.config.head_dim_v // VEC

    @property
    def vectors(self) -> int:
        """Vectors of a thread."""
        return slot_vectors(self.config)

    def rule(self, split_blocks: Int32) -> PieceRule:
        """Where KV is cut into pieces; the schedule's `piece_rule`."""
        return PieceRule(short_piece(self.vectors), split_blocks)

    def make_totals(self) -> Totals:
        """Fresh registers."""
        n = self.vectors
        vectors = cute.make_rmem_tensor(cute.make_layout((n, VEC), stride=(VEC, 1)), Float32)
        return Totals(vectors, cute.make_rmem_tensor(n, Float32), cute.make_rmem_tensor(n, Float32))

    @cute.jit
    def reset(self, totals: Totals):
        """Before the first piece of an entry."""
        totals.rO.fill(0.0)
        totals.rMax.fill(-Float32.inf)
        totals.rSum.fill(0.0)

    def pieces(self, entry: Entry, split_blocks: Int32) -> tuple[Int32, Int32]:
        """Pieces of an entry, half-open; numbered from the sequence's first key in batch-invariant mode."""
        if const_expr(not self.config.has_pieces):
            return Int32(0), Int32(1)
        first = piece_of(entry.n_block_begin, self.rule(split_blocks), cutlass.min, cutlass.max)
        last = piece_of(entry.n_block_end - 1, self.rule(split_blocks), cutlass.min, cutlass.max)
        return first, cutlass.max(last, first) + 1

    def piece_tiles(self, piece: Int32, begin: Int32, end: Int32, split_blocks: Int32) -> tuple[Int32, Int32]:
        """Visible KV tiles of a piece."""
        if const_expr(not self.config.has_pieces):
            return begin, end
        first, last = (piece_begin(piece + i, self.rule(split_blocks), cutlass.min, cutlass.max) for i in (0, 1))
        return cutlass.max(begin, first), cutlass.min(end, last)

    @cute.jit
    def meet(self, state: RowState, shared: SharedTensors):
        """The key warps lay down their O, row_max and row_sum, in two turns where the buffers are two; ends with a barrier."""
        warp = cute.arch.warp_idx()
        row_group, key_warp = warp // BOXES, warp % BOXES
        for h in cutlass.range_constexpr(2):
            for offset in (1, 2):
                state.rSum[h] = state.rSum[h] + cute.arch.shuffle_sync_bfly(state.rSum[h], offset)
        buffers = const_expr(self.config.merge_buffers)
        buffer = row_group * buffers + key_warp % buffers
        if const_expr(buffers < BOXES):
            if key_warp >= buffers:
                self._lay_down(state, shared, row_group, buffer)
            self._barrier()
            if key_warp < buffers:
                self._take_up(state, shared, row_group, buffer)
                # Each lane overwrites just what it read.
                self._lay_down(state, shared, row_group, buffer)
        else:
            self._lay_down(state, shared, row_group, buffer)
        self._barrier()

    @cute.jit
    def _lay_down(self, state: RowState, shared: SharedTensors, row_group: Int32, buffer: Int32):
        """This warp's rows to a buffer."""
        c = self.config
        lane = cute.arch.lane_idx()
        group, pair = lane // 4, lane % 4
        for h in cutlass.range_constexpr(2):
            row = group + 8 * h
            if row_group * MMA_ROWS + row < c.rows:
                if pair == 0:
                    shared.sMax[buffer, row] = state.rMax[h]
                    shared.sSum[buffer, row] = state.rSum[h]
                for i in cutlass.range_constexpr(c.head_dim_v // 8):
                    for e in cutlass.range_constexpr(2):
                        shared.sO[buffer, row, self.operands.column(i, pair, e)] = state.rO[4 * i + 2 * h + e]

    @cute.jit
    def _take_up(self, state: RowState, shared: SharedTensors, row_group: Int32, buffer: Int32):
        """Add a buffer to this warp's rows."""
        c = self.config
        lane = cute.arch.lane_idx()
        group, pair = lane // 4, lane % 4
        for h in cutlass.range_constexpr(2):
            row = group + 8 * h
            if row_group * MMA_ROWS + row < c.rows:
                other_max, other_sum = shared.sMax[buffer, row], shared.sSum[buffer, row]
                row_max = cute.arch.fmax(state.rMax[h], other_max)
                finite = cutlass.select_(row_max == -Float32.inf, Float32(0.0), row_max)
                weight = cute.math.exp2(state.rMax[h] - finite, fastmath=True)
                other_weight = cute.math.exp2(other_max - finite, fastmath=True)
                for i in cutlass.range_constexpr(c.head_dim_v // 8):
                    for e in cutlass.range_constexpr(2):
                        other = shared.sO[buffer, row, self.operands.column(i, pair, e)]
                        state.rO[4 * i + 2 * h + e] = cute.math.fma(other, other_weight, state.rO[4 * i + 2 * h + e] * weight)
                state.rSum[h] = cute.math.fma(other_sum, other_weight, state.rSum[h] * weight)
                state.rMax[h] = row_max
        # The row's four lanes read one maximum and one sum, which the first of them will overwrite.
        cute.arch.sync_warp()

    @cute.jit
    def finish_piece(
        self, entry: Entry, piece_in_entry: Int32, shared: SharedTensors, totals: Totals, factor: Float32 | None, results: ResultTensors
    ):
        """Add up the key warps; to `out`, to the running totals or to the piece's slot. Ends with a barrier of the consumers."""
        c = self.config
        for v in cutlass.range_constexpr(self.vectors):
            row, at = self._vector(v)
            if row < c.rows:
                part = self._add_warps(shared, row, at)
                if entry.partial_slot >= 0:
                    self._store_partial(results, entry.partial_slot + piece_in_entry, row, at, part)
                elif const_expr(c.has_pieces):
                    self._fold(totals, v, [part])
                else:
                    self.write(results, entry, row, at, part, factor)
        self._barrier()

    @cute.jit
    def finish_whole(self, entry: Entry, totals: Totals, factor: Float32 | None, results: ResultTensors):
        """After the last piece of an entry that is a whole row group: write the totals."""
        if const_expr(self.config.has_pieces):
            for v in cutlass.range_constexpr(self.vectors):
                row, at = self._vector(v)
                if row < self.config.rows:
                    self.write(results, entry, row, at, self._total(totals, v), factor)

    @cute.jit
    def postpone(self, entry: Entry, pieces_here: Int32, place: Int32, shared: SharedTensors):
        """Note an entry whose slots are written; its arrival waits until the CTA is done, so that all share its barriers."""
        tidx, _, _ = cute.arch.thread_idx()
        if tidx == 0:
            note_pending(shared.sPending, place, entry, pieces_here)

    @cute.jit
    def arrive(self, num_pending: Int32, shared: SharedTensors, results: ResultTensors):
        """Arrive at the slots of every pending entry and wait for those that all add up; sShare tells what this CTA adds up of each. Ends
        with a barrier of the consumers.

        The barriers before and after carry the release and the acquire of one thread's atomics to all consumers (PTX ISA, "Causality
        order"). Without fences of their own, and without reading slots past the last, 1 x 1K went from 12.7 to 11.9 us (H100). That thread
        is one of the last warp, which adds up least: it leaves while the others' loads fly.
        """
        tidx, _, _ = cute.arch.thread_idx()
        place = tidx - (self.num_threads - LANES)
        stayers = Int32(0)
        self._barrier()
        if place >= 0 and place < num_pending:
            looks = Int32(0)
            if const_expr(not self.config.has_pieces):
                if self.is_shared(shared.sPending[place, NUM_PIECES]):
                    looks = Int32(self.config.arrival_looks)
            counter, here = counter_of(shared.sPending, place, results.mArrivals)
            share, stayers = arrive(counter, here, shared.sPending[place, NUM_PIECES], looks)
            shared.sShare[place] = share
        self._barrier()
        if stayers > 0:
            counter, here = counter_of(shared.sPending, place, results.mArrivals)
            leave(counter, counter + 1, here, stayers)

    def is_shared(self, num_pieces: Int32) -> Boolean:
        """Whether all CTAs that made a row group's slots add them up."""
        return num_pieces * self.vectors >= self.config.share_vectors

    def join(self):
        """All consumers have read the slots of the pending entry before, whose place the next one's take."""
        self._barrier()

    @cute.jit
    def combine(self, entry: Entry, ring: RingPosition, totals: Totals, shared: SharedTensors, results: ResultTensors) -> RingPosition:
        """Add up all slots of a row group and write it. Slots come by bulk copies to where KV tiles were; returns the position of that
        ring behind them."""
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        stages = (entry.num_pieces + c.stage_slots - 1) // c.stage_slots
        factor = result_factor(results.mVScale, results.mOutScale, entry.kv_head_idx)
        if tidx == 0:
            # Other CTAs' stores, seen since the arrival, come before what the copies read, and this CTA's reads of tiles before
            # what they write.
            cute.arch.fence_proxy("async")
            fetched_to = ring
            for stage in cutlass.range(cutlass.min(stages, c.slot_stage), unroll=1):
                self._fetch_slots(entry, stage, fetched_to.slot, shared, results)
                fetched_to = advance(fetched_to, c.slot_stage)
        self.reset(totals)
        for stage in cutlass.range(stages, unroll=1):
            cute.arch.mbarrier_wait(shared.slot_full + ring.slot, ring.phase)
            base = shared.kv_address + ring.slot * c.slot_stage_bytes
            here = cutlass.min(entry.num_pieces - stage * c.stage_slots, c.stage_slots)
            for first in cutlass.range(0, here, self.fold_parts, unroll=1):
                for v in cutlass.range_constexpr(self.vectors):
                    self._fold(totals, v, [self._slot_vector(base, first + i, here, v) for i in range(self.fold_parts)])
            if stage + c.slot_stage < stages:
                self._barrier()
                if tidx == 0:
                    cute.arch.fence_proxy("async")
                    self._fetch_slots(entry, stage + c.slot_stage, ring.slot, shared, results)
            ring = advance(ring, c.slot_stage)
        for v in cutlass.range_constexpr(self.vectors):
            row, at = self._vector(v)
            if row < c.rows:
                self.write(results, entry, row, at, self._total(totals, v), factor)
        return ring

    @property
    def fold_parts(self) -> int:
        """Slots that are added up at once."""
        return max(1, FOLD_VECTORS // self.vectors)

    def _slot_vector(self, base: Int32, index: Int32, count: Int32, v: int) -> Part:
        """A vector of the `index`-th slot in a stage; past the `count` slots nothing, without weight, and no memory that nobody wrote."""
        c = self.config
        row, at = self._vector(v)
        row = cutlass.min(row, c.rows - 1)
        address = base + cutlass.min(index, count - 1) * c.slot_bytes
        values = ptx.load_shared_f32x4(address + 4 * (row * c.head_dim_v + at * VEC))
        row_max, row_sum = ptx.load_shared_f32x2(address + 4 * (c.rows * c.head_dim_v + 2 * row))
        return only_if(index < count, Part(values, row_max, row_sum))

    @cute.jit
    def _fetch_slots(self, entry: Entry, stage: Int32, ring_slot: Int32, shared: SharedTensors, results: ResultTensors):
        """Start the copy of the `stage`-th slots of a row group to a stage of the ring; one thread calls."""
        c = self.config
        first = stage * c.stage_slots
        num_bytes = cutlass.min(entry.num_pieces - first, c.stage_slots) * c.slot_bytes
        barrier = shared.slot_full + ring_slot
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, num_bytes)
        source = results.mSlots.iterator + cutlass.Int64(entry.first_slot + first) * slot_floats(c)
        ptx.bulk_load(source, shared.kv_address + ring_slot * c.slot_stage_bytes, barrier, num_bytes)

    def _vector(self, v: int) -> tuple[Int32, Int32]:
        """Row and place in the row (in vectors) of the thread's v-th vector."""
        tidx, _, _ = cute.arch.thread_idx()
        index = tidx + v * self.num_threads
        row = index // self.row_vectors
        return row, index - row * self.row_vectors

    def _add_warps(self, shared: SharedTensors, row: Int32, at: Int32) -> Part:
        """One vector summed over the key warps."""
        buffers = self.config.merge_buffers
        first, row_in_group = row // MMA_ROWS * buffers, row % MMA_ROWS
        maxima = [shared.sMax[first + k, row_in_group] for k in range(buffers)]
        row_max = maxima[0]
        for other in maxima[1:]:
            row_max = cute.arch.fmax(row_max, other)
        finite = cutlass.select_(row_max == -Float32.inf, Float32(0.0), row_max)
        o, row_sum = [Float32(0.0)] * VEC, Float32(0.0)
        for k in range(buffers):
            weight = cute.math.exp2(maxima[k] - finite, fastmath=True)
            r = cute.make_rmem_tensor(VEC, Float32)
            cute.autovec_copy(self._row_vector(shared.sO[first + k, row_in_group, None], at), r)
            o = [cute.math.fma(r[e], weight, o[e]) for e in range(VEC)]
            row_sum = cute.math.fma(shared.sSum[first + k, row_in_group], weight, row_sum)
        return Part(o, row_max, row_sum)

    def _total(self, totals: Totals, v: int) -> Part:
        """The totals of a vector."""
        return Part([totals.rO[v, e] for e in range(VEC)], totals.rMax[v], totals.rSum[v])

    def _fold(self, totals: Totals, v: int, parts: list[Part]) -> None:
        """Add parts to the totals of a vector, one after the other."""
        total = fold(self._total(totals, v), parts)
        for e in range(VEC):
            totals.rO[v, e] = total.o[e]
        totals.rSum[v], totals.rMax[v] = total.row_sum, total.row_max

    @cute.jit
    def write(self, results: ResultTensors, entry: Entry, row: Int32, at: Int32, part: Part, factor: Float32 | None):
        """One vector of a finished row to `out`, and the row's lse; rows past the query are left alone."""
        c = self.config
        token = row // c.q_per_kv
        if token < entry.seqlen.seqlen_q:
            head = entry.kv_head_idx * c.q_per_kv + row - token * c.q_per_kv
            sink = None
            if const_expr(results.mSinks is not None):
                sink = Float32(results.mSinks[head])
            result = finalize_row(part.row_max, part.row_sum, sink)
            o_scale = result.o_scale
            if const_expr(factor is not None):
                o_scale = o_scale * factor
            gO = self._row_vector(results.mO[entry.seqlen.q_begin + token, head, None], at)
            if const_expr(c.has_out_scale):
                cute.recast_tensor(gO, Int32)[0] = float32_to_e4m3([part.o[e] * o_scale for e in range(VEC)])
            else:
                r = cute.make_rmem_tensor(VEC, results.mO.element_type)
                for e in cutlass.range_constexpr(VEC):
                    r[e] = results.mO.element_type(part.o[e] * o_scale)
                cute.autovec_copy(r, gO)
            if const_expr(results.mLse is not None):
                if at == 0:
                    results.mLse[head, entry.seqlen.q_begin + token] = result.lse

    @cute.jit
    def _store_partial(self, results: ResultTensors, slot: Int32, row: Int32, at: Int32, part: Part):
        """One vector of a piece to its slot."""
        rows, dim = const_expr(self.config.rows), const_expr(self.config.head_dim_v)
        r = cute.make_rmem_tensor(VEC, Float32)
        for e in cutlass.range_constexpr(VEC):
            r[e] = part.o[e]
        values = results.mSlots.iterator + cutlass.Int64(slot) * const_expr(slot_floats(self.config))
        stats = cute.make_tensor(values + rows * dim, cute.make_layout((rows, 2), stride=(2, 1)))
        cute.autovec_copy(r, self._row_vector(cute.make_tensor(values + row * dim, cute.make_layout(dim)), at))
        if at == 0:
            stats[row, 0], stats[row, 1] = part.row_max, part.row_sum

    def _row_vector(self, row: cute.Tensor, at: Int32) -> cute.Tensor:
        """Vector `at` of a row, known to be aligned to its size."""
        pointer = row.iterator + at * VEC
        return cute.make_tensor(pointer.align(VEC * row.element_type.width // 8), cute.make_layout(VEC))

    def _barrier(self):
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=self.num_threads)
