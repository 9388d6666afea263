"""Softmax warps: S from tensor memory to weights in shared memory, O kept at the rows' reference, and at a piece's end O to registers.

A warp has 16 rows of the CTA's tile and of a block the 64 keys of its lane half; the warp with the same rows and the other keys has the
other lane half, and with it the other half of O's columns. Loads of shape 16x256b give a thread what an accumulator of wgmma would, so rows
and columns are those of `common/wgmma_fragment.py`, and what follows the main loop is `merge.py`.

The two warps of 16 rows exchange the rows' maxima of a block, so that both weigh with one reference. O is rescaled only where a reference
grew by more than `rescale_threshold`: each warp then changes its columns, behind the product with V of the block before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import tcgen05_ops
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.decode_entry import Entry, StepTensors
from fa4_backend.kernels.common.fp8 import split_float16, split_row
from fa4_backend.kernels.common.mask import Columns, MaskValues
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.common.wgmma_fragment import RowFragment, RowStats, ScoreScale, flat, log2_scale
from fa4_backend.kernels.mla_decode.config import LATENT_DIM, PARTS, TILE_M, WARP_ROWS
from fa4_backend.kernels.mla_decode.merge import ResultTensors, Scales, consumer_thread
from fa4_backend.kernels.mla_decode.sm100.config import BLOCK_KEYS, CTA_KEYS, S_STAGE
from fa4_backend.kernels.mla_decode.sm100.merge import LaneFragment, PairMerge
from fa4_backend.kernels.mla_decode.sm100.storage import (
    O_COL,
    P_PARTS,
    Q_PART_BYTES,
    Q_ROW_BYTES,
    S_COL,
    S_COLUMNS,
    SIDES,
    SOFTMAX_WARPS,
    PairStorage,
    Place,
    SharedTensors,
)
from fa4_backend.kernels.mla_decode.sm100.work import PairWork
from fa4_backend.kernels.mla_decode.work import Blocks

CHUNK = 64  # columns that a load of tensor memory moves: 32 registers a thread
SIDE_COLUMNS = LATENT_DIM // SIDES
CHUNK_BYTES = 16  # of a row in shared memory


Mine = cutlass.Constexpr[LaneFragment]


class Rows(NamedTuple):
    """What a thread's two rows of an entry see."""

    columns: tuple[Columns, Columns]
    full_end: Int32  # blocks before it need no mask
    scales: tuple[ScoreScale, ScoreScale]  # of raw scores of each row


