"""Half precision, bfloat16 and 8-bit floats: PTX ISA 9.7.4 and 9.7.9.21."""

from __future__ import annotations

import math

from tests.emulator.programs.elementwise import FLOAT_EDGES, constant, elementwise, float_pairs, float_triples, halves, packed
from tests.emulator.programs.fp32 import COMPARE_NAMES, arithmetic, compare, extremum, to_integer
from tests.emulator.programs.numerics import FORMATS, decode, encode, flush, is_negative
from tests.emulator.programs.program import Program


def _arithmetic() -> list[Program]:
    out = []
    for kind in ("f16", "bf16"):
        for op, section in (("add", "9.7.4.1"), ("sub", "9.7.4.2"), ("mul", "9.7.4.3"), ("fma", "9.7.4.4")):
            cases = float_triples(kind) if op == "fma" else float_pairs(kind)
            arity = len(cases[0])
            tag = ".rn" if op == "fma" else ""
            variants = [("", False, False)]
            if kind == "f16":
                variants += [(".ftz", True, False), (".sat", False, True)]
            for suffix, ftz, sat in variants:
                function = arithmetic(op, "rn", ftz, sat, kind)
                out.append(elementwise(f"{op}{tag}{suffix}.{kind}", kind, (kind,) * arity, cases, function, section))
                two = f"{op}{tag}{suffix}.{kind}x2"
                out.append(elementwise(two, f"{kind}x2", (f"{kind}x2",) * arity, halves(cases, 16), packed(function, 16), section))
        cases = float_triples(kind)
        plain = arithmetic("fma", "rn", False, False, kind)

        def relu(a: int, b: int, c: int, plain=plain, kind=kind) -> int:
            bits = plain(a, b, c)
            value = decode(bits, FORMATS[kind])
            return FORMATS[kind].nan if value != value else 0 if is_negative(value) else bits

        out.append(elementwise(f"fma.rn.relu.{kind}x2", f"{kind}x2", (f"{kind}x2",) * 3, halves(cases, 16), packed(relu, 16), "9.7.4.4"))
        numbers = [(v,) for v in FLOAT_EDGES[kind] if v not in (0x7E00, 0x7FC0)]
        out += [
            elementwise(f"neg.{kind}", kind, (kind,), numbers, lambda a: a ^ 0x8000, "9.7.4.5"),
            elementwise(f"abs.{kind}", kind, (kind,), numbers, lambda a: a & 0x7FFF, "9.7.4.6"),
            elementwise(f"neg.{kind}x2", f"{kind}x2", (f"{kind}x2",), halves(numbers, 16), lambda a: a ^ 0x80008000, "9.7.4.5"),
            elementwise(f"abs.{kind}x2", f"{kind}x2", (f"{kind}x2",), halves(numbers, 16), lambda a: a & 0x7FFF7FFF, "9.7.4.6"),
        ]
    return out


def _extrema() -> list[Program]:
    out = []
    for kind in ("f16", "bf16"):
        cases = float_pairs(kind)
        for op, section in (("min", "9.7.4.7"), ("max", "9.7.4.8")):
            for suffix, nan in (("", False), (".NaN", True)):
                function = extremum(op, kind=kind, nan=nan)
                out.append(elementwise(f"{op}{suffix}.{kind}", kind, (kind,) * 2, cases, function, section))
                two = f"{op}{suffix}.{kind}x2"
                out.append(elementwise(two, f"{kind}x2", (f"{kind}x2",) * 2, halves(cases, 16), packed(function, 16), section))
        for name in COMPARE_NAMES:
            out.append(elementwise(f"setp.{name}.{kind}", "pred", (kind, kind), float_pairs(kind, 0), compare(name, kind), "9.7.6.2"))
    return out


def narrow(bits: int, kind: str, mode: str = "rn", *, relu: bool = False, satfinite: bool = False, source: str = "f32") -> int:
    """cvt to a narrower float."""
    value = decode(bits, FORMATS[source])
    if value != value:
        return FORMATS[kind].nan
    result = encode(value, FORMATS[kind], mode, saturate=satfinite)
    return 0 if relu and result & FORMATS[kind].sign else result


