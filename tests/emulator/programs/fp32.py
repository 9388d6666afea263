"""Single precision and packed pairs: PTX ISA 9.7.3, 9.7.6.2 and the float part of 9.7.9.21. Results are exact, then rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from tests.emulator.programs.elementwise import FLOAT_EDGES, constant, elementwise, float_pairs, float_triples, halves, packed, signed
from tests.emulator.programs.numerics import FORMATS, Value, add, decode, encode, flush, flush_bits, fma, is_negative, multiply, negate
from tests.emulator.programs.program import Program

F32 = FORMATS["f32"]
MODES = ("rn", "rz", "rm", "rp")
ONE = constant(1.0)


def arithmetic(op: str, mode: str, ftz: bool, sat: bool = False, kind: str = "f32") -> Callable[..., int]:
    """The bits of `op` on bit patterns."""
    fmt = FORMATS[kind]

    def apply(*operands: int) -> int:
        values = [decode(v, fmt) for v in operands]
        if ftz:
            values = [flush(v, fmt) for v in values]
        if op == "add":
            result = add(*values, mode)
        elif op == "sub":
            result = add(values[0], negate(values[1]), mode)
        elif op == "mul":
            result = multiply(*values)
        else:
            result = fma(*values, mode)
        # The hardware flushes what is tiny before rounding (seen on an H200): just under the smallest normal gives 0.
        bits = encode(flush(result, fmt) if ftz else result, fmt, mode)
        if sat:
            bits = saturate(bits, kind)
        return bits

    return apply


def saturate(bits: int, kind: str) -> int:
    """.sat: clamped to [0, 1], NaN becomes +0."""
    value = decode(bits, FORMATS[kind])
    if value != value or is_negative(value) or value == 0:
        return 0
    return constant(1.0, kind) if value >= 1 else bits


def _arithmetic() -> list[Program]:
    out = []
    sections = {"add": "9.7.3.3", "sub": "9.7.3.4", "mul": "9.7.3.5", "fma": "9.7.3.6"}
    for op, section in sections.items():
        cases = float_triples("f32") if op == "fma" else float_pairs("f32")
        arity = len(cases[0])
        for mode in MODES:
            for ftz in (False, True):
                name = f"{op}.{mode}{'.ftz' * ftz}.f32"
                out.append(elementwise(name, "f32", ("f32",) * arity, cases, arithmetic(op, mode, ftz), section))
                two = f"{op}.{mode}{'.ftz' * ftz}.f32x2"
                function = packed(arithmetic(op, mode, ftz), 32)
                out.append(elementwise(two, "f32x2", ("f32x2",) * arity, halves(cases, 32), function, section, target="sm_100a"))
        tag = ".rn" if op == "fma" else ""
        out.append(elementwise(f"{op}{tag}.sat.f32", "f32", ("f32",) * arity, cases, arithmetic(op, "rn", False, True), section))
        if op != "fma":
            out.append(elementwise(f"{op}.f32", "f32", ("f32",) * arity, cases, arithmetic(op, "rn", False), section))
            out.append(elementwise(f"{op}.ftz.f32", "f32", ("f32",) * arity, cases, arithmetic(op, "rn", True), section))
    return out


def extremum(op: str, *, kind: str = "f32", ftz: bool = False, nan: bool = False, xorsign: bool = False) -> Callable[..., int]:
    """min, max: a NaN operand is dropped unless `nan`; -0 is less than +0. 9.7.3.11, 9.7.3.12"""
    fmt = FORMATS[kind]

    def apply(*operands: int) -> int:
        patterns = [flush_bits(v, fmt) if ftz else v for v in operands]
        values = [decode(v, fmt) for v in patterns]
        if xorsign:
            # PTX ISA: the result is the min or max of the absolute values, with the xor of the signs.
            negative = is_negative_bits(patterns[0], kind) != is_negative_bits(patterns[1], kind)
            patterns = [v & (fmt.sign - 1) for v in patterns]
            values = [decode(v, fmt) for v in patterns]
        numbers = [(v, p) for v, p in zip(values, patterns, strict=True) if v == v]
        if not numbers or (nan and len(numbers) < len(operands)):
            return fmt.nan
        key = (lambda item: (item[0], not is_negative(item[0]))) if op else None
        _, bits = (min if op == "min" else max)(numbers, key=key)
        return bits | (fmt.sign if xorsign and negative else 0)

    return apply


def is_negative_bits(bits: int, kind: str) -> bool:
    return bool(bits & FORMATS[kind].sign)


def _extrema() -> list[Program]:
    out = []
    cases = float_pairs("f32")
    three = float_triples("f32")
    # The sign of a NaN result is open, so the xor-sign form gets no NaN.
    ordered = [(a, b) for a, b in cases if 0x7FC00000 not in (a, b)]
    for op, section in (("min", "9.7.3.11"), ("max", "9.7.3.12")):
        for ftz in (False, True):
            suffix = ".ftz" * ftz
            out += [
                elementwise(f"{op}{suffix}.f32", "f32", ("f32",) * 2, cases, extremum(op, ftz=ftz), section),
                elementwise(f"{op}{suffix}.NaN.f32", "f32", ("f32",) * 2, cases, extremum(op, ftz=ftz, nan=True), section),
                elementwise(f"{op}{suffix}.xorsign.abs.f32", "f32", ("f32",) * 2, ordered, extremum(op, ftz=ftz, xorsign=True), section),
                elementwise(
                    f"{op}{suffix}.f32", "f32", ("f32",) * 3, three, extremum(op, ftz=ftz), section,
                    name=f"{op}{suffix}.f32 three", target="sm_100a",
                ),
                elementwise(
                    f"{op}{suffix}.NaN.f32", "f32", ("f32",) * 3, three, extremum(op, ftz=ftz, nan=True), section,
                    name=f"{op}{suffix}.NaN.f32 three", target="sm_100a",
                ),
            ]  # fmt: skip
    return out


def quotient(a: int, b: int, ftz: bool = False) -> int:
    x, y = (flush(decode(v, F32), F32) if ftz else decode(v, F32) for v in (a, b))
    negative = is_negative(x) != is_negative(y)
    if x != x or y != y or (x == 0 and y == 0) or (isinstance(x, float) and isinstance(y, float) and math.isinf(x) and math.isinf(y)):
        return F32.nan
    if y == 0 or (isinstance(x, float) and math.isinf(x)):
        return encode(-math.inf if negative else math.inf, F32)
    if x == 0 or (isinstance(y, float) and math.isinf(y)):
        return encode(-0.0 if negative else 0.0, F32)
    bits = encode(Fraction(x) / Fraction(y), F32)
    return flush_bits(bits, F32) if ftz else bits


def square_root(a: int) -> int:
    value = decode(a, F32)
    if value != value or (is_negative(value) and value != 0):
        return F32.nan
    if isinstance(value, float):
        return a
    # 2^120 widens the integer root to many more bits than a result has; the odd low bit stands for the rest.
    scaled = value * Fraction(2) ** 240
    root = math.isqrt(scaled.numerator // scaled.denominator)
    exact = Fraction(root) ** 2 == scaled
    return encode(Fraction(2 * root + (not exact), 2) / Fraction(2) ** 120, F32)


def _division() -> list[Program]:
    cases = float_pairs("f32")
    singles = [(v,) for v in sorted({a for pair in cases for a in pair})]
    return [
        elementwise("div.rn.f32", "f32", ("f32",) * 2, cases, quotient, "9.7.3.8"),
        elementwise("div.rn.ftz.f32", "f32", ("f32",) * 2, cases, lambda a, b: quotient(a, b, True), "9.7.3.8"),
        elementwise("rcp.rn.f32", "f32", ("f32",), singles, lambda a: quotient(ONE, a), "9.7.3.13"),
        elementwise("sqrt.rn.f32", "f32", ("f32",), singles, square_root, "9.7.3.15"),
    ]


def _signs() -> list[Program]:
    singles = [(v,) for v in FLOAT_EDGES["f32"] if v != 0x7FC00000]
    two = [(a, b) for (a,) in singles for (b,) in singles]
    return [
        elementwise("abs.f32", "f32", ("f32",), singles, lambda a: a & 0x7FFFFFFF, "9.7.3.9"),
        elementwise("abs.ftz.f32", "f32", ("f32",), singles, lambda a: flush_bits(a, F32) & 0x7FFFFFFF, "9.7.3.9"),
        elementwise("neg.f32", "f32", ("f32",), singles, lambda a: a ^ 0x80000000, "9.7.3.10"),
        elementwise("neg.ftz.f32", "f32", ("f32",), singles, lambda a: flush_bits(a, F32) ^ 0x80000000, "9.7.3.10"),
        elementwise("copysign.f32", "f32", ("f32",) * 2, two, lambda a, b: b & 0x7FFFFFFF | a & 0x80000000, "9.7.3.2"),
    ]


TESTS: dict[str, Callable[[Value, int], bool]] = {
    "finite": lambda v, bits: v == v and abs(v) != math.inf,
    "infinite": lambda v, bits: v == v and abs(v) == math.inf,
    "number": lambda v, bits: v == v,
    "notanumber": lambda v, bits: v != v,
    # The ISA does not say where zero belongs; on an H200 it is normal.
    "normal": lambda v, bits: v == 0 or (isinstance(v, Fraction) and bits & 0x7FFFFFFF >= 0x00800000),
    "subnormal": lambda v, bits: isinstance(v, Fraction) and bits & 0x7FFFFFFF < 0x00800000,
}


def compare(name: str, kind: str = "f32", ftz: bool = False) -> Callable[[int, int], bool]:
    """setp on floats: eq..ge are false on NaN, equ..geu true, num and nan ask for it. 9.7.6.2"""
    from tests.emulator.programs.integer import COMPARISONS

    fmt = FORMATS[kind]

    def apply(a: int, b: int) -> bool:
        x, y = (flush(decode(v, fmt), fmt) if ftz else decode(v, fmt) for v in (a, b))
        unordered = x != x or y != y
        if name == "num":
            return not unordered
        if name == "nan":
            return unordered
        if unordered:
            return name.endswith("u")
        return COMPARISONS[name.removesuffix("u")](x, y)

    return apply


COMPARE_NAMES = [n + u for u in ("", "u") for n in ("eq", "ne", "lt", "le", "gt", "ge")] + ["num", "nan"]


def _tests() -> list[Program]:
    out = []
    cases = float_pairs("f32", 0)
    singles = [(v,) for v in FLOAT_EDGES["f32"]]
    for name, function in TESTS.items():
        out.append(elementwise(f"testp.{name}.f32", "pred", ("f32",), singles, lambda a, f=function: f(decode(a, F32), a), "9.7.3.1"))
    for name in COMPARE_NAMES:
        out.append(elementwise(f"setp.{name}.f32", "pred", ("f32", "f32"), cases, compare(name), "9.7.6.2"))
    for name in ("eq", "ne", "lt", "ge", "neu", "gtu"):
        out.append(elementwise(f"setp.{name}.ftz.f32", "pred", ("f32", "f32"), cases, compare(name, ftz=True), "9.7.6.2"))
    select = [(a, b, i & 1) for i, (a, b) in enumerate(cases)]
    out.append(elementwise("selp.f32", "f32", ("f32", "f32", "pred"), select, lambda a, b, p: a if p else b, "9.7.6.3"))
    return out


def to_integer(bits: int, mode: str, dst: str, kind: str = "f32", ftz: bool = False) -> int:
    """cvt from a float: rounded, then clamped; NaN gives 0, or the top bit for 64-bit results. 9.7.9.21"""
    value = decode(bits, FORMATS[kind])
    if ftz:
        value = flush(value, FORMATS[kind])
    width = int(dst[1:])
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if dst[0] == "s" else (0, (1 << width) - 1)
    if value != value:
        return 1 << 63 if width == 64 else 0
    if isinstance(value, float) and math.isinf(value):
        return high if value > 0 else low
    whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](value)
    return min(max(whole, low), high)


def _conversions() -> list[Program]:
    out = []
    numbers = (
        0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 1e9, -1e9, 3e9, -3e9, 4.2e9, 5e9, 1e19, -1e19, 1.9e19, 7.75, -7.75, 32767.5, -32768.5,
        65535.4, 70000.0, 9.3e18,
    )  # fmt: skip
    singles = [(v,) for v in FLOAT_EDGES["f32"]] + [(constant(x),) for x in numbers]
    for dst in ("s32", "u32", "s64", "u64", "s16", "u16"):
        for mode in ("rni", "rzi", "rmi", "rpi"):
            out.append(
                elementwise(f"cvt.{mode}.{dst}.f32", dst, ("f32",), singles, lambda a, m=mode, d=dst: to_integer(a, m, d), "9.7.9.21")
            )
    out.append(elementwise("cvt.rpi.ftz.s32.f32", "s32", ("f32",), singles, lambda a: to_integer(a, "rpi", "s32", ftz=True), "9.7.9.21"))
    for mode in ("rni", "rzi", "rmi", "rpi"):

        def whole(a: int, mode: str = mode) -> int:
            value = decode(a, F32)
            if isinstance(value, float):
                return a if value == value else F32.nan
            rounded = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](value)
            return encode(Fraction(rounded), F32) if rounded else a & 0x80000000

        out.append(elementwise(f"cvt.{mode}.f32.f32", "f32", ("f32",), singles, whole, "9.7.9.21"))
    integers = [
        0,
        1,
        2,
        0xFFFFFF,
        0x1000001,
        0x1000003,
        0x7FFFFFFF,
        0x80000000,
        0xFFFFFFFF,
        0x7FFFFF80,
        0x123456789ABCDEF,
        (1 << 63) + 1,
        (1 << 64) - 1,
    ]
    for src in ("s32", "u32", "s64", "u64", "s16", "u16"):
        for mode in MODES:
            cases = [(v,) for v in integers]
            name = f"cvt.{mode}.f32.{src}"
            out.append(elementwise(name, "f32", (src,), cases, lambda a, m=mode: encode(Fraction(a) if a else 0.0, F32, m), "9.7.9.21"))
    out.append(elementwise("cvt.sat.f32.f32", "f32", ("f32",), singles, lambda a: saturate(a, "f32"), "9.7.9.21"))
    out.append(elementwise("cvt.ftz.f32.f32", "f32", ("f32",), singles, lambda a: flush_bits(a, F32), "9.7.9.21"))
    tf32 = [(a,) for a, _ in float_pairs("f32") if a != 0x7FC00000 and 0x00800000 <= a & 0x7FFFFFFF < 0x7F000000]
    # tf32 keeps 10 bits of mantissa; rna rounds half away from zero.
    out.append(
        elementwise("cvt.rna.tf32.f32", "b32", ("f32",), tf32, lambda a: (a + 0x1000) & 0xFFFFE000, "9.7.9.21", form="{op} {d}, {s};")
    )
    # Every byte of a 32-bit integer as a float, as dequantising code does it.
    out.append(
        elementwise("cvt.rn.f32.u8", "f32", ("u32",), [(v,) for v in range(0, 512, 7)], lambda a: constant(float(a & 255)), "9.7.9.21")
    )
    out.append(
        elementwise("cvt.rn.f32.s8", "f32", ("u32",), [(v,) for v in range(0, 512, 7)], lambda a: constant(float(signed(a, 8))), "9.7.9.21")
    )
    return out


PROGRAMS = [*_arithmetic(), *_extrema(), *_division(), *_signs(), *_tests(), *_conversions()]
