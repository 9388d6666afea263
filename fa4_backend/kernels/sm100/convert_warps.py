"""Convert warps: K and V tiles from e4m3, as they are staged, to the 16 bits that tcgen05 reads from the ring; every value is exact.

They are the correction warps, which between the ends of two items have nothing else to do. An item's rows are finished (`correction_warps`)
while tiles of the next are converted: query tile 0 behind its first K and V, query tile 1 behind its second K, a lone tile behind its
second K. What products of the next item need before they need O is then ready when O is, and no tile waits for a buffer that only finished
rows would free.

A lane has one row of a tile, and takes chunks of 16 bytes of it. Eight lanes, whose accesses shared memory serves together, then have eight
neighbouring rows: in TMA's swizzles their chunks lie in eight different groups of banks, staged (rows of 64 or 32 bytes) and in the ring
(rows of 128 bytes).

PTX ISA 9.2 has a conversion from e4m3 to bfloat16 in one instruction (sm_100a and later), which would take a quarter of these; the
compiler here writes PTX ISA 8.8.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.fp8 import e4m3_to_16bit
from fa4_backend.kernels.common.hardware import ACCESS_BYTES, LANES
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm100.correction_warps import CorrectionWarps
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE, WARPGROUP, WARPGROUP_THREADS
from fa4_backend.kernels.sm100.work import Geometry, HeadTensors, Place, WorkTensors

CHUNK = ACCESS_BYTES  # elements of FP8 of a shared-memory access
PART_CHUNKS = 64 // CHUNK  # of FP8 that make a row of a part of the ring


class Seen(NamedTuple):
    """What of a sequence's K and V an item sees."""

    num_blocks: Int32
    blocks_end: Int32  # block behind the last
    first_key: Int32
    seqlen_k: Int32


