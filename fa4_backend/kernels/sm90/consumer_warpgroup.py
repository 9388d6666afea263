"""A consumer warpgroup: 64 packed query rows of each tile, both products, the softmax and the store.

One KV block j of the loop, with O in registers all along:

    my turn:  S = Q K(j+1)^T   (wgmma, asynchronous)
              O += P(j) V(j)   (wgmma, asynchronous)   -> the other warpgroup's turn
    S ready:  P' = softmax(S), while O += P V still runs, and while the other warpgroup's products run
    O ready:  rescale O, P = P' in 16 bits

So the tensor cores see two warpgroups in ping-pong, and each one overlaps its own softmax with its own second product.

The blocks of all tiles of a CTA are one stream: the first scores of a tile take their turn together with the last product of the tile
before, whose O is written while the other warpgroup's products run. Behind the last tile stands an empty one (`load_warp.py`), of which
no scores are made.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.block_info import BlockInfo, BlockRange
from fa4_backend.kernels.common.fragment_store import store_fragment, store_fragment_fp8
from fa4_backend.kernels.common.mask import Columns, MaskValues
from fa4_backend.kernels.common.online_softmax import LOG2_E, finalize_row
from fa4_backend.kernels.common.output_store import OutputStore
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.part_arrivals import NOTHING
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.common.seqlen_info import MAX_INT32, SeqlenInfo
from fa4_backend.kernels.common.tile_scheduler import TilePart, WorkTile
from fa4_backend.kernels.common.wgmma_fragment import FIXED_CAP, FP8_LIFT, CapScale, RowFragment, RowStats, ScoreScale, log2_scale, quad_sum
from fa4_backend.kernels.sm90.arguments import Outputs
from fa4_backend.kernels.sm90.part_shares import PartShares, RowEnds
from fa4_backend.kernels.sm90.query_rows import QueryRows
from fa4_backend.kernels.sm90.storage import IS_TILE, K_SCALE, O_FACTOR, WORK_FLAGS, Barriers, Storage, tensor_at
from fa4_backend.kernels.sm90.tile_parts import TileParts
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WGMMA_ROWS, WarpRoles, has_own_slots


class SharedTiles(NamedTuple):
    """Shared memory as a consumer sees it."""

    q: cute.Pointer  # q_stage buffers
    kv: cute.Pointer
    sWork: cute.Tensor  # (WORK_INTS, WORK_STAGE) int32
    sRowScales: cute.Tensor | None  # (tile_m, WORK_STAGE) float32: what a row of Q was divided by; None: Q is as it came


class Products(NamedTuple):
    """Operands of both products of this warpgroup."""

    qk: cute.TiledMma
    pv: cute.TiledMma
    tSrQ: cute.Tensor  # last mode: Q buffer
    tSrK: cute.Tensor  # last mode: slot
    tOrVt: cute.Tensor  # last mode: slot
    rP: cute.Tensor  # A operand of the second product, 16 bits
    rO: cute.Tensor  # float32


class Turn(NamedTuple):
    """This warpgroup's place in the order in which warpgroups issue products."""

    mine: Int32  # named barrier I wait on
    next: Int32  # named barrier of the warpgroup after me


class TileState(NamedTuple):
    """A tile, its KV blocks, and what its rows need of the sequence: their keys and their bias."""

    is_tile: Int32  # 0: the empty one behind the last
    work: WorkTile
    blocks: BlockRange
    columns: tuple[Columns, Columns]  # of this thread's two rows
    diagonals: tuple[Int32, Int32]  # key on the diagonal of each row
    slopes: tuple[Float32, Float32]  # ALiBi slope of each row, times log2(e)
    softmax_scales: tuple[Float32, Float32]  # multiply raw scores of each row; K's scale and that of the row's Q included
    log2_scales: tuple[Float32, Float32]  # the same times log2(e), where K and V are FP8
    scale: ScoreScale  # of the call: no other scale included


