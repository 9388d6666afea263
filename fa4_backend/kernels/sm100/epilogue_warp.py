"""Epilogue warp: finished tiles from shared memory to `out`, a row a bulk copy, which costs no registers and few issue slots; writes valid
rows only."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.hardware import LANES
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm100.tile_bytes import o_pitch
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE
from fa4_backend.kernels.sm100.work import Geometry, Place, WorkItem, WorkTensors


@dataclass(frozen=True)
class EpilogueWarp:
    """One warp."""

    geometry: Geometry
    o_stage: int

    @cute.jit
    def run(
        self,
        place: Place,
        work: WorkTensors,
        mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v)
    ):
        """Walk the entries; owns the consumer side of `o_correction_to_epilogue`."""
        g = self.geometry
        buffer, feed = RingPosition(Int32(0), Int32(0)), RingPosition(Int32(0), Int32(0))
        has_tile = g.has_tile(place, feed)
        while has_tile:
            item = g.read_item(place, work, feed)
            is_whole = Boolean(True)
            if const_expr(g.config.kernel.has_parts):
                is_whole = g.read_part(place, feed).slot < 0
            # A head of several parts is that of a lone query tile.
            for turn in range(g.config.q_tiles * g.config.o_parts, unroll=1):
                q_idx, part = (turn, 0) if const_expr(g.config.o_parts == 1) else (0, turn)
                ptx.mbarrier_wait(g.full(place, "o_correction_to_epilogue", buffer.slot), buffer.phase)
                is_written = is_whole
                if const_expr(g.config.kernel.has_parts):
                    if not is_whole:  # only then has somebody written the flag
                        is_written = ptx.load_shared_i32(place.smem_base + g.storage.part_flag) == 1
                if is_written:
                    source = place.smem_base + g.storage.o + buffer.slot * g.storage.sizes.o
                    self.store_part(place, mO, item, g.q_tile(place, item.tile, q_idx), part, source)
                ptx.warp_arrive(g.empty(place, "o_correction_to_epilogue", buffer.slot), place.lane_idx)
                buffer = advance(buffer, self.o_stage)
            g.release_tile(place, feed)
            feed = advance(feed, FEED_STAGE)
            has_tile = g.has_tile(place, feed)

    @cute.jit
    def store_part(self, place: Place, mO: cute.Tensor, item: WorkItem, m_block: Int32, part: Int32 | int, source: Int32):
        """Rows of query tile `m_block`, `o_columns` of each, and wait until they were read. mO: (total_q, num_q_heads, head_dim_v)."""
        config, seqlen, columns = self.geometry.config.kernel, item.tile.seqlen, self.geometry.config.o_columns
        tokens = cutlass.min(seqlen.seqlen_q - m_block * config.tokens_per_tile, config.tokens_per_tile)
        for row in range(place.lane_idx, tokens * config.q_per_kv, LANES, unroll=1):
            packed = self.geometry.pack.row(row, m_block, seqlen)
            head = item.tile.kv_head_idx * config.q_per_kv + packed.head
            index = Int64(seqlen.q_begin + packed.token) * mO.stride[0] + Int64(head) * mO.stride[1] + part * columns
            ptx.bulk_store(mO.iterator + index, source + row * o_pitch(self.geometry.config), columns * config.out_element_bytes)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)
