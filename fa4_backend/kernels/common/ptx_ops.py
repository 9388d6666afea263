"""Thin names for the PTX instructions that kernels issue directly: shared memory, mbarriers, TMA, single registers.

Shared-memory addresses are Int32 in the shared window. These are plain functions that emit operations: they may be called from
`@cute.jit` code with constant Python arguments, and hold no control flow of the device. Vectors of registers: `vector_ops.py`; tensor
memory: `tcgen05_ops.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import arith, llvm, nvvm, vector
from cutlass._mlir.dialects import cute as cute_ir
from cutlass._mlir.dialects import cute_nvgpu as cute_nvgpu_ir
from cutlass._mlir.dialects import math as math_ir
from cutlass.cutlass_dsl import T

from fa4_backend.kernels.common import vector_ops as vectors

SMEM_SPACE, CLUSTER_SPACE = 3, 7  # LLVM address spaces of the NVPTX target
WAIT_TICKS = 10_000_000  # ns a try_wait may suspend before it looks again; any value is correct


def inline_asm(text: str, operands: Sequence[Int32], result: ir.Type | None = None, result_constraint: str = "", *, pure: bool = False):
    """Inline PTX; `text` names its operands $0, $1, ... (the result, if any, is $0). All operands are 32-bit registers."""
    constraints = ",".join([result_constraint] * bool(result_constraint) + ["r"] * len(operands) + ["~{memory}"] * (not pure))
    values = [Int32(x).ir_value() for x in operands]
    return llvm.inline_asm(
        result, values, text, constraints, has_side_effects=not pure, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT
    )


def inline_asm_f32(text: str, operands: Sequence[Float32]) -> Int32:
    """Pure inline PTX from float32 registers to a word, as `inline_asm`."""
    values = [Float32(x).ir_value() for x in operands]
    constraints = ",".join(["=r"] + ["f"] * len(values))
    return Int32(
        llvm.inline_asm(
            T.i32(), values, text, constraints, has_side_effects=False, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT
        )
    )


# ---- shared memory, mbarriers, TMA -------------------------------------------------------------------------------------------


def smem_pointer(address: Int32, *, cluster: bool = False) -> ir.Value:
    """LLVM pointer to a shared-memory address of the CTA, or of the cluster."""
    return llvm.inttoptr(llvm.PointerType.get(CLUSTER_SPACE if cluster else SMEM_SPACE), Int32(address).ir_value())


def mbarrier_init(address: Int32, arrivals: int) -> None:
    """PTX ISA, "mbarrier.init"."""
    nvvm.mbarrier_init(smem_pointer(address), Int32(arrivals).ir_value())


def mbarrier_wait(address: Int32, parity: Int32) -> None:
    """Wait until the phase with this parity has completed (acquire, CTA scope)."""
    nvvm.mbarrier_try_wait_parity(smem_pointer(address), Int32(parity).ir_value(), Int32(WAIT_TICKS).ir_value())


def mbarrier_wait_cluster(address: Int32, parity: Int32) -> None:
    """`mbarrier_wait` for what CTAs of the cluster released (acquire, cluster scope)."""
    inline_asm(
        "{ .reg .pred over;\n AGAIN:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [$0], $1, $2; "
        "@over bra.uni OVER; bra.uni AGAIN;\n OVER: }",
        [address, parity, Int32(WAIT_TICKS)],
    )


def mbarrier_arrive_expect_tx(address: Int32, tx_bytes: int) -> None:
    """One arrival that also announces `tx_bytes` of TMA."""
    nvvm.mbarrier_arrive_expect_tx(smem_pointer(address), Int32(tx_bytes).ir_value(), scope=nvvm.MemScopeKind.CTA, relaxed=False)


def mbarrier_arrive(address: Int32) -> None:
    """One arrival (release, CTA scope) by each thread that gets here."""
    nvvm.mbarrier_arrive(smem_pointer(address), scope=nvvm.MemScopeKind.CTA, relaxed=False)


def warp_arrive(address: Int32, lane_idx: Int32) -> None:
    """One arrival on behalf of the whole warp: the lanes' earlier accesses happen before it."""
    cute.arch.sync_warp()
    inline_asm(
        "{ .reg .pred leader; setp.eq.b32 leader, $1, 0; @leader mbarrier.arrive.shared::cta.b64 _, [$0]; }",
        [address, lane_idx],
    )


