"""What CTAs of a cluster do to each other's shared memory: arrivals, waits for them, copies to several CTAs at once.

PTX ISA: "mapa", "mbarrier.arrive" (shared::cluster), "mbarrier.try_wait" (.cluster), "cp.async.bulk.tensor" (multicast::cluster).
Each function does the plain thing where a cluster is a single CTA.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass.cute as cute
from cutlass import Int16, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import nvvm

from fa4_backend.kernels.common import ptx_ops as ptx


def sync_cluster(cluster_size: int) -> None:
    """Every thread of the cluster."""
    if cluster_size == 1:
        cute.arch.sync_threads()
    else:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


def arrive_at(barrier: cute.Pointer, rank: Int32 | int, cluster_size: int) -> None:
    """One arrival at a CTA's barrier by each thread that gets here; its accesses come before it."""
    if cluster_size == 1:
        cute.arch.mbarrier_arrive(barrier)
    else:
        cute.arch.mbarrier_arrive(barrier, rank, scope=nvvm.MemScopeKind.CLUSTER)


def wait_for_cluster(barrier: cute.Pointer, parity: Int32, cluster_size: int) -> None:
    """Wait for a phase that CTAs of the cluster complete: acquires what they released."""
    if cluster_size == 1:
        cute.arch.mbarrier_wait(barrier, parity)
        return
    ptx.mbarrier_wait_cluster(barrier.toint(), parity)


def tma_load(descriptor: ir.Value, smem_address: Int32, barrier: Int32, coords: Sequence[Int32 | int], cluster_size: int) -> None:
    """One box to the same place of every CTA of the cluster; completes at each one's barrier. Issued by each thread that gets here."""
    if cluster_size == 1:
        ptx.tma_load(descriptor, smem_address, barrier, coords)
        return
    nvvm.cp_async_bulk_tensor_shared_cluster_global(
        ptx.smem_pointer(smem_address, cluster=True), descriptor, [Int32(c).ir_value() for c in coords], ptx.smem_pointer(barrier), [],
        multicast_mask=Int16((1 << cluster_size) - 1).ir_value(),
    )  # fmt: skip
