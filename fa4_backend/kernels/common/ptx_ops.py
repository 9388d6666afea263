"""Thin names for the PTX instructions that kernels issue directly: TMA, mbarriers, packed float32 pairs, TMEM and tcgen05.

Shared-memory addresses are Int32 in the shared window; TMEM addresses are Int32 with the lane in bits 16-31 and the column in
bits 0-15 (PTX ISA, "Tensor Memory Addressing"). Vectors are MLIR values `vector<n x f32>`. These are plain functions that emit
operations: they may be called from `@cute.jit` code with constant Python arguments, and hold no control flow of the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import arith, llvm, nvvm, scf, vector
from cutlass._mlir.dialects import cute as cute_ir
from cutlass._mlir.dialects import cute_nvgpu as cute_nvgpu_ir
from cutlass._mlir.dialects import math as math_ir
from cutlass.cutlass_dsl import T

SMEM_SPACE, TMEM_SPACE, CLUSTER_SPACE = 3, 6, 7  # LLVM address spaces of the NVPTX target
FULL_WARP = 0xFFFFFFFF
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


def mbarrier_test(address: Int32, parity: Int32) -> Int32:
    """1 where the phase with this parity has completed (acquire, CTA scope), else 0, without waiting (PTX ISA, "mbarrier.test_wait")."""
    text = "{ .reg .pred over; mbarrier.test_wait.parity.shared::cta.b64 over, [$1], $2; selp.b32 $0, 1, 0, over; }"
    return Int32(inline_asm(text, [address, parity], T.i32(), "=r"))


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
    value = vector.from_elements(ir.VectorType.get([4], T.i32()), list(words))
    llvm.store(value, smem_pointer(address), alignment=16)


def load_shared_v4(address: Int32) -> ir.Value:
    """vector<4 x i32> from a 16-byte aligned shared address."""
    return llvm.load(ir.VectorType.get([4], T.i32()), smem_pointer(address), alignment=16)


def store_shared_f32(address: Int32, value: Float32) -> None:
    """Store one float32 to shared memory."""
    llvm.store(Float32(value).ir_value(), smem_pointer(address), alignment=4)


def store_shared_i32(address: Int32, value: Int32, *, cluster: bool = False) -> None:
    """Store one int32 to shared memory; cluster: an address of the cluster's."""
    llvm.store(Int32(value).ir_value(), smem_pointer(address, cluster=cluster), alignment=4)


def load_shared_f32(address: Int32) -> Float32:
    """Load one float32 from shared memory."""
    return Float32(llvm.load(T.f32(), smem_pointer(address), alignment=4))


def load_shared_i32x2(address: Int32) -> list[Int32]:
    """Two 32-bit words from an 8-byte aligned shared address."""
    value = llvm.load(words(2), smem_pointer(address), alignment=8)
    return [Int32(vector.extract(value, [], [i])) for i in range(2)]


def load_shared_f32x2(address: Int32) -> list[Float32]:
    """Two float32 from an 8-byte aligned shared address."""
    value = llvm.load(vec(2), smem_pointer(address), alignment=8)
    return [Float32(vector.extract(value, [], [i])) for i in range(2)]


def load_shared_f32x4(address: Int32) -> list[Float32]:
    """Four float32 from a 16-byte aligned shared address."""
    value = llvm.load(ir.VectorType.get([4], T.f32()), smem_pointer(address), alignment=16)
    return [Float32(vector.extract(value, [], [i])) for i in range(4)]


def load_shared_i32(address: Int32) -> Int32:
    """Load one int32 from shared memory."""
    return Int32(llvm.load(T.i32(), smem_pointer(address), alignment=4))


def store_matrices(address: Int32, words: Sequence[Int32]) -> None:
    """Store four 8 x 8 matrices of 16 bits, a row of 16 bytes at each lane's address (PTX ISA, "stmatrix"). The whole warp calls."""
    inline_asm("stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};", [address, *words])


def store_global_v4(pointer: cute.Pointer, words: ir.Value) -> None:
    """Store a vector<4 x i32> at a 16-byte aligned global address."""
    llvm.store(words, pointer.to_llvm_ptr(), alignment=16)


