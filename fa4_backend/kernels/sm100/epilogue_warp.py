"""Epilogue warp: finished tiles from shared memory to `out`, 16 bytes a lane, coalesced along the head; writes valid rows only."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.sm100.correction_warps import CHUNK_BYTES
from fa4_backend.kernels.sm100.storage import o_pitch
from fa4_backend.kernels.sm100.work import Geometry, Place, WorkItem, WorkTensors


@dataclass(frozen=True)
class EpilogueWarp:
    """One warp; a tile of 128 rows takes it as many stores as the rows have 512-byte pieces."""

    geometry: Geometry
    o_stage: int

    @cute.jit
    def run(self, place: Place, work: WorkTensors, mO: cute.Tensor):
        """Walk the work list; owns the consumer side of `o_correction_to_epilogue`."""
        g = self.geometry
        begin, end = g.item_range(work)
        stage, phase = Int32(0), Int32(0)
        for index in range(begin, end, unroll=1):
            item = g.read_item(work, index)
            # A head of several parts is that of a lone query tile.
            for turn in range(g.config.q_tiles * g.config.o_parts, unroll=1):
                q_idx, part = (turn, 0) if const_expr(g.config.o_parts == 1) else (0, turn)
                ptx.mbarrier_wait(g.full(place, "o_correction_to_epilogue", stage), phase)
                source = place.smem_base + g.storage.o + stage * g.storage.sizes.o
                self.store_part(place, mO, item, g.q_tile(place, item.tile, q_idx), part, source)
                ptx.warp_arrive(g.empty(place, "o_correction_to_epilogue", stage), place.lane_idx)
                stage += 1
                if stage == self.o_stage:
                    stage = Int32(0)
                    phase ^= 1

    @cute.jit
    def store_part(self, place: Place, mO: cute.Tensor, item: WorkItem, m_block: Int32, part: Int32 | int, source: Int32):
        """Rows of query tile `m_block`, `o_columns` of each. mO: (total_q, num_q_heads, head_dim_v)."""
        config, seqlen = self.geometry.config.kernel, item.tile.seqlen
        chunks = self.geometry.config.o_columns * config.out_element_bytes // CHUNK_BYTES
        elems = CHUNK_BYTES // config.out_element_bytes
        tokens = cutlass.min(seqlen.seqlen_q - m_block * config.tokens_per_tile, config.tokens_per_tile)
        num_chunks = tokens * config.q_per_kv * chunks
        for chunk in range(place.lane_idx, num_chunks, 32, unroll=2):
            row, column = chunk // chunks, chunk % chunks
            words = ptx.load_shared_v4(source + row * o_pitch(self.geometry.config) + column * CHUNK_BYTES)
            packed = self.geometry.pack.row(row, m_block, seqlen)
            head = item.tile.kv_head_idx * config.q_per_kv + packed.head
            index = Int64(seqlen.q_begin + packed.token) * mO.stride[0] + Int64(head) * mO.stride[1] + (part * chunks + column) * elems
            ptx.store_global_v4(mO.iterator + index, words)
