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
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.common.online_softmax import LOG2_E
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.common.seqlen_info import MAX_INT32
from fa4_backend.kernels.common.wgmma_fragment import RowStats, ScoreScale, log2_scale
from fa4_backend.kernels.sm90.arguments import Outputs
from fa4_backend.kernels.sm90.block_weights import BlockWeights
from fa4_backend.kernels.sm90.consumer_state import Place, Products, SharedTiles, TileState, TileSums, row_of_tile
from fa4_backend.kernels.sm90.query_rows import QueryRows
from fa4_backend.kernels.sm90.storage import Barriers, Storage, tensor_at
from fa4_backend.kernels.sm90.tile_end import TileEnd
from fa4_backend.kernels.sm90.tile_numbers import IS_TILE, K_SCALE, read_tile
from fa4_backend.kernels.sm90.value_rows import ValueRows
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WGMMA_ROWS, WarpRoles, has_own_slots


class Turn(NamedTuple):
    """This warpgroup's place in the order in which warpgroups issue products."""

    mine: Int32  # named barrier I wait on
    next: Int32  # named barrier of the warpgroup after me


@dataclass(frozen=True)
class ConsumerWarpgroup:
    """Role of warpgroups 1 and up."""

    config: PrefillConfig
    roles: WarpRoles
    storage: Storage
    blocks: BlockInfo
    pack: PackGqa
    weights: BlockWeights
    value_rows: ValueRows
    tile_end: TileEnd
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
        place = Place(group, thread)
        products = self._operands(qk, pv, tiles, group)
        turn = Turn(
            self.roles.turn_barrier + group,
            self.roles.turn_barrier + cutlass.select_(group == self.roles.num_consumers - 1, Int32(0), group + 1),
        )
        if const_expr(c.tile.ping_pong):
            if group == self.roles.num_consumers - 1:
                self._give_turn(turn)
        # Where K and V have scales each tile has its own.
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
            self.weights.first(rS, stats, tile, values)
            self.weights.fragment.to_operand(rS, products.rP)
            products.rO.fill(0.0)
            if const_expr(not c.converts_kv):
                self.value_rows.clear_tail(tiles, barriers, position, tile, thread)
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
                    position = self._block(products, stats, barriers, position, q, turn, n_block, values, tile, True)
                num_full = cutlass.max(cutlass.min(n_block, full_end) - full_begin, 0)
                for _ in cutlass.range(num_full, unroll=1):
                    n_block -= 1
                    position = self._block(products, stats, barriers, position, q, turn, n_block, values, tile, False)
                if const_expr(self.blocks.mask.has_left):
                    for _ in cutlass.range(n_block - blocks.begin, unroll=1):
                        n_block -= 1
                        position = self._block(products, stats, barriers, position, q, turn, n_block, values, tile, True)
                # Then into the next tile: its first scores with this tile's last product.
                q_next = advance(q, c.tile.q_stage)
                next_tile = self._next_tile(tiles, barriers, q_next, values, scale, outputs, group, thread)
                after = advance(position, stages)
                if const_expr(self.blocks.mask.has_left and not c.converts_kv):
                    self.value_rows.clear_head(tiles, barriers, after, tile, values, thread)
                next_stats = RowStats(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
                for i in cutlass.range_constexpr(2):
                    next_stats.row_max[i], next_stats.row_sum[i] = -Float32.inf, Float32(0.0)
                if next_tile.is_tile == 1:
                    rS = self._issue_turn(products, barriers, position, after, q_next, turn)
                    warpgroup.wait_group(1)
                    self._release(barriers.kv_empty + position.slot)
                    self.weights.first(rS, next_stats, next_tile, values)
                    warpgroup.wait_group(0)
                    self._release(barriers.kv_empty + after.slot)
                    self.weights.fragment.to_operand(rS, products.rP)
                else:
                    self._issue_last(products, barriers, after, turn)
                    warpgroup.wait_group(0)
                sums = TileSums(products, stats, self.weights.score_scales(tile), tile.work)
                if const_expr(c.has_parts):
                    self.tile_end.finish_part(sums, tiles, outputs, q, next_tile.is_tile == 0, place)
                else:
                    self.tile_end.finish(sums, tiles, outputs, q, place)
                if const_expr(self.storage.releases_q_late):
                    self._release_query(barriers.q_empty + q.slot)
                # Not before the tile is finished, whose numbers the tile after the next will overwrite.
                self._release_read_query(barriers.q_empty + q_next.slot, next_tile.blocks, next_tile.blocks.end - 1)
                products.rO.fill(0.0)
                for i in cutlass.range_constexpr(2):
                    stats.row_max[i], stats.row_sum[i] = next_stats.row_max[i], next_stats.row_sum[i]
                position, q, tile = advance(after, stages), q_next, next_tile
                if const_expr(not c.converts_kv):
                    self.value_rows.clear_tail(tiles, barriers, position, tile, thread)
            if const_expr(c.share_parts > 0):
                work_slot = 1 - self.storage.work_slot(q)  # the empty tile has the other
                self.tile_end.share_last(tiles, outputs, self._last_scale(tiles, work_slot, tile, values), work_slot, place)
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
        self.weights.transform(rS, n_block, values, tile, is_masked)
        factors = cute.make_rmem_tensor(2, Float32)
        moves = self.weights.weigh(rS, stats, factors, tile, values, may_be_empty=is_masked, is_first=False)
        warpgroup.wait_group(0)
        self._release(barriers.kv_empty + after.slot)
        self.weights.rescale(products, rS, stats, factors, moves, values)
        self.weights.fragment.to_operand(rS, products.rP)
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
            in_group, barrier = thread % WARPGROUP_THREADS, self.roles.output_barrier + group
            is_tile = tiles.sWork[IS_TILE, self.storage.work_slot(q)]
            self.query_rows.to_float16(tiles.q, tiles.sRowScales, q, is_tile, group * WGMMA_ROWS, in_group, barrier)
        work = read_tile(tiles.sWork, self.storage.work_slot(q))
        key_end = None
        if const_expr(self.config.has_parts):
            # A part that the layer's window leaves no block of its own works on one of another part, of which it must see nothing.
            tile_n = const_expr(self.config.tile.tile_n)
            key_end = cutlass.min(work.n_block_end, MAX_INT32 // tile_n) * tile_n
        blocks = self.blocks.blocks(work.m_block, work.seqlen, values, work.n_block_begin, work.n_block_end)
        columns, diagonals, slopes = [], [], []
        for i in range(2):
            packed = self.pack.row(row_of_tile(group, thread, i), work.m_block, work.seqlen)
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
                of_query = [tiles.sRowScales[row_of_tile(group, thread, i), work_slot] for i in range(2)]
                softmax_scales, log2_scales = (
                    tuple(x * y for x, y in zip(scales, of_query, strict=True)) for scales in (softmax_scales, log2_scales)
                )
        if const_expr(self.config.is_converted):
            scale = self._tile_scale(tiles, self.storage.work_slot(q), values)
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

    def _last_scale(self, tiles: SharedTiles, work_slot: Int32, empty: TileState, values: MaskValues) -> ScoreScale | None:
        """The scale of all rows of the CTA's last tile, behind the empty one; None where `score_scales` is, or a row has its own."""
        scales = self.weights.score_scales(empty)
        if scales is None or self.config.converts_kv:
            return None
        return self._tile_scale(tiles, work_slot, values) if self.config.is_converted else scales[0]

    def _tile_scale(self, tiles: SharedTiles, work_slot: Int32, values: MaskValues) -> ScoreScale:
        """Of a tile whose keys have a scale, which is the same in all its rows."""
        return ScoreScale.of_log2(log2_scale(values.softmax_scale, ptx.bits_to_float(tiles.sWork[K_SCALE, work_slot])))


def _issue(
    mma: cute.TiledMma,
    acc: cute.Tensor,  # (MMA, row tiles, column tiles) float32
    a: cute.Tensor,  # (MMA, row tiles, k steps)
    b: cute.Tensor,  # (MMA, column tiles, k steps)
    *,
    accumulate: bool,
) -> None:
    """Start one product as a wgmma group of its own; the caller waits for it."""
    atom = cute.make_mma_atom(mma.op)
    warpgroup.fence()
    for k in range(cute.size(a, mode=[2])):
        atom.set(warpgroup.Field.ACCUMULATE, Boolean(accumulate or k > 0))
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
    warpgroup.commit_group()