def _conversions() -> list[Program]:
    out = []
    cases = float_pairs("f32") + [
        (constant(x), constant(-x)) for x in (448.0, 449.0, 464.0, 465.0, 57344.0, 61439.0, 61440.0, 65504.0, 65520.0)
    ]
    cases += [(constant(2.0**-k), constant(1.5 * 2.0**-k)) for k in range(4, 30)]
    singles = [(v,) for v in sorted({v for pair in cases for v in pair})]
    for kind in ("f16", "bf16"):
        for mode in ("rn", "rz"):
            for relu in (False, True):
                suffix = f"{mode}{'.relu' * relu}"

                def one(a: int, kind=kind, mode=mode, relu=relu) -> int:
                    return narrow(a, kind, mode, relu=relu)

                out.append(elementwise(f"cvt.{suffix}.{kind}.f32", kind, ("f32",), singles, one, "9.7.9.21"))
                # The first source goes to the upper half. 9.7.9.21
                out.append(
                    elementwise(
                        f"cvt.{suffix}.{kind}x2.f32",
                        f"{kind}x2",
                        ("f32", "f32"),
                        cases,
                        lambda a, b, one=one: one(a) << 16 | one(b),
                        "9.7.9.21",
                    )
                )
        every = [(v,) for v in range(0, 1 << 16, 37)] + [(v,) for v in FLOAT_EDGES[kind]]
        out.append(elementwise(f"cvt.f32.{kind}", "f32", (kind,), every, lambda a, k=kind: _widen(a, k), "9.7.9.21"))
        for dst in ("s32", "u32"):
            name = f"cvt.rzi.{dst}.{kind}"
            out.append(elementwise(name, dst, (kind,), every, lambda a, k=kind, d=dst: to_integer(a, "rzi", d, k), "9.7.9.21"))
        integers = [(v,) for v in (0, 1, 2047, 2049, 2051, 65519, 65520, 0xFFFFFFFF, 255, 257, 259)]
        for src in ("s32", "u32"):
            from fractions import Fraction

            out.append(
                elementwise(
                    f"cvt.rn.{kind}.{src}", kind, (src,), integers,
                    lambda a, k=kind: encode(Fraction(a) if a else 0.0, FORMATS[k]), "9.7.9.21",
                )
            )  # fmt: skip
    for kind in ("e4m3", "e5m2"):
        for relu in (False, True):

            def eight(a: int, b: int, kind=kind, relu=relu) -> int:
                high, low = (narrow(v, kind, relu=relu, satfinite=True) for v in (a, b))
                return high << 8 | low

            name = f"cvt.rn.satfinite{'.relu' * relu}.{kind}x2.f32"
            # The sign of a NaN is open in 8 bits too, but these outputs are compared as bits: leave NaN to its own program.
            numbers = [(a, b) for a, b in cases if 0x7FC00000 not in (a, b)]
            out.append(elementwise(name, f"{kind}x2", ("f32", "f32"), numbers, eight, "9.7.9.21"))
        nan = [(0x7FC00000, constant(1.0)), (constant(-2.0), 0x7FC00000)]
        out.append(
            elementwise(
                f"cvt.rn.satfinite.{kind}x2.f32", f"{kind}x2", ("f32", "f32"), nan,
                lambda a, b, k=kind: narrow(a, k, satfinite=True) << 8 | narrow(b, k, satfinite=True), "9.7.9.21",
                name=f"cvt {kind}x2 of NaN",
            )
        )  # fmt: skip
        halves_in = halves([p for p in float_pairs("f16") if 0x7E00 not in p], 16)
        out.append(
            elementwise(
                f"cvt.rn.satfinite.{kind}x2.f16x2", f"{kind}x2", ("f16x2",), [(a,) for a, _ in halves_in],
                lambda a, k=kind: _e8_of_f16(a >> 16, k) << 8 | _e8_of_f16(a & 0xFFFF, k),
                "9.7.9.21",
            )
        )  # fmt: skip
        all_bytes = [(v | (255 - v) << 8,) for v in range(256)]
        out.append(
            elementwise(
                f"cvt.rn.f16x2.{kind}x2", "f16x2", (f"{kind}x2",), all_bytes,
                lambda a, k=kind: _f16_of(a >> 8, k) << 16 | _f16_of(a & 255, k), "9.7.9.21",
            )
        )  # fmt: skip
    return out


def _widen(bits: int, kind: str) -> int:
    return encode(decode(bits, FORMATS[kind]), FORMATS["f32"])


def _e8_of_f16(bits: int, kind: str) -> int:
    return narrow(bits, kind, satfinite=True, source="f16")


def _f16_of(bits: int, kind: str) -> int:
    return encode(decode(bits, FORMATS[kind]), FORMATS["f16"])


def _packing() -> list[Program]:
    """mov between a 32-bit register and its halves, and packed constants. 9.7.9.1"""
    cases = [(0x12345678,), (0xFFFF0001,), (0x80007FFF,)]
    return [
        elementwise(
            "mov.b32", "u32", ("u32",), cases, lambda a: (a & 0xFFFF) << 16 | a >> 16, "9.7.9.1", name="mov halves swapped",
            form="{op} {{%h1, %h2}}, {a};\n{op} {d}, {{%h2, %h1}};",
        ),
        elementwise(
            "mov.b64", "b64", ("b64",), [(0x0123456789ABCDEF,), (1,)], lambda a: (a & 0xFFFFFFFF) << 32 | a >> 32, "9.7.9.1",
            name="mov words swapped", form="{op} {{%r1, %r2}}, {a};\n{op} {d}, {{%r2, %r1}};",
        ),
    ]  # fmt: skip


def approximate(function, source: str, kind: str, ftz: bool = False):
    """`function` in double precision, rounded to `kind`."""

    def apply(bits: int) -> int:
        value = decode(bits, FORMATS[source])
        if ftz:
            value = flush(value, FORMATS[source])
        return encode_float(function(float(value)), kind, ftz)

    return apply


def encode_float(value: float, kind: str, ftz: bool = False) -> int:
    from fractions import Fraction

    from tests.emulator.programs.numerics import flush_bits

    fmt = FORMATS[kind]
    bits = encode(value if value == 0 or not math.isfinite(value) else Fraction(value), fmt)
    return flush_bits(bits, fmt) if ftz else bits


PROGRAMS = [*_arithmetic(), *_extrema(), *_conversions(), *_packing()]
