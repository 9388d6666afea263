"""Value tail warp: zeroes the rows of V past a sequence's last token, which may hold NaN; their weight is 0, and 0 * NaN is NaN.

K needs none of this (masked scores are replaced, not multiplied), nor do boxes without any token (TMA fills them with zeros). A tile with
such rows is loaded on a barrier of its own, and this warp takes the load warp's place as the one that fills its buffer of the KV ring: a
warp that only watched the ring could mistake one pass for another, since a parity tells neighbouring passes apart and no others.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.sm100.storage import ROW_BYTES
from fa4_backend.kernels.sm100.work import Geometry, Place, WorkTensors

STORE_BYTES = 16
WARP_BYTES = 32 * STORE_BYTES


@dataclass(frozen=True)
class ValueTailWarp:
    """Works on the first V tile of items whose last box is not full; tracks that tile's place in the KV ring."""

    geometry: Geometry

    @cute.jit
    def run(self, place: Place, work: WorkTensors):
        """Walk the work list; owns the consumer side of `v_tail_load_to_value_tail`, and hands each tile on in `kv_load_to_mma`."""
        g, storage, config = self.geometry, self.geometry.storage, self.geometry.config.kernel
        kv_stage = g.config.kv_stage
        begin, end = g.item_range(work)
        stage, tail_phase = Int32(0), Int32(0)
        for index in range(begin, end, unroll=1):
            item = g.read_item(work, index)
            if g.has_v_tail(item):
                ptx.mbarrier_wait(g.full(place, "v_tail_load_to_value_tail"), tail_phase)
                v_stage = (stage + 1) % kv_stage
                base = place.smem_base + storage.kv + v_stage * storage.kv_stride
                self.zero_rows(place, base, item.tile.seqlen.seqlen_k - (item.blocks.end - 1) * config.tile.tile_n)
                ptx.fence_proxy_async_shared()
                g.group.warp_arrive(g.full_at_leader(place, "kv_load_to_mma", v_stage), place.lane_idx)
                ptx.warp_arrive(g.empty(place, "v_tail_load_to_value_tail"), place.lane_idx)
                tail_phase ^= 1
            stage = (stage + 2 * item.num_blocks) % kv_stage

    @cute.jit
    def zero_rows(self, place: Place, base: Int32, first_row: Int32):
        """Rows `first_row` to the end of its box, in every part; rows behind that box are zeros already."""
        config = self.geometry.config.kernel
        box_bytes = config.box_rows * ROW_BYTES
        first = first_row * ROW_BYTES
        last = (first + box_bytes - 1) // box_bytes * box_bytes
        zero = Int32(0).ir_value()
        for offset in range(first + place.lane_idx * STORE_BYTES, last, WARP_BYTES, unroll=1):
            for part in cutlass.range_constexpr(self.geometry.config.v_parts):
                ptx.store_shared_v4(base + part * self.geometry.storage.sizes.part + offset, [zero] * 4)
