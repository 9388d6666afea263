"""The end of an entry: the key warps' results are added up, written to `out` or to a split-KV slot, and slots are combined.

Note [Order]. Sums run in a fixed order: key warps 0 to 3 within a piece, pieces by their place in the KV across
pieces. Whoever adds (the CTA that holds the whole row group, or the one that arrives last at its slots) does so with
the same arithmetic on the same numbers, so a row's bits depend on where its KV is cut and on nothing else.

Work is spread over the consumer threads in vectors of four elements of a row; a thread keeps its vectors throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from fa4_backend.kernels.common.kv_pieces import PieceRule, piece_begin, piece_of, short_piece
from fa4_backend.kernels.common.online_softmax import LN_2, finalize_row
from fa4_backend.kernels.decode.config import BOXES, MMA_ROWS, VEC, DecodeConfig, slot_vectors
from fa4_backend.kernels.decode.storage import SharedTensors
from fa4_backend.kernels.decode.work import CallValues, Entry
from fa4_backend.kernels.work_list import FIRST_SLOT, KV_HEAD_IDX, NUM_PIECES, Q_BEGIN, QUERY_LEN

CONSUMER_BARRIER = 1  # named barrier of the consumer warps
PIECES_HERE = 11  # int of a pending entry: pieces that this CTA wrote (the ints before it are the work list's)
COMBINE_LOADS = 24  # 16-byte loads of slots that a thread has in flight together


class ResultTensors(NamedTuple):
    """Where results go."""

    mO: cute.Tensor  # (total_q, num_q_heads, head_dim_v)
    mLse: cute.Tensor | None  # (num_q_heads, total_q) float32, natural log
    mOPartial: cute.Tensor  # (max_slots, decode_rows, head_dim_v) float32
    mLsePartial: cute.Tensor  # (max_slots, decode_rows) float32, log2
    mArrivals: cute.Tensor  # (max_slots,) int32
    mSinks: cute.Tensor | None  # (num_q_heads,) scaled logits


class RowState(NamedTuple):
    """Registers of a consumer lane for its two rows."""

    rO: cute.Tensor  # (4 * head_dim_v / 8,) float32, fragments of mma.sync
    rMax: cute.Tensor  # (2,) float32, row_max of the scores in the units of ScoreTransform
    rSum: cute.Tensor  # (2,) float32, this lane's share of row_sum


class Totals(NamedTuple):
    """Registers: sums over the pieces so far of each of the thread's vectors."""

    rO: cute.Tensor  # (vectors, VEC) float32, relative to rMax
    rMax: cute.Tensor  # (vectors,) float32, log2
    rSum: cute.Tensor  # (vectors,) float32