@dataclass(frozen=True)
class ConsumerWarpgroup:
    """Role of warpgroups 1 and up."""

    config: PrefillConfig
    roles: WarpRoles
    storage: Storage
    blocks: BlockInfo
    pack: PackGqa
    output: OutputStore
    parts: TileParts
    shares: PartShares
    query_rows: QueryRows

    @cute.jit
    def run(
        self,
        qk: cute.TiledMma,
        pv: cute.TiledMma,
        tiles: SharedTiles,
        barriers: Barriers,
        values: MaskValues,
        outputs: Outputs,
    ):
        """Compute every tile of this CTA."""
        c, stages = self.config, self.config.tile.kv_stage
        thread = cute.arch.thread_idx()[0] - 32 * self.roles.first_consumer_warp
        group = cute.arch.make_warp_uniform(thread // WARPGROUP_THREADS)
        products = self._operands(qk, pv, tiles, group)
        fragment = RowFragment(c.tile.tile_n, c.tile.rescale_threshold, FP8_LIFT if c.has_kv_scales else 0.0)
        turn = Turn(
            self.roles.turn_barrier + group,
            self.roles.turn_barrier + cutlass.select_(group == self.roles.num_consumers - 1, Int32(0), group + 1),
        )
        if const_expr(c.tile.ping_pong):
            if group == self.roles.num_consumers - 1:
                self._give_turn(turn)
        # Where K and V are FP8 each tile has its own.
        scale = ScoreScale.of_call(values.softmax_scale)
        stats = RowStats(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
        q = RingPosition(Int32(0), Int32(0))
        tile = self._next_tile(tiles, barriers, q, values, scale, outputs, group, thread)
        if tile.is_tile == 1:
            # The stream's first block: nothing to overlap with yet.
            position = RingPosition(Int32(0), Int32(0))
            cute.arch.mbarrier_wait(barriers.kv_full + position.slot, position.phase)
            rS = self._scores(products, q.slot, position.slot)
            warpgroup.wait_group(0)
            self._release(barriers.kv_empty + position.slot)
            self._release_read_query(barriers.q_empty + q.slot, tile.blocks, tile.blocks.end - 1)
            position = advance(position, stages)
            if const_expr(has_own_slots(c)):
                self._release(barriers.kv_empty + position.slot)  # the stage that stays empty once
                position = advance(position, stages)
            self._first_weights(fragment, rS, stats, tile, values)
            fragment.to_operand(rS, products.rP)
            products.rO.fill(0.0)
            if const_expr(not c.has_kv_scales):
                self._clear_tail(tiles, barriers, position, tile, thread)
            while tile.is_tile == 1:
                # From the tile's second block down to its first key: masked on the right, whole, masked on the left.
                blocks = tile.blocks
                n_block = blocks.end - 1
                full_end = cutlass.max(blocks.full_end, blocks.begin)
                full_begin = cutlass.min(cutlass.max(blocks.full_begin, blocks.begin), full_end)
                if const_expr(c.may_fix_reference):
                    # A row may see its first key in the first whole block, unless that is the tile's first.
                    full_end = cutlass.select_(full_end < blocks.end, cutlass.max(full_end - 1, full_begin), full_end)
                num_right = cutlass.max(n_block - full_end, 0)
                for _ in cutlass.range(num_right, unroll=1):
                    n_block -= 1
                    position = self._block(products, fragment, stats, barriers, position, q, turn, n_block, values, tile, True)
                num_full = cutlass.max(cutlass.min(n_block, full_end) - full_begin, 0)
                for _ in cutlass.range(num_full, unroll=1):
                    n_block -= 1
                    position = self._block(products, fragment, stats, barriers, position, q, turn, n_block, values, tile, False)
                if const_expr(self.blocks.mask.has_left):
                    for _ in cutlass.range(n_block - blocks.begin, unroll=1):
                        n_block -= 1
                        position = self._block(products, fragment, stats, barriers, position, q, turn, n_block, values, tile, True)
                # Then into the next tile: its first scores with this tile's last product.
                q_next = advance(q, c.tile.q_stage)
                next_tile = self._next_tile(tiles, barriers, q_next, values, scale, outputs, group, thread)
                after = advance(position, stages)
                if const_expr(self.blocks.mask.has_left and not c.has_kv_scales):
                    self._clear_head(tiles, barriers, after, tile, values, thread)
                next_stats = RowStats(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
                for i in cutlass.range_constexpr(2):
                    next_stats.row_max[i], next_stats.row_sum[i] = -Float32.inf, Float32(0.0)
                if next_tile.is_tile == 1:
                    rS = self._issue_turn(products, barriers, position, after, q_next, turn)
                    warpgroup.wait_group(1)
                    self._release(barriers.kv_empty + position.slot)
                    self._first_weights(fragment, rS, next_stats, next_tile, values)
                    warpgroup.wait_group(0)
                    self._release(barriers.kv_empty + after.slot)
                    fragment.to_operand(rS, products.rP)
                else:
                    self._issue_last(products, barriers, after, turn)
                    warpgroup.wait_group(0)
                if const_expr(c.has_parts):
                    is_last = next_tile.is_tile == 0
                    self._finish_part(products, stats, self._score_scales(tile), tiles, outputs, tile.work, q, is_last, group, thread)
                else:
                    self._finish(products, stats, self._score_scales(tile), tiles, outputs, tile.work, q, group, thread)
                if const_expr(self.storage.releases_q_late):
                    self._release_query(barriers.q_empty + q.slot)
                # Not before the tile is finished, whose numbers the tile after the next will overwrite.
                self._release_read_query(barriers.q_empty + q_next.slot, next_tile.blocks, next_tile.blocks.end - 1)
                products.rO.fill(0.0)
                for i in cutlass.range_constexpr(2):
                    stats.row_max[i], stats.row_sum[i] = next_stats.row_max[i], next_stats.row_sum[i]
                position, q, tile = advance(after, stages), q_next, next_tile
                if const_expr(not c.has_kv_scales):
                    self._clear_tail(tiles, barriers, position, tile, thread)
            if const_expr(c.share_parts > 0):
                scales = self._score_scales(tile)
                work_slot = 1 - self.storage.work_slot(q)  # the empty tile has the other
                self._share_last(tiles, outputs, None if scales is None else scales[0], work_slot, group, thread)
        if const_expr(c.tile.ping_pong):
            # The last turn given is taken, so that no barrier is left half full.
            if group == 0:
                self._take_turn(turn)

    def _operands(self, qk: cute.TiledMma, pv: cute.TiledMma, tiles: SharedTiles, group: Int32) -> Products:
        c, s = self.config, self.storage
        sQ = tensor_at(cute.recast_ptr(tiles.q, dtype=s.key_dtype), s.q_layout())
        sK = tensor_at(cute.recast_ptr(tiles.kv, dtype=s.key_dtype), s.k_layout())
        sVt = tensor_at(cute.recast_ptr(tiles.kv, dtype=s.value_dtype), s.v_layout())
        first_thread = group * WARPGROUP_THREADS
        group_qk, group_pv = qk.get_slice(first_thread), pv.get_slice(first_thread)
        rO = cute.make_rmem_tensor(group_pv.partition_shape_C((c.tile.tile_m, c.head_dim_v)), Float32)
        rP = group_pv.make_fragment_A(group_pv.partition_shape_A((c.tile.tile_m, c.tile.tile_n)))
        return Products(
            qk, pv,
            group_qk.make_fragment_A(group_qk.partition_A(sQ)),
            group_qk.make_fragment_B(group_qk.partition_B(sK)),
            group_pv.make_fragment_B(group_pv.partition_B(sVt)),
            rP, rO,
        )  # fmt: skip

    @cute.jit
    def _block(
        self,
        products: Products,
        fragment: cutlass.Constexpr,
        stats: RowStats,
        barriers: Barriers,
        position: RingPosition,
        q: RingPosition,
        turn: Turn,
        n_block: Int32,
        values: MaskValues,
        tile: TileState,
        is_masked: cutlass.Constexpr[bool],
    ):
        """Scores of `n_block` while the block before it is accumulated; see the module's text. Returns the ring position after both."""
        stages = self.config.tile.kv_stage
        after = advance(position, stages)
        rS = self._issue_turn(products, barriers, position, after, q, turn)
        warpgroup.wait_group(1)
        self._release(barriers.kv_empty + position.slot)
        self._release_read_query(barriers.q_empty + q.slot, tile.blocks, n_block)
        self._transform(fragment, rS, n_block, values, tile, is_masked)
        factors = self._weights(fragment, rS, stats, tile, values, may_be_empty=is_masked, is_first=False)
        moves = Boolean(True)
        if const_expr(self.config.may_skip_rescale):
            moves = cute.arch.vote_any_sync((factors[0] != 1.0) | (factors[1] != 1.0))
        warpgroup.wait_group(0)
        self._release(barriers.kv_empty + after.slot)
        self._rescale(products, factors, moves)
        fragment.to_operand(rS, products.rP)
        return advance(after, stages)

    def _issue_turn(
        self, products: Products, barriers: Barriers, k: RingPosition, v: RingPosition, q: RingPosition, turn: Turn
    ) -> cute.Tensor:
        """In this warpgroup's turn, start S = Q K^T with the K tile at `k`, then O += P V with the V tile at `v`; returns S."""
        cute.arch.mbarrier_wait(barriers.kv_full + k.slot, k.phase)
        if const_expr(self.config.tile.ping_pong):
            self._take_turn(turn)
        rS = self._scores(products, q.slot, k.slot)
        cute.arch.mbarrier_wait(barriers.kv_full + v.slot, v.phase)
        self._accumulate(products, v.slot)
        if const_expr(self.config.tile.ping_pong):
            self._give_turn(turn)
        return rS

    def _issue_last(self, products: Products, barriers: Barriers, v: RingPosition, turn: Turn) -> None:
        """`_issue_turn` where no scores are left to make."""
        cute.arch.mbarrier_wait(barriers.kv_full + v.slot, v.phase)
        if const_expr(self.config.tile.ping_pong):
            self._take_turn(turn)
        self._accumulate(products, v.slot)
        if const_expr(self.config.tile.ping_pong):
            self._give_turn(turn)

    def _first_weights(
        self,
        fragment: RowFragment,
        rS: cute.Tensor,
        stats: RowStats,
        tile: TileState,
        values: MaskValues,
    ) -> None:
        """Weights of a tile's first block (its last keys), in place, and the tile's statistics."""
        self._transform(fragment, rS, tile.blocks.end - 1, values, tile, True)
        self._weights(fragment, rS, stats, tile, values, may_be_empty=True, is_first=True)

    def _weights(
        self,
        fragment: RowFragment,
        rS: cute.Tensor,
        stats: RowStats,
        tile: TileState,
        values: MaskValues,
        *,
        may_be_empty: bool,
        is_first: bool,
    ) -> cute.Tensor:
        """What `_transform` leaves to weights, in place, and the statistics. Returns (2,) factors of O."""
        if not self.config.may_fix_reference:
            return fragment.softmax(rS, stats, self._weight_scales(tile, values), may_be_empty=may_be_empty, is_first=is_first)
        factors = cute.make_rmem_tensor(2, Float32)
        factors.fill(1.0)
        self._capped_weights(fragment, rS, stats, factors, values, may_be_empty, is_first)
        return factors

    @cute.jit
    def _capped_weights(
        self,
        fragment: cutlass.Constexpr,
        rS: cute.Tensor,
        stats: RowStats,
        factors: cute.Tensor,
        values: MaskValues,
        may_be_empty: cutlass.Constexpr[bool],
        is_first: cutlass.Constexpr[bool],
    ):
        """Relative to the first block's reference, or to a running one where the cap is too wide for that."""
        scale = CapScale.of_call(values.softcap)
        if values.softcap <= FIXED_CAP:
            fragment.bounded_softmax(rS, stats, scale, finds_reference=may_be_empty, is_first=is_first)
        else:
            made = fragment.softmax(rS, stats, scale, may_be_empty=may_be_empty, is_first=is_first)
            factors[0], factors[1] = made[0], made[1]

    @cute.jit
    def _rescale(self, products: Products, factors: cute.Tensor, moves: Boolean):
        """Multiply O's rows by their factors; where few blocks move a reference, only if a row of the warp `moves`."""
        fragment = RowFragment(self.config.head_dim_v, 0.0)
        if const_expr(self.config.may_skip_rescale):
            if moves:
                fragment.rescale(products.rO, factors)
        else:
            fragment.rescale(products.rO, factors)

    def _score_scales(self, tile: TileState) -> tuple[ScoreScale, ScoreScale] | None:
        """Of raw logits of both rows; None where something is added to them or bounds them first."""
        c = self.config
        if c.mask.has_softcap or c.mask.has_alibi:
            return None
        return tuple(ScoreScale.of_row(x) for x in tile.log2_scales) if c.has_kv_scales else (tile.scale, tile.scale)

    def _weight_scales(self, tile: TileState, values: MaskValues) -> tuple[ScoreScale, ScoreScale] | CapScale | None:
        """From what `_transform` leaves to log2 units; None: there already."""
        is_capped = self.config.mask.has_softcap and not self.config.mask.has_alibi
        return CapScale.of_call(values.softcap) if is_capped else self._score_scales(tile)

    def _scores(self, products: Products, q_slot: Int32, slot: Int32) -> cute.Tensor:
        """Start S = Q K^T for the K tile in `slot`; S is a new float32 fragment."""
        c = self.config
        rS = cute.make_rmem_tensor(products.qk.get_slice(0).partition_shape_C((c.tile.tile_m, c.tile.tile_n)), Float32)
        _issue(products.qk, rS, products.tSrQ[None, None, None, q_slot], products.tSrK[None, None, None, slot], accumulate=False)
        return rS

    def _accumulate(self, products: Products, slot: Int32) -> None:
        """Start O += P V for the V tile in `slot`."""
        _issue(products.pv, products.rO, products.rP, products.tOrVt[None, None, None, slot], accumulate=True)

    def _release(self, empty: cute.Pointer) -> None:
        """One arrival a warp: its reads of the buffer are done."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(empty)

    @cute.jit
    def _release_read_query(self, empty: cute.Pointer, blocks: BlockRange, n_block: Int32):
        """Where Q is not released with its tile: release it when the products of the tile's last block have read it."""
        if const_expr(not self.storage.releases_q_late):
            if n_block == blocks.begin:
                cute.arch.sync_warp()  # all lanes have read the numbers of the tile before, whose place is given away too
                self._release(empty)

    def _release_query(self, empty: cute.Pointer) -> None:
        """One arrival a warp: Q was read, and O, which passed through the same buffer, has left it; the next writer is TMA."""
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        self._release(empty)

    def _take_turn(self, turn: Turn) -> None:
        cute.arch.barrier(barrier_id=turn.mine, number_of_threads=2 * WARPGROUP_THREADS)

    def _give_turn(self, turn: Turn) -> None:
        cute.arch.barrier_arrive(barrier_id=turn.next, number_of_threads=2 * WARPGROUP_THREADS)

    def _next_tile(
        self,
        tiles: SharedTiles,
        barriers: Barriers,
        q: RingPosition,
        values: MaskValues,
        scale: ScoreScale,  # of the call
        outputs: Outputs,
        group: Int32,
        thread: Int32,
    ) -> TileState:
        """Wait for the tile at `q`: its numbers, blocks, scales, and the keys, diagonals and slopes of this thread's two rows."""
        cute.arch.mbarrier_wait(barriers.q_full + q.slot, q.phase)
        if const_expr(tiles.sRowScales is not None):
            lane, barrier = thread % WARPGROUP_THREADS, self.roles.output_barrier + group
            is_tile = tiles.sWork[IS_TILE, self.storage.work_slot(q)]
            self.query_rows.to_float16(tiles.q, tiles.sRowScales, q, is_tile, group * WGMMA_ROWS, lane, barrier)
        n = [tiles.sWork[i, self.storage.work_slot(q)] for i in range(7)]
        # The sequence's index is not needed here.
        work = WorkTile(Int32(0), n[0], n[1], n[2], n[3], SeqlenInfo(n[4], n[5], n[6]))
        key_end = None
        if const_expr(self.config.has_parts):
            # A part that the layer's window leaves no block of its own works on one of another part, of which it must see nothing.
            tile_n = const_expr(self.config.tile.tile_n)
            key_end = cutlass.min(work.n_block_end, MAX_INT32 // tile_n) * tile_n
        blocks = self.blocks.blocks(work.m_block, work.seqlen, values, work.n_block_begin, work.n_block_end)
        columns, diagonals, slopes = [], [], []
        for i in range(2):
            packed = self.pack.row(_row_of_thread(group, thread, i), work.m_block, work.seqlen)
            seen = self.blocks.mask.columns(packed.token, work.seqlen, values)
            if const_expr(key_end is not None):
                seen = seen._replace(end=cutlass.min(seen.end, key_end))
            columns.append(seen)
            diagonals.append(work.seqlen.diagonal + packed.token)
            slope = Float32(0.0)
            if const_expr(self.config.mask.has_alibi):
                # Idle rows may lie past the last head; any slope does for them.
                head = cutlass.min(work.kv_head_idx * self.pack.q_per_kv + packed.head, cute.size(outputs.mSlopes, mode=[0]) - 1)
                slope = outputs.mSlopes[head] * LOG2_E
            slopes.append(slope)
        softmax_scales = log2_scales = (values.softmax_scale, values.softmax_scale)
        if const_expr(self.config.has_kv_scales):
            work_slot = self.storage.work_slot(q)
            k_scale = ptx.bits_to_float(tiles.sWork[K_SCALE, work_slot])
            softmax_scales, log2_scales = (values.softmax_scale * k_scale,) * 2, (log2_scale(values.softmax_scale, k_scale),) * 2
            if const_expr(tiles.sRowScales is not None):
                of_query = [tiles.sRowScales[_row_of_thread(group, thread, i), work_slot] for i in range(2)]
                softmax_scales, log2_scales = (
                    tuple(x * y for x, y in zip(scales, of_query, strict=True)) for scales in (softmax_scales, log2_scales)
                )
        return TileState(
            tiles.sWork[IS_TILE, self.storage.work_slot(q)],
            work,
            blocks,
            tuple(columns),
            tuple(diagonals),
            tuple(slopes),
            softmax_scales,
            log2_scales,
            scale,
        )

    def _transform(
        self, fragment: RowFragment, rS: cute.Tensor, n_block: Int32, values: MaskValues, state: TileState, is_masked: bool
    ) -> None:
        """Soft cap, ALiBi and mask, in place; biased scores leave in log2 units, capped ones as `CapScale` reads them."""
        c = self.config
        first_column = n_block * c.tile.tile_n
        if const_expr(c.mask.has_softcap):
            fragment.softcap(rS, state.softmax_scales, values.softcap)
            if const_expr(c.mask.has_alibi):
                fragment.to_log2(rS, CapScale.of_call(values.softcap))
        elif const_expr(c.mask.has_alibi):
            fragment.scale(rS, state.softmax_scales)
        if const_expr(c.mask.has_alibi):
            fragment.alibi(rS, first_column, state.diagonals, state.slopes)
        if const_expr(is_masked):
            fragment.mask(rS, first_column, state.columns)

    @cute.jit
    def _clear_tail(
        self,
        tiles: SharedTiles,
        barriers: Barriers,
        position: RingPosition,  # of the K tile after the tile's first; its first V stands behind it
        tile: TileState,
        thread: Int32,
    ):
        """Zero the V rows past the sequence's last token in the tile's last block: a weight of 0 times NaN would be NaN.

        Boxes that begin past the end hold zeros already; only the box that the sequence ends in has foreign rows.
        """
        c = self.config
        first = cutlass.max(tile.work.seqlen.seqlen_k - (tile.blocks.end - 1) * c.tile.tile_n, 0)
        end = cutlass.min((first + c.box_rows - 1) // c.box_rows * c.box_rows, c.tile.tile_n)
        if first < end:
            value = advance(position, c.tile.kv_stage)
            cute.arch.mbarrier_wait(barriers.kv_full + value.slot, value.phase)
            self._clear_rows(tiles, value.slot, first, end, thread, self.roles.consumer_threads)
            cute.arch.barrier(barrier_id=self.roles.consumers_barrier, number_of_threads=self.roles.consumer_threads)

    @cute.jit
    def _clear_head(
        self,
        tiles: SharedTiles,
        barriers: Barriers,
        value: RingPosition,  # of the V tile of the tile's first block
        tile: TileState,
        values: MaskValues,
        thread: Int32,
    ):
        """Zero the V rows before the first key that a row of the tile sees, in the tile's first block, as `_clear_tail` does at the end.

        Boxes that end before that key hold zeros already. The first warpgroup clears before its turn, and the turn that it gives tells
        the others, so nobody waits for anybody else; without turns all clear and meet.
        """
        c = self.config
        first_key = self.blocks.first_key(tile.work.m_block, tile.work.seqlen, values)
        end = cutlass.max(first_key - tile.blocks.begin * c.tile.tile_n, 0)
        first = end // c.box_rows * c.box_rows
        clearing = const_expr(WARPGROUP_THREADS if c.tile.ping_pong else self.roles.consumer_threads)
        if first < end and thread < clearing:
            cute.arch.mbarrier_wait(barriers.kv_full + value.slot, value.phase)
            self._clear_rows(tiles, value.slot, first, end, thread, clearing)
            if const_expr(not c.tile.ping_pong):
                cute.arch.barrier(barrier_id=self.roles.consumers_barrier, number_of_threads=self.roles.consumer_threads)

    @cute.jit
    def _clear_rows(self, tiles: SharedTiles, slot: Int32, first: Int32, end: Int32, thread: Int32, threads: cutlass.Constexpr[int]):
        """Zero rows `first .. end` of one box of the V tile in `slot`, by `threads` threads; a barrier then shows it to the products."""
        c = self.config
        part = c.part_elems(c.head_dim_v)
        chunk = 16 // c.element_bytes
        row_chunks = part // chunk
        zeros = cute.make_rmem_tensor(chunk, self.storage.dtype)
        zeros.fill(0.0)
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.storage.dtype, num_bits_per_copy=128)
        box = tiles.kv + self.storage.tile_slots.offset(slot) + first // c.box_rows * c.box_rows * c.head_dim_v
        # A row is one line of its part whatever the swizzle, so whole lines may be cleared in any order.
        for part_idx in cutlass.range_constexpr(c.head_dim_v // part):
            line = box + (part_idx * c.box_rows + first % c.box_rows) * part
            for i in cutlass.range(thread, (end - first) * row_chunks, threads, unroll=1):
                target = (line + i * chunk).align(16)
                cute.copy(copy, zeros, cute.make_tensor(target, cute.make_layout(chunk)))
        cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def _finish_part(
        self,
        products: Products,
        stats: RowStats,
        score_scales: tuple[ScoreScale, ScoreScale] | None,
        tiles: SharedTiles,
        outputs: Outputs,
        work: WorkTile,
        q: RingPosition,
        is_last: Boolean,  # the CTA has no tile left
        group: Int32,
        thread: Int32,
    ):
        """`_finish` where the tile is whole, or its last part has come; a part of rows that are all idle is dropped."""
        work_slot = self.storage.work_slot(q)
        part = TilePart(*(tiles.sWork[i, work_slot] for i in range(7, 10)))
        if const_expr(self.config.has_kv_scales):
            # One end for both: registers are fewer (with two ends d64 keeps values in memory over its loop, d128 88 bytes outside).
            thread = cute.arch.shuffle_sync(thread, cute.arch.lane_idx())
            is_whole = Int32(1)
            if part.slot >= 0:
                is_whole = self._join(part, products, stats, tiles, outputs, work, work_slot, is_last, group, thread)
            if is_whole == 1:
                self._finish(products, stats, score_scales, tiles, outputs, work, q, group, thread)
        else:
            if part.slot >= 0:
                # The same number, which compilers take for a new one: addresses are computed here, not held over the loops over KV.
                part_thread = cute.arch.shuffle_sync(thread, cute.arch.lane_idx())
                is_whole = self._join(part, products, stats, tiles, outputs, work, work_slot, is_last, group, part_thread)
                if is_whole == 1:
                    self._finish(products, stats, score_scales, tiles, outputs, work, q, group, part_thread)
            else:
                # Apart, though the same: whole tiles pay for nothing that parts need.
                self._finish(products, stats, score_scales, tiles, outputs, work, q, group, thread)

    @cute.jit
    def _join(
        self,
        part: TilePart,
        products: Products,
        stats: RowStats,
        tiles: SharedTiles,
        outputs: Outputs,
        work: WorkTile,
        work_slot: Int32,
        is_last: Boolean,
        group: Int32,
        thread: Int32,
    ) -> Int32:
        """Lay down a part; 1 where `products.rO` and `stats` then are those of the whole tile. The last tile's part is left to
        `_share_last` where all add up."""
        is_whole = Int32(0)
        if self.pack.row(group * WGMMA_ROWS, work.m_block, work.seqlen).is_valid:
            barrier, lane = self.roles.output_barrier + group, thread % WARPGROUP_THREADS
            is_left = Boolean(False)
            if const_expr(self.config.share_parts > 0):
                is_left = is_last & (part.num_parts >= self.config.share_parts)
            if is_left:
                self.parts.lay_down(outputs.parts, part.slot, products.rO, stats, group, lane)
            else:
                flag = self._flag(tiles, work_slot, group)
                is_whole = self.parts.join(outputs.parts, part, products.rO, stats, group, lane, barrier, flag)
        return is_whole

    @cute.jit
    def _share_last(
        self,
        tiles: SharedTiles,
        outputs: Outputs,
        scale: ScoreScale | None,  # of raw scores
        work_slot: Int32,  # of the CTA's last tile
        group: Int32,
        thread: Int32,
    ):
        """Behind the loop over tiles, whose registers would suffer: if the last one was a part of many, wait for the others and add up a
        share."""
        n = [tiles.sWork[i, work_slot] for i in range(10)]
        work, part = WorkTile(Int32(0), n[0], n[1], n[2], n[3], SeqlenInfo(n[4], n[5], n[6])), TilePart(n[7], n[8], n[9])
        if part.slot >= 0 and part.num_parts >= self.config.share_parts:
            if self.pack.row(group * WGMMA_ROWS, work.m_block, work.seqlen).is_valid:
                barrier, lane = self.roles.output_barrier + group, thread % WARPGROUP_THREADS
                flag, looks = self._flag(tiles, work_slot, group), Int32(self.config.arrival_looks)
                share, stayers = self.parts.arrive(outputs.parts, part, looks, group, lane, barrier, flag)
                self.parts.leave(outputs.parts, part, group, stayers)
                if share != NOTHING:
                    factor = None
                    if const_expr(self.storage.has_factors):
                        factor = ptx.bits_to_float(tiles.sWork[O_FACTOR, work_slot])
                    self.shares.add_up(outputs, part, share, work, RowEnds(scale, factor), group, lane)

    def _flag(self, tiles: SharedTiles, work_slot: Int32, group: Int32) -> cute.Pointer:
        """An int32 of shared memory that is this warpgroup's."""
        return tiles.sWork.iterator + (work_slot * cute.size(tiles.sWork, mode=[0]) + WORK_FLAGS + group)

    @cute.jit
    def _finish(
        self,
        products: Products,
        stats: RowStats,
        score_scales: tuple[ScoreScale, ScoreScale] | None,
        tiles: SharedTiles,
        outputs: Outputs,
        work: WorkTile,
        q: RingPosition,  # the tile's Q buffer, whose rows of this warpgroup nobody needs any more
        group: Int32,
        thread: Int32,
    ):
        """Divide O by its denominator, write O and the LSE of the rows that are valid."""
        c = self.config
        lane = thread % WARPGROUP_THREADS
        scales = cute.make_rmem_tensor(2, Float32)
        for i in cutlass.range_constexpr(2):
            packed = self.pack.row(_row_of_thread(group, thread, i), work.m_block, work.seqlen)
            head = work.kv_head_idx * self.pack.q_per_kv + packed.head
            sink = None
            if const_expr(c.mask.has_sinks):
                sink = Float32(outputs.mSinks[cutlass.min(head, cute.size(outputs.mSinks, mode=[0]) - 1)])
            row_sum = quad_sum(stats.row_sum[i])
            row_max = stats.row_max[i]
            if const_expr(score_scales is not None and (c.has_lse or c.mask.has_sinks)):
                row_max = score_scales[i].true_max(row_max)
            result = finalize_row(row_max, row_sum, sink)
            scales[i] = result.o_scale
            if const_expr(self.storage.has_factors):
                scales[i] = result.o_scale * ptx.bits_to_float(tiles.sWork[O_FACTOR, self.storage.work_slot(q)])
            if const_expr(c.has_lse):
                if packed.is_valid and lane % 4 == 0:
                    outputs.mLse[head, work.seqlen.q_begin + packed.token] = result.lse
        RowFragment(c.head_dim_v, 0.0).rescale(products.rO, scales)
        if const_expr(c.has_out_scale):
            rows = tuple(self.pack.row(_row_of_thread(group, thread, i), work.m_block, work.seqlen) for i in range(2))
            store_fragment_fp8(outputs.mO, products.rO, rows, work.kv_head_idx * self.pack.q_per_kv, work.seqlen.q_begin)
        else:
            rO = cute.make_rmem_tensor_like(products.rO, self.storage.dtype)
            rO.store(products.rO.load().to(self.storage.dtype))
            if const_expr(self.storage.o_through_q):
                self._store_through_q(products, rO, tiles, outputs, work, q, group, lane)
            else:
                rows = tuple(self.pack.row(_row_of_thread(group, thread, i), work.m_block, work.seqlen) for i in range(2))
                store_fragment(outputs.mO, rO, rows, work.kv_head_idx * self.pack.q_per_kv, work.seqlen.q_begin)

    @cute.jit
    def _store_through_q(
        self,
        products: Products,
        rO: cute.Tensor,  # finished rows in 16 bits
        tiles: SharedTiles,
        outputs: Outputs,
        work: WorkTile,
        q: RingPosition,
        group: Int32,
        lane: Int32,
    ):
        """Finished rows to `out` through their rows of Q's buffer."""
        c = self.config
        first_row = group * WGMMA_ROWS
        sO_ptr = (tiles.q + q.slot * self.storage.q_elems + first_row * c.part_elems(c.head_dim_v)).align(1024)
        sO = tensor_at(sO_ptr, self.storage.group_rows_layout(WGMMA_ROWS, c.head_dim_v))
        matrices = cute.nvgpu.warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4)
        copy = cute.make_tiled_copy_C(cute.make_copy_atom(matrices, self.storage.dtype), _one_group(products.pv))
        thread_copy = copy.get_slice(lane)
        barrier = self.roles.output_barrier + group
        # Every warp has read its rows of Q.
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP_THREADS)
        cute.copy(thread_copy, thread_copy.retile(rO), thread_copy.partition_D(sO))
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP_THREADS)
        self.output.store(outputs.mO, sO_ptr, lane, first_row, work.kv_head_idx, work.m_block, work.seqlen)


def _one_group(mma: cute.TiledMma) -> cute.TiledMma:
    """The same product for a single warpgroup."""
    return cute.make_tiled_mma(cute.make_mma_atom(mma.op), (1, 1, 1))


def _row_of_thread(group: Int32, thread: Int32, i: int) -> Int32:
    """Tile row of a thread's accumulators of half `i` (PTX ISA, wgmma: D fragment layout)."""
    in_group = thread % WARPGROUP_THREADS
    return group * WGMMA_ROWS + (in_group // 32) * 16 + (in_group % 32) // 4 + 8 * i


def _issue(mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, *, accumulate: bool) -> None:
    """Start one product as a wgmma group of its own; the caller waits for it."""
    atom = cute.make_mma_atom(mma.op)
    warpgroup.fence()
    for k in range(cute.size(a, mode=[2])):
        atom.set(warpgroup.Field.ACCUMULATE, Boolean(accumulate or k > 0))
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
    warpgroup.commit_group()
