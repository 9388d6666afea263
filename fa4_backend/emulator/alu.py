"""Instructions that compute registers from registers: one table row each.

A row gives the types of the destination and the sources and a C expression over the lane values `a`, `b`, `c` (and `e`
for a fourth source). `native_core.py` turns every row into one case of the interpreter's switch. Types:

| type | register | lane value in the expression |
|---|---|---|
| u16 i16 u8 i8 | 32-bit container, low bits | integer |
| u32 i32 f32, u64 i64 f64 | one or two 128-byte slots | integer or float |
| f32x2 | 64 bits, seen as 64 floats a warp | one float: the expression runs on both halves |
| pred | one bit a lane | 0 or 1 |
| mask | a whole predicate register | uint32, one bit a lane |

Sections are those of the PTX ISA 9.0. `rounding` is the C rounding mode while the row runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction: types of its result and sources, the C expression, the section of the PTX ISA; see the module's docstring."""

    dst: str
    srcs: tuple[str, ...]
    expr: str
    section: str
    rounding: str = ""


TABLE: dict[str, Row] = {}

# PTX type -> expression type
_INT = {"s16": "i16", "u16": "u16", "s32": "i32", "u32": "u32", "s64": "i64", "u64": "u64"}
_UNSIGNED = {"s16": "u16", "u16": "u16", "s32": "u32", "u32": "u32", "s64": "u64", "u64": "u64"}
_BITS = {"b16": "u16", "b32": "u32", "b64": "u64"}
_MODES = {"rn": "", "rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}


def _row(name: str, dst: str, srcs: str, expr: str, section: str, rounding: str = "") -> None:
    assert name not in TABLE, name
    TABLE[name] = Row(dst, tuple(srcs.split()), expr, section, rounding)


def _substitute(expr: str, **values: str) -> str:
    return re.sub(r"\b([a-z])\b", lambda m: values.get(m.group(1), m.group(1)), expr)


def _integers() -> None:
    for ptx, t in _INT.items():
        u = _UNSIGNED[ptx]
        wide = {"u16": "u32", "i16": "i32", "u32": "u64", "i32": "i64"}.get(t)
        big = {"u64": "unsigned __int128", "i64": "__int128"}.get(t, "i64" if t[0] == "i" else "u64")
        bits = int(ptx[1:])
        # Wrapping arithmetic is done unsigned: signed overflow is undefined in C, defined in PTX. 9.7.1
        _row(f"add.{ptx}", u, f"{u} {u}", "a + b", "9.7.1.1")
        _row(f"sub.{ptx}", u, f"{u} {u}", "a - b", "9.7.1.2")
        _row(f"mul.lo.{ptx}", u, f"{u} {u}", "(u64)a * (u64)b", "9.7.1.3")
        _row(f"mul.hi.{ptx}", t, f"{t} {t}", f"(({big})a * ({big})b) >> {bits}", "9.7.1.3")
        _row(f"mad.lo.{ptx}", u, f"{u} {u} {u}", "(u64)a * (u64)b + c", "9.7.1.4")
        _row(f"mad.hi.{ptx}", u, f"{t} {t} {u}", f"({u})((({big})a * ({big})b) >> {bits}) + c", "9.7.1.4")
        _row(f"div.{ptx}", t, f"{t} {t}", f"DIV_{t[0]}({t}, a, b)", "9.7.1.8")
        _row(f"rem.{ptx}", t, f"{t} {t}", f"REM_{t[0]}({t}, a, b)", "9.7.1.9")
        _row(f"min.{ptx}", t, f"{t} {t}", "a < b ? a : b", "9.7.1.12")
        _row(f"max.{ptx}", t, f"{t} {t}", "a > b ? a : b", "9.7.1.13")
        if wide:
            _row(f"mul.wide.{ptx}", wide, f"{t} {t}", f"({wide})a * ({wide})b", "9.7.1.3")
            uw = wide.replace("i", "u")
            _row(f"mad.wide.{ptx}", uw, f"{t} {t} {uw}", f"({uw})(({wide})a * ({wide})b) + c", "9.7.1.4")
        if ptx[0] == "s":
            _row(f"abs.{ptx}", u, t, f"a < 0 ? 0 - ({u})a : ({u})a", "9.7.1.10")
            _row(f"neg.{ptx}", u, u, "0 - a", "9.7.1.11")
    _row("add.sat.s32", "i32", "i32 i32", "clamp_i32((i64)a + b)", "9.7.1.1")
    _row("sub.sat.s32", "i32", "i32 i32", "clamp_i32((i64)a - b)", "9.7.1.2")
    _row("min.relu.s32", "i32", "i32 i32", "MAX(a < b ? a : b, 0)", "9.7.1.12")
    _row("max.relu.s32", "i32", "i32 i32", "MAX(a > b ? a : b, 0)", "9.7.1.13")
    _row("mul24.lo.u32", "u32", "u32 u32", "(a & 0xffffff) * (b & 0xffffff)", "9.7.1.5")
    _row("sad.u32", "u32", "u32 u32 u32", "c + (a < b ? b - a : a - b)", "9.7.1.7")
    _row("sad.s32", "u32", "i32 i32 u32", "c + (a < b ? (u32)b - (u32)a : (u32)a - (u32)b)", "9.7.1.7")
    for op in ("add", "min", "max"):
        for ptx, half in (("u16x2", "u16"), ("s16x2", "i16")):
            _row(
                f"{op}.{ptx}",
                "u32",
                "u32 u32",
                f"PAIR16({op}_op(({half})a, ({half})b), {op}_op(({half})(a >> 16), ({half})(b >> 16)))",
                "9.7.1",
            )


def _bits() -> None:
    for ptx, t in _BITS.items():
        bits = int(ptx[1:])
        signed = t.replace("u", "i")
        for op, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            _row(f"{op}.{ptx}", t, f"{t} {t}", f"a {sign} b", "9.7.8")
        _row(f"not.{ptx}", t, t, "~a", "9.7.8.4")
        _row(f"cnot.{ptx}", t, t, "a == 0", "9.7.8.5")
        # Shift amounts above the width clamp to it. 9.7.8.8, 9.7.8.9
        _row(f"shl.{ptx}", t, f"{t} u32", f"b >= {bits} ? 0 : ({t})(a << (b & {bits - 1}))", "9.7.8.8")
        for name in (f"shr.{ptx}", f"shr.u{bits}"):
            _row(name, t, f"{t} u32", f"b >= {bits} ? 0 : ({t})(a >> (b & {bits - 1}))", "9.7.8.9")
        _row(f"shr.s{bits}", signed, f"{signed} u32", f"a >> (b >= {bits} ? {bits - 1} : b)", "9.7.8.9")
    for op, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        _row(f"{op}.pred", "mask", "mask mask", f"a {sign} b", "9.7.8")
    _row("not.pred", "mask", "mask", "~a", "9.7.8.4")
    _row("mov.pred", "mask", "mask", "a", "9.7.9.1")
    _row("lop3.b32", "u32", "u32 u32 u32 u32", "lop3(a, b, c, e)", "9.7.8.6")
    _row("shf.l.wrap.b32", "u32", "u32 u32 u32", "(u32)((((u64)b << 32 | a) << (c & 31)) >> 32)", "9.7.8.7")
    _row("shf.r.wrap.b32", "u32", "u32 u32 u32", "(u32)(((u64)b << 32 | a) >> (c & 31))", "9.7.8.7")
    _row("shf.l.clamp.b32", "u32", "u32 u32 u32", "(u32)((((u64)b << 32 | a) << MIN(c, 32u)) >> 32)", "9.7.8.7")
    _row("shf.r.clamp.b32", "u32", "u32 u32 u32", "(u32)(((u64)b << 32 | a) >> MIN(c, 32u))", "9.7.8.7")
    for mode in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        _row(f"prmt.b32.{mode}", "u32", "u32 u32 u32", f"prmt_{mode}(a, b, c & 3)", "9.7.9.7")
    _row("prmt.b32", "u32", "u32 u32 u32", "prmt(a, b, c)", "9.7.9.7")
    _row("popc.b32", "u32", "u32", "__builtin_popcount(a)", "9.7.1.14")
    _row("popc.b64", "u32", "u64", "__builtin_popcountll(a)", "9.7.1.14")
    _row("clz.b32", "u32", "u32", "a ? __builtin_clz(a) : 32", "9.7.1.15")
    _row("clz.b64", "u32", "u64", "a ? __builtin_clzll(a) : 64", "9.7.1.15")
    _row("brev.b32", "u32", "u32", "brev32(a)", "9.7.1.18")
    _row("brev.b64", "u64", "u64", "(u64)brev32((u32)a) << 32 | brev32((u32)(a >> 32))", "9.7.1.18")
    _row("bfind.u32", "u32", "u32", "a ? 31 - __builtin_clz(a) : 0xffffffffu", "9.7.1.16")
    _row("bfind.s32", "u32", "u32", "bfind_s32(a)", "9.7.1.16")
    _row("bfind.u64", "u32", "u64", "a ? 63 - __builtin_clzll(a) : 0xffffffffu", "9.7.1.16")
    _row("bfind.shiftamt.u32", "u32", "u32", "a ? __builtin_clz(a) : 0xffffffffu", "9.7.1.16")
    _row("bfe.u32", "u32", "u32 u32 u32", "bfe_u32(a, b, c)", "9.7.1.19")
    _row("bfe.s32", "u32", "u32 u32 u32", "bfe_s32(a, b, c)", "9.7.1.19")
    _row("bfe.s64", "u64", "u64 u32 u32", "bfe_s64(a, b, c)", "9.7.1.19")
    _row("bfe.u64", "u64", "u64 u32 u32", "bfe_u64(a, b, c)", "9.7.1.19")
    _row("bfi.b32", "u32", "u32 u32 u32 u32", "bfi_b32(a, b, c, e)", "9.7.1.20")
    _row("bfi.b64", "u64", "u64 u64 u32 u32", "bfi_b64(a, b, c, e)", "9.7.1.20")
    for ptx, t in {**_INT, **_BITS, "f32": "u32", "f64": "u64"}.items():
        _row(f"mov.{ptx}", t, t, "a", "9.7.9.1")
        _row(f"selp.{ptx}", t, f"{t} {t} pred", "c ? a : b", "9.7.6.3")
    for ptx, t in (("s32", "u32"), ("u32", "u32"), ("f32", "u32"), ("b32", "u32"), ("b64", "u64")):
        _row(f"slct.{ptx}.s32", t, f"{t} {t} i32", "c >= 0 ? a : b", "9.7.6.4")
    for space, window in (("shared", 1), ("local", 2)):
        _row(f"isspacep.{space}", "pred", "u64", f"(a >> 56) == {window}", "9.7.9.19")
    _row("isspacep.shared::cta", "pred", "u64", "(a >> 56) == 1 && ((u32)a >> 24) == cta_rank", "9.7.9.19")
    _row("isspacep.shared::cluster", "pred", "u64", "(a >> 56) == 1", "9.7.9.19")
    # Shared addresses of a cluster hold the CTA's rank in bits 24 and up. 9.7.9.23 mapa, 9.7.9.24 getctarank
    _row("mapa.shared::cluster.u32", "u32", "u32 u32", "b << 24 | (a & 0xffffffu)", "9.7.9.23")
    _row("mapa.shared::cluster.u64", "u64", "u64 u32", "(u64)b << 24 | (a & 0xffffffu)", "9.7.9.23")
    _row("mapa.u64", "u64", "u64 u32", "(a & ~0xff000000ull) | (u64)b << 24", "9.7.9.23")
    _row("getctarank.shared::cluster.u32", "u32", "u32", "a >> 24", "9.7.9.24")
    _row("getctarank.shared::cluster.u64", "u32", "u64", "(u32)a >> 24", "9.7.9.24")
    _row("getctarank.u64", "u32", "u64", "(u32)a >> 24", "9.7.9.24")
    _row("isspacep.global", "pred", "u64", "(a >> 56) == 0", "9.7.9.19")


def _compares() -> None:
    signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    for cmp, sign in signs.items():
        for ptx, t in _INT.items():
            _row(f"setp.{cmp}.{ptx}", "pred", f"{t} {t}", f"a {sign} b", "9.7.6.2")
        if cmp in ("eq", "ne"):
            for ptx, t in _BITS.items():
                _row(f"setp.{cmp}.{ptx}", "pred", f"{t} {t}", f"a {sign} b", "9.7.6.2")
        for ptx in ("f32", "f64", "f16", "bf16"):
            ordered = f"(a == a && b == b && a {sign} b)"
            _row(f"setp.{cmp}.{ptx}", "pred", f"{ptx} {ptx}", ordered, "9.7.6.2")
            _row(f"setp.{cmp}u.{ptx}", "pred", f"{ptx} {ptx}", f"(a != a || b != b || a {sign} b)", "9.7.6.2")
    for cmp, sign in (("lo", "<"), ("ls", "<="), ("hi", ">"), ("hs", ">=")):
        for ptx in ("u16", "u32", "u64"):
            _row(f"setp.{cmp}.{ptx}", "pred", f"{ptx} {ptx}", f"a {sign} b", "9.7.6.2")
    for ptx in ("f32", "f64", "f16", "bf16"):
        _row(f"setp.num.{ptx}", "pred", f"{ptx} {ptx}", "a == a && b == b", "9.7.6.2")
        _row(f"setp.nan.{ptx}", "pred", f"{ptx} {ptx}", "a != a || b != b", "9.7.6.2")
    for name in [n for n in TABLE if n.startswith("setp.") and n.split(".")[-1] in ("s32", "u32", "f32", "b32")]:
        # set writes all ones (1.0 for f32) where setp is true. 9.7.6.1
        row, parts = TABLE[name], name.split(".")
        for dst, true in (("u32", "0xffffffffu"), ("s32", "0xffffffffu"), ("f32", "0x3f800000u")):
            _row(f"set.{parts[1]}.{dst}.{parts[2]}", "u32", " ".join(row.srcs), f"({row.expr}) ? {true} : 0", "9.7.6.1")
    for cmp in (*signs, *(c + "u" for c in signs)):
        row = TABLE[f"setp.{cmp}.f32"]
        expr = _substitute(row.expr, a="FZ(a)", b="FZ(b)")
        _row(f"setp.{cmp}.ftz.f32", "pred", "f32 f32", expr, "9.7.6.2")
    _row("testp.finite.f32", "pred", "f32", "isfinite(a)", "9.7.3.1")
    _row("testp.infinite.f32", "pred", "f32", "isinf(a)", "9.7.3.1")
    _row("testp.notanumber.f32", "pred", "f32", "a != a", "9.7.3.1")
    _row("testp.number.f32", "pred", "f32", "a == a", "9.7.3.1")
    _row("testp.normal.f32", "pred", "f32", "isnormal(a) || a == 0", "9.7.3.1")
    _row("testp.subnormal.f32", "pred", "f32", "a != 0 && FZ(a) == 0", "9.7.3.1")


def _arithmetic(ptx: str, t: str, ftz: str, mode: str, tag: str, sat: str) -> None:
    """add, sub, mul, fma of one float type with one combination of modifiers. 9.7.3.3 to 9.7.3.6, 9.7.4"""
    x, y, z = (f"FZ({v})" if ftz else v for v in "abc")
    result = "FZ({})" if ftz else "{}"
    if sat:
        result = f"SAT({result})"
    suffix = f"{tag}{ftz}{sat}.{ptx}"
    fma = "fma" if t == "f64" else "fmaf"
    # A product is flushed when it is subnormal before rounding; the hardware does so, the ISA leaves it open.
    exact = "FLUSH((f64){} * {}{}, {})" if ftz else "{3}"
    product = exact.format(x, y, "", f"{x} * {y}")
    fused = exact.format(x, y, f" + {z}", f"{fma}({x}, {y}, {z})")
    if sat:
        product, fused = f"SAT({product})", f"SAT({fused})"
    for op, expr in (("add", f"{x} + {y}"), ("sub", f"{x} - {y}")):
        _row(f"{op}{suffix}", t, f"{t} {t}", result.format(expr), "9.7.3", _MODES[mode])
    _row(f"mul{suffix}", t, f"{t} {t}", product, "9.7.3.5", _MODES[mode])
    if tag:
        _row(f"fma{suffix}", t, f"{t} {t} {t}", fused, "9.7.3.6", _MODES[mode])


def _floats() -> None:
    for mode in _MODES:
        for tag in (f".{mode}", "") if mode == "rn" else (f".{mode}",):
            for ftz in ("", ".ftz"):
                for sat in ("", ".sat"):
                    _arithmetic("f32", "f32", ftz, mode, tag, sat)
                _arithmetic("f32x2", "f32x2", ftz, mode, tag, "")
            _arithmetic("f64", "f64", "", mode, tag, "")
    for t in ("f32", "f64"):
        for op in ("min", "max"):
            # A NaN operand is dropped, unless .NaN asks for it. 9.7.3.11, 9.7.3.12
            _row(f"{op}.{t}", t, f"{t} {t}", f"{op}_num(a, b)", "9.7.3.11")
        _row(f"abs.{t}", t, t, "fabs(a)" if t == "f64" else "fabsf(a)", "9.7.3.9")
        _row(f"neg.{t}", t, t, "-a", "9.7.3.10")
        _row(f"copysign.{t}", t, f"{t} {t}", "copysign(b, a)" if t == "f64" else "copysignf(b, a)", "9.7.3.2")
    for op in ("min", "max"):
        _row(f"{op}.ftz.f32", "f32", "f32 f32", f"{op}_num(FZ(a), FZ(b))", "9.7.3.11")
        for ftz in ("", ".ftz"):
            x, y, z = (f"FZ({v})" if ftz else v for v in "abc")
            _row(f"{op}{ftz}.NaN.f32", "f32", "f32 f32", f"({x} != {x} || {y} != {y}) ? QNAN : {op}_num({x}, {y})", "9.7.3.11")
            nan = f"({x} != {x} || {y} != {y} || {z} != {z})"
            _row(f"{op}3{ftz}.NaN.f32", "f32", "f32 f32 f32", f"{nan} ? QNAN : {op}_num({op}_num({x}, {y}), {z})", "9.7.3.11")
            _row(f"{op}3{ftz}.f32", "f32", "f32 f32 f32", f"{op}_num({op}_num({x}, {y}), {z})", "9.7.3.11")
            _row(f"{op}{ftz}.xorsign.abs.f32", "f32", "f32 f32", f"xorsign({op}_num(fabsf({x}), fabsf({y})), {x}, {y})", "9.7.3.11")
    for ftz in ("", ".ftz"):
        x, y = ("FZ(a)", "FZ(b)") if ftz else ("a", "b")
        out = "FZ({})" if ftz else "{}"
        if ftz:
            _row("abs.ftz.f32", "f32", "f32", "fabsf(FZ(a))", "9.7.3.9")
            _row("neg.ftz.f32", "f32", "f32", "-FZ(a)", "9.7.3.10")
        for name, expr in (
            ("ex2.approx", f"exp2f({x})"),
            ("lg2.approx", f"log2f({x})"),
            ("rcp.approx", f"1.0f / {x}"),
            ("rcp.rn", f"1.0f / {x}"),
            ("sqrt.approx", f"sqrtf({x})"),
            ("sqrt.rn", f"sqrtf({x})"),
            ("rsqrt.approx", f"1.0f / sqrtf({x})"),
            ("sin.approx", f"sinf({x})"),
            ("cos.approx", f"cosf({x})"),
        ):
            _row(f"{name}{ftz}.f32", "f32", "f32", out.format(expr), "9.7.3.13-22")
        for name in ("div.approx", "div.full", "div.rn"):
            _row(f"{name}{ftz}.f32", "f32", "f32 f32", out.format(f"{x} / {y}"), "9.7.3.8")
    _row("tanh.approx.f32", "f32", "f32", "tanhf(a)", "9.7.3.23")
    _row("div.rn.f64", "f64", "f64 f64", "a / b", "9.7.3.8")
    _row("rcp.rn.f64", "f64", "f64", "1.0 / a", "9.7.3.13")
    _row("sqrt.rn.f64", "f64", "f64", "sqrt(a)", "9.7.3.15")


def _half_floats() -> None:
    """f16, bf16 and their pairs; the arithmetic is done in float32 and rounded once (exact for add, sub, mul). 9.7.4"""
    for t in ("f16", "bf16"):
        to, of = f"{t}_of", f"{t}_to"
        pair = f"{t}x2"
        one = {
            "add": "x + y",
            "sub": "x - y",
            "mul": "x * y",
            "min": "min_num(x, y)",
            "max": "max_num(x, y)",
        }

        def both(expr: str, to: str = to, of: str = of) -> str:
            low = _substitute(expr, x=f"{of}((u16)a)", y=f"{of}((u16)b)", z=f"{of}((u16)c)")
            high = _substitute(expr, x=f"{of}(a >> 16)", y=f"{of}(b >> 16)", z=f"{of}(c >> 16)")
            return f"PAIR16({to}({low}), {to}({high}))"

        for op, expr in one.items():
            scalar = _substitute(expr, x="a", y="b")
            for name in (f"{op}", f"{op}.rn") if op in ("add", "sub", "mul") else (op,):
                _row(f"{name}.{t}", t, f"{t} {t}", scalar, "9.7.4")
                _row(f"{name}.{pair}", "u32", "u32 u32", both(expr), "9.7.4")
        for op in ("min", "max"):
            _row(f"{op}.NaN.{t}", t, f"{t} {t}", f"(a != a || b != b) ? QNAN : {op}_num(a, b)", "9.7.4.7")
            _row(f"{op}.NaN.{pair}", "u32", "u32 u32", both(f"(x != x || y != y) ? QNAN : {op}_num(x, y)"), "9.7.4.7")
        if t == "f16":
            one["fma.rn"] = "(float)((double)x * y + z)"
            for op in ("add", "sub", "mul", "fma.rn"):
                for tags in (".ftz", ".sat", ".ftz.sat"):
                    expr = _substitute(one[op], x="FZH(x)", y="FZH(y)", z="FZH(z)") if "ftz" in tags else one[op]
                    expr = f"FZH({expr})" if "ftz" in tags else expr
                    expr = f"SAT({expr})" if "sat" in tags else expr
                    count = 3 if op == "fma.rn" else 2
                    for name in (f"{op}{tags}",) if op == "fma.rn" else (f"{op}{tags}", f"{op}.rn{tags}"):
                        scalar = _substitute(expr, x="a", y="b", z="c")
                        _row(f"{name}.{t}", t, " ".join([t] * count), scalar, "9.7.4")
                        _row(f"{name}.{pair}", "u32", " ".join(["u32"] * count), both(expr), "9.7.4")
        # The product of two 11-bit (8-bit) significands is exact in double, so is its sum up to 53 bits: one rounding matters.
        _row(f"fma.rn.{t}", t, f"{t} {t} {t}", "(double)a * b + c", "9.7.4.4")
        _row(f"fma.rn.{pair}", "u32", "u32 u32 u32", both("(float)((double)x * y + z)"), "9.7.4.4")
        _row(f"fma.rn.relu.{pair}", "u32", "u32 u32 u32", both("RELU((float)((double)x * y + z))"), "9.7.4.4")
        _row(f"neg.{t}", "u16", "u16", "a ^ 0x8000", "9.7.4.5")
        _row(f"neg.{pair}", "u32", "u32", "a ^ 0x80008000u", "9.7.4.5")
        _row(f"abs.{t}", "u16", "u16", "a & 0x7fff", "9.7.4.6")
        _row(f"abs.{pair}", "u32", "u32", "a & 0x7fff7fffu", "9.7.4.6")
        _row(f"tanh.approx.{t}", t, t, "tanhf(a)", "9.7.4.9")
        _row(f"tanh.approx.{pair}", "u32", "u32", both("tanhf(x)"), "9.7.4.9")
        ftz = "" if t == "f16" else ".ftz"
        _row(f"ex2.approx{ftz}.{t}", t, t, "exp2f(a)", "9.7.4.10")
        _row(f"ex2.approx{ftz}.{pair}", "u32", "u32", both("exp2f(x)"), "9.7.4.10")


def _conversions() -> None:
    """cvt, 9.7.9.21. The first type is the destination."""
    ints = {"s8": "i8", "u8": "u8", **_INT}
    for dst, td in ints.items():
        for src, ts in ints.items():
            if dst != src:
                _row(f"cvt.{dst}.{src}", td, ts, f"({td})a", "9.7.9.21")
                _row(f"cvt.sat.{dst}.{src}", td, ts, f"SATURATE({td}, {ts}, a)", "9.7.9.21")
        for f in ("f32", "f64"):
            for mode, expr in (("rzi", "trunc"), ("rni", "rint"), ("rmi", "floor"), ("rpi", "ceil")):
                for ftz in ("", ".ftz") if f == "f32" else ("",):
                    if int(dst[1:]) >= 16:
                        x = "FZ(a)" if ftz else "a"
                        # NaN becomes 0, or the smallest integer for 64-bit results. 9.7.9.21
                        expression = f"to_{td}({expr}((double){x}))"
                        if int(dst[1:]) == 64:
                            expression = f"{x} != {x} ? ({td})0x8000000000000000ull : {expression}"
                        _row(f"cvt.{mode}{ftz}.{dst}.{f}", td, f, expression, "9.7.9.21")
        for h in ("f16", "bf16"):
            for mode, expr in (("rzi", "trunc"), ("rni", "rint"), ("rmi", "floor"), ("rpi", "ceil")):
                if int(dst[1:]) >= 16:
                    _row(f"cvt.{mode}.{dst}.{h}", td, h, f"to_{td}({expr}((double)a))", "9.7.9.21")
        for mode, c_mode in _MODES.items():
            _row(f"cvt.{mode}.f32.{dst}", "f32", td, "(float)a", "9.7.9.21", c_mode)
        _row(f"cvt.rn.f64.{dst}", "f64", td, "(double)a", "9.7.9.21")
        for h in ("f16", "bf16"):
            _row(f"cvt.rn.{h}.{dst}", h, td, "(float)a", "9.7.9.21")
    for mode, expr in (("rzi", "truncf"), ("rni", "rintf"), ("rmi", "floorf"), ("rpi", "ceilf")):
        for ftz in ("", ".ftz"):
            _row(f"cvt.{mode}{ftz}.f32.f32", "f32", "f32", f"{expr}({'FZ(a)' if ftz else 'a'})", "9.7.9.21")
    for ftz in ("", ".ftz"):
        _row(f"cvt{ftz}.f32.f16", "f32", "f16", "a", "9.7.9.21")
        _row(f"cvt{ftz}.f32.bf16", "f32", "bf16", "a", "9.7.9.21")
    _row("cvt.ftz.f32.f32", "f32", "f32", "FZ(a)", "9.7.9.21")
    _row("cvt.rna.tf32.f32", "u32", "f32", "tf32_rna(a)", "9.7.9.21")
    _row("cvt.sat.f32.f32", "f32", "f32", "SAT(a)", "9.7.9.21")
    _row("cvt.ftz.sat.f32.f32", "f32", "f32", "SAT(FZ(a))", "9.7.9.21")
    _row("cvt.f64.f32", "f64", "f32", "(double)a", "9.7.9.21")
    _row("cvt.rn.f32.f64", "f32", "f64", "(float)a", "9.7.9.21")
    for t in ("f16", "bf16"):
        for mode, c in (("rn", f"{t}_of"), ("rz", f"{t}_rz")):
            for relu in ("", ".relu"):
                x, y = ("RELU(a)", "RELU(b)") if relu else ("a", "b")
                _row(f"cvt.{mode}{relu}.{t}.f32", "u16", "f32", f"{c}({x})", "9.7.9.21")
                # The first source goes to the upper half.
                _row(f"cvt.{mode}{relu}.{t}x2.f32", "u32", "f32 f32", f"PAIR16({c}({y}), {c}({x}))", "9.7.9.21")
    for f8 in ("e4m3", "e5m2"):
        for relu in ("", ".relu"):
            x, y = ("RELU(a)", "RELU(b)") if relu else ("a", "b")
            _row(f"cvt.rn.satfinite{relu}.{f8}x2.f32", "u16", "f32 f32", f"{f8}_of({y}) | {f8}_of({x}) << 8", "9.7.9.21")
        _row(f"cvt.rn.satfinite.{f8}x2.f16x2", "u16", "u32", f"{f8}_of(f16_to((u16)a)) | {f8}_of(f16_to(a >> 16)) << 8", "9.7.9.21")
        _row(f"cvt.rn.f16x2.{f8}x2", "u32", "u16", f"PAIR16(f16_of({f8}_to(a & 255)), f16_of({f8}_to(a >> 8)))", "9.7.9.21")
    for dst in ("u32", "s32"):
        _row(f"cvt.pack.sat.s16.{dst}", "u32", "i32 i32", "PAIR16(clamp_i16(b), clamp_i16(a))", "9.7.9.22")


def contracted(kind: str, ftz: bool, sat: bool, negate_product: bool, negate_addend: bool) -> str:
    """Name of the row of a product and a sum that were made one FMA (no PTX opcode has a blank): see contraction.py."""
    signs = f"{'-' if negate_product else '+'}ab {'-' if negate_addend else '+'}c"
    return f"fma{'.ftz' * ftz}{'.sat' * sat}.{kind} {signs}"


def _contracted() -> None:
    for kind in ("f32", "f32x2", "f64", "f16", "f16x2", "bf16", "bf16x2"):
        for ftz in (False, True):
            for sat in (False, True):
                fma = TABLE.get(f"fma.rn{'.ftz' * ftz}{'.sat' * sat}.{kind}")
                if fma is None:
                    continue
                for negate_product in (False, True):
                    for negate_addend in (False, True):
                        a, c = (f"NEGATED_{kind}({x})" if n else x for x, n in (("a", negate_product), ("c", negate_addend)))
                        name = contracted(kind, ftz, sat, negate_product, negate_addend)
                        _row(name, fma.dst, " ".join(fma.srcs), _substitute(fma.expr, a=a, c=c), fma.section, fma.rounding)


for _make in (_integers, _bits, _compares, _floats, _half_floats, _conversions, _contracted):
    _make()
OPCODES: dict[str, int] = {name: number for number, name in enumerate(TABLE)}