def store_global_f32x4(pointer: cute.Pointer, values: Sequence[ir.Value]) -> None:
    """Store four float32 at a 16-byte aligned global address."""
    llvm.store(from_elements(values), pointer.to_llvm_ptr(), alignment=16)


def load_global_f32x4(pointer: cute.Pointer) -> list[Float32]:
    """Four float32 from a 16-byte aligned global address."""
    value = llvm.load(vec(4), pointer.to_llvm_ptr(), alignment=16)
    return [Float32(vector.extract(value, [], [i])) for i in range(4)]


def fence_proxy_async_shared() -> None:
    """Order this thread's generic shared-memory accesses before later async-proxy ones (TMA, tcgen05)."""
    cute.arch.fence_proxy("async.shared", space="cta")


# ---- TMEM and tcgen05 --------------------------------------------------------------------------------------------------------


def _tmem_pointer(address: Int32) -> ir.Value:
    return llvm.inttoptr(llvm.PointerType.get(TMEM_SPACE), Int32(address).ir_value())


def tmem_load(address: Int32, columns: int) -> ir.Value:
    """Start loading `columns` words of this thread's TMEM lane (shape 32x32b): vector<n x i32>, to be used after `tmem_wait_load`."""
    return nvvm.tcgen05_ld(ir.VectorType.get([columns], T.i32()), nvvm.Tcgen05LdStShape.SHAPE_32X32B, _tmem_pointer(address))


def tmem_load_max(address: Int32, columns: int) -> tuple[ir.Value, Float32]:
    """`tmem_load` of float32 that also brings their largest; NaN loses (PTX ISA, "tcgen05.ld.red": sm_103a, not sm_100a)."""
    shape, pointer = nvvm.Tcgen05LdStShape.SHAPE_32X32B, _tmem_pointer(address)
    loaded, largest = nvvm.tcgen05_ld_red(vec(columns), T.f32(), shape, nvvm.ReductionKind.MAX, pointer)
    return loaded, Float32(largest)


def tmem_store(address: Int32, words: ir.Value) -> None:
    """Start storing a vector<n x i32> to this thread's TMEM lane; complete after `tmem_wait_store`."""
    nvvm.tcgen05_st(nvvm.Tcgen05LdStShape.SHAPE_32X32B, _tmem_pointer(address), words)


