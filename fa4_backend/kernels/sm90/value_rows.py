"""Rows of V that no row of a tile sees, at the edges of what TMA brought: consumers zero them before a product reads them."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_backend.kernels.common.block_info import BlockInfo
from fa4_backend.kernels.common.hardware import ACCESS_BYTES
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm90.consumer_state import SharedTiles, TileState
from fa4_backend.kernels.sm90.storage import Barriers, Storage
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WarpRoles


@dataclass(frozen=True)
class ValueRows:
    """Clearing of one kernel's V tiles."""

    config: PrefillConfig
    roles: WarpRoles
    storage: Storage
    blocks: BlockInfo

    @cute.jit
    def clear_tail(
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
    def clear_head(
        self,
        tiles: SharedTiles,
        barriers: Barriers,
        value: RingPosition,  # of the V tile of the tile's first block
        tile: TileState,
        values: MaskValues,
        thread: Int32,
    ):
        """Zero the V rows before the first key that a row of the tile sees, in the tile's first block, as `clear_tail` does at the end.

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
        chunk = ACCESS_BYTES // c.element_bytes
        row_chunks = part // chunk
        zeros = cute.make_rmem_tensor(chunk, self.storage.dtype)
        zeros.fill(0.0)
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.storage.dtype, num_bits_per_copy=8 * ACCESS_BYTES)
        box = tiles.kv + self.storage.tile_slots.offset(slot) + first // c.box_rows * c.box_rows * c.head_dim_v
        # A row is one line of its part whatever the swizzle, so whole lines may be cleared in any order.
        for part_idx in cutlass.range_constexpr(c.head_dim_v // part):
            line = box + (part_idx * c.box_rows + first % c.box_rows) * part
            for i in cutlass.range(thread, (end - first) * row_chunks, threads, unroll=1):
                target = (line + i * chunk).align(ACCESS_BYTES)
                cute.copy(copy, zeros, cute.make_tensor(target, cute.make_layout(chunk)))
        cute.arch.fence_proxy("async.shared", space="cta")
