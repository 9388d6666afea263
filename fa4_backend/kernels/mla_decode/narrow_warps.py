"""The consumer warps of at most 16 packed rows over FP8 latents: eight warps, products of 16 rows by mma.sync, e4m3 converted in registers.

wgmma's operands come from shared memory and its rows are 64: latents would be written there in 16 bits, three quarters of the products for
nothing. Here a block's bytes are read twice and written once, by TMA.

    every warp: S(i) of 8 keys, all 576 elements; largest scores of its keys ->
    barrier -> O += P(i - 1) V(i - 1), its 64 columns of O; P(i), the weights of its keys; S(i + 1) ...

Between two barriers a warp has both products of two blocks and the weights between them, so a wait of one is under the others.

Q is in registers, 144 words a lane. Both products are of float16, where every e4m3 number is exact; a bfloat16 Q is scaled by a power of
two a row (`common/fp8.py`, Note [bfloat16 Q]), and a row's reference lies 7 log2 units below its largest score (`common/wgmma_fragment.py`,
Note [Lifted weights]). All warps know the largest scores of all keys, so they agree on a row's reference without a word.

**K.** An ldmatrix of 16-byte rows gives lane (group, pair) elements 4 pair .. 4 pair + 3 of a chunk of key `group`, where mma.sync has
2 pair, + 1 and 2 pair + 8, + 9. A product sums over all 16, so Q is put in the same order.

**V.** The transposed ldmatrix gives a lane elements 2 group, 2 group + 1 of keys 2 pair and 2 pair + 1. A prmt puts the keys of an element
side by side, zeros in place of keys behind the sequence's end (0x7F is NaN), and the halves are B words of two tiles of O: even and odd
elements of a chunk of 16 (`fragments.NarrowFragment`).

A stage is released when every word of it has come: ptxas lets an arrival overtake an ldmatrix (`decode/consumer_warps.py`, Note [Release]),
as it did here, so the arrival's address takes a word of each. Q is released behind the barrier that its first scores precede.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.decode_entry import Entry, StepTensors, entry_of
from fa4_backend.kernels.common.fp8 import e4m3_to_float16, scaled_to_float16
from fa4_backend.kernels.common.mask import Columns, MaskValues
from fa4_backend.kernels.common.online_softmax import update_max
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.common.warp_mma import load_matrices, mma, pack_pair, permute_bytes, quad_max
from fa4_backend.kernels.common.wgmma_fragment import FP8_LIFT, RowStats, log2_scale
from fa4_backend.kernels.mla_decode.config import (
    NARROW_WARPS,
    PART_DIM,
    PART_ELEMS,
    PARTS,
    TILE_N,
    WARP_ROWS,
    MlaDecodeConfig,
)
from fa4_backend.kernels.mla_decode.fragments import NarrowFragment, narrow_warp
from fa4_backend.kernels.mla_decode.merge import Merge, ResultTensors, Scales
from fa4_backend.kernels.mla_decode.storage import MlaStorage, SharedTensors
from fa4_backend.kernels.mla_decode.work import MlaWork
from fa4_backend.kernels.schedule.work_list import NUM_ENTRIES

CHUNK = 16  # elements of a product
PART_CHUNKS = PART_DIM // CHUNK
WARP_KEYS = TILE_N // NARROW_WARPS
KEY_STEPS = TILE_N // CHUNK
Q_WORDS = 4 * PART_CHUNKS * PARTS  # a lane's words of Q
CHAINS = 4  # sums of scores side by side, one for each chunk of a part, so that a product waits for a quarter of those before it
GROWTH = 7.0  # log2 units that a row's largest score grows before its reference moves
# Nibbles of a prmt's selector, of each of two keys: nibbles 0 and 2 take the first one's elements, 1 and 3 the second one's, or zeros.
KEPT, DROPPED = (0x0100, 0x3020), (0x0404, 0x4040)


class Rows(NamedTuple):
    """This lane's two rows of an entry."""

    columns: tuple[Columns, Columns]
    scales: tuple[Float32, Float32]  # of raw scores, to log2 units


