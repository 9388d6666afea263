"""How many CTAs share a matrix product: one, or a pair of a cluster of two (tcgen05 `cta_group::2`).

In a pair each CTA owns query tiles with their S, P and O in TMEM, half of K's rows and half of V's columns: a product of 256 rows reads the
halves of its second operand from both shared memories. CTA 0, the leader, issues every product for both. So what the mma warp waits for is
signalled at the leader's barriers by both CTAs, and its commits arrive at both CTAs' barriers. All else stays within a CTA.

PTX ISA: "tcgen05.mma" (cta_group), "tcgen05.commit" (multicast), "mapa", "mbarrier.arrive" (shared::cluster).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import nvvm
from cutlass.cutlass_dsl import T

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import tcgen05_ops
from fa4_backend.kernels.common.cluster_ops import sync_cluster

LEADER = 0
BOTH = 0b11  # ranks that a commit arrives at


@dataclass(frozen=True)
class CtaGroup:
    """Emits what depends on the number of CTAs; holds no state."""

    ctas: int  # 1 or 2

    def rank(self) -> Int32 | int:
        """This CTA's place in the group."""
        return 0 if self.ctas == 1 else Int32(cute.arch.block_idx_in_cluster())

    def leader_base(self, smem_base: Int32) -> Int32:
        """Address, for arrivals and copies, of the leader's shared memory."""
        return self.base_of(smem_base, LEADER)

    def base_of(self, smem_base: Int32, rank: int) -> Int32:
        """Address, for arrivals and stores, of the shared memory of the group's CTA `rank`."""
        if self.ctas == 1:
            return smem_base
        return Int32(ptx.inline_asm("mapa.shared::cluster.u32 $0, $1, $2;", [smem_base, Int32(rank)], T.i32(), "=r"))

    def sync_all(self) -> None:
        """Every thread of the group."""
        sync_cluster(self.ctas)

    # -- what the mma warp waits for --------------------------------------------------------------------------------------------

    def wait(self, barrier: Int32, parity: Int32) -> None:
        """The mma warp's wait: acquires what both CTAs released."""
        if self.ctas == 1:
            ptx.mbarrier_wait(barrier, parity)
        else:
            ptx.mbarrier_wait_cluster(barrier, parity)

    def warp_arrive(self, barrier: Int32, lane_idx: Int32) -> None:
        """One arrival of the warp at a barrier of any CTA of the group."""
        if self.ctas == 1:
            ptx.warp_arrive(barrier, lane_idx)
            return
        cute.arch.sync_warp()
        ptx.inline_asm(
            "{ .reg .pred leader; setp.eq.b32 leader, $1, 0; @leader mbarrier.arrive.release.cluster.shared::cluster.b64 _, [$0]; }",
            [barrier, lane_idx],
        )

    def announce(self, barrier: Int32, tx_bytes: int) -> None:
        """One arrival, by each thread that gets here, that announces this CTA's bytes."""
        if self.ctas == 1:
            ptx.mbarrier_arrive_expect_tx(barrier, tx_bytes)
            return
        ptx.inline_asm("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [$0], $1;", [barrier, Int32(tx_bytes)])

    def tma_load(self, descriptor: ir.Value, smem_address: Int32, barrier: Int32, coords: Sequence[Int32]) -> None:
        """One box to this CTA's shared memory, whose bytes complete at a barrier of either CTA."""
        if self.ctas == 1:
            ptx.tma_load(descriptor, smem_address, barrier, coords)
            return
        nvvm.cp_async_bulk_tensor_shared_cluster_global(
            ptx.smem_pointer(smem_address, cluster=True), descriptor, [Int32(c).ir_value() for c in coords], ptx.smem_pointer(barrier), [],
            group=nvvm.CTAGroupKind.CTA_2,
        )  # fmt: skip

    # -- tensor core ------------------------------------------------------------------------------------------------------------

    def commit(self, barrier: Int32) -> None:
        """One arrival at this barrier of every CTA when all products issued so far have completed; the warp elects the issuer."""
        if self.ctas == 1:
            tcgen05_ops.commit(barrier)
            return
        ptx.inline_asm(
            "{ .reg .pred issue; .reg .b16 ranks; elect.sync _|issue, 0xffffffff; "
            f"mov.b16 ranks, {BOTH}; "
            "@issue tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [$0], ranks; }",
            [barrier],
        )

    @property
    def kind(self) -> nvvm.CTAGroupKind:
        """The group as NVVM names it."""
        return nvvm.CTAGroupKind.CTA_1 if self.ctas == 1 else nvvm.CTAGroupKind.CTA_2

    def tmem_alloc(self, smem_address: Int32, columns: int) -> None:
        """Allocate TMEM in each CTA; one warp of each calls."""
        tcgen05_ops.alloc(smem_address, columns, self.kind)

    def tmem_dealloc(self, address: Int32, columns: int) -> None:
        """Free what `tmem_alloc` allocated; the same warps call."""
        tcgen05_ops.dealloc(address, columns, self.kind)
