"""K and V in FP8 (e4m3) as 16-bit numbers, in which every e4m3 number is exact, a bfloat16 Q as float16 beside them, and out in FP8.

Note [bfloat16 Q]. A product takes both operands in one type, and there is no instruction from e4m3 to bfloat16 before sm_100. So Q becomes
float16 instead, once a tile: a row is multiplied by the power of 2 that brings its largest element to 2^14 .. 2^15, and its scores are
scaled back with the softmax's scale. bfloat16's 8 bits fit float16's 11, so an element is exact down to 2^-32 of its row's largest, and one
below is off by at most 2^-39 of that: far below a float32 sum of such products, whose first 24 bits the largest take. A row's factor is a
function of the row alone.

Note [Two terms]. Where a product takes operands of 8 bits only, a 16-bit number x of at most 2^8 is x = hi + lo: hi is x rounded to e4m3
(4 significand bits from 2^-6 on), lo = x - hi rounded to e5m2 (3 bits, numbers down to 2^-16). A bfloat16 has 8 bits: |lo| is at most 8
units of its last place, which 3 bits hold. So of a row of Q that is multiplied by a power of 2 to have its largest element at 2^7 .. 2^8,
elements are exact down to 2^-13 of that, and one below is off by at most 2^-21 of it. A weight of the softmax, a float32, is rounded as to
bfloat16 where it is 2^-6 or more, else by at most 2^-14. Two products, A in e4m3 and in e5m2, add up in one accumulator; at twice the rate
of 16 bits they take its time, with half of B's bytes. Were lo e4m3 too, whose numbers end at 2^-9, elements would be exact down to 2^-9 of
the largest only, and off by 2^-17 below. `tests/host/test_two_terms.py` has the arithmetic.
"""

from __future__ import annotations

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import vector
from cutlass.cutlass_dsl import T

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors

BIAS = 127  # exponent field of 1.0 in float32 and bfloat16
SCALED_EXPONENT = BIAS + 14  # of the largest element of a scaled row
SPLIT_EXPONENT = BIAS + 7  # the same where Q becomes two terms
NOT_FINITE = 255  # exponent field of infinity and NaN


def e4m3_to_float16(word: Int32) -> tuple[Int32, Int32]:
    """Four e4m3 numbers as float16, exact: bytes 0 and 1, bytes 2 and 3 (PTX ISA, "cvt")."""
    text = "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, %s; }"
    return tuple(Int32(ptx.inline_asm(text % half, [word], T.i32(), "=r", pure=True)) for half in ("low", "high"))  # type: ignore[return-value]


def float16_to_bfloat16(word: Int32) -> Int32:
    """Two float16 that bfloat16 holds too, as e4m3 numbers are: by way of float32, of which it is the upper half."""
    text = (
        "{ .reg .b16 low, high; .reg .b32 first, second; mov.b32 {low, high}, $1; "
        "cvt.f32.f16 first, low; cvt.f32.f16 second, high; prmt.b32 $0, first, second, 0x7632; }"
    )
    return Int32(ptx.inline_asm(text, [word], T.i32(), "=r", pure=True))


def e4m3_to_16bit(word: ir.Value, dtype: str) -> list[ir.Value]:
    """Four e4m3 numbers as two words of a 16-bit type, exact."""
    halves = e4m3_to_float16(Int32(word))
    return [(half if dtype == "float16" else float16_to_bfloat16(half)).ir_value() for half in halves]


def float32_to_e4m3(values: list[Float32]) -> Int32:
    """Two or four numbers, rounded and cut to +-448, in a word from its lowest byte on (PTX ISA, "cvt": satfinite); NaN stays NaN."""
    # The first source of an instruction goes to the upper byte.
    if len(values) == 2:
        text = "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, $2, $1; cvt.u32.u16 $0, pair; }"
    else:
        text = (
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
            "mov.b32 $0, {low, high}; }"
        )
    return ptx.inline_asm_f32(text, values)


def result_factor(
    mVScale: cute.Tensor | None,  # (num_kv_heads,) float32
    mOutScale: cute.Tensor | None,  # (1,) float32
    kv_head_idx: Int32,
) -> Float32 | None:
    """What rows of O are multiplied by, beside their softmax's denominator, to be what `out` holds; None: nothing."""
    factor = None if mVScale is None else mVScale[kv_head_idx]
    if mOutScale is not None:
        inverse = Float32(1.0) / mOutScale[0]
        factor = inverse if factor is None else factor * inverse
    return factor


def split_float16(pair: Int32) -> tuple[Int32, Int32]:
    """Two float16, in the lower half of a word each: Note [Two terms]; where the numbers are beyond 448, lo has what hi is cut by."""

    def converted(kind: str, word: Int32) -> Int32:
        text = "{ .reg .b16 pair; cvt.rn.satfinite." + kind + ".f16x2 pair, $1; cvt.u32.u16 $0, pair; }"
        return Int32(ptx.inline_asm(text, [word], T.i32(), "=r", pure=True))

    hi = converted("e4m3x2", pair)
    rest = ptx.inline_asm("sub.f16x2 $0, $1, $2;", [pair, e4m3_to_float16(hi)[0]], T.i32(), "=r", pure=True)
    return hi, converted("e5m2x2", Int32(rest))


def split_row(words: list[Int32], lanes: int) -> tuple[list[Int32], list[Int32], Float32]:
    """A lane's share of a row of Q, pairs of bfloat16, as words of four e4m3 and of four e5m2, and what they were divided by.

    The factor of a row with an infinity is NaN: conversion to 8 bits cuts to what is finite.
    """
    scaled, factor = scaled_to_float16(words, lanes, SPLIT_EXPONENT)
    factor = cutlass.select_(ptx.float_to_bits(factor) == (NOT_FINITE - (SPLIT_EXPONENT - BIAS)) << 23, Float32(math.nan), factor)
    terms = [split_float16(pair) for pair in scaled]
    hi, lo = ([terms[i][k] | (terms[i + 1][k] << 16) for i in range(0, len(terms), 2)] for k in (0, 1))
    return hi, lo, factor


def scaled_to_float16(words: list[Int32], lanes: int, scaled_exponent: int = SCALED_EXPONENT) -> tuple[list[Int32], Float32]:
    """A lane's share of a row of Q, pairs of bfloat16, as float16, and what they were divided by: Note [bfloat16 Q].

    Args:
        lanes: neighbours that share the row, a power of 2.
        scaled_exponent: field of the row's largest element then.
    """
    largest = words[0] & 0x7FFF7FFF
    for word in words[1:]:
        largest = ptx.max_u16x2(largest, word & 0x7FFF7FFF)
    largest = cutlass.max(largest & 0xFFFF, largest >> 16)
    for offset in (1 << i for i in range(lanes.bit_length() - 1)):
        largest = cutlass.max(largest, cute.arch.shuffle_sync_bfly(largest, offset))
    exponent = cutlass.max(largest >> 7, scaled_exponent - BIAS + 1)  # below it, the row's factor would be subnormal
    multiplier = ptx.bits_to_float((scaled_exponent + BIAS - exponent) << 23)
    scaled = []
    for word in words:
        low, high = ptx.bits_to_float(word << 16), ptx.bits_to_float(word & -65536)
        both = vectors.from_elements([(low * multiplier).ir_value(), (high * multiplier).ir_value()])
        scaled.append(Int32(vector.extract(vectors.pack_16bit(both, "float16"), [], [0])))
    return scaled, ptx.bits_to_float((exponent - (scaled_exponent - BIAS)) << 23)
