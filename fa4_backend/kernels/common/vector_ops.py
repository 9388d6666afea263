"""Vectors of 32-bit registers: float32 pairs that one instruction works on, words of packed 16-bit numbers, choices between them.

MLIR values `vector<n x f32>` and `vector<n x i32>`. These are plain functions that emit operations: they may be called from `@cute.jit`
code with constant Python arguments, and hold no control flow of the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Boolean, Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import arith, nvvm, vector
from cutlass._mlir.dialects import math as math_ir
from cutlass.cutlass_dsl import T


def float32s(n: int) -> ir.Type:
    """vector<n x f32>."""
    return ir.VectorType.get([n], T.f32())


def int32s(n: int) -> ir.Type:
    """vector<n x i32>."""
    return ir.VectorType.get([n], T.i32())


def from_elements(elements: Sequence[ir.Value]) -> ir.Value:
    """The float32 vector of these elements."""
    return vector.from_elements(float32s(len(elements)), list(elements))


def from_words(values: Sequence[Int32]) -> ir.Value:
    """The vector of these words."""
    return vector.from_elements(int32s(len(values)), [Int32(v).ir_value() for v in values])


def broadcast(value: Float32, n: int) -> ir.Value:
    """A vector whose elements all are `value`."""
    return vector.broadcast(float32s(n), Float32(value).ir_value())


def element(v: ir.Value, i: int) -> ir.Value:
    """Element i of a vector."""
    return vector.extract(v, [], [i])


def elements(v: ir.Value) -> list[ir.Value]:
    """All elements of a vector."""
    return [vector.extract(v, [], [i]) for i in range(ir.VectorType(v.type).shape[0])]


def pair(v: ir.Value, i: int) -> ir.Value:
    """Elements i, i + 1 as a vector<2 x f32>."""
    return vector.from_elements(float32s(2), [element(v, i), element(v, i + 1)])


def from_pairs(pairs: Sequence[ir.Value]) -> ir.Value:
    """The vector that consists of these pairs."""
    return vector.from_elements(float32s(2 * len(pairs)), [element(p, i) for p in pairs for i in (0, 1)])


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
    return vector.bitcast(int32s(n // 2), halves)


def as_words(v: ir.Value) -> ir.Value:
    """The same bits as vector<n x i32>."""
    return vector.bitcast(int32s(ir.VectorType(v.type).shape[0]), v)


def select(condition: Boolean, v: ir.Value, otherwise: ir.Value) -> ir.Value:
    """v where `condition` holds, else `otherwise`."""
    return arith.select(Boolean(condition).ir_value(), v, otherwise)


def select_words(condition: Boolean, v: ir.Value) -> ir.Value:
    """A vector of words where `condition` holds, else zeros."""
    zero = vector.broadcast(v.type, Int32(0).ir_value())
    return arith.select(Boolean(condition).ir_value(), v, zero)


def select_zero(condition: Boolean, v: ir.Value) -> ir.Value:
    """A vector of zeros where `condition` holds, else v."""
    n = ir.VectorType(v.type).shape[0]
    return arith.select(Boolean(condition).ir_value(), broadcast(Float32(0.0), n), v)


def select_by_bits(bits: Int32, v: ir.Value, otherwise: float) -> ir.Value:
    """Elements of v (at most 32) whose bit is set, the others replaced by a constant."""
    n = ir.VectorType(v.type).shape[0]
    other, word, zero = Float32(otherwise).ir_value(), Int32(bits).ir_value(), Int32(0).ir_value()
    kept = []
    for i in range(n):
        one = arith.andi(word, Int32(1 << i if i < 31 else -(1 << 31)).ir_value())
        kept.append(arith.select(arith.cmpi(arith.CmpIPredicate.ne, one, zero), element(v, i), other))
    return vector.from_elements(v.type, kept)
