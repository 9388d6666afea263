"""Exact float arithmetic on fractions, rounded once: the ground truth for the float instructions (IEEE 754-2008, OCP 8-bit formats)."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import NamedTuple

Value = Fraction | float  # a float stands for NaN, an infinity or a signed zero only


class Format(NamedTuple):
    exponent_bits: int
    mantissa_bits: int
    has_inf: bool = True  # e4m3 has none: its top exponent holds numbers, and all-ones is NaN

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def sign(self) -> int:
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def max_finite(self) -> int:
        """Bit pattern."""
        top = self.sign - 1
        return top - (1 << self.mantissa_bits) if self.has_inf else top - 1

    @property
    def infinity(self) -> int:
        return self.max_finite + 1 if self.has_inf else self.sign - 1

    @property
    def nan(self) -> int:
        return self.sign - 1


FORMATS = {
    "f32": Format(8, 23),
    "f16": Format(5, 10),
    "bf16": Format(8, 7),
    "e5m2": Format(5, 2),
    "e4m3": Format(4, 3, has_inf=False),
    "f64": Format(11, 52),
}


@functools.cache
def decode(bits: int, fmt: Format) -> Value:
    """The value of a bit pattern."""
    negative, magnitude = bool(bits & fmt.sign), bits & (fmt.sign - 1)
    if magnitude > fmt.max_finite:
        if fmt.has_inf and magnitude == fmt.infinity:
            return -math.inf if negative else math.inf
        return math.nan
    if magnitude == 0:
        return -0.0 if negative else 0.0
    exponent, mantissa = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    if exponent:
        mantissa |= 1 << fmt.mantissa_bits
    shift = max(exponent, 1) - fmt.bias - fmt.mantissa_bits
    value = Fraction(mantissa << shift) if shift >= 0 else Fraction(mantissa, 1 << -shift)
    return -value if negative else value


def is_negative(value: Value) -> bool:
    return math.copysign(1.0, value) < 0 if isinstance(value, float) else value < 0


def encode(value: Value, fmt: Format, mode: str = "rn", *, saturate: bool = False) -> int:
    """Round to `fmt`: rn (to nearest, ties to even), rz (towards zero), rm (down), rp (up). `saturate`: to the largest finite number."""
    if isinstance(value, float):
        if math.isnan(value):
            return fmt.nan
        sign = fmt.sign if math.copysign(1.0, value) < 0 else 0
        if value == 0:
            return sign
        return sign | (fmt.max_finite if saturate else fmt.infinity)
    if value == 0:
        return 0
    negative = value < 0
    numerator, denominator = abs(value.numerator), value.denominator
    exponent = numerator.bit_length() - denominator.bit_length()
    # Integers are scaled and compared, not fractions: these would be brought to lowest terms each time.
    if (denominator << exponent > numerator) if exponent >= 0 else (denominator > numerator << -exponent):
        exponent -= 1
    exponent = max(exponent, 1 - fmt.bias)
    shift = exponent - fmt.mantissa_bits
    if shift >= 0:
        denominator <<= shift
    else:
        numerator <<= -shift
    whole, rest = divmod(numerator, denominator)
    if rest:
        up = {
            "rn": 2 * rest > denominator or (2 * rest == denominator and whole & 1),
            "rz": False,
            "rm": negative,
            "rp": not negative,
        }[mode]
        whole += bool(up)
    # A carry out of the mantissa raises the exponent by itself; a subnormal has no hidden bit to add.
    bits = whole + ((exponent + fmt.bias - 1) << fmt.mantissa_bits)
    if bits > fmt.max_finite:
        to_infinity = mode == "rn" or (mode == "rm" and negative) or (mode == "rp" and not negative)
        bits = fmt.infinity if to_infinity and not saturate else fmt.max_finite
    return bits | (fmt.sign if negative else 0)


def flush(value: Value, fmt: Format) -> Value:
    """Subnormals become a zero of their sign (`.ftz`)."""
    if isinstance(value, Fraction) and abs(value) < Fraction(2) ** (1 - fmt.bias):
        return -0.0 if value < 0 else 0.0
    return value


def flush_bits(bits: int, fmt: Format) -> int:
    return bits if bits & (fmt.sign - 1) >= 1 << fmt.mantissa_bits else bits & fmt.sign


def add(x: Value, y: Value, mode: str = "rn") -> Value:
    """Exact sum; `mode` decides the sign of an exact zero."""
    if not (_finite(x) and _finite(y)):
        return float(x if not _finite(x) else 0.0) + float(y if not _finite(y) else 0.0)
    total = Fraction(x) + Fraction(y)
    if total:
        return total
    if not x and not y and is_negative(x) == is_negative(y):
        return -0.0 if is_negative(x) else 0.0
    return -0.0 if mode == "rm" else 0.0


def multiply(x: Value, y: Value) -> Value:
    negative = is_negative(x) != is_negative(y)
    if not (_finite(x) and _finite(y)):
        if math.isnan(x) or math.isnan(y) or x == 0 or y == 0:
            return math.nan
        return -math.inf if negative else math.inf
    product = Fraction(x) * Fraction(y)
    return product if product else (-0.0 if negative else 0.0)


def fma(x: Value, y: Value, z: Value, mode: str = "rn") -> Value:
    return add(multiply(x, y), z, mode)


def negate(x: Value) -> Value:
    return -x


def _finite(x: Value) -> bool:
    return isinstance(x, Fraction) or x == 0
