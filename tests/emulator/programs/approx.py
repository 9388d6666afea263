"""Approximate functions, within the error that the PTX ISA states (9.7.3.13 to 9.7.3.24, 9.7.4.9, 9.7.4.10); special values are exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.emulator.programs.elementwise import FLOAT_EDGES, elementwise, halves, packed
from tests.emulator.programs.fp32 import quotient
from tests.emulator.programs.half import approximate
from tests.emulator.programs.program import Program


def _exp2(x: float) -> float:
    return math.exp2(x) if x < 1000 else math.inf if x == x else x


def _log2(x: float) -> float:
    if x == 0:
        return -math.inf
    return math.log2(x) if x > 0 else math.nan


def _reciprocal(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else 1.0 / x


def _root(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def _reciprocal_root(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else 1.0 / math.sqrt(x) if x > 0 else math.nan


def _singles(low: float, high: float, count: int = 480) -> list[tuple[int]]:
    values = np.random.default_rng(5).uniform(low, high, count).astype(np.float32)
    return [(int(v),) for v in values.view(np.uint32)]


def _positive() -> list[tuple[int]]:
    rng = np.random.default_rng(6)
    values = np.exp2(rng.uniform(-120, 120, 448)).astype(np.float32)
    near_one = (1 + rng.uniform(-2e-3, 2e-3, 64)).astype(np.float32)
    return [(int(v),) for v in np.concatenate([values, near_one]).view(np.uint32)]


SPECIAL = [(v,) for v in FLOAT_EDGES["f32"]]


def _f32() -> list[Program]:
    out = []
    signs = [(v | (i & 1) << 31,) for i, (v,) in enumerate(_positive())]
    # name, function, cases, ulp, absolute error, section
    table: list[tuple[str, Callable[[float], float], list[tuple[int]], float, float, str]] = [
        ("ex2.approx", _exp2, _singles(-126, 127) + _singles(-1, 1) + SPECIAL, 2, 0.0, "9.7.3.21"),
        ("lg2.approx", _log2, _positive() + SPECIAL, 4, 2.0**-22, "9.7.3.20"),
        ("rcp.approx", _reciprocal, signs + SPECIAL, 1, 0.0, "9.7.3.14"),
        ("sqrt.approx", _root, _positive() + SPECIAL, 2, 0.0, "9.7.3.15"),
        ("rsqrt.approx", _reciprocal_root, _positive() + SPECIAL, 2, 0.0, "9.7.3.16"),
        ("sin.approx", math.sin, _singles(-math.pi, math.pi), 0, 2.0**-20.5, "9.7.3.18"),
        ("cos.approx", math.cos, _singles(-math.pi, math.pi), 0, 2.0**-20.5, "9.7.3.19"),
    ]
    for name, function, cases, ulp, absolute, section in table:
        for ftz in (False, True):
            ops = f"{name}{'.ftz' * ftz}.f32"
            # Without .ftz, subnormal operands and results keep their value only as far as the ISA says so: 2 more units.
            out.append(
                elementwise(ops, "f32", ("f32",), cases, approximate(function, "f32", "f32", ftz), section, ulp=ulp, absolute=absolute)
            )
    tanh = [*_singles(-5, 5), (0x7F800000,), (0xFF800000,), (0x7FC00000,), (0,), (0x80000000,)]
    out.append(elementwise("tanh.approx.f32", "f32", ("f32",), tanh, approximate(math.tanh, "f32", "f32"), "9.7.3.22", ulp=8192))
    pairs = [(a, b) for (a,), (b,) in zip(_positive(), reversed(_positive()), strict=True) if abs((a >> 23) - (b >> 23)) < 100]
    for name in ("div.approx", "div.full"):
        out.append(elementwise(f"{name}.f32", "f32", ("f32",) * 2, pairs, quotient, "9.7.3.8", ulp=2))
    return out


def _half() -> list[Program]:
    out = []
    rng = np.random.default_rng(7)
    f16 = [(int(v),) for v in rng.uniform(-12, 12, 480).astype(np.float16).view(np.uint16)] + [
        (v,) for v in (0, 0x8000, 0x7C00, 0xFC00, 0x7E00)
    ]
    bf16 = [(int(v) >> 16,) for v in rng.uniform(-12, 12, 480).astype(np.float32).view(np.uint32)] + [
        (v,) for v in (0, 0x8000, 0x7F80, 0xFF80)
    ]
    for kind, cases, ftz, ulps, tanh_error in (("f16", f16, "", 2, 2.0**-10.9), ("bf16", bf16, ".ftz", 2, 2.0**-7.9)):
        exp = approximate(_exp2, kind, kind)
        tanh = approximate(math.tanh, kind, kind)
        two = f"{kind}x2"
        out += [
            elementwise(f"ex2.approx{ftz}.{kind}", kind, (kind,), cases, exp, "9.7.4.10", ulp=ulps),
            elementwise(f"ex2.approx{ftz}.{two}", two, (two,), halves(cases, 16), packed(exp, 16), "9.7.4.10", ulp=ulps),
            elementwise(f"tanh.approx.{kind}", kind, (kind,), cases, tanh, "9.7.4.9", ulp=1, absolute=tanh_error),
            elementwise(f"tanh.approx.{two}", two, (two,), halves(cases, 16), packed(tanh, 16), "9.7.4.9", ulp=1, absolute=tanh_error),
        ]
    return out


def _range_reduction() -> list[Program]:
    """exp2 on the FMA units: floor by adding 1.5 * 2^23 rounded down, a polynomial, and the exponent by an integer add."""
    cases = _singles(-100, 100, 512)
    body = (
        "mov.b32 %f10, 0x4b400000;\nadd.rm.ftz.f32 %f11, {a}, %f10;\nsub.rn.ftz.f32 %f12, %f11, %f10;\nsub.rn.ftz.f32 %f13, {a}, %f12;\n"
        "mov.b32 %r11, %f11;\nshl.b32 %r11, %r11, 23;\n"
        "mov.b32 %f14, 0x3d9df09d;\nmov.b32 %f15, 0x3e6906a4;\nfma.rn.ftz.f32 %f14, %f13, %f14, %f15;\n"
        "mov.b32 %f15, 0x3f31f519;\nfma.rn.ftz.f32 %f14, %f13, %f14, %f15;\nmov.b32 %f15, 0x3f800000;\n"
        "fma.rn.ftz.f32 %f14, %f13, %f14, %f15;\n"
        "mov.b32 %r12, %f14;\nadd.s32 %r12, %r11, %r12;\nmov.b32 {d}, %r12;"
    )
    # A degree-3 polynomial is right to about 1e-4 relative: 2000 units in the last place.
    return [elementwise("exp2 by polynomial", "f32", ("f32",), cases, approximate(_exp2, "f32", "f32"), "9.7.3", ulp=2000, form=body)]


PROGRAMS = [*_f32(), *_half(), *_range_reduction()]
