"""Value tail warp: zeroes the rows of V past a sequence's last token, which may hold NaN; their weight is 0, and 0 * NaN is NaN.

K needs none of this (masked scores are replaced, not multiplied), nor do boxes without any token (TMA fills them with zeros).
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.tile_scheduler import tile_range
from fa4_backend.kernels.sm100.storage import ROW_BYTES, num_parts
from fa4_backend.kernels.sm100.work import Geometry, Place, WorkTensors

STORE_BYTES = 16
WARP_BYTES = 32 * STORE_BYTES


@dataclass(frozen=True)
class ValueTailWarp:
    """Follows the ring of K and V tiles and works on the first V tile of items that end within a block."""

    geometry: Geometry

    @cute.jit
    def run(self, place: Place, work: WorkTensors):
        """Walk the work list; owns the producer side of `v_tail_to_mma`, reads `kv_load_to_mma` as a bystander."""
        g, storage, config = self.geometry, self.geometry.storage, self.geometry.config.kernel
        kv_stage = config.tile.kv_stage
        begin, end = tile_range(work.mBegin)
        slot, tail_phase = Int32(0), Int32(0)  # slot: position in the ring, counted through both parities
        for index in range(begin, end, unroll=1):
            item = g.read_item(work, index)
            if item.has_v_tail:
                v_slot = (slot + 1) % (2 * kv_stage)
                stage, phase = v_slot % kv_stage, v_slot // kv_stage
                ptx.mbarrier_wait(g.empty(place, "v_tail_to_mma"), tail_phase ^ 1)
                ptx.mbarrier_wait(g.full(place, "kv_load_to_mma", stage), phase)
                base = place.smem_base + storage.kv + stage * storage.kv_stride
                self.zero_rows(place, base, item.tile.seqlen.seqlen_k - (item.blocks.end - 1) * config.tile.tile_n)
                ptx.fence_proxy_async_shared()
                ptx.warp_arrive(g.full(place, "v_tail_to_mma"), place.lane_idx)
                tail_phase ^= 1
            slot = (slot + 2 * item.num_blocks) % (2 * kv_stage)

    @cute.jit
    def zero_rows(self, place: Place, base: Int32, first_row: Int32):
        """Rows `first_row` to the end of its box, in every part; rows behind that box are zeros already."""
        config = self.geometry.config.kernel
        box_bytes = config.box_rows * ROW_BYTES
        first = cutlass.max(first_row, 0) * ROW_BYTES
        last = (first + box_bytes - 1) // box_bytes * box_bytes
        zero = Int32(0).ir_value()
        for offset in range(first + place.lane_idx * STORE_BYTES, last, WARP_BYTES, unroll=1):
            for part in cutlass.range_constexpr(num_parts(config.head_dim_v)):
                ptx.store_shared_v4(base + part * self.geometry.storage.sizes.part + offset, [zero] * 4)