@dataclass(frozen=True)
class SoftmaxWarps:
    """Eight warps of each CTA, two for each 16 rows."""

    storage: PairStorage
    work: PairWork
    merge: PairMerge
    first_warp: int  # of the CTA; a multiple of 4, which says what lanes of tensor memory a warp reaches

    @cute.jit
    def clear_unloaded_query(self, place: Place):
        """Zero the rows of Q that no box brings, before the pair's first barrier."""
        loaded = const_expr(self.storage.config.loaded_rows)
        if const_expr(loaded < TILE_M):
            zero = Int32(0).ir_value()
            first = (place.warp - self.first_warp) * 32 + place.lane
            for offset in cutlass.range(
                loaded * Q_ROW_BYTES + first * CHUNK_BYTES, TILE_M * Q_ROW_BYTES, SOFTMAX_WARPS * 32 * CHUNK_BYTES, unroll=1
            ):
                for part in cutlass.range_constexpr(PARTS):
                    ptx.store_shared_v4(place.q + part * Q_PART_BYTES + offset, [zero] * 4)
            ptx.fence_proxy_async_shared()

    @cute.jit
    def run(self, place: Place, step: StepTensors, values: MaskValues, results: ResultTensors, shared: SharedTensors):
        """Walk the entries, then add up this CTA's share of split row groups; owns the consumer sides of S, of products and of a Q that is
        split, and the producer sides of P and of Q's terms."""
        s, work, mine = self.storage, self.work, LaneFragment()
        fragment = RowFragment(CTA_KEYS, s.config.rescale_threshold, s.config.lift)
        stats = RowStats(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
        totals = RowStats(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
        scales = self._scales(values, results)
        word, num_entries, second = work.first_entry(step)
        next_s, pv_phase, num_pending, turn = RingPosition(Int32(0), Int32(0)), Int32(0), Int32(0), Int32(0)
        q_phase, factors_of_q = Int32(0), cute.make_rmem_tensor(2, Float32)
        factors_of_q.fill(1.0)
        if const_expr(s.config.terms > 1):
            if num_entries > 0:
                if self._has_blocks(step, word, values):
                    ptx.mbarrier_wait(s.full(place, "q_load_to_softmax"), q_phase)
                    q_phase ^= 1
                    self._split_query(place, mine, factors_of_q, shared)
        for index in cutlass.range(num_entries, unroll=1):
            entry = work.entry(step, word)
            blocks = work.blocks(entry, values)
            if index + 1 < num_entries:
                word = work.entry_word(step, second + index)
            rows = self._rows(entry, blocks, values, scales.score, factors_of_q, mine)
            first_piece, last_piece = work.pieces(entry, step.split_blocks)
            totals.row_max.fill(-Float32.inf)
            totals.row_sum.fill(0.0)
            for piece in cutlass.range(first_piece, last_piece, unroll=1):
                begin, end = work.piece_blocks(piece, blocks, step.split_blocks)
                stats.row_max.fill(-Float32.inf)
                stats.row_sum.fill(0.0)
                for n_block in cutlass.range(begin, end, unroll=1):
                    rS = self._scores(place, rows, n_block, next_s, mine)
                    maxima = self._maxima(fragment, rS, next_s, mine, shared)
                    before = [stats.row_max[i] for i in range(2)]
                    factors = fragment.softmax(rS, stats, rows.scales, may_be_empty=True, is_first=False, maxima=maxima)
                    if n_block > begin:
                        # Rows of no token may be NaN, which compares false.
                        moved = (stats.row_max[0] > before[0]) | (stats.row_max[1] > before[1])
                        ptx.mbarrier_wait(s.full(place, "pv_mma_to_softmax"), pv_phase)
                        pv_phase ^= 1
                        if cute.arch.vote_any_sync(moved):
                            tcgen05_ops.fence_after_sync()
                            self._rescale(factors, mine)
                    self._publish(place, rS, mine)
                    next_s = advance(next_s, S_STAGE)
                if const_expr(s.config.terms > 1):
                    # The next entry's, before this one is finished: its first products run meanwhile.
                    if (piece == last_piece - 1) & (index + 1 < num_entries):
                        if self._has_blocks(step, word, values):
                            ptx.mbarrier_wait(s.full(place, "q_load_to_softmax"), q_phase)
                            q_phase ^= 1
                            self._split_query(place, mine, factors_of_q, shared)
                rO = cute.make_rmem_tensor(WARP_ROWS * SIDE_COLUMNS // 32, Float32)
                rO.fill(0.0)
                if end > begin:
                    ptx.mbarrier_wait(s.full(place, "pv_mma_to_softmax"), pv_phase)
                    pv_phase ^= 1
                    tcgen05_ops.fence_after_sync()
                    self._load_o(rO, mine)
                self.merge.finish_piece(
                    mine, entry, piece - first_piece, piece == last_piece - 1, turn, rO, stats, totals, scales, shared, results
                )
                turn ^= 1
            if entry.partial_slot >= 0:
                self.merge.postpone(entry, last_piece - first_piece, num_pending, shared)
                num_pending += 1
        if num_pending > 0:
            self.merge.join_parts(num_pending, step, scales, shared, results)

    def _has_blocks(self, step: StepTensors, word: Int32, values: MaskValues) -> Boolean:
        """Whether the entry whose ints the lanes hold has any block, and with it a Q."""
        blocks = self.work.blocks(self.work.entry(step, word), values)
        return blocks.end > blocks.begin

    def _scales(self, values: MaskValues, results: ResultTensors) -> Scales:
        if const_expr(results.mScale is None):
            return Scales(ScoreScale.of_call(values.softmax_scale), None)
        latent_scale = Float32(results.mScale[0])
        return Scales(ScoreScale.of_log2(log2_scale(values.softmax_scale, latent_scale)), latent_scale)

    @cute.jit
    def _split_query(self, place: Place, mine: Mine, factors: cute.Tensor, shared: SharedTensors):
        """Q as two terms in its own place, four threads a row; all rows are in registers before the first is written. factors: (2,) of this
        thread's rows, what they were divided by."""
        s, thread = self.storage, consumer_thread()
        row, quarter = thread // 4, thread % 4
        has_row, source = row < s.config.loaded_rows, cutlass.min(row, s.config.loaded_rows - 1)
        line = place.q + source * Q_ROW_BYTES
        # Chunks of 8 elements, swizzled by the row's number; two of them are one of the 16 bytes of a term.
        places = [
            line + part * Q_PART_BYTES + ((2 * quarter + chunk) ^ (source % 8)) * CHUNK_BYTES for part in range(PARTS) for chunk in range(2)
        ]
        words = [Int32(word) for where in places for word in vectors.elements(vectors.select_words(has_row, ptx.load_shared_v4(where)))]
        hi, lo, factor = split_row(words, 4)
        if quarter == 0:
            shared.sFactor[row] = factor
        self.merge.meet()
        for i in cutlass.range_constexpr(2):
            factors[i] = shared.sFactor[mine.row(i)]
        chunk = quarter ^ (row // 2 % 4)
        for part in cutlass.range_constexpr(PARTS):
            for term, split in enumerate((hi, lo)):
                where = place.q + (term * PARTS + part) * s.q_part_bytes + row * s.row_bytes + chunk * CHUNK_BYTES
                ptx.store_shared_v4(where, [word.ir_value() for word in split[4 * part : 4 * part + 4]])
        ptx.fence_proxy_async_shared()
        s.group.warp_arrive(s.full_at_leader(place, "q_softmax_to_mma"), place.lane)

    def _rows(self, entry: Entry, blocks: Blocks, values: MaskValues, scale: ScoreScale, factors: cute.Tensor, mine: Mine) -> Rows:
        columns, scales = [], [scale, scale]
        if self.storage.config.terms > 1:
            # Powers of two: exact.
            scales = [ScoreScale.of_row(scale.log2 * factors[i]) for i in range(2)]
        for i in range(2):
            packed = self.work.row(self.work.first_row(entry) + mine.row(i), entry.seqlen)
            columns.append(self.work.mask.columns(packed.token, entry.seqlen, values))
        return Rows(tuple(columns), blocks.full_end, tuple(scales))  # type: ignore[arg-type]

    @cute.jit
    def _scores(self, place: Place, rows: Rows, n_block: Int32, buffer: RingPosition, mine: Mine) -> cute.Tensor:
        """This warp's scores of a block, masked."""
        ptx.mbarrier_wait(self.storage.full(place, "s_mma_to_softmax", buffer.slot), buffer.phase)
        tcgen05_ops.fence_after_sync()
        rS = cute.make_rmem_tensor(WARP_ROWS * CTA_KEYS // 32, Float32)
        self._load(rS, 0, Int32(S_COL) + buffer.slot * S_COLUMNS + mine.lanes())
        if n_block >= rows.full_end:
            RowFragment(CTA_KEYS, 0.0).mask(rS, n_block * BLOCK_KEYS + mine.sum_index() * CTA_KEYS, rows.columns)
        return rS

    @cute.jit
    def _maxima(
        self,
        fragment: cutlass.Constexpr,
        rS: cute.Tensor,
        buffer: RingPosition,
        mine: Mine,
        shared: SharedTensors,
    ) -> tuple[Float32, Float32]:
        """Largest scores of this thread's rows among all keys of the block."""
        largest = [fragment.row_max(rS, i) for i in range(2)]
        if cute.arch.lane_idx() % 4 == 0:
            for i in cutlass.range_constexpr(2):
                shared.sMax[buffer.slot, mine.sum_index(), mine.row(i)] = largest[i]
        self.merge.meet_rows(mine)
        others = [shared.sMax[buffer.slot, 1 - mine.sum_index(), mine.row(i)] for i in range(2)]
        return tuple(cute.arch.fmax(largest[i], others[i]) for i in range(2))  # type: ignore[return-value]

    @cute.jit
    def _publish(self, place: Place, rS: cute.Tensor, mine: Mine):
        """Weights to shared memory; the product before has read those of the block before."""
        if const_expr(self.storage.config.terms > 1):
            self._store_terms(place, rS, mine)
        else:
            self._store_weights(place, rS, mine)
        ptx.fence_proxy_async_shared()
        tcgen05_ops.fence_before_sync()
        self.storage.group.warp_arrive(self.storage.full_at_leader(place, "p_softmax_to_mma"), place.lane)

    def _store_weights(self, place: Place, rS: cute.Tensor, mine: Mine) -> None:
        """Weights in 16 bits."""
        weights = flat(rS)
        base = place.p + mine.sum_index() * self.storage.q_part_bytes
        row = mine.row_block() * WARP_ROWS + place.lane % WARP_ROWS
        for group in range(0, CTA_KEYS // 8, 2):
            words = [self._pack(weights[4 * group + 2 * i], weights[4 * group + 2 * i + 1], self.storage.config.dtype) for i in range(4)]
            chunk = (group + place.lane // WARP_ROWS) ^ (row % 8)
            ptx.store_matrices(base + row * self.storage.row_bytes + chunk * CHUNK_BYTES, words)

    def _store_terms(self, place: Place, rS: cute.Tensor, mine: Mine) -> None:
        """Weights as two terms, two neighbouring keys at a time: four lanes write 8 bytes of a row, and the 8 rows of a store lie in 16
        banks."""
        s, weights = self.storage, flat(rS)
        for half in range(2):
            row = mine.row(half)
            line = place.p + mine.sum_index() * s.q_part_bytes + row * s.row_bytes + place.lane % 4 * 2
            for chunk in range(s.row_bytes // CHUNK_BYTES):
                where = line + (chunk ^ (row // 2 % 4)) * CHUNK_BYTES
                for group in range(2):
                    at = 4 * (2 * chunk + group) + 2 * half
                    terms = split_float16(self._pack(weights[at], weights[at + 1], "float16"))
                    for term, pair in enumerate(terms):
                        ptx.store_shared_u16(where + (term * (P_PARTS * s.q_part_bytes) + 8 * group), pair)

    def _pack(self, low: Float32, high: Float32, dtype: str) -> Int32:
        """Two weights in a word."""
        pair = vectors.from_elements([Float32(low).ir_value(), Float32(high).ir_value()])
        return Int32(vectors.element(vectors.pack_16bit(pair, dtype), 0))

    # -- tensor memory --------------------------------------------------------------------------------------------------------------

    def _load(self, registers: cute.Tensor, first: int, address: Int32) -> None:
        """16 lanes x 64 columns to 32 registers from `first` on."""
        (words,) = tcgen05_ops.wait_load([tcgen05_ops.load_rows(address, CHUNK)])
        for i in range(WARP_ROWS * CHUNK // 32):
            registers[first + i] = Float32(vectors.element(words, i))

    def _load_o(self, rO: cute.Tensor, mine: Mine) -> None:
        """This warp's rows and columns of O."""
        for column in range(0, SIDE_COLUMNS, CHUNK):
            self._load(rO, column * WARP_ROWS // 32, Int32(O_COL + column) + mine.lanes())

    def _rescale(self, factors: cute.Tensor, mine: Mine) -> None:
        """O of earlier blocks times its rows' factors. No product with O is under way."""
        for column in range(0, SIDE_COLUMNS, CHUNK):
            rO = cute.make_rmem_tensor(WARP_ROWS * CHUNK // 32, Float32)
            address = Int32(O_COL + column) + mine.lanes()
            self._load(rO, 0, address)
            RowFragment(CHUNK, 0.0).rescale(rO, factors)
            scaled = vectors.from_elements([Float32(rO[i]).ir_value() for i in range(cute.size(rO))])
            tcgen05_ops.store_rows(address, vectors.as_words(scaled))
        tcgen05_ops.wait_store()
