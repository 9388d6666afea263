"""The end of a tile, behind its last product: parts are joined, rows divided by their denominators and written to `out` and `lse`."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.fragment_store import store_fragment, store_fragment_fp8
from fa4_backend.kernels.common.hardware import QUAD, SWIZZLE_ALIGN
from fa4_backend.kernels.common.online_softmax import finalize_row
from fa4_backend.kernels.common.output_store import OutputStore
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.part_arrivals import NOTHING
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.ring import RingPosition
from fa4_backend.kernels.common.tile_scheduler import TilePart, WorkTile
from fa4_backend.kernels.common.wgmma_fragment import RowFragment, ScoreScale, quad_sum
from fa4_backend.kernels.schedule.work_list import MAX_PARTS, WHOLE
from fa4_backend.kernels.sm90.arguments import Outputs
from fa4_backend.kernels.sm90.consumer_state import Place, Products, SharedTiles, TileSums, row_of_tile
from fa4_backend.kernels.sm90.part_shares import PartShares, RowEnds
from fa4_backend.kernels.sm90.storage import Storage, tensor_at
from fa4_backend.kernels.sm90.tile_numbers import HAS_BEGUN, IS_CONTINUED, LINK, O_FACTOR, PIECES_UNIT, WORK_FLAGS, read_part, read_tile
from fa4_backend.kernels.sm90.tile_parts import TileParts
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WGMMA_ROWS, WarpRoles


@dataclass(frozen=True)
class TileEnd:
    """What a consumer warpgroup does with finished sums."""

    config: PrefillConfig
    roles: WarpRoles
    storage: Storage
    pack: PackGqa
    output: OutputStore
    parts: TileParts
    shares: PartShares

    @cute.jit
    def finish_part(
        self,
        sums: TileSums,
        tiles: SharedTiles,
        outputs: Outputs,
        q: RingPosition,
        is_last: Boolean,  # the CTA has no tile left
        place: Place,
    ):
        """`finish` where the tile is whole, or its last part has come; a part of rows that are all idle is dropped."""
        work_slot = self.storage.work_slot(q)
        part = read_part(tiles.sWork, work_slot)
        if const_expr(self.config.has_pieces):
            link = tiles.sWork[LINK, work_slot]
            if (part.slot == WHOLE) & (link == PIECES_UNIT):
                self.finish(sums, tiles, outputs, q, place)
            else:
                part_place = place._replace(thread=cute.arch.shuffle_sync(place.thread, cute.arch.lane_idx()))
                if self._end_piece(part, link, sums, tiles, outputs, work_slot, is_last, part_place) == 1:
                    self.finish(sums, tiles, outputs, q, part_place)
        elif const_expr(self.config.converts_kv):
            # One end for both: registers are fewer (with two ends d64 keeps values in memory over its loop, d128 88 bytes outside).
            place = place._replace(thread=cute.arch.shuffle_sync(place.thread, cute.arch.lane_idx()))
            is_whole = Int32(1)
            if part.slot >= 0:
                is_whole = self._join(part, Int32(1), sums, tiles, outputs, work_slot, is_last, place)
            if is_whole == 1:
                self.finish(sums, tiles, outputs, q, place)
        else:
            if part.slot >= 0:
                # The same number, which compilers take for a new one: addresses are computed here, not held over the loops over KV.
                part_place = place._replace(thread=cute.arch.shuffle_sync(place.thread, cute.arch.lane_idx()))
                is_whole = self._join(part, Int32(1), sums, tiles, outputs, work_slot, is_last, part_place)
                if is_whole == 1:
                    self.finish(sums, tiles, outputs, q, part_place)
            else:
                # Apart, though the same: whole tiles pay for nothing that parts need.
                self.finish(sums, tiles, outputs, q, place)

    @cute.jit
    def _end_piece(
        self,
        part: TilePart,
        link: Int32,
        sums: TileSums,
        tiles: SharedTiles,
        outputs: Outputs,
        work_slot: Int32,
        is_last: Boolean,
        place: Place,
    ) -> Int32:
        """Add a piece to what this CTA has of its tile, or lay it down; 1 where `sums` then are those of the whole tile."""
        is_whole = cutlass.select_((link & IS_CONTINUED == 0) & (part.slot == WHOLE), Int32(1), Int32(0))
        group, in_group = place.group, place.thread % WARPGROUP_THREADS
        rO, stats = sums.products.rO, sums.stats
        if self.pack.row(group * WGMMA_ROWS, sums.work.m_block, sums.work.seqlen).is_valid:
            if link & HAS_BEGUN != 0:
                self.parts.add_before(outputs.parts, rO, stats, group, in_group)
            if link & IS_CONTINUED != 0:
                self.parts.keep(outputs.parts, part, rO, stats, sums.scales, group, in_group)
        if (link & IS_CONTINUED == 0) & (part.slot >= 0):
            is_whole = self._join(part, link // PIECES_UNIT, sums, tiles, outputs, work_slot, is_last, place)
        return is_whole

    @cute.jit
    def _join(
        self,
        part: TilePart,
        here: Int32,  # slots that this entry of the list has filled with it
        sums: TileSums,
        tiles: SharedTiles,
        outputs: Outputs,
        work_slot: Int32,
        is_last: Boolean,
        place: Place,
    ) -> Int32:
        """Lay down a part; 1 where `sums` then are those of the whole tile. The last tile's part is left to
        `share_last` where all add up."""
        is_whole, group, work = Int32(0), place.group, sums.work
        if self.pack.row(group * WGMMA_ROWS, work.m_block, work.seqlen).is_valid:
            barrier, in_group = self.roles.output_barrier + group, place.thread % WARPGROUP_THREADS
            is_left = Boolean(False)
            if const_expr(self.config.share_parts > 0):
                is_left = is_last & self._is_shared(part)
            if is_left:
                self.parts.lay_down(outputs.parts, part.slot, sums.products.rO, sums.stats, sums.scales, group, in_group)
            else:
                flag = self._flag(tiles, work_slot, group)
                rO, stats, scales = sums.products.rO, sums.stats, sums.scales
                is_whole = self.parts.join(outputs.parts, part, here, rO, stats, scales, group, in_group, barrier, flag)
        return is_whole

    @cute.jit
    def share_last(
        self,
        tiles: SharedTiles,
        outputs: Outputs,
        scale: ScoreScale | None,  # of raw scores; None: they were in log2 units, or each row has its own
        work_slot: Int32,  # of the CTA's last tile
        place: Place,
    ):
        """Behind the loop over tiles, whose registers would suffer: if the last one was a part of many, wait for the others and add up a
        share."""
        work, part, group = read_tile(tiles.sWork, work_slot), read_part(tiles.sWork, work_slot), place.group
        here = Int32(1)
        if const_expr(self.config.has_pieces):
            here = tiles.sWork[LINK, work_slot] // PIECES_UNIT
        if part.slot >= 0 and self._is_shared(part):
            if self.pack.row(group * WGMMA_ROWS, work.m_block, work.seqlen).is_valid:
                barrier, in_group = self.roles.output_barrier + group, place.thread % WARPGROUP_THREADS
                flag, looks = self._flag(tiles, work_slot, group), Int32(self.config.arrival_looks)
                share, stayers = self.parts.arrive(outputs.parts, part, here, looks, group, in_group, barrier, flag)
                self.parts.leave(outputs.parts, part, here, group, stayers)
                if share != NOTHING:
                    factor = None
                    if const_expr(self.storage.has_factors):
                        factor = ptx.bits_to_float(tiles.sWork[O_FACTOR, work_slot])
                    self.shares.add_up(outputs, part, here, share, work, RowEnds(scale, factor), group, in_group)

    def _is_shared(self, part: TilePart) -> Boolean:
        """Whether all that made a tile's parts add them up. The schedule makes more than `MAX_PARTS` of pieces alone."""
        is_shared = part.num_parts >= self.config.share_parts
        return is_shared & (part.num_parts <= MAX_PARTS) if const_expr(self.config.has_pieces) else is_shared

    def _flag(self, tiles: SharedTiles, work_slot: Int32, group: Int32) -> cute.Pointer:
        """An int32 of shared memory that is this warpgroup's."""
        return tiles.sWork.iterator + (work_slot * cute.size(tiles.sWork, mode=[0]) + WORK_FLAGS + group)

    @cute.jit
    def finish(
        self,
        sums: TileSums,
        tiles: SharedTiles,
        outputs: Outputs,
        q: RingPosition,  # the tile's Q buffer, whose rows of this warpgroup nobody needs any more
        place: Place,
    ):
        """Divide O by its denominator, write O and the LSE of the rows that are valid."""
        c, (products, stats, score_scales, work), (group, thread) = self.config, sums, place
        in_group = thread % WARPGROUP_THREADS
        scales = cute.make_rmem_tensor(2, Float32)
        for i in cutlass.range_constexpr(2):
            packed = self.pack.row(row_of_tile(group, thread, i), work.m_block, work.seqlen)
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
                if packed.is_valid and in_group % QUAD == 0:
                    outputs.mLse[head, work.seqlen.q_begin + packed.token] = result.lse
        RowFragment(c.head_dim_v, 0.0).rescale(products.rO, scales)
        if const_expr(c.has_out_scale):
            rows = tuple(self.pack.row(row_of_tile(group, thread, i), work.m_block, work.seqlen) for i in range(2))
            store_fragment_fp8(outputs.mO, products.rO, rows, work.kv_head_idx * self.pack.q_per_kv, work.seqlen.q_begin)
        else:
            rO = cute.make_rmem_tensor_like(products.rO, self.storage.dtype)
            rO.store(products.rO.load().to(self.storage.dtype))
            if const_expr(self.storage.o_through_q):
                self._store_through_q(products, rO, tiles, outputs, work, q, group, in_group)
            else:
                rows = tuple(self.pack.row(row_of_tile(group, thread, i), work.m_block, work.seqlen) for i in range(2))
                store_fragment(outputs.mO, rO, rows, work.kv_head_idx * self.pack.q_per_kv, work.seqlen.q_begin)

    @cute.jit
    def _store_through_q(
        self,
        products: Products,
        rO: cute.Tensor,  # (MMA, 1, column tiles) of 16 bits: finished rows
        tiles: SharedTiles,
        outputs: Outputs,
        work: WorkTile,
        q: RingPosition,
        group: Int32,
        in_group: Int32,
    ):
        """Finished rows to `out` through their rows of Q's buffer."""
        c = self.config
        first_row = group * WGMMA_ROWS
        sO_ptr = (tiles.q + q.slot * self.storage.q_elems + first_row * c.part_elems(c.head_dim_v)).align(SWIZZLE_ALIGN)
        sO = tensor_at(sO_ptr, self.storage.group_rows_layout(WGMMA_ROWS, c.head_dim_v))
        matrices = cute.nvgpu.warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4)
        copy = cute.make_tiled_copy_C(cute.make_copy_atom(matrices, self.storage.dtype), one_group(products.pv))
        thread_copy = copy.get_slice(in_group)
        barrier = self.roles.output_barrier + group
        # Every warp has read its rows of Q.
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP_THREADS)
        cute.copy(thread_copy, thread_copy.retile(rO), thread_copy.partition_D(sO))
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP_THREADS)
        self.output.store(outputs.mO, sO_ptr, in_group, first_row, work.kv_head_idx, work.m_block, work.seqlen)


def one_group(mma: cute.TiledMma) -> cute.TiledMma:
    """The same product for a single warpgroup."""
    return cute.make_tiled_mma(cute.make_mma_atom(mma.op), (1, 1, 1))
