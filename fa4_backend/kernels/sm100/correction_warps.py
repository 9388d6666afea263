"""Correction warps: divide a finished O by its row sums, round it and hand it to the epilogue, while the softmax groups go on.

The rescaling between blocks, FlashAttention-4's other work of this role, is rare enough that the softmax group does it where it decides
about it (`block_weights`); so no block waits for a message to this role and back.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass._mlir import ir

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import tcgen05_ops
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.fp8 import float32_to_e4m3, result_factor
from fa4_backend.kernels.common.hardware import LANES
from fa4_backend.kernels.common.online_softmax import finalize_row
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm100.softmax_warps import sink_of
from fa4_backend.kernels.sm100.storage import STATS_BYTES
from fa4_backend.kernels.sm100.tile_bytes import o_pitch
from fa4_backend.kernels.sm100.tile_parts import RowSums, TileParts
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE, WARPGROUP
from fa4_backend.kernels.sm100.work import Geometry, HeadTensors, Place, WorkTensors


@dataclass(frozen=True)
class CorrectionWarps:
    """Four warps that serve the query tiles in turn."""

    geometry: Geometry
    o_stage: int

    def __post_init__(self) -> None:
        # `finish_part` takes the one buffer's release for a sign that the flag of the tile before was read.
        assert self.o_stage == 1 or not self.geometry.config.kernel.has_parts, f"{self.o_stage=}, expected 1 where tiles have parts"

    @property
    def columns(self) -> int:
        """Columns of O that a thread holds at once; divides every supported head_dim_v. 32 would spill at this role's register budget."""
        return 16

    @cute.jit
    def run(self, place: Place, work: WorkTensors, heads: HeadTensors):
        """Walk the entries; owns the consumer sides of the statistics and of O, and the producer side of finished tiles."""
        g = self.geometry
        phase = Int32(0)
        out, feed = RingPosition(Int32(0), Int32(0)), RingPosition(Int32(0), Int32(0))
        has_tile = g.has_tile(place, feed)
        while has_tile:
            for q_idx in range(g.config.q_tiles, unroll=1):
                out = self.finish_tile(place, work, heads, feed, q_idx, phase, out)
            g.release_tile(place, feed)
            feed = advance(feed, FEED_STAGE)
            phase ^= 1
            has_tile = g.has_tile(place, feed)

    @cute.jit
    def finish_tile(
        self, place: Place, work: WorkTensors, heads: HeadTensors, feed: RingPosition, q_idx: Int32 | int, phase: Int32, out: RingPosition
    ):
        """Query tile `q_idx` of the entry at `feed`: wait for its statistics, its O and a buffer for each part of it; hand the finished
        parts on. phase: of the item's statistics and O.

        Returns the place of the buffer after them.
        """
        g = self.geometry
        warp = place.warp_idx % WARPGROUP
        row = warp * LANES + place.lane_idx
        lanes = warp * LANES << tcgen05_ops.LANE_SHIFT
        stats = place.smem_base + g.storage.stats + row * o_pitch(g.config) + q_idx * STATS_BYTES
        edge = q_idx * WARPGROUP + warp
        ptx.mbarrier_wait(g.full(place, "stats_softmax_to_correction", edge), phase)
        scale = ptx.load_shared_f32(stats)
        row_sum = ptx.load_shared_f32(stats + 4) if const_expr(g.config.kernel.has_parts) else None
        ptx.warp_arrive(g.empty(place, "stats_softmax_to_correction", edge), place.lane_idx)
        ptx.mbarrier_wait(g.full(place, "o_mma_to_correction", q_idx), phase)
        tcgen05_ops.fence_after_sync()
        o_tmem = g.tmem.o_at(place.tmem_base, q_idx) + lanes
        if const_expr(row_sum is not None):
            if g.read_part(place, feed).slot >= 0:
                out = self.finish_part(place, work, heads, feed, q_idx, row, o_tmem, RowSums(scale, row_sum), out)
            else:
                out = self.finish_whole(place, q_idx, row, o_tmem, scale, out)
        else:
            out = self.finish_whole(place, q_idx, row, o_tmem, scale, out)
        return out

    @cute.jit
    def finish_whole(self, place: Place, q_idx: Int32 | int, row: Int32, o_tmem: Int32, scale: Float32, out: RingPosition):
        """A query tile whose KV was not cut."""
        g = self.geometry
        for part in cutlass.range_constexpr(g.config.o_parts):
            ptx.mbarrier_wait(g.empty(place, "o_correction_to_epilogue", out.slot), out.phase ^ 1)
            self.finish_rows(o_tmem + part * g.config.o_columns, self.target(place, out, row), scale)
            if const_expr(part == g.config.o_parts - 1):
                self.release_o(place, q_idx)
            out = self.hand_over(place, out)
        return out

    @cute.jit
    def finish_part(
        self,
        place: Place,
        work: WorkTensors,
        heads: HeadTensors,
        feed: RingPosition,
        q_idx: Int32 | int,
        row: Int32,
        o_tmem: Int32,
        sums: RowSums,
        out: RingPosition,
    ):
        """Lay down a part's rows. Who comes last closes them; the others hand on buffers that the epilogue does not write from.

        Sums and maxima of a part are in the scale of its scores: `sums` of one row.
        """
        g, config, parts = self.geometry, self.geometry.config.kernel, TileParts(self.geometry.config)
        part, item = g.read_part(place, feed), g.read_item(place, work, feed)
        m_block = g.q_tile(place, item.tile, q_idx)
        tile, flag = g.tile_of_item(place, q_idx), place.smem_base + g.storage.part_flag
        # The epilogue has read the flag of the tile before when it has left the buffer.
        ptx.mbarrier_wait(g.empty(place, "o_correction_to_epilogue", out.slot), out.phase ^ 1)
        has_rows = m_block * config.tokens_per_tile < item.tile.seqlen.seqlen_q
        is_last = Int32(0)
        if has_rows:
            parts.lay_down(work.parts, part.slot, tile, row, o_tmem, sums, self.columns)
        self.release_o(place, q_idx)
        if has_rows:
            is_last = parts.arrive(work.parts, part, tile, row, flag)
        elif row == 0:
            ptx.store_shared_i32(flag, Int32(0))
        row_max, scale = Float32(0.0), Float32(0.0)
        if is_last == 1:
            total = parts.sum_rows(work.parts, part, tile, row)
            packed = g.pack.row(row, m_block, item.tile.seqlen)
            head = item.tile.kv_head_idx * config.q_per_kv + packed.head
            result = finalize_row(total.row_max, total.row_sum, sink_of(config, heads, head, packed.is_valid))
            row_max, scale = total.row_max, result.o_scale
            factor = result_factor(heads.mVScale, heads.mOutScale, item.tile.kv_head_idx)
            if const_expr(factor is not None):
                scale = scale * factor
            if const_expr(config.has_lse):
                if packed.is_valid:
                    heads.mLse[head, item.tile.seqlen.q_begin + packed.token] = result.lse
        for o_part in cutlass.range_constexpr(g.config.o_parts):
            if const_expr(o_part > 0):
                ptx.mbarrier_wait(g.empty(place, "o_correction_to_epilogue", out.slot), out.phase ^ 1)
            if is_last == 1:
                for base in cutlass.range(0, g.config.o_columns, self.columns, unroll=1):
                    o = parts.add_up(work.parts, part, tile, row, row_max, o_part * g.config.o_columns + base, self.columns)
                    self.store_columns(self.target(place, out, row) + base * config.out_element_bytes, o, scale)
            out = self.hand_over(place, out)
        return out

    def target(self, place: Place, out: RingPosition, row: Int32) -> Int32:
        """Shared address of a row in a buffer of finished rows."""
        g = self.geometry
        return place.smem_base + g.storage.o + out.slot * g.storage.sizes.o + row * o_pitch(g.config)

    def release_o(self, place: Place, q_idx: Int32 | int) -> None:
        """O of the query tile was read."""
        tcgen05_ops.fence_before_sync()
        self.geometry.group.warp_arrive(self.geometry.empty_at_leader(place, "o_mma_to_correction", q_idx), place.lane_idx)

    def hand_over(self, place: Place, out: RingPosition) -> RingPosition:
        """A buffer of finished rows to the epilogue, which copies them by the asynchronous proxy; the place of the next one."""
        ptx.fence_proxy_async_shared()
        ptx.warp_arrive(self.geometry.full(place, "o_correction_to_epilogue", out.slot), place.lane_idx)
        return advance(out, self.o_stage)

    def finish_rows(self, o_tmem: Int32, target: Int32, scale: Float32) -> None:
        """This thread's row of a part of O, scaled, to shared memory."""
        for base in range(0, self.geometry.config.o_columns, self.columns):
            (o,) = tcgen05_ops.wait_load([tcgen05_ops.load(o_tmem + base, self.columns)])
            self.store_columns(target + base * self.geometry.config.kernel.out_element_bytes, o, scale)

    def store_columns(self, target: Int32, o: ir.Value, scale: Float32) -> None:
        """`columns` columns of a row, scaled and rounded, to shared memory."""
        config = self.geometry.config.kernel
        # A row without keys gives 0 even where O is not finite.
        row = vectors.select_zero(scale == 0.0, self.scaled(o, scale))
        if config.has_out_scale:
            numbers = [Float32(x) for x in vectors.elements(row)]
            words = [float32_to_e4m3(numbers[j : j + 4]).ir_value() for j in range(0, self.columns, 4)]
        else:
            words = vectors.elements(vectors.pack_16bit(row, config.dtype))
        for j in range(0, len(words), 4):
            ptx.store_shared_v4(target + 4 * j, words[j : j + 4])

    def scaled(self, o: ir.Value, factor: Float32) -> ir.Value:
        """o * factor on packed pairs."""
        factors = vectors.broadcast(factor, 2)
        return vectors.from_pairs([vectors.mul2(vectors.pair(o, j), factors) for j in range(0, self.columns, 2)])
