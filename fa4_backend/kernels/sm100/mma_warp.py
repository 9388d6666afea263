"""MMA warp: S = Q K^T and O += P V for both query tiles, in the order PV 0, QK 0, PV 1, QK 1 of consecutive KV blocks.

While the tensor core works for one tile, the other tile's softmax group turns S into P. MMAs of one CTA execute in issue order, so the QK
that overwrites S (and P over it) needs no wait for the PV that reads P.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common import tcgen05_ops, umma
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE
from fa4_backend.kernels.sm100.work import Geometry, Place, WorkTensors


@dataclass(frozen=True)
class MmaWarp:
    """One elected thread issues; the whole warp walks the loop. Of a CTA pair, the leader's mma warp alone."""

    geometry: Geometry

    @cute.jit
    def run(self, place: Place, work: WorkTensors):
        """Walk the entries; owns the consumer sides of Q, KV and P, and the producer sides of S and O.

        One stream of blocks over all items: behind the last product with V of a query tile stands its first Q K^T of the next item, so
        that the softmax of that block runs while the other tile's last product does, and O of the item before is read meanwhile.
        """
        g, kv_stage = self.geometry, self.geometry.config.kv_stage
        k, feed = RingPosition(Int32(0), Int32(0)), RingPosition(Int32(0), Int32(0))
        item_phase, p_phase = Int32(0), Int32(0)
        has_tile = g.has_tile(place, feed)
        if has_tile:
            g.group.wait(g.full(place, g.kv_edge, k.slot), k.phase)
            for q_idx in range(g.config.q_tiles, unroll=1):
                g.group.wait(g.full(place, "q_load_to_mma", q_idx), item_phase)
                self.issue_qk(place, q_idx, q_idx, k.slot)
            g.group.commit(g.empty(place, g.kv_edge, k.slot))
        while has_tile:
            num_blocks = g.read_item(place, work, feed).num_blocks
            g.release_tile(place, feed)
            feed = advance(feed, FEED_STAGE)
            if num_blocks == 1:
                for q_idx in range(g.config.q_tiles, unroll=1):
                    g.group.commit(g.empty(place, "q_load_to_mma", q_idx))
            for i in range(num_blocks, unroll=1):
                v = advance(k, kv_stage)
                k = advance(v, kv_stage)
                is_last = i == num_blocks - 1
                g.group.wait(g.full(place, g.kv_edge, v.slot), v.phase)
                for q_idx in range(g.config.q_tiles, unroll=1):
                    if i == 0:
                        g.group.wait(g.empty(place, "o_mma_to_correction", q_idx), item_phase ^ 1)
                    g.group.wait(g.full(place, "p_softmax_to_mma", q_idx), p_phase)
                    tcgen05_ops.fence_after_sync()
                    self.issue_pv(place, q_idx, v.slot, is_rest=False, accumulate=i)
                    g.group.wait(g.full(place, "p_rest_softmax_to_mma", q_idx), p_phase)
                    tcgen05_ops.fence_after_sync()
                    self.issue_pv(place, q_idx, v.slot, is_rest=True, accumulate=Int32(1))
                    if q_idx == g.config.q_tiles - 1:
                        # Before the commit that lets the CTAs end: a peer that has ended must not be arrived at.
                        g.group.commit(g.empty(place, g.kv_edge, v.slot))
                    if is_last:
                        g.group.commit(g.full(place, "o_mma_to_correction", q_idx))
                        if q_idx == 0:
                            has_tile = g.has_tile(place, feed)
                    if not is_last or has_tile:
                        if q_idx == 0:
                            g.group.wait(g.full(place, g.kv_edge, k.slot), k.phase)
                        if is_last:
                            g.group.wait(g.full(place, "q_load_to_mma", q_idx), item_phase ^ 1)
                        self.issue_qk(place, q_idx, q_idx, k.slot)
                        if i == num_blocks - 2:
                            g.group.commit(g.empty(place, "q_load_to_mma", q_idx))
                if not is_last or has_tile:
                    g.group.commit(g.empty(place, g.kv_edge, k.slot))
                p_phase ^= 1
            item_phase ^= 1

    @property
    def products(self) -> umma.Products:
        """Of the model's dtype, or of FP8 where Q is."""
        config = self.geometry.config
        dtype = config.kernel.q_dtype if config.kernel.has_q_scale else config.kernel.dtype
        return umma.Products(dtype, config.tuning.cta_group, config.kernel.tile.tile_m, config.row_bytes)

    def issue_qk(self, place: Place, q_idx: Int32, buffer: Int32, stage: Int32) -> None:
        """S of query tile `q_idx` against the K tile in `stage` to `buffer`, then its commit."""
        g, storage, config = self.geometry, self.geometry.storage, self.geometry.config.kernel
        q_low = umma.descriptor_low(place.smem_base + storage.q + q_idx * storage.sizes.q)
        k_low = umma.descriptor_low(place.smem_base + storage.kv + stage * storage.kv_stride)
        products = self.products
        q_steps, k_steps = (products.k_major_steps(config.head_dim, part) for part in (storage.sizes.part, storage.sizes.k_part))
        products.mma_ss(g.tmem.s_at(place.tmem_base, buffer), q_low, k_low, q_steps, k_steps, config.tile.tile_n)
        g.group.commit(g.full(place, "s_mma_to_softmax", buffer))

    def issue_pv(self, place: Place, buffer: Int32, stage: Int32, *, is_rest: bool, accumulate: Int32) -> None:
        """First or last part of O += P V for the weights in `buffer` with the V tile in `stage`."""
        g, storage, config = self.geometry, self.geometry.storage, self.geometry.config.kernel
        v_low = umma.descriptor_low(place.smem_base + storage.kv + stage * storage.kv_stride, storage.sizes.part)
        products = self.products
        cut, end = g.config.tuning.p_first_columns // products.k_elems, config.tile.tile_n // products.k_elems
        k_steps = range(cut, end) if is_rest else range(cut)
        o_tmem, p_tmem = (at(place.tmem_base, buffer) for at in (g.tmem.o_at, g.tmem.p_at))
        products.mma_ts(o_tmem, p_tmem, v_low, k_steps, config.head_dim_v, accumulate)
