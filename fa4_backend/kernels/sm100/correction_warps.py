"""Correction warps: divide a finished O by its row sums, round it and hand it to the epilogue, while the softmax groups go on.

The rescaling between blocks, FlashAttention-4's other work of this role, is rare enough that the softmax group does it where it decides
about it (`block_weights`); so no block waits for a message to this role and back.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.fp8 import float32_to_e4m3
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm100.softmax_warps import LANE_SHIFT
from fa4_backend.kernels.sm100.storage import STATS_BYTES, o_pitch
from fa4_backend.kernels.sm100.warp_roles import WARPGROUP
from fa4_backend.kernels.sm100.work import Geometry, Place, WorkTensors

CHUNK_BYTES = 16  # of a row of O in shared memory


@dataclass(frozen=True)
class CorrectionWarps:
    """Four warps that serve the query tiles in turn."""

    geometry: Geometry
    o_stage: int

    @property
    def columns(self) -> int:
        """Columns of O that a thread holds at once; divides every supported head_dim_v. 32 would spill at this role's register budget."""
        return 16

    @cute.jit
    def run(self, place: Place, work: WorkTensors):
        """Walk the work list; owns the consumer sides of the statistics and of O, and the producer side of finished tiles."""
        begin, end = self.geometry.item_range(work)
        stats_phase, o_phase = Int32(0), Int32(0)
        out = RingPosition(Int32(0), Int32(0))
        for _ in range(begin, end, unroll=1):
            for q_idx in range(self.geometry.config.q_tiles, unroll=1):
                out = self.finish_tile(place, q_idx, stats_phase, o_phase, out)
            stats_phase ^= 1
            o_phase ^= 1

    @cute.jit
    def finish_tile(self, place: Place, q_idx: Int32 | int, stats_phase: Int32, o_phase: Int32, out: RingPosition):
        """Query tile `q_idx` of an item: wait for its statistics, its O and a buffer for each part of it; hand the finished parts on.

        Returns the place of the buffer after them.
        """
        g = self.geometry
        warp = place.warp_idx % WARPGROUP
        row = warp * 32 + place.lane_idx
        lanes = warp * 32 << LANE_SHIFT
        stats = place.smem_base + g.storage.stats + row * o_pitch(g.config)
        edge = q_idx * WARPGROUP + warp
        ptx.mbarrier_wait(g.full(place, "stats_softmax_to_correction", edge), stats_phase)
        scale = ptx.load_shared_f32(stats + q_idx * STATS_BYTES)
        ptx.warp_arrive(g.empty(place, "stats_softmax_to_correction", edge), place.lane_idx)
        ptx.mbarrier_wait(g.full(place, "o_mma_to_correction", q_idx), o_phase)
        ptx.tcgen05_fence_after_sync()
        for part in cutlass.range_constexpr(g.config.o_parts):
            ptx.mbarrier_wait(g.empty(place, "o_correction_to_epilogue", out.slot), out.phase ^ 1)
            target = place.smem_base + g.storage.o + out.slot * g.storage.sizes.o
            o_tmem = g.tmem.o_at(place, q_idx) + part * g.config.o_columns + lanes
            self.finish_rows(o_tmem, target + row * o_pitch(g.config), scale)
            if const_expr(part == g.config.o_parts - 1):
                ptx.tcgen05_fence_before_sync()
                g.group.warp_arrive(g.empty_at_leader(place, "o_mma_to_correction", q_idx), place.lane_idx)
            ptx.warp_arrive(g.full(place, "o_correction_to_epilogue", out.slot), place.lane_idx)
            out = advance(out, self.o_stage)
        return out

    def finish_rows(self, o_tmem: Int32, target: Int32, scale: Float32) -> None:
        """This thread's row of a part of O, scaled, to shared memory."""
        config = self.geometry.config.kernel
        is_empty = scale == 0.0
        for base in range(0, self.geometry.config.o_columns, self.columns):
            (o,) = ptx.tmem_wait_load([ptx.tmem_load(o_tmem + base, self.columns)])
            # A row without keys gives 0 even where O is not finite.
            row = ptx.select_zero(is_empty, self.scaled(o, scale))
            if config.has_out_scale:
                numbers = [Float32(x) for x in ptx.elements(row)]
                words = [float32_to_e4m3(numbers[j : j + 4]).ir_value() for j in range(0, self.columns, 4)]
            else:
                words = ptx.elements(ptx.pack_16bit(row, config.dtype))
            for j in range(0, len(words), 4):
                ptx.store_shared_v4(target + base * config.out_element_bytes + 4 * j, words[j : j + 4])

    def scaled(self, o, factor: Float32):
        """o * factor on packed pairs."""
        factors = ptx.broadcast(factor, 2)
        return ptx.from_pairs([ptx.mul2(ptx.pair(o, j), factors) for j in range(0, self.columns, 2)])