@dataclass(frozen=True)
class ConvertWarps:
    """Four warps that convert every K and V tile of their CTA."""

    geometry: Geometry
    correction: CorrectionWarps

    @cute.jit
    def run(self, place: Place, work: WorkTensors, heads: HeadTensors):
        """Walk the entries; owns both sides of the convert warps' edges of K and V, and the places in the correction's edges."""
        g = self.geometry
        is_lone = g.config.q_tiles == 1
        staged, ring = RingPosition(Int32(0), Int32(0)), RingPosition(Int32(0), Int32(0))
        out, item_phase = RingPosition(Int32(0), Int32(0)), Int32(0)
        feed, before = RingPosition(Int32(0), Int32(0)), RingPosition(Int32(0), Int32(0))
        has_tile, has_before = g.has_tile(place, feed), Boolean(False)
        # The last round has no tiles: it finishes the last item's rows.
        while has_tile or has_before:
            seen = Seen(Int32(0), Int32(0), Int32(0), Int32(0))
            if has_tile:
                item = g.read_item(place, work, feed)
                seen = Seen(item.num_blocks, item.blocks.end, g.first_key(work, item), item.tile.seqlen.seqlen_k)
            # Of a lone query tile, V comes a round behind its K, as its products do.
            for i in range(cutlass.max(seen.num_blocks + int(is_lone), 2), unroll=1):
                for is_v in cutlass.range_constexpr(2):
                    if i == 1 and has_before:
                        if const_expr(not is_lone or is_v):
                            out = self.correction.finish_tile(place, work, heads, before, 0 if is_lone else is_v, item_phase, out)
                    if const_expr(is_lone and is_v):
                        if (i > 0) & (i <= seen.num_blocks):
                            staged, ring = self.convert_tile(place, is_v, seen, i - 1, staged, ring)
                    else:
                        if i < seen.num_blocks:
                            staged, ring = self.convert_tile(place, is_v, seen, i, staged, ring)
            if has_before:
                item_phase ^= 1
                g.release_tile(place, before)
            has_before, before = has_tile, feed
            if has_tile:
                feed = advance(feed, FEED_STAGE)
                has_tile = g.has_tile(place, feed)

    @cute.jit
    def convert_tile(self, place: Place, is_v: cutlass.Constexpr[int], seen: Seen, i: Int32, staged: RingPosition, ring: RingPosition):
        """K or V of the item's block `i`, once it is staged and a buffer of the ring is free; returns the places behind both."""
        g, storage = self.geometry, self.geometry.storage
        first_column = (seen.blocks_end - 1 - i) * g.config.kernel.tile.tile_n
        ptx.mbarrier_wait(g.full(place, "kv_load_to_convert", staged.slot), staged.phase)
        ptx.mbarrier_wait(g.empty(place, "kv_convert_to_mma", ring.slot), ring.phase ^ 1)
        source = place.smem_base + storage.loaded + staged.slot * storage.loaded_stride
        target = place.smem_base + storage.kv + ring.slot * storage.kv_stride
        self.convert(place, source, target, is_v, seen.first_key - first_column, seen.seqlen_k - first_column)
        ptx.warp_arrive(g.empty(place, "kv_load_to_convert", staged.slot), place.lane_idx)
        ptx.fence_proxy_async_shared()
        g.group.warp_arrive(g.full_at_leader(place, "kv_convert_to_mma", ring.slot), place.lane_idx)
        return advance(staged, g.config.staged), advance(ring, g.config.kv_stage)

    @cute.jit
    def convert(
        self,
        place: Place,
        source: Int32,  # shared address of a staged tile
        target: Int32,  # shared address of a buffer of the ring
        is_v: cutlass.Constexpr[int],
        first_row: Int32,  # rows `first_row .. end_row` are those that the item sees
        end_row: Int32,
    ):
        """This thread's chunks of a tile of K or V.

        Rows of V that the item does not see become zeros: they may hold NaN, and a weight of 0 times NaN is NaN. K needs none of this,
        since masked scores are replaced, not multiplied.
        """
        config, sizes, kernel = self.geometry.config, self.geometry.storage.sizes, self.geometry.config.kernel
        rows, elems, loaded_part, part_bytes = config.k_rows, kernel.head_dim, sizes.k_loaded_part, sizes.k_part
        if const_expr(is_v):
            rows, elems = kernel.tile.tile_n, min(config.v_parts * config.part_elems, kernel.head_dim_v)
            loaded_part, part_bytes = sizes.v_loaded_part, sizes.part
        # Warps that have the same rows take every other chunk.
        shares, staged_chunks = WARPGROUP_THREADS // rows, config.loaded_elems // CHUNK
        assert staged_chunks % shares == 0, f"{staged_chunks=} {shares=}"
        thread = place.warp_idx % WARPGROUP * LANES + place.lane_idx
        row, share = thread % rows, thread // rows
        # Swizzles: chunk c of a row of n chunks lies at c ^ (row * n / 8 % n).
        source += row * config.loaded_elems + (share ^ (row * staged_chunks // 8 % staged_chunks)) * CHUNK
        target += row * config.row_bytes + (2 * share ^ (row % 8)) * CHUNK
        is_seen = (row >= first_row) & (row < end_row)
        for staged_part in cutlass.range_constexpr(elems // config.loaded_elems):
            chunks = list(range(0, staged_chunks, shares))
            loaded = [ptx.load_shared_v4((source ^ c * CHUNK) + staged_part * loaded_part) for c in chunks]
            for chunk, words in zip(chunks, loaded, strict=True):
                part, c = divmod(staged_part * staged_chunks + chunk, PART_CHUNKS)
                kept = vectors.select_words(is_seen, words) if const_expr(is_v) else words
                pairs = [pair for word in vectors.elements(kept) for pair in e4m3_to_16bit(word, kernel.dtype)]
                for half in cutlass.range_constexpr(2):
                    ptx.store_shared_v4((target ^ (2 * c + half) * CHUNK) + part * part_bytes, pairs[4 * half : 4 * half + 4])
