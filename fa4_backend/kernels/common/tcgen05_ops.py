"""Thin names for what moves tensor memory (TMEM) and orders it: PTX ISA, "tcgen05". Products are in `umma.py`.

An address of TMEM is an Int32 with the lane in bits 16-31 and the column in bits 0-15 (PTX ISA, "Tensor Memory Addressing").
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import arith, llvm, nvvm, vector
from cutlass.cutlass_dsl import T

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors

TMEM_SPACE = 6  # LLVM's address space of TMEM
LANE_SHIFT = 16  # of the lane in an address


def _tmem_pointer(address: Int32) -> ir.Value:
    return llvm.inttoptr(llvm.PointerType.get(TMEM_SPACE), Int32(address).ir_value())


def load(address: Int32, columns: int) -> ir.Value:
    """Start loading `columns` words of this thread's TMEM lane (shape 32x32b): vector<n x i32>, to be used after `wait_load`."""
    return nvvm.tcgen05_ld(vectors.int32s(columns), nvvm.Tcgen05LdStShape.SHAPE_32X32B, _tmem_pointer(address))


def load_max(address: Int32, columns: int) -> tuple[ir.Value, Float32]:
    """`load` of float32 that also brings their largest; NaN loses (PTX ISA, "tcgen05.ld.red": sm_103a, not sm_100a)."""
    shape, pointer = nvvm.Tcgen05LdStShape.SHAPE_32X32B, _tmem_pointer(address)
    loaded, largest = nvvm.tcgen05_ld_red(vectors.float32s(columns), T.f32(), shape, nvvm.ReductionKind.MAX, pointer)
    return loaded, Float32(largest)


def store(address: Int32, words: ir.Value) -> None:
    """Start storing a vector<n x i32> to this thread's TMEM lane; complete after `wait_store`."""
    nvvm.tcgen05_st(nvvm.Tcgen05LdStShape.SHAPE_32X32B, _tmem_pointer(address), words)


def load_rows(address: Int32, columns: int) -> ir.Value:
    """Start loading 16 lanes x `columns` (shape 16x256b) as a warp's accumulator fragment (`wgmma_fragment`): vector<columns / 2 x i32>."""
    return nvvm.tcgen05_ld(vectors.int32s(columns // 2), nvvm.Tcgen05LdStShape.SHAPE_16X256B, _tmem_pointer(address))


def store_rows(address: Int32, words: ir.Value) -> None:
    """Start storing what `load_rows` loads; complete after `wait_store`."""
    nvvm.tcgen05_st(nvvm.Tcgen05LdStShape.SHAPE_16X256B, _tmem_pointer(address), words)


def wait_load(words: Sequence[ir.Value]) -> list[ir.Value]:
    """Wait for this thread's TMEM loads; returns what they brought as vector<n x f32>.

    The words are taken apart behind the wait: a bitcast of the whole vector would become register moves in front of it.
    """
    nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.LOAD)
    loaded = []
    for v in words:
        n = ir.VectorType(v.type).shape[0]
        loaded.append(vector.from_elements(vectors.float32s(n), [arith.bitcast(T.f32(), vector.extract(v, [], [i])) for i in range(n)]))
    return loaded


def wait_store() -> None:
    """Wait for this thread's TMEM stores."""
    nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.STORE)


def alloc(smem_address: Int32, columns: int, group: nvvm.CTAGroupKind) -> None:
    """Allocate TMEM columns and give up the right to allocate more; the whole warp calls. The address goes to shared memory."""
    nvvm.tcgen05_alloc(ptx.smem_pointer(smem_address), Int32(columns).ir_value(), group=group)
    nvvm.tcgen05_relinquish_alloc_permit(group=group)


def dealloc(address: Int32, columns: int, group: nvvm.CTAGroupKind) -> None:
    """Free what `alloc` allocated; the same warp calls."""
    nvvm.tcgen05_dealloc(_tmem_pointer(address), Int32(columns).ir_value(), group=group)


def fence_before_sync() -> None:
    """Order earlier tcgen05 operations before a following thread synchronisation (PTX ISA, "tcgen05.fence")."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)


def fence_after_sync() -> None:
    """Order later tcgen05 operations behind a preceding thread synchronisation."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)


def commit(barrier: Int32) -> None:
    """One arrival on `barrier` when all MMAs issued so far have completed; the warp elects the issuer."""
    ptx.inline_asm(
        "{ .reg .pred issue; elect.sync _|issue, 0xffffffff; "
        "@issue tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [$0]; }",
        [barrier],
    )