@dataclass(frozen=True)
class Merge:
    """What follows the main loop, for one kernel."""

    config: DecodeConfig

    @property
    def num_threads(self) -> int:
        """Consumer threads."""
        return 32 * self.config.num_consumer_warps

    @property
    def row_vectors(self) -> int:
        """Vectors of a row."""
        return self.config.head_dim_v // VEC

    @property
    def vectors(self) -> int:
        """Vectors of a thread."""
        return slot_vectors(self.config)

    def rule(self, values: CallValues) -> PieceRule:
        """Where KV is cut into pieces; the schedule's `piece_rule`."""
        return PieceRule(short_piece(self.vectors), values.split_blocks)

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

    def pieces(self, entry: Entry, values: CallValues) -> tuple[Int32, Int32]:
        """Pieces of an entry, half-open; numbered from the sequence's first key in batch-invariant mode."""
        if const_expr(not self.config.has_pieces):
            return Int32(0), Int32(1)
        first = piece_of(entry.n_block_begin, self.rule(values), cutlass.min, cutlass.max)
        last = piece_of(entry.n_block_end - 1, self.rule(values), cutlass.min, cutlass.max)
        return first, cutlass.max(last, first) + 1

    def piece_tiles(self, piece: Int32, begin: Int32, end: Int32, values: CallValues) -> tuple[Int32, Int32]:
        """Visible KV tiles of a piece."""
        if const_expr(not self.config.has_pieces):
            return begin, end
        first, last = (piece_begin(piece + i, self.rule(values), cutlass.min, cutlass.max) for i in (0, 1))
        return cutlass.max(begin, first), cutlass.min(end, last)

    @cute.jit
    def meet(self, state: RowState, shared: SharedTensors, scale_log2: Float32):
        """The key warps lay down their O, row_max and row_sum, in two turns where the buffers are two; ends with a barrier."""
        warp = cute.arch.warp_idx()
        row_group, key_warp = warp // BOXES, warp % BOXES
        for h in cutlass.range_constexpr(2):
            state.rMax[h] = state.rMax[h] * scale_log2
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
                        shared.sO[buffer, row, 8 * i + 2 * pair + e] = state.rO[4 * i + 2 * h + e]

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
                        other = shared.sO[buffer, row, 8 * i + 2 * pair + e]
                        state.rO[4 * i + 2 * h + e] = state.rO[4 * i + 2 * h + e] * weight + other * other_weight
                state.rSum[h] = state.rSum[h] * weight + other_sum * other_weight
                state.rMax[h] = row_max
        # The row's four lanes read one maximum and one sum, which the first of them will overwrite.
        cute.arch.sync_warp()

    @cute.jit
    def finish_piece(self, entry: Entry, piece_in_entry: Int32, shared: SharedTensors, totals: Totals, results: ResultTensors):
        """Add up the key warps; to `out`, to the running totals or to the piece's slot. Ends with a barrier of the consumers."""
        c = self.config
        for v in cutlass.range_constexpr(self.vectors):
            row, at = self._vector(v)
            if row < c.rows:
                o, row_max, row_sum = self._add_warps(shared, row, at)
                if const_expr(c.has_pieces):
                    o, lse_log2 = self._normalize(o, row_max, row_sum)
                    if entry.partial_slot < 0:
                        self._fold(totals, v, o, lse_log2)
                    else:
                        self._store_partial(results, entry.partial_slot + piece_in_entry, row, at, o, lse_log2)
                else:
                    if entry.partial_slot < 0:
                        self._write(results, entry, row, at, o, row_max, row_sum)
                    else:
                        o, lse_log2 = self._normalize(o, row_max, row_sum)
                        self._store_partial(results, entry.partial_slot, row, at, o, lse_log2)
        self._barrier()

    @cute.jit
    def finish_whole(self, entry: Entry, totals: Totals, results: ResultTensors):
        """After the last piece of an entry that is a whole row group: write the totals."""
        if const_expr(self.config.has_pieces):
            for v in cutlass.range_constexpr(self.vectors):
                row, at = self._vector(v)
                if row < self.config.rows:
                    self._write(results, entry, row, at, [totals.rO[v, e] for e in range(VEC)], totals.rMax[v], totals.rSum[v])

    @cute.jit
    def postpone(self, entry: Entry, pieces_here: Int32, place: Int32, shared: SharedTensors):
        """Note an entry whose slots are written; its arrival waits until the CTA is done, so that all share its barriers."""
        tidx, _, _ = cute.arch.thread_idx()
        if tidx == 0:
            q = entry.seqlen
            fields = (
                (KV_HEAD_IDX, entry.kv_head_idx), (FIRST_SLOT, entry.first_slot), (NUM_PIECES, entry.num_pieces),
                (Q_BEGIN, q.q_begin), (QUERY_LEN, q.seqlen_q), (PIECES_HERE, pieces_here),
            )  # fmt: skip
            for field, value in fields:
                shared.sPending[place, field] = value

    @cute.jit
    def arrive(self, num_pending: Int32, shared: SharedTensors, results: ResultTensors):
        """Arrive at the slots of every pending entry; sFlag tells where this CTA is the last. Ends with a barrier of the consumers.

        The barriers before and after carry the release and the acquire of the one thread's atomic to all consumers (PTX ISA,
        "Causality order"). Without fences of their own, and without reading slots past the last, 1 x 1K went from 12.7 to 11.9 us (H100).
        """
        tidx, _, _ = cute.arch.thread_idx()
        self._barrier()
        if tidx < num_pending:
            first_slot, pieces_here = shared.sPending[tidx, FIRST_SLOT], shared.sPending[tidx, PIECES_HERE]
            arrived = cute.arch.atomic_add(results.mArrivals.iterator + first_slot, pieces_here, sem="acq_rel", scope="gpu")
            is_last = Int32(0)
            if arrived + pieces_here == shared.sPending[tidx, NUM_PIECES]:
                is_last = Int32(1)
                results.mArrivals[first_slot] = Int32(0)  # for the next launch
            shared.sFlag[tidx] = is_last
        self._barrier()

    @cute.jit
    def combine(self, entry: Entry, totals: Totals, results: ResultTensors):
        """Add up all slots of a row group and write it."""
        c = self.config
        batch = const_expr(max(1, COMBINE_LOADS // self.vectors))
        fold_batch = const_expr(self._fold_in_order if c.has_pieces else self._fold_together)
        self.reset(totals)
        for base in cutlass.range(0, entry.num_pieces, batch, unroll=1):
            fetched = []
            for i in cutlass.range_constexpr(batch):
                slot = entry.first_slot + base + i
                for v in cutlass.range_constexpr(self.vectors):
                    row, at = self._vector(v)
                    row = cutlass.min(row, c.rows - 1)
                    # Past the last piece: nothing, without weight.
                    lse_log2, r = -Float32.inf, cute.make_rmem_tensor(VEC, Float32)
                    r.fill(0.0)
                    if base + i < entry.num_pieces:
                        lse_log2 = results.mLsePartial[slot, row]
                        cute.autovec_copy(self._row_vector(results.mOPartial[slot, row, None], at), r)
                    fetched.append((v, r, lse_log2))
            fold_batch(totals, fetched)
        for v in cutlass.range_constexpr(self.vectors):
            row, at = self._vector(v)
            if row < c.rows:
                self._write(results, entry, row, at, [totals.rO[v, e] for e in range(VEC)], totals.rMax[v], totals.rSum[v])

    def _vector(self, v: int) -> tuple[Int32, Int32]:
        """Row and place in the row (in vectors) of the thread's v-th vector."""
        tidx, _, _ = cute.arch.thread_idx()
        index = tidx + v * self.num_threads
        row = index // self.row_vectors
        return row, index - row * self.row_vectors

    def _add_warps(self, shared: SharedTensors, row: Int32, at: Int32):
        """One vector summed over the key warps: values relative to the common maximum (log2), the maximum, the denominator."""
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
            o = [o[e] + r[e] * weight for e in range(VEC)]
            row_sum = row_sum + shared.sSum[first + k, row_in_group] * weight
        return o, row_max, row_sum

    def _normalize(self, o: list[Float32], row_max: Float32, row_sum: Float32):
        """A vector divided by its denominator, and the denominator in log2; 0 and -inf for an empty row."""
        result = finalize_row(row_max, row_sum, Float32(1.0), None)
        return [x * result.o_scale for x in o], result.lse * (1.0 / LN_2)

    def _fold_in_order(self, totals: Totals, fetched: list) -> None:
        """Add pieces (vector, values, lse_log2) one after the other, as a CTA does that holds them all."""
        for v, r, lse_log2 in fetched:
            self._fold(totals, v, [r[e] for e in range(VEC)], lse_log2)

    def _fold_together(self, totals: Totals, fetched: list) -> None:
        """Add pieces relative to their common maximum: one rescale for all of them, and weights that wait for nothing else."""
        for v in range(self.vectors):
            mine = [(r, lse_log2) for vector, r, lse_log2 in fetched if vector == v]
            new_max = totals.rMax[v]
            for _, lse_log2 in mine:
                new_max = cute.arch.fmax(new_max, lse_log2)
            finite = cutlass.select_(new_max == -Float32.inf, Float32(0.0), new_max)
            old_weight = cute.math.exp2(totals.rMax[v] - finite, fastmath=True)
            row_sum, o = totals.rSum[v] * old_weight, [totals.rO[v, e] * old_weight for e in range(VEC)]
            for r, lse_log2 in mine:
                weight = cute.math.exp2(lse_log2 - finite, fastmath=True)
                row_sum = row_sum + weight
                o = [cute.math.fma(r[e], weight, o[e]) for e in range(VEC)]
            for e in range(VEC):
                totals.rO[v, e] = o[e]
            totals.rSum[v], totals.rMax[v] = row_sum, new_max

    @cute.jit
    def _fold(self, totals: Totals, v: cutlass.Constexpr[int], o: list[Float32], lse_log2: Float32):
        """Add a piece to the totals."""
        new_max = cute.arch.fmax(totals.rMax[v], lse_log2)
        finite = cutlass.select_(new_max == -Float32.inf, Float32(0.0), new_max)
        old_weight = cute.math.exp2(totals.rMax[v] - finite, fastmath=True)
        weight = cute.math.exp2(lse_log2 - finite, fastmath=True)
        for e in cutlass.range_constexpr(VEC):
            totals.rO[v, e] = cute.math.fma(o[e], weight, totals.rO[v, e] * old_weight)
        totals.rSum[v] = cute.math.fma(totals.rSum[v], old_weight, weight)
        totals.rMax[v] = new_max

    @cute.jit
    def _write(self, results: ResultTensors, entry: Entry, row: Int32, at: Int32, o: list[Float32], row_max: Float32, row_sum: Float32):
        """One vector of a finished row to `out`, and the row's lse; rows past the query are left alone."""
        c = self.config
        token = row // c.q_per_kv
        if token < entry.seqlen.seqlen_q:
            head = entry.kv_head_idx * c.q_per_kv + row - token * c.q_per_kv
            sink = None
            if const_expr(results.mSinks is not None):
                sink = Float32(results.mSinks[head])
            result = finalize_row(row_max, row_sum, Float32(1.0), sink)
            r = cute.make_rmem_tensor(VEC, results.mO.element_type)
            for e in cutlass.range_constexpr(VEC):
                r[e] = results.mO.element_type(o[e] * result.o_scale)
            cute.autovec_copy(r, self._row_vector(results.mO[entry.seqlen.q_begin + token, head, None], at))
            if const_expr(results.mLse is not None):
                if at == 0:
                    results.mLse[head, entry.seqlen.q_begin + token] = result.lse

    @cute.jit
    def _store_partial(self, results: ResultTensors, slot: Int32, row: Int32, at: Int32, o: list[Float32], lse_log2: Float32):
        """One vector of a piece to its slot."""
        r = cute.make_rmem_tensor(VEC, Float32)
        for e in cutlass.range_constexpr(VEC):
            r[e] = o[e]
        cute.autovec_copy(r, self._row_vector(results.mOPartial[slot, row, None], at))
        if at == 0:
            results.mLsePartial[slot, row] = lse_log2

    def _row_vector(self, row: cute.Tensor, at: Int32) -> cute.Tensor:
        """Vector `at` of a row, known to be aligned to its size."""
        pointer = row.iterator + at * VEC
        return cute.make_tensor(pointer.align(VEC * row.element_type.width // 8), cute.make_layout(VEC))

    def _barrier(self):
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=self.num_threads)