@dataclass(frozen=True)
class NarrowWarps:
    """Role of warpgroups 1 and 2."""

    config: MlaDecodeConfig
    storage: MlaStorage
    work: MlaWork
    merge: Merge

    @cute.jit
    def run(self, step: StepTensors, values: MaskValues, results: ResultTensors, shared: SharedTensors):
        """Work off the CTA's entries, then add up this CTA's share of split row groups."""
        fragment = NarrowFragment()
        stats = RowStats(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
        totals = RowStats(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
        rQ = cute.make_rmem_tensor(Q_WORDS, Int32)
        rO = cute.make_rmem_tensor(fragment.num_values, Float32)
        latent_scale = Float32(results.mScale[0])
        scales = Scales(None, latent_scale)
        kv, q_phase = RingPosition(Int32(0), Int32(0)), Int32(0)
        num_pending, turn = Int32(0), Int32(0)
        num_entries = step.mFirst[self.work.list_idx(), NUM_ENTRIES]
        for _ in cutlass.range(num_entries, unroll=1):
            cute.arch.mbarrier_wait(shared.barriers.q_full, q_phase)
            q_phase ^= 1
            entry = entry_of(lambda field: shared.sEntry[field], step.bounds)
            blocks = self.work.blocks(entry, values)
            rows = self._rows(entry, values, self._load_query(shared, rQ), log2_scale(values.softmax_scale, latent_scale))
            first_piece, last_piece = self.work.pieces(entry, step.split_blocks)
            totals.row_max.fill(-Float32.inf)
            totals.row_sum.fill(0.0)
            has_query = Boolean(True)
            for piece in cutlass.range(first_piece, last_piece, unroll=1):
                begin, end = self.work.piece_blocks(piece, blocks, step.split_blocks)
                rO.fill(0.0)
                stats.row_max.fill(-Float32.inf)
                stats.row_sum.fill(0.0)
                before = kv
                for n_block in cutlass.range(begin, end, unroll=1):
                    seen = self._scores(n_block, rows, rQ, kv, turn, shared)
                    self.merge.meet()
                    if n_block > begin:
                        read = self._accumulate(rO, before, Int32(TILE_N), turn ^ 1, shared)
                        self._release(before, read, shared)
                    self._weigh(seen, rO, stats, turn, shared)
                    before = kv
                    kv = advance(kv, self.config.kv_stage)
                    turn ^= 1
                    if has_query:
                        has_query = Boolean(False)
                        self._arrive(shared.barriers.q_empty)
                self.merge.meet()
                if begin < end:
                    # Other blocks lie before the sequence's end.
                    read = self._accumulate(rO, before, entry.seqlen.seqlen_k - (end - 1) * TILE_N, turn ^ 1, shared)
                    self._release(before, read, shared)
                self.merge.finish_piece(
                    fragment, entry, piece - first_piece, piece == last_piece - 1, turn, rO, stats, totals, scales, shared, results
                )
                turn ^= 1
            if has_query:
                self._arrive(shared.barriers.q_empty)
            if entry.partial_slot >= 0:
                self.merge.postpone(entry, last_piece - first_piece, num_pending, shared)
                num_pending += 1
        if num_pending > 0:
            self.merge.join_parts(num_pending, step, scales, shared, results)

    def _load_query(self, shared: SharedTensors, rQ: cute.Tensor) -> tuple[Float32, Float32]:
        """A words of all chunks; what the lane's two rows were divided by. Rows that no box brought repeat the last one."""
        c = self.config
        lane = cute.arch.lane_idx()
        pair = lane % 4
        factors = []
        for half in range(2):
            row = cutlass.min(lane // 4 + 8 * half, c.rows - 1)
            line = shared.q.toint() + row * (PART_DIM * c.element_bytes) + pair % 2 * 8
            words = []
            for part in range(PARTS):
                for chunk in range(PART_CHUNKS):
                    within = ((2 * chunk + pair // 2) ^ (row % 8)) * 16
                    words += ptx.load_shared_i32x2(line + part * c.q_part_bytes + within)
            factor = Float32(1.0)
            if c.dtype == "bfloat16":
                words, factor = scaled_to_float16(words, 4)
            factors.append(factor)
            for k in range(PARTS * PART_CHUNKS):
                for i in range(2):
                    rQ[4 * k + 2 * i + half] = words[2 * k + i]
        return factors[0], factors[1]

    def _rows(self, entry: Entry, values: MaskValues, factors: tuple[Float32, Float32], scale: Float32) -> Rows:
        columns = []
        for half in range(2):
            packed = self.work.row(self.work.first_row(entry) + cute.arch.lane_idx() // 4 + 8 * half, entry.seqlen)
            columns.append(self.work.mask.columns(packed.token, entry.seqlen, values))
        # Powers of two: exact.
        return Rows((columns[0], columns[1]), (scale * factors[0], scale * factors[1]))

    @cute.jit
    def _scores(
        self, n_block: Int32, rows: Rows, rQ: cute.Tensor, kv: RingPosition, turn: Int32, shared: SharedTensors
    ) -> tuple[Float32, Float32, Float32, Float32]:
        """Scores of this warp's 8 keys in log2 units, -inf where a row does not see the key: two neighbouring keys of each row half. The
        largest of each row to shared memory."""
        warp, lane = narrow_warp(), cute.arch.lane_idx()
        cute.arch.mbarrier_wait(shared.barriers.kv_full[0] + kv.slot, kv.phase)
        sums = self._products(shared.kv.toint() + kv.slot * self.config.stage_bytes, rQ, warp, lane)
        first = n_block * TILE_N + warp * WARP_KEYS + 2 * (lane % 4)
        seen = []
        for half in cutlass.range_constexpr(2):
            begin, end = rows.columns[half].begin, rows.columns[half].end
            for e in cutlass.range_constexpr(2):
                score = ptx.mul_rn(sums[2 * half + e], rows.scales[half])
                seen.append(cutlass.select_((first + e >= begin) & (first + e < end), score, -Float32.inf))
            largest = quad_max(cute.arch.fmax(seen[2 * half], seen[2 * half + 1]))
            if lane % 4 == 0:
                shared.sReference[turn, lane // 4 + 8 * half, warp] = largest
        return seen[0], seen[1], seen[2], seen[3]

    def _products(self, tile: Int32, rQ: cute.Tensor, warp: Int32, lane: Int32) -> list[Float32]:
        """Raw scores."""
        key = warp * WARP_KEYS + lane % 8
        # A lane of `load_matrices` has a row of a chunk: a part's four chunks are one instruction. Rows of 64 bytes, two a line.
        address = tile + key * PART_DIM + ((lane // 8) ^ (key // 2 % 4)) * 16
        chains = [[Float32(0.0)] * 4 for _ in range(CHAINS)]
        for part in range(PARTS):
            for i, word in enumerate(load_matrices(address + part * PART_ELEMS, transpose=False)):
                a = [rQ[4 * (PART_CHUNKS * part + i) + k] for k in range(4)]
                chains[i] = mma("float16", chains[i], a, e4m3_to_float16(word))
        return [(chains[0][e] + chains[1][e]) + (chains[2][e] + chains[3][e]) for e in range(4)]

    @cute.jit
    def _weigh(
        self,
        seen: tuple[Float32, Float32, Float32, Float32],
        rO: cute.Tensor,
        stats: RowStats,
        turn: Int32,
        shared: SharedTensors,
    ):
        """Weights to shared memory, statistics, and O to a reference that moved."""
        warp, lane = narrow_warp(), cute.arch.lane_idx()
        factors, moved = [], Boolean(False)
        for half in cutlass.range_constexpr(2):
            row = lane // 4 + 8 * half
            maxima = [
                value
                for k in range(0, NARROW_WARPS, 4)
                for value in ptx.load_shared_f32x4(
                    shared.sReference.iterator.toint() + (turn * WARP_ROWS + row) * (NARROW_WARPS * 4) + 4 * k
                )
            ]
            largest = maxima[0]
            for value in maxima[1:]:
                largest = cute.arch.fmax(largest, value)
            update = update_max(largest - FP8_LIFT, stats.row_max[half], may_be_empty=True, is_first=False, threshold=GROWTH)
            # Rows of no token may be NaN, which compares false.
            moved = moved | (update.row_max > stats.row_max[half])
            stats.row_max[half] = update.row_max
            weights = [cute.math.exp2(seen[2 * half + e] - update.offset, fastmath=True) for e in range(2)]
            stats.row_sum[half] = cute.math.fma(stats.row_sum[half], update.factor, weights[0] + weights[1])
            # P: row, chunk of 8 keys (a warp's), word; a row's chunks are swizzled with its number.
            where = self._weights_at(turn, shared) + row * (TILE_N * 2) + (warp ^ (row % 8)) * 16 + lane % 4 * 4
            ptx.store_shared_i32(where, pack_pair("float16", weights[0], weights[1]))
            factors.append(update.factor)
        if cute.arch.vote_any_sync(moved):
            for j in cutlass.range_constexpr(cute.size(rO)):
                rO[j] = rO[j] * factors[j // 2 % 2]

    def _weights_at(self, turn: Int32, shared: SharedTensors) -> Int32:
        """Address of a block's weights: blocks take turns."""
        return shared.p.toint() + turn * (WARP_ROWS * TILE_N * 2)

    def _accumulate(self, rO: cute.Tensor, kv: RingPosition, num_keys: Int32, turn: Int32, shared: SharedTensors) -> Int32:
        """O += P V of this warp's 64 columns; keys from `num_keys` on count as zeros. Returns a word made of all that V's loads brought."""
        warp, lane = narrow_warp(), cute.arch.lane_idx()
        row = lane % 16
        p_line, p_chunk = self._weights_at(turn, shared) + row * (TILE_N * 2), lane // 16
        part, read = shared.kv.toint() + kv.slot * self.config.stage_bytes + warp * PART_ELEMS, Int32(0)
        for step in range(KEY_STEPS):
            p = load_matrices(p_line + ((2 * step + p_chunk) ^ (row % 8)) * 16, transpose=False)
            key = CHUNK * step + lane % 16
            line = part + key * PART_DIM
            kept = [self._keep_pair(CHUNK * step + 8 * i + 2 * (lane % 4), num_keys) for i in range(2)]
            for half in range(PART_CHUNKS // 2):
                words = load_matrices(line + ((2 * half + lane // 16) ^ (key // 2 % 4)) * 16, transpose=True)
                read = read ^ words[0]
                halves = [e4m3_to_float16(permute_bytes(words[i], kept[i % 2])) for i in range(4)]
                for i in range(2):
                    for parity in range(2):
                        at = 4 * (2 * (2 * half + i) + parity)
                        o = mma("float16", [rO[at + e] for e in range(4)], p, (halves[2 * i][parity], halves[2 * i + 1][parity]))
                        for e in range(4):
                            rO[at + e] = o[e]
        return read

    def _keep_pair(self, key: Int32, num_keys: Int32) -> Int32:
        """The selector that puts the elements of keys `key` and `key + 1` side by side, zeros for one that is none of the sequence's."""
        words = [cutlass.select_(key + i < num_keys, Int32(KEPT[i]), Int32(DROPPED[i])) for i in range(2)]
        return words[0] | words[1]

    def _release(self, kv: RingPosition, read: Int32, shared: SharedTensors) -> None:
        """This warp has read a stage. Products of it may still be to come, and nothing else waits for their ldmatrix."""
        self._arrive(shared.barriers.kv_empty[0] + kv.slot + ptx.zero_after(read))

    @cute.jit
    def _arrive(self, barrier: cute.Pointer):
        """One arrival of the warp, behind what all its lanes did."""
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(barrier)
