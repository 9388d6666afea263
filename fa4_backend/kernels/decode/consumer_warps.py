"""The consumer warps: each attends 16 packed rows to the 16 keys of one box of every KV tile.

Four key warps share a row group's tiles, so a tile is touched once by each; nothing passes between warps until the
entry (or a piece of it) ends and `merge` adds them up. S, P and O live in registers; Q, K and V come by ldmatrix.

Note [Release]. An ldmatrix is in flight until something uses its registers, and ptxas lets an mbarrier arrival overtake it:
on an H200, TMA overwrote the Q of short entries while ldmatrix, slow on 8-way bank conflicts, still read it (rows of 8 and more
packed queries, CTAs with many entries of one or two tiles). So a slot is released only when mma.sync has used every word read
from it. `tests/emulated/test_decode_sass.py` holds the compiled kernels to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass._mlir.dialects import vector

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.mask import Columns, MaskValues
from fa4_backend.kernels.common.online_softmax import update_max
from fa4_backend.kernels.common.ring import RingPosition
from fa4_backend.kernels.decode.config import BOX_KEYS, BOXES, ENTRY_STAGE, MMA_ROWS, TILE_N, DecodeConfig
from fa4_backend.kernels.decode.merge import Merge, ResultTensors, RowState
from fa4_backend.kernels.decode.scores import RowView, ScoreTransform
from fa4_backend.kernels.decode.storage import DecodeStorage, SharedTensors
from fa4_backend.kernels.decode.warp_mma import BoxLayout, load_matrices, mma
from fa4_backend.kernels.decode.work import StepTensors, VisibleTiles, entry_of
from fa4_backend.kernels.schedule.work_list import NUM_ENTRIES

RESCALE_THRESHOLD = 8.0  # log2 units a row's maximum may grow before O is rescaled; weights reach 2^8, exact in the end


@dataclass(frozen=True)
class ConsumerWarps:
    """Role of warps 0 .. num_consumer_warps - 1; warp = row group * BOXES + key warp."""

    config: DecodeConfig
    storage: DecodeStorage
    visible: VisibleTiles
    scores: ScoreTransform
    merge: Merge

    @cute.jit
    def run(
        self,
        step: StepTensors,
        values: MaskValues,
        mSlopes: cute.Tensor | None,  # (num_q_heads,) float32
        results: ResultTensors,
        shared: SharedTensors,
    ):
        """Work off this CTA's entries: waits for an entry and its Q, then for each tile; attends; releases both.

        Meets the load warp once, at the barrier after which mbarriers may be used.
        """
        c = self.config
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        cta, _, _ = cute.arch.block_idx()
        key_warp, row_group = warp % BOXES, warp // BOXES
        first_row = row_group * MMA_ROWS + lane // 4
        state = RowState(
            cute.make_rmem_tensor(c.head_dim_v // 2, Float32), cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        )
        rQ = cute.make_rmem_tensor(c.head_dim // 4, Int32)
        totals = self.merge.make_totals()
        slot, phase = Int32(0), Int32(0)
        stage, entry_phase = Int32(0), Int32(0)
        num_pending = Int32(0)
        num_entries = step.mFirst[cta, NUM_ENTRIES]
        cute.arch.sync_threads()
        for _ in cutlass.range(num_entries, unroll=1):
            cute.arch.mbarrier_wait(shared.entry_full + stage, entry_phase)
            entry = entry_of(lambda field: shared.sEntry[stage, field], step.bounds)  # noqa: B023 (called at once)
            self._load_query(self.storage.q_tile(shared, stage), row_group, rQ)
            begin, end = self.visible.clip(entry, values)
            keys = self.visible.keys(entry, values)
            rows = tuple(self.scores.row(first_row + 8 * h, entry.seqlen, entry.kv_head_idx, values, mSlopes) for h in (0, 1))
            self.merge.reset(totals)
            first_piece, last_piece = self.merge.pieces(entry, step.split_blocks)
            for piece in cutlass.range(first_piece, last_piece, unroll=1):
                state.rO.fill(0.0)
                state.rMax.fill(-Float32.inf)
                state.rSum.fill(0.0)
                piece_begin, piece_end = self.merge.piece_tiles(piece, begin, end, step.split_blocks)
                for n_block in cutlass.range(piece_begin, piece_end, unroll=1):
                    cute.arch.mbarrier_wait(shared.kv_full + slot, phase)
                    column = n_block * TILE_N + key_warp * MMA_ROWS
                    if self.visible.has_any(keys, column, BOX_KEYS):
                        k_box = self.storage.k_box(shared, slot, key_warp)
                        v_box = self.storage.v_box(shared, slot, key_warp)
                        self._attend(k_box, v_box, column, keys, rows, values, rQ, state)
                    cute.arch.sync_warp()
                    if lane == 0:
                        cute.arch.mbarrier_arrive(shared.kv_empty + slot)
                    slot += 1
                    if slot == c.kv_stage:
                        slot = Int32(0)
                        phase ^= 1
                self.merge.meet(state, shared)
                self.merge.finish_piece(entry, piece - first_piece, shared, totals, results)
            if entry.partial_slot >= 0:
                self.merge.postpone(entry, last_piece - first_piece, num_pending, shared)
                num_pending += 1
            else:
                self.merge.finish_whole(entry, totals, results)
            # Not before: see Note [Release].
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(shared.entry_empty + stage)
            stage += 1
            if stage == ENTRY_STAGE:
                stage = Int32(0)
                entry_phase ^= 1
        if num_pending > 0:
            self.merge.arrive(num_pending, shared, results)
            ring = RingPosition(Int32(0), Int32(0))
            for pending in cutlass.range(num_pending, unroll=1):
                if shared.sFlag[pending] == 1:
                    if pending > 0:
                        self.merge.join()
                    entry = entry_of(lambda field: shared.sPending[pending, field], step.bounds)  # noqa: B023
                    ring = self.merge.combine(entry, ring, totals, shared, results)

    @cute.jit
    def _load_query(self, q_address: Int32, row_group: Int32, rQ: cute.Tensor):
        """A fragments of this warp's 16 packed rows; idle rows repeat the last one and are masked."""
        c = self.config
        lane = cute.arch.lane_idx()
        row = cutlass.min(row_group * MMA_ROWS + lane % 16, c.rows - 1)
        part_bytes = const_expr(c.part_elems(c.head_dim) * c.element_bytes)
        for step in cutlass.range_constexpr(c.head_dim // 16):
            part, within = const_expr(divmod(32 * step, part_bytes))
            line = (part * c.rows + row) * part_bytes
            chunk = within + lane // 16 * 16
            words = load_matrices(q_address + line + (chunk ^ ((line // 128) % (part_bytes // 16) * 16)), transpose=False)
            for i in cutlass.range_constexpr(4):
                rQ[4 * step + i] = words[i]

    @cute.jit
    def _attend(
        self,
        k_box: Int32,
        v_box: Int32,
        column: Int32,  # first of the box's 16 keys
        keys: Columns,  # that any row may see
        rows: tuple[RowView, RowView],
        values: MaskValues,
        rQ: cute.Tensor,
        state: RowState,
    ):
        """One box: S = Q K^T, weights, O += P V."""
        c = self.config
        lane = cute.arch.lane_idx()
        pair = lane % 4
        k_layout = const_expr(BoxLayout(c.part_elems(c.head_dim) * c.element_bytes))
        v_layout = const_expr(BoxLayout(c.part_elems(c.head_dim_v) * c.element_bytes))
        k_address = k_box + k_layout.key_matrices(lane)
        # Keys 0-7 and 8-15; in two chains even and odd steps apart, so that a product waits for half as many before it.
        chains = const_expr(c.score_chains)
        sums = [[[Float32(0.0)] * 4, [Float32(0.0)] * 4] for _ in range(chains)]
        for step in cutlass.range_constexpr(c.head_dim // 16):
            words = load_matrices(k_layout.step_address(k_address, step), transpose=False)
            a = [rQ[4 * step + i] for i in range(4)]
            chain = step % chains
            sums[chain] = [mma(c.dtype, sums[chain][i], a, (words[2 * i], words[2 * i + 1])) for i in range(2)]
        halves = sums[0]
        if const_expr(chains == 2):
            halves = [[sums[0][i][e] + sums[1][i][e] for e in range(4)] for i in range(2)]

        factors, p, moved = [], [None] * 4, Boolean(False)
        for h in cutlass.range_constexpr(2):
            seen = []
            for i in cutlass.range_constexpr(4):
                key = column + 8 * (i // 2) + 2 * pair + i % 2
                seen.append(self.scores.apply(halves[i // 2][2 * h + i % 2], key, rows[h], values))
            block_max = quad_max(cute.arch.fmax(cute.arch.fmax(seen[0], seen[1]), cute.arch.fmax(seen[2], seen[3])))
            update = update_max(
                block_max, state.rMax[h], may_be_empty=True, is_first=False, threshold=RESCALE_THRESHOLD
            )  # fmt: skip
            weights = [cute.math.exp2(score - update.offset, fastmath=True) for score in seen]
            # Rows that saw no key yet stay as they are: idle rows would otherwise ask for a rescale at every tile.
            moved = moved | (update.row_max > state.rMax[h])
            state.rMax[h] = update.row_max
            state.rSum[h] = cute.math.fma(state.rSum[h], update.factor, (weights[0] + weights[1]) + (weights[2] + weights[3]))
            p[h] = pack_pair(c.dtype, weights[0], weights[1])
            p[2 + h] = pack_pair(c.dtype, weights[2], weights[3])
            factors.append(update.factor)

        if cute.arch.vote_any_sync(moved):
            for i in cutlass.range_constexpr(c.head_dim_v // 2):
                state.rO[i] = state.rO[i] * factors[i // 2 % 2]

        v_address = v_box + v_layout.value_matrices(lane)
        # Other keys hold anything, NaN too: their weight 0 does not silence it, so their V is cleared.
        keep = (self._keep_pair(column + 2 * pair, keys), self._keep_pair(column + 8 + 2 * pair, keys))
        self._add_values(v_address, v_layout, p, keep, state)

    @cute.jit
    def _add_values(self, v_address: Int32, v_layout: cutlass.Constexpr, p, keep, state: RowState):
        """O += P V. keep: bits to keep of the words that hold keys 0-7 and 8-15, None: all."""
        c = self.config
        for step in cutlass.range_constexpr(c.head_dim_v // 16):
            words = load_matrices(v_layout.step_address(v_address, step), transpose=True)
            if const_expr(keep is not None):
                words = [words[i] & keep[i % 2] for i in range(4)]
            for i in cutlass.range_constexpr(2):
                at = 8 * step + 4 * i
                o = mma(c.dtype, [state.rO[at + e] for e in range(4)], p, (words[2 * i], words[2 * i + 1]))
                for e in cutlass.range_constexpr(4):
                    state.rO[at + e] = o[e]

    def _keep_pair(self, key: Int32, keys: Columns) -> Int32:
        """Bits to keep of a word that holds V of keys `key` and `key + 1`."""
        low = cutlass.select_(self.visible.has_any(keys, key, 1), Int32(0xFFFF), Int32(0))
        high = cutlass.select_(self.visible.has_any(keys, key + 1, 1), Int32(-65536), Int32(0))
        return low | high


def quad_max(value: Float32) -> Float32:
    """Largest value of the four lanes that hold a row."""
    for offset in (1, 2):
        value = cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset))
    return value


def pack_pair(dtype: str, low: Float32, high: Float32) -> Int32:
    """Two weights rounded to the element type, in one word."""
    values = vector.from_elements(ptx.vec(2), [Float32(low).ir_value(), Float32(high).ir_value()])
    return Int32(vector.extract(ptx.pack_16bit(values, dtype), [], [0]))