def tmem_load_rows(address: Int32, columns: int) -> ir.Value:
    """Start loading 16 lanes x `columns` (shape 16x256b) as a warp's accumulator fragment (`wgmma_fragment`): vector<columns / 2 x i32>."""
    return nvvm.tcgen05_ld(ir.VectorType.get([columns // 2], T.i32()), nvvm.Tcgen05LdStShape.SHAPE_16X256B, _tmem_pointer(address))


def tmem_store_rows(address: Int32, words: ir.Value) -> None:
    """Start storing what `tmem_load_rows` loads; complete after `tmem_wait_store`."""
    nvvm.tcgen05_st(nvvm.Tcgen05LdStShape.SHAPE_16X256B, _tmem_pointer(address), words)


def tmem_wait_load(words: Sequence[ir.Value]) -> list[ir.Value]:
    """Wait for this thread's TMEM loads; returns what they brought as vector<n x f32>.

    The words are taken apart behind the wait: a bitcast of the whole vector would become register moves in front of it.
    """
    nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.LOAD)
    loaded = []
    for v in words:
        n = ir.VectorType(v.type).shape[0]
        loaded.append(vector.from_elements(vec(n), [arith.bitcast(T.f32(), vector.extract(v, [], [i])) for i in range(n)]))
    return loaded


def tmem_wait_store() -> None:
    """Wait for this thread's TMEM stores."""
    nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.STORE)


def tmem_alloc(smem_address: Int32, columns: int, group: nvvm.CTAGroupKind) -> None:
    """Allocate TMEM columns and give up the right to allocate more; the whole warp calls. The address goes to shared memory."""
    nvvm.tcgen05_alloc(smem_pointer(smem_address), Int32(columns).ir_value(), group=group)
    nvvm.tcgen05_relinquish_alloc_permit(group=group)


def tmem_dealloc(address: Int32, columns: int, group: nvvm.CTAGroupKind) -> None:
    """Free what `tmem_alloc` allocated; the same warp calls."""
    nvvm.tcgen05_dealloc(_tmem_pointer(address), Int32(columns).ir_value(), group=group)


def tcgen05_fence_before_sync() -> None:
    """Order earlier tcgen05 operations before a following thread synchronisation (PTX ISA, "tcgen05.fence")."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)


def tcgen05_fence_after_sync() -> None:
    """Order later tcgen05 operations behind a preceding thread synchronisation."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)


def tcgen05_commit(barrier: Int32) -> None:
    """One arrival on `barrier` when all MMAs issued so far have completed; the warp elects the issuer."""
    inline_asm(
        "{ .reg .pred issue; elect.sync _|issue, 0xffffffff; "
        "@issue tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [$0]; }",
        [barrier],
    )


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


# ---- float32 pairs and vectors -----------------------------------------------------------------------------------------------


def vec(n: int) -> ir.Type:
    """vector<n x f32>."""
    return ir.VectorType.get([n], T.f32())


def words(n: int) -> ir.Type:
    """vector<n x i32>."""
    return ir.VectorType.get([n], T.i32())


def i1() -> ir.Type:
    """The type of a Boolean."""
    return T.bool()


def f32() -> ir.Type:
    """The float32 type."""
    return T.f32()


def i32() -> ir.Type:
    """The int32 type."""
    return T.i32()


def from_elements(elements: Sequence[ir.Value]) -> ir.Value:
    """The float32 vector of these elements."""
    return vector.from_elements(vec(len(elements)), list(elements))


def from_words(values: Sequence[Int32]) -> ir.Value:
    """The vector of these words."""
    return vector.from_elements(words(len(values)), [Int32(v).ir_value() for v in values])


def broadcast(value: Float32, n: int) -> ir.Value:
    """A vector whose elements all are `value`."""
    return vector.broadcast(vec(n), Float32(value).ir_value())


def element(v: ir.Value, i: int) -> ir.Value:
    """Element i of a vector."""
    return vector.extract(v, [], [i])


def pair(v: ir.Value, i: int) -> ir.Value:
    """Elements i, i + 1 as a vector<2 x f32>."""
    return vector.from_elements(vec(2), [element(v, i), element(v, i + 1)])


def from_pairs(pairs: Sequence[ir.Value]) -> ir.Value:
    """The vector that consists of these pairs."""
    return vector.from_elements(vec(2 * len(pairs)), [element(p, i) for p in pairs for i in (0, 1)])


def fma2(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c on a pair, one instruction (fma.rn.f32x2)."""
    return nvvm.fma_packed_f32x2(a, b, c, rnd=nvvm.FPRoundingMode.RN)


def add2(a: ir.Value, b: ir.Value) -> ir.Value:
    """a + b on a pair."""
    return nvvm.add_packed_f32x2(a, b, rnd=nvvm.FPRoundingMode.RN)


def add2_down(a: ir.Value, b: ir.Value) -> ir.Value:
    """a + b on a pair, rounded towards minus infinity."""
    return nvvm.add_packed_f32x2(a, b, rnd=nvvm.FPRoundingMode.RM)


def mul2(a: ir.Value, b: ir.Value) -> ir.Value:
    """a * b on a pair."""
    return nvvm.mul_packed_f32x2(a, b, rnd=nvvm.FPRoundingMode.RN)


def max_of(vectors: Sequence[ir.Value], start: Float32) -> Float32:
    """Largest of `start` and all elements; NaN elements lose."""
    largest = Float32(start).ir_value()
    for v in vectors:
        largest = vector.reduction(T.f32(), vector.CombiningKind.MAXNUMF, v, acc=largest)
    return Float32(largest)


def exp2_approx(v: ir.Value) -> ir.Value:
    """2^x of a float32 or a vector on the MUFU unit (ex2.approx.ftz)."""
    return math_ir.exp2(v, fastmath=arith.FastMathFlags.fast)


def pack_16bit(v: ir.Value, dtype: str) -> ir.Value:
    """vector<n x f32> rounded to a 16-bit type, two elements to a 32-bit word: vector<n/2 x i32>."""
    n = ir.VectorType(v.type).shape[0]
    element_type = {"bfloat16": T.bf16, "float16": T.f16}[dtype]()
    halves = arith.truncf(ir.VectorType.get([n], element_type), v)
    return vector.bitcast(ir.VectorType.get([n // 2], T.i32()), halves)


def elements(v: ir.Value) -> list[ir.Value]:
    """All elements of a vector."""
    return [vector.extract(v, [], [i]) for i in range(ir.VectorType(v.type).shape[0])]


def select_words(condition: Boolean, v: ir.Value) -> ir.Value:
    """A vector of words where `condition` holds, else zeros."""
    zero = vector.broadcast(v.type, Int32(0).ir_value())
    return arith.select(Boolean(condition).ir_value(), v, zero)


def as_words(v: ir.Value) -> ir.Value:
    """The same bits as vector<n x i32>."""
    return vector.bitcast(ir.VectorType.get([ir.VectorType(v.type).shape[0]], T.i32()), v)


def select(condition: Boolean, v: ir.Value, otherwise: ir.Value) -> ir.Value:
    """v where `condition` holds, else `otherwise`."""
    return arith.select(Boolean(condition).ir_value(), v, otherwise)


def select_zero(condition: Boolean, v: ir.Value) -> ir.Value:
    """A vector of zeros where `condition` holds, else v."""
    n = ir.VectorType(v.type).shape[0]
    return arith.select(Boolean(condition).ir_value(), broadcast(Float32(0.0), n), v)


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


def select_by_bits(bits: Int32, v: ir.Value, otherwise: float) -> ir.Value:
    """Elements of v (at most 32) whose bit is set, the others replaced by a constant."""
    n = ir.VectorType(v.type).shape[0]
    other, word, zero = Float32(otherwise).ir_value(), Int32(bits).ir_value(), Int32(0).ir_value()
    kept = []
    for i in range(n):
        one = arith.andi(word, Int32(1 << i if i < 31 else -(1 << 31)).ir_value())
        kept.append(arith.select(arith.cmpi(arith.CmpIPredicate.ne, one, zero), element(v, i), other))
    return vector.from_elements(v.type, kept)


def either(
    condition: Boolean, types: Sequence[ir.Type], then: Callable[[], list[ir.Value]], otherwise: Callable[[], list[ir.Value]]
) -> list[ir.Value]:
    """What `then` returns where `condition` holds, else what `otherwise` does: a branch, not selects. Both return values of `types`."""
    branch = scf.IfOp(Boolean(condition).ir_value(), list(types), has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(then())
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(otherwise())
    return list(branch.results)


def when(condition: Boolean, values: Sequence[ir.Value], change) -> list[ir.Value]:
    """`change(values)` where `condition` holds, else `values`: a branch, not selects. `change` maps a list to a list of its types."""
    return either(condition, [v.type for v in values], lambda: change(list(values)), lambda: list(values))


def when_scalars(condition: Boolean, vectors: Sequence[ir.Value], change) -> list[ir.Value]:
    """`when` for float32 vectors whose elements join one by one.

    LLVM would join pairs of registers, which ptxas cannot keep where a TMEM load has put them: it then copies them.
    """
    lengths = [ir.VectorType(v.type).shape[0] for v in vectors]

    def apart(flat: list[ir.Value]) -> list[ir.Value]:
        ends = list(itertools.accumulate(lengths))
        return [from_elements(flat[end - n : end]) for n, end in zip(lengths, ends, strict=True)]

    def change_flat(values: list[ir.Value]) -> list[ir.Value]:
        return [x for v in change(apart(values)) for x in elements(v)]

    return apart(when(condition, [x for v in vectors for x in elements(v)], change_flat))


def repeat_once(one_pass, flag: Boolean, values: Sequence[ir.Value], results: Sequence[ir.Type]) -> list[ir.Value]:
    """A do-while loop: `one_pass(flag, *values)` returns (again, results); when repeated, flag is true and values are the first results."""
    inits = [Boolean(flag).ir_value(), *values]
    loop = scf.WhileOp(list(results), inits)
    body = loop.before.blocks.append(*[v.type for v in inits])
    with ir.InsertionPoint(body):
        again, produced = one_pass(*body.arguments)
        scf.condition(Boolean(again).ir_value(), produced)
    step = loop.after.blocks.append(*results)
    with ir.InsertionPoint(step):
        scf.yield_([Boolean(True).ir_value(), *list(step.arguments)[: len(values)]])
    return list(loop.results)
