"""MMA warp of a CTA with one query tile, as wide heads leave room for: S of consecutive KV blocks in two buffers, O += P V in block order.

While the softmax group turns S of a block into P, the tensor core does the product with V of the block before and S of the block behind:
QK 0, QK 1, PV 0, QK 2, PV 1, ..., which is also the order of K and V in their ring. MMAs of one CTA execute in issue order, so the QK that
overwrites a buffer of S (and P over it) needs no wait for the PV that reads that P.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common import tcgen05_ops
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm100.config import S_STAGE
from fa4_backend.kernels.sm100.mma_warp import MmaWarp
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE
from fa4_backend.kernels.sm100.work import Geometry, Place, WorkTensors


@dataclass(frozen=True)
class LoneTileMmaWarp:
    """One elected thread issues; the whole warp walks the loop. Of a CTA pair, the leader's mma warp alone."""

    geometry: Geometry

    @cute.jit
    def run(self, place: Place, work: WorkTensors):
        """Walk the entries; owns the consumer sides of Q, KV and P, and the producer sides of S, of finished products and of O."""
        g = self.geometry
        issue = MmaWarp(g)
        ring, p = RingPosition(Int32(0), Int32(0)), RingPosition(Int32(0), Int32(0))
        next_s, item_phase = Int32(0), Int32(0)
        feed = RingPosition(Int32(0), Int32(0))
        has_tile = g.has_tile(place, feed)
        while has_tile:
            num_blocks = g.read_item(place, work, feed).num_blocks
            g.release_tile(place, feed)
            feed = advance(feed, FEED_STAGE)
            g.group.wait(g.full(place, "q_load_to_mma"), item_phase)
            # Round t: S of block t, then the product with V of the block before it.
            for t in range(num_blocks + 1, unroll=1):
                if t < num_blocks:
                    g.group.wait(g.full(place, g.kv_edge, ring.slot), ring.phase)
                    issue.issue_qk(place, Int32(0), next_s, ring.slot)
                    g.group.commit(g.empty(place, g.kv_edge, ring.slot))
                    if t == num_blocks - 1:
                        g.group.commit(g.empty(place, "q_load_to_mma"))
                    ring, next_s = advance(ring, g.config.kv_stage), (next_s + 1) % S_STAGE
                if t > 0:
                    g.group.wait(g.full(place, g.kv_edge, ring.slot), ring.phase)
                    if t == 1:
                        g.group.wait(g.empty(place, "o_mma_to_correction"), item_phase ^ 1)
                    for rest in cutlass.range_constexpr(2):
                        edge = "p_rest_softmax_to_mma" if rest else "p_softmax_to_mma"
                        g.group.wait(g.full(place, edge, p.slot), p.phase)
                        tcgen05_ops.fence_after_sync()
                        issue.issue_pv(place, p.slot, ring.slot, is_rest=bool(rest), accumulate=Int32(1) if rest else t - 1)
                    g.group.commit(g.full(place, "pv_mma_to_softmax"))
                    # Before the commit that lets the CTAs end: a peer that has ended must not be arrived at.
                    g.group.commit(g.empty(place, g.kv_edge, ring.slot))
                    if t == num_blocks:
                        g.group.commit(g.full(place, "o_mma_to_correction"))
                    ring, p = advance(ring, g.config.kv_stage), advance(p, S_STAGE)
            item_phase ^= 1
            has_tile = g.has_tile(place, feed)
