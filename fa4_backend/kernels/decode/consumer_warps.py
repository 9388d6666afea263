"""The consumer warps: each attends 16 packed rows to the 16 keys of one box of every KV tile.

Four key warps share a row group's tiles, so a tile is touched once by each; nothing passes between warps until the
entry (or a piece of it) ends and `merge` adds them up. S, P and O live in registers; Q, K and V come as `operands` say.

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

from fa4_backend.kernels.common.decode_entry import StepTensors, entry_of
from fa4_backend.kernels.common.fp8 import result_factor
from fa4_backend.kernels.common.mask import Columns, MaskValues
from fa4_backend.kernels.common.online_softmax import update_max
from fa4_backend.kernels.common.part_arrivals import NOTHING
from fa4_backend.kernels.common.ring import RingPosition
from fa4_backend.kernels.common.warp_mma import mma, pack_pair, quad_max
from fa4_backend.kernels.decode.config import BOX_KEYS, BOXES, ENTRY_STAGE, MMA_ROWS, TILE_N, DecodeConfig
from fa4_backend.kernels.decode.merge import Merge, ResultTensors, RowState, scale_of
from fa4_backend.kernels.decode.operands import Operands
from fa4_backend.kernels.decode.scores import RowView, ScoreTransform
from fa4_backend.kernels.decode.shares import Shares
from fa4_backend.kernels.decode.storage import DecodeStorage, SharedTensors
from fa4_backend.kernels.decode.work import VisibleTiles
from fa4_backend.kernels.schedule.work_list import NUM_ENTRIES


@dataclass(frozen=True)
class ConsumerWarps:
    """Role of warps 0 .. num_consumer_warps - 1; warp = row group * BOXES + key warp."""

    config: DecodeConfig
    storage: DecodeStorage
    visible: VisibleTiles
    scores: ScoreTransform
    operands: Operands
    merge: Merge
    shares: Shares

    @cute.jit
    def run(
        self,
        step: StepTensors,
        values: MaskValues,
        mSlopes: cute.Tensor | None,  # (num_q_heads,) float32
        mQScale: cute.Tensor | None,  # (num_kv_heads,) float32: a query is what is given times it
        mKScale: cute.Tensor | None,  # (num_kv_heads,) float32: K is the stored value times it
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
            factors = self.operands.load_query(self.storage.q_tile(shared, stage), row_group, rQ)
            score_scales = [scale_of(mScale, entry.kv_head_idx) for mScale in (mQScale, mKScale) if const_expr(mScale is not None)]
            factor = result_factor(results.mVScale, results.mOutScale, entry.kv_head_idx)
            begin, end = self.visible.clip(entry, values)
            keys = self.visible.keys(entry, values)
            scales = self._row_scales(factors, score_scales, values)
            rows = tuple(self.scores.row(first_row + 8 * h, entry.seqlen, entry.kv_head_idx, values, mSlopes, scales[h]) for h in (0, 1))
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
                self.merge.finish_piece(entry, piece - first_piece, shared, totals, factor, results)
            if entry.partial_slot >= 0:
                self.merge.postpone(entry, last_piece - first_piece, num_pending, shared)
                num_pending += 1
            else:
                self.merge.finish_whole(entry, totals, factor, results)
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
                share = shared.sShare[pending]
                if share != NOTHING:
                    entry = entry_of(lambda field: shared.sPending[pending, field], step.bounds)  # noqa: B023
                    is_shared = Boolean(False)
                    if const_expr(not c.has_pieces):
                        is_shared = self.merge.is_shared(entry.num_pieces)
                        if is_shared:
                            self.shares.add_up(entry, share, results)
                    if not is_shared:
                        if pending > 0:
                            self.merge.join()
                        ring = self.merge.combine(entry, ring, totals, shared, results)

    @cute.jit
    def _attend(
        self,
        k_box: Int32,  # shared address
        v_box: Int32,  # shared address
        column: Int32,  # first of the box's 16 keys
        keys: Columns,  # that any row may see
        rows: tuple[RowView, RowView],
        values: MaskValues,
        rQ: cute.Tensor,  # (head_dim / 4,) words of Q
        state: RowState,
    ):
        """One box: S = Q K^T, weights, O += P V."""
        c = self.config
        pair = cute.arch.lane_idx() % 4
        product = const_expr(self.operands.product_dtype)
        # Keys 0-7 and 8-15; in two chains even and odd chunks apart, so that a product waits for half as many before it.
        chains = const_expr(c.score_chains)
        sums = [[[Float32(0.0)] * 4, [Float32(0.0)] * 4] for _ in range(chains)]
        for chunk, (a, b) in enumerate(self.operands.score_products(k_box, rQ)):
            chain = chunk % chains
            sums[chain] = [mma(product, sums[chain][i], a, b[i]) for i in range(2)]
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
            if const_expr(self.operands.weights.largest > 0):
                block_max = block_max - self.operands.weights.largest
            update = update_max(block_max, state.rMax[h], may_be_empty=True, is_first=False, threshold=self.operands.weights.growth)
            weights = [cute.math.exp2(score - update.offset, fastmath=True) for score in seen]
            # Rows that saw no key yet stay as they are: idle rows would otherwise ask for a rescale at every tile.
            moved = moved | (update.row_max > state.rMax[h])
            state.rMax[h] = update.row_max
            state.rSum[h] = cute.math.fma(state.rSum[h], update.factor, (weights[0] + weights[1]) + (weights[2] + weights[3]))
            p[h] = pack_pair(product, weights[0], weights[1])
            p[2 + h] = pack_pair(product, weights[2], weights[3])
            factors.append(update.factor)

        if cute.arch.vote_any_sync(moved):
            for i in cutlass.range_constexpr(c.head_dim_v // 2):
                state.rO[i] = state.rO[i] * factors[i // 2 % 2]

        # Other keys hold anything, NaN too: their weight 0 does not silence it, so their V is cleared.
        for tile, b in self.operands.value_products(v_box, lambda half: self._keep_pair(column + 8 * half + 2 * pair, keys)):
            o = mma(product, [state.rO[4 * tile + e] for e in range(4)], p, b)
            for e in cutlass.range_constexpr(4):
                state.rO[4 * tile + e] = o[e]

    def _keep_pair(self, key: Int32, keys: Columns) -> Int32:
        """What keeps V of keys `key` and `key + 1` where they are in `keys`."""
        return self.operands.keep(0, self.visible.has_any(keys, key, 1)) | self.operands.keep(1, self.visible.has_any(keys, key + 1, 1))

    def _row_scales(
        self, factors: tuple[Float32, Float32] | None, score_scales: list[Float32], values: MaskValues
    ) -> tuple[Float32, Float32]:
        """What multiplies the raw scores of the lane's two rows: the softmax's scale, Q's and K's, and what Q was divided by."""
        scale = values.softmax_scale
        for factor in score_scales:
            scale = scale * factor
        return (scale, scale) if factors is None else (scale * factors[0], scale * factors[1])