def tma_descriptor(atom: cute.CopyAtom) -> ir.Value:
    """Generic pointer to the tensor map of a TMA atom, which is a kernel parameter."""
    executable = cute_nvgpu_ir.atom_make_exec_tma(atom._trait.value)
    pointer_type = cute_ir.PtrType.get(cute_nvgpu_ir.TmaDescriptorTiledType.get(), cute_ir.AddressSpace.generic, 64)
    return cute_nvgpu_ir.get_tma_desc_addr(pointer_type, executable).to_llvm_ptr()


def tma_load(descriptor: ir.Value, smem_address: Int32, barrier: Int32, coords: Sequence[Int32]) -> None:
    """Fetch one box of a tensor map to shared memory; completes its bytes on `barrier`. Issued by each thread that gets here."""
    nvvm.cp_async_bulk_tensor_shared_cluster_global(
        smem_pointer(smem_address), descriptor, [Int32(c).ir_value() for c in coords], smem_pointer(barrier), [], is_cta_only=True
    )


def tma_prefetch(descriptor: ir.Value, coords: Sequence[Int32]) -> None:
    """Bring one box of a tensor map to L2 (PTX ISA, "cp.async.bulk.prefetch.tensor"). Issued by each thread that gets here."""
    nvvm.cp_async_bulk_tensor_prefetch(descriptor, [Int32(c).ir_value() for c in coords], [])


def bulk_load(source: cute.Pointer, smem_address: Int32, barrier: cute.Pointer, num_bytes: Int32) -> None:
    """Copy consecutive bytes of global to shared memory; completes them on `barrier`. Addresses and bytes are multiples of 16.

    PTX ISA, "cp.async.bulk". Issued by each thread that gets here.
    """
    nvvm.cp_async_bulk_shared_cluster_global(
        smem_pointer(smem_address, cluster=True), source.to_llvm_ptr(), barrier.to_llvm_ptr(), Int32(num_bytes).ir_value()
    )


def bulk_store(target: cute.Pointer, smem_address: Int32, num_bytes: int) -> None:
    """Copy consecutive bytes of shared to global memory, in the thread's open bulk group. Addresses and bytes are multiples of 16.

    PTX ISA, "cp.async.bulk". Issued by each thread that gets here; reads what was written before a fence of the async proxy.
    """
    nvvm.cp_async_bulk_global_shared_cta(target.to_llvm_ptr(), smem_pointer(smem_address), Int32(num_bytes).ir_value())


def store_shared_v4(address: Int32, words: Sequence[ir.Value]) -> None:
    """Store four 32-bit words at a 16-byte aligned shared address."""
    value = vector.from_elements(vectors.int32s(4), list(words))
    llvm.store(value, smem_pointer(address), alignment=16)


def load_shared_v4(address: Int32) -> ir.Value:
    """vector<4 x i32> from a 16-byte aligned shared address."""
    return llvm.load(vectors.int32s(4), smem_pointer(address), alignment=16)


def store_shared_f32(address: Int32, value: Float32) -> None:
    """Store one float32 to shared memory."""
    llvm.store(Float32(value).ir_value(), smem_pointer(address), alignment=4)


def store_shared_i32(address: Int32, value: Int32, *, cluster: bool = False) -> None:
    """Store one int32 to shared memory; cluster: an address of the cluster's."""
    llvm.store(Int32(value).ir_value(), smem_pointer(address, cluster=cluster), alignment=4)


def store_shared_u16(address: Int32, value: Int32) -> None:
    """Store the lower half of a word to shared memory."""
    llvm.store(arith.trunci(T.i16(), Int32(value).ir_value()), smem_pointer(address), alignment=2)


def load_shared_f32(address: Int32) -> Float32:
    """Load one float32 from shared memory."""
    return Float32(llvm.load(T.f32(), smem_pointer(address), alignment=4))


def load_shared_i32x2(address: Int32) -> list[Int32]:
    """Two 32-bit words from an 8-byte aligned shared address."""
    value = llvm.load(vectors.int32s(2), smem_pointer(address), alignment=8)
    return [Int32(vector.extract(value, [], [i])) for i in range(2)]


def load_shared_f32x2(address: Int32) -> list[Float32]:
    """Two float32 from an 8-byte aligned shared address."""
    value = llvm.load(vectors.float32s(2), smem_pointer(address), alignment=8)
    return [Float32(vector.extract(value, [], [i])) for i in range(2)]


