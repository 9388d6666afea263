"""Value tail warp: zeroes the rows of V at the edges of what an item sees: past the sequence's last token, and before its window.

They may hold NaN; their weight is 0, and 0 * NaN is NaN. K needs none of this (masked scores are replaced, not multiplied), nor do boxes
that lie wholly beyond an edge (TMA fills them with zeros). A tile with such rows is loaded on a barrier of its own, and this warp takes the
load warp's place as the one that fills its buffer of the KV ring: a warp that only watched the ring could mistake one pass for another,
since a parity tells neighbouring passes apart and no others.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.hardware import ACCESS_BYTES, LANES
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE
from fa4_backend.kernels.sm100.work import Geometry, Place, WorkItem, WorkTensors

WARP_BYTES = LANES * ACCESS_BYTES


@dataclass(frozen=True)
class ValueTailWarp:
    """Works on an item's first V tile (its last keys) and, where a window begins there, on its last; tracks their places in the KV ring."""

    geometry: Geometry

    @cute.jit
    def run(self, place: Place, work: WorkTensors):
        """Walk the entries; owns the consumer side of `v_tail_load_to_value_tail`, and hands each tile on in `kv_load_to_mma`."""
        g = self.geometry
        kv_stage = g.config.kv_stage
        stage, tail_phase = Int32(0), Int32(0)
        feed = RingPosition(Int32(0), Int32(0))
        has_tile = g.has_tile(place, feed)
        while has_tile:
            item = g.read_item(place, work, feed)
            g.release_tile(place, feed)
            feed = advance(feed, FEED_STAGE)
            has_edge, last = g.has_v_tail(item), item.num_blocks - 1
            if const_expr(g.has_window_left):
                has_edge = has_edge | (last == 0) & g.has_v_head(work, item)
            if has_edge:
                self.clean(place, work, item, 0, (stage + self.place_of_v(item, 0)) % kv_stage, tail_phase)
                tail_phase ^= 1
            if const_expr(g.has_window_left):
                if (last > 0) & g.has_v_head(work, item):
                    self.clean(place, work, item, last, (stage + self.place_of_v(item, last)) % kv_stage, tail_phase)
                    tail_phase ^= 1
            stage = (stage + 2 * item.num_blocks) % kv_stage
            has_tile = g.has_tile(place, feed)

    def place_of_v(self, item: WorkItem, i: Int32 | int) -> Int32 | int:
        """Where V of the item's block `i` comes among the item's tiles: behind its K; of a lone query tile behind the next block's K."""
        if self.geometry.config.q_tiles > 1:
            return 2 * i + 1
        return cutlass.min(2 * i + 2, 2 * item.num_blocks - 1)

    @cute.jit
    def clean(self, place: Place, work: WorkTensors, item: WorkItem, i: Int32 | int, stage: Int32, tail_phase: Int32):
        """The item's V tile `i` in buffer `stage` of the ring: wait for it, zero what no row sees, hand it to the mma warp."""
        g, storage, tile_n = self.geometry, self.geometry.storage, self.geometry.config.kernel.tile.tile_n
        row_bytes = g.config.row_bytes
        box_bytes = g.config.kernel.box_rows * row_bytes
        ptx.mbarrier_wait(g.full(place, "v_tail_load_to_value_tail"), tail_phase)
        base = place.smem_base + storage.kv + stage * storage.kv_stride
        first_column = (item.blocks.end - 1 - i) * tile_n
        # From the sequence's end to the end of its box; rows behind that box are zeros already.
        tail = (item.tile.seqlen.seqlen_k - first_column) * row_bytes
        tail_end = (tail + box_bytes - 1) // box_bytes * box_bytes
        if const_expr(g.has_window_left):
            # The tile may lie before the sequence's end; and from the box that the window begins in to its first key.
            tail_end = cutlass.min(tail_end, tile_n * row_bytes)
            head_end = cutlass.max(g.first_key(work, item) - first_column, 0) * row_bytes
            self.zero_bytes(place, base, head_end // box_bytes * box_bytes, head_end)
        self.zero_bytes(place, base, tail, tail_end)
        ptx.fence_proxy_async_shared()
        g.group.warp_arrive(g.full_at_leader(place, "kv_load_to_mma", stage), place.lane_idx)
        ptx.warp_arrive(g.empty(place, "v_tail_load_to_value_tail"), place.lane_idx)

    @cute.jit
    def zero_bytes(self, place: Place, base: Int32, first: Int32, last: Int32):
        """Bytes `first .. last` of every part: whole rows."""
        zero = Int32(0).ir_value()
        for offset in range(first + place.lane_idx * ACCESS_BYTES, last, WARP_BYTES, unroll=1):
            for part in cutlass.range_constexpr(self.geometry.config.v_parts):
                ptx.store_shared_v4(base + part * self.geometry.storage.sizes.part + offset, [zero] * 4)