def load_shared_f32x4(address: Int32) -> list[Float32]:
    """Four float32 from a 16-byte aligned shared address."""
    value = llvm.load(vectors.float32s(4), smem_pointer(address), alignment=16)
    return [Float32(vector.extract(value, [], [i])) for i in range(4)]


def load_shared_i32(address: Int32) -> Int32:
    """Load one int32 from shared memory."""
    return Int32(llvm.load(T.i32(), smem_pointer(address), alignment=4))


def store_matrices(address: Int32, words: Sequence[Int32]) -> None:
    """Store four 8 x 8 matrices of 16 bits, a row of 16 bytes at each lane's address (PTX ISA, "stmatrix"). The whole warp calls."""
    inline_asm("stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};", [address, *words])


def store_global_f32x4(pointer: cute.Pointer, values: Sequence[ir.Value]) -> None:
    """Store four float32 at a 16-byte aligned global address."""
    llvm.store(vectors.from_elements(values), pointer.to_llvm_ptr(), alignment=16)


def load_global_f32x4(pointer: cute.Pointer) -> list[Float32]:
    """Four float32 from a 16-byte aligned global address."""
    value = llvm.load(vectors.float32s(4), pointer.to_llvm_ptr(), alignment=16)
    return [Float32(vector.extract(value, [], [i])) for i in range(4)]


def fence_proxy_async_shared() -> None:
    """Order this thread's generic shared-memory accesses before later async-proxy ones (TMA, tcgen05)."""
    cute.arch.fence_proxy("async.shared", space="cta")


# ---- single registers --------------------------------------------------------------------------------------------------------


def absolute(value: Float32) -> Float32:
    """|value|, a modifier of the operand in most instructions."""
    return Float32(math_ir.absf(Float32(value).ir_value()))


def float_to_bits(value: Float32) -> Int32:
    """The word that holds a float32."""
    return Int32(arith.bitcast(T.i32(), Float32(value).ir_value()))


def bits_to_float(bits: Int32) -> Float32:
    """The float32 that a word holds."""
    return Float32(arith.bitcast(T.f32(), Int32(bits).ir_value()))


def mul_rn(a: Float32, b: Float32) -> Float32:
    """a * b, rounded: PTX forbids to fuse a product with a rounding modifier into the sum or difference that uses it."""
    return cute.math.mul(Float32(a), Float32(b), rounding=cute.math.RoundingMode.NEAREST_EVEN)


def shift_ones(count: Int32) -> Int32:
    """A word whose `count` low bits are 0 and whose others are 1: all 0 from 32 on, where a shift of LLVM's is undefined."""
    return Int32(inline_asm("shl.b32 $0, -1, $1;", [count], T.i32(), "=r", pure=True))


def keep_here(value: Int32) -> Int32:
    """The same value, which LLVM takes for a new one: keeps what is computed from it inside a branch that is seldom taken."""
    return Int32(inline_asm("mov.b32 $0, $1;", [value], T.i32(), "=r"))


def zero_after(value: Int32) -> Int32:
    """0, for which ptxas has to wait for `value`: all 32 lanes are active, which it cannot know."""
    text = "{ .reg .b32 lanes; activemask.b32 lanes; not.b32 lanes, lanes; and.b32 $0, $1, lanes; }"
    return Int32(inline_asm(text, [value], T.i32(), "=r"))


def keep_in_loop(value: Int32) -> Int32:
    """The same value, which ptxas takes for a new one as well: keeps what is computed from it out of the loop's registers.

    All 32 lanes are active, which ptxas cannot know; a copy it would see through.
    """
    return Int32(inline_asm("{ .reg .b32 lanes; activemask.b32 lanes; and.b32 $0, $1, lanes; }", [value], T.i32(), "=r"))


def max_u16x2(a: Int32, b: Int32) -> Int32:
    """The larger of each of two unsigned halves (PTX ISA, "max")."""
    return Int32(inline_asm("max.u16x2 $0, $1, $2;", [a, b], T.i32(), "=r", pure=True))


def shift_left(value: Int32, count: Int32) -> Int32:
    """value << count with counts above 31 giving 0 (PTX ISA, "shl")."""
    return Int32(inline_asm("shl.b32 $0, $1, $2;", [value, count], T.i32(), "=r", pure=True))


def shift_right(value: Int32, count: Int32) -> Int32:
    """value >> count, unsigned, with counts above 31 giving 0 (PTX ISA, "shr")."""
    return Int32(inline_asm("shr.u32 $0, $1, $2;", [value, count], T.i32(), "=r", pure=True))
