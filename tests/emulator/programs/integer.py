"""Integer, bit and predicate instructions: PTX ISA 9.7.1, 9.7.2, 9.7.6, 9.7.8 and the integer part of 9.7.9."""

from __future__ import annotations

import numpy as np

from tests.emulator.programs.elementwise import edges, elementwise, pairs, signed, triples, width
from tests.emulator.programs.program import Buffer, Program, output

INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")


def _divide(a: int, b: int) -> int:
    """Towards zero."""
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def _arithmetic() -> list[Program]:
    out = []
    for t in INTEGERS:
        bits = width(t)
        lowest = 1 << (bits - 1)
        # Division by zero and -2^(n-1) / -1 have no stated result.
        divisions = [(a, b) for a, b in pairs(t) if b and not (a == lowest and b == (1 << bits) - 1)]
        out += [
            elementwise(f"add.{t}", t, (t, t), pairs(t), lambda a, b: a + b, "9.7.1.1"),
            elementwise(f"sub.{t}", t, (t, t), pairs(t), lambda a, b: a - b, "9.7.1.2"),
            elementwise(f"mul.lo.{t}", t, (t, t), pairs(t), lambda a, b: a * b, "9.7.1.3"),
            elementwise(f"mul.hi.{t}", t, (t, t), pairs(t), lambda a, b, n=bits: a * b >> n, "9.7.1.3"),
            elementwise(f"mad.lo.{t}", t, (t, t, t), triples(t), lambda a, b, c: a * b + c, "9.7.1.4"),
            elementwise(f"div.{t}", t, (t, t), divisions, _divide, "9.7.1.8"),
            elementwise(f"rem.{t}", t, (t, t), divisions, lambda a, b: a - _divide(a, b) * b, "9.7.1.9"),
            elementwise(f"min.{t}", t, (t, t), pairs(t), min, "9.7.1.12"),
            elementwise(f"max.{t}", t, (t, t), pairs(t), max, "9.7.1.13"),
        ]
        if t in ("s32", "u32", "s64", "u64"):
            out.append(elementwise(f"mad.hi.{t}", t, (t, t, t), triples(t), lambda a, b, c, n=bits: (a * b >> n) + c, "9.7.1.4"))
        if bits < 64:
            wide = f"{t[0]}{2 * bits}"
            out.append(elementwise(f"mul.wide.{t}", wide, (t, t), pairs(t), lambda a, b: a * b, "9.7.1.3"))
            out.append(elementwise(f"mad.wide.{t}", wide, (t, t, wide), triples(t), lambda a, b, c: a * b + c, "9.7.1.4"))
        if t[0] == "s":
            single = [(v,) for v in edges(t)]
            out.append(elementwise(f"neg.{t}", t, (t,), single, lambda a: -a, "9.7.1.11"))
            out.append(elementwise(f"abs.{t}", t, (t,), single, abs, "9.7.1.10"))
    low, high = -(1 << 31), (1 << 31) - 1
    out += [
        elementwise("add.sat.s32", "s32", ("s32", "s32"), pairs("s32"), lambda a, b: min(max(a + b, low), high), "9.7.1.1"),
        elementwise("sub.sat.s32", "s32", ("s32", "s32"), pairs("s32"), lambda a, b: min(max(a - b, low), high), "9.7.1.2"),
        elementwise("sad.u32", "u32", ("u32",) * 3, triples("u32"), lambda a, b, c: abs(a - b) + c, "9.7.1.7"),
        elementwise("sad.s32", "s32", ("s32",) * 3, triples("s32"), lambda a, b, c: abs(a - b) + c, "9.7.1.7"),
        elementwise("max.relu.s32", "s32", ("s32",) * 2, pairs("s32"), lambda a, b: max(a, b, 0), "9.7.1.13"),
        elementwise("min.relu.s32", "s32", ("s32",) * 2, pairs("s32"), lambda a, b: max(min(a, b), 0), "9.7.1.12"),
        elementwise("mul24.lo.u32", "u32", ("u32",) * 2, pairs("u32"), lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF), "9.7.1.5"),
    ]
    for op, scalar in (("add", lambda a, b: a + b), ("min", min), ("max", max)):
        for t in ("s16x2", "u16x2"):

            def both(a: int, b: int, scalar=scalar, is_signed=t[0] == "s") -> int:
                view = (lambda v: signed(v, 16)) if is_signed else (lambda v: v & 0xFFFF)
                low_half = scalar(view(a), view(b)) & 0xFFFF
                return low_half | (scalar(view(a >> 16), view(b >> 16)) & 0xFFFF) << 16

            values = [0, 1, 0x7FFF8000, 0xFFFF0001, 0x80007FFF, 0x12345678, 0xFFFFFFFF, 0x00010002]
            cases = [(a, b) for a in values for b in values]
            out.append(elementwise(f"{op}.{t}", t, (t, t), cases, both, "9.7.1"))
    return out


def _lop3(table: int, a: int, b: int, c: int) -> int:
    result = 0
    for i in range(32):
        index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
        result |= (table >> index & 1) << i
    return result


def _prmt(a: int, b: int, selector: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        result |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * i
    return result


PRMT_MODES = {
    # mode -> source bytes of the result for selector 0..3, lowest first. PTX ISA 9.7.9.7
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


def _prmt_mode(mode: str, a: int, b: int, selector: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(data[int(d)] for d in reversed(PRMT_MODES[mode][selector & 3])), "little")


def _bfe(a: int, position: int, length: int, bits: int, is_signed: bool) -> int:
    position, length = position & 0xFF, length & 0xFF
    raw = a & ((1 << bits) - 1)
    sign = 0
    if is_signed and length:
        sign = raw >> min(position + length - 1, bits - 1) & 1
    result = 0
    for i in range(bits):
        bit = sign if i >= length or position + i >= bits else raw >> (position + i) & 1
        result |= bit << i
    return result


def _bfi(a: int, b: int, position: int, length: int, bits: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    for i in range(length):
        if position + i < bits:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def _bits() -> list[Program]:
    out = []
    for t in ("b16", "b32", "b64"):
        n = width(t)
        mask = (1 << n) - 1
        single = [(v,) for v in edges(t)]
        shifts = [(a, s) for a in edges(t) for s in (0, 1, n // 2, n - 1, n, n + 1, 255, 0xFFFFFFFF)]
        out += [
            elementwise(f"and.{t}", t, (t, t), pairs(t), lambda a, b: a & b, "9.7.8.1"),
            elementwise(f"or.{t}", t, (t, t), pairs(t), lambda a, b: a | b, "9.7.8.2"),
            elementwise(f"xor.{t}", t, (t, t), pairs(t), lambda a, b: a ^ b, "9.7.8.3"),
            elementwise(f"not.{t}", t, (t,), single, lambda a: ~a, "9.7.8.4"),
            elementwise(f"cnot.{t}", t, (t,), single, lambda a: int(a == 0), "9.7.8.5"),
            elementwise(f"shl.{t}", t, (t, "u32"), shifts, lambda a, s, n=n: a << s if s < n else 0, "9.7.8.8"),
            elementwise(f"shr.u{n}", f"u{n}", (t, "u32"), shifts, lambda a, s: a >> s, "9.7.8.9"),
            elementwise(f"shr.s{n}", f"s{n}", (f"s{n}", "u32"), shifts, lambda a, s, n=n: a >> min(s, n), "9.7.8.9"),
            elementwise(f"shr.{t}", t, (t, "u32"), shifts, lambda a, s: a >> s, "9.7.8.9"),
        ]
        if n > 16:
            fields = [(a, p, k) for a in edges(t) for p in (0, 3, n // 2, n - 1, n, 255) for k in (0, 1, 5, n - 1, n, 255)]
            mixed = [(a, b, p, k) for a, b in ((mask, 0), (0, mask), (0x5A5A, mask)) for _, p, k in fields[:36]]
            out += [
                elementwise(f"bfe.u{n}", f"u{n}", (t, "u32", "u32"), fields, lambda a, p, k, n=n: _bfe(a, p, k, n, False), "9.7.1.19"),
                elementwise(f"bfe.s{n}", f"s{n}", (t, "u32", "u32"), fields, lambda a, p, k, n=n: _bfe(a, p, k, n, True), "9.7.1.19"),
                elementwise(f"bfi.{t}", t, (t, t, "u32", "u32"), mixed, lambda a, b, p, k, n=n: _bfi(a, b, p, k, n), "9.7.1.20"),
                elementwise(f"popc.{t}", "u32", (t,), single, lambda a: a.bit_count(), "9.7.1.14"),
                elementwise(f"clz.{t}", "u32", (t,), single, lambda a, n=n: n - a.bit_length(), "9.7.1.15"),
                elementwise(f"brev.{t}", t, (t,), single, lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2), "9.7.1.18"),
                elementwise(f"bfind.u{n}", "u32", (f"u{n}",), single, lambda a: a.bit_length() - 1, "9.7.1.16"),
            ]
    out += [
        elementwise(
            "bfind.s32", "u32", ("s32",), [(v,) for v in edges("s32")], lambda a: (a if a >= 0 else ~a).bit_length() - 1, "9.7.1.16"
        ),
        elementwise(
            "bfind.shiftamt.u32", "u32", ("u32",), [(v,) for v in edges("u32")], lambda a: 32 - a.bit_length() if a else -1, "9.7.1.16"
        ),
    ]
    for table in (0x80, 0x96, 0xE8, 0xCA, 0x1E, 0xF8):
        out.append(
            elementwise(
                "lop3.b32",
                "b32",
                ("b32",) * 3,
                triples("b32", (0, 0xFFFFFFFF, 0xF0F0A5A5)),
                lambda a, b, c, m=table: _lop3(m, a, b, c),
                "9.7.8.6",
                name=f"lop3.b32 {table:#x}",
                form="{op} {d}, {s}, " + str(table) + ";",
            )
        )
    funnel = [(a, b, s) for a, b in pairs("b32")[::3] for s in (0, 1, 13, 31, 32, 33, 64)]
    for direction, mode, function in (
        ("l", "wrap", lambda a, b, s: (b << 32 | a) << (s & 31) >> 32),
        ("r", "wrap", lambda a, b, s: (b << 32 | a) >> (s & 31)),
        ("l", "clamp", lambda a, b, s: (b << 32 | a) << min(s, 32) >> 32),
        ("r", "clamp", lambda a, b, s: (b << 32 | a) >> min(s, 32)),
    ):
        out.append(elementwise(f"shf.{direction}.{mode}.b32", "b32", ("b32", "b32", "u32"), funnel, function, "9.7.8.7"))
    words = [0x83C2A1F0, 0x7F80FF01, 0x00112233, 0xDEADBEEF]
    selectors = [0x3210, 0x7654, 0x5410, 0x7632, 0x0123, 0xBA98, 0xFEDC, 0x8080, 0x4444, 0x1F2E]
    permutes = [(a, b, s) for a in words for b in words for s in selectors]
    out.append(elementwise("prmt.b32", "b32", ("b32",) * 3, permutes, _prmt, "9.7.9.7"))
    for mode in PRMT_MODES:
        cases = [(a, b, s) for a in words for b in words for s in range(4)]
        out.append(elementwise(f"prmt.b32.{mode}", "b32", ("b32",) * 3, cases, lambda a, b, s, m=mode: _prmt_mode(m, a, b, s), "9.7.9.7"))
    return out


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _predicates() -> list[Program]:
    out = []
    for t in INTEGERS:
        for name, function in COMPARISONS.items():
            out.append(elementwise(f"setp.{name}.{t}", "pred", (t, t), pairs(t), function, "9.7.6.2"))
        if t[0] == "u":
            for name, same in UNSIGNED_COMPARISONS.items():
                out.append(elementwise(f"setp.{name}.{t}", "pred", (t, t), pairs(t), COMPARISONS[same], "9.7.6.2"))
    for t in ("b16", "b32", "b64"):
        for name in ("eq", "ne"):
            out.append(elementwise(f"setp.{name}.{t}", "pred", (t, t), pairs(t), COMPARISONS[name], "9.7.6.2"))
        cases = [(a, b, i & 1) for i, (a, b) in enumerate(pairs(t))]
        out.append(elementwise(f"selp.{t}", t, (t, t, "pred"), cases, lambda a, b, p: a if p else b, "9.7.6.3"))
    three = [(a, b, (i >> 1) & 1) for i, (a, b) in enumerate(pairs("s32"))]
    for name, function in (("and", lambda x, c: x and c), ("or", lambda x, c: x or c), ("xor", lambda x, c: x != bool(c))):
        out.append(
            elementwise(
                f"setp.lt.{name}.s32", "pred", ("s32", "s32", "pred"), three, lambda a, b, c, f=function: bool(f(a < b, c)), "9.7.6.2"
            )
        )
        # The second result combines the complement of the comparison. 9.7.6.2
        out.append(
            elementwise(
                f"setp.lt.{name}.s32",
                "pred",
                ("s32", "s32", "pred"),
                three,
                lambda a, b, c, f=function: bool(f(a >= b, not c)),
                "9.7.6.2",
                name=f"setp.lt.{name}.s32 second result",
                form="{op} %q9|{d}, {a}, {b}, !{c};",
            )
        )
    two = [(a, b) for a in (0, 1) for b in (0, 1)]
    for name, function in (("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b)):
        out.append(elementwise(f"{name}.pred", "pred", ("pred", "pred"), two, function, "9.7.8"))
    out += [
        elementwise("not.pred", "pred", ("pred",), [(0,), (1,)], lambda a: not a, "9.7.8.4"),
        elementwise("mov.pred", "pred", ("pred",), [(0,), (1,)], lambda a: a, "9.7.9.1"),
        elementwise("set.lt.u32.s32", "u32", ("s32", "s32"), pairs("s32"), lambda a, b: 0xFFFFFFFF if a < b else 0, "9.7.6.1"),
        elementwise(
            "slct.u32.s32", "u32", ("u32", "u32", "s32"), [(7, 9, c) for c in edges("s32")], lambda a, b, c: a if c >= 0 else b, "9.7.6.4"
        ),
    ]
    return out


def _carries() -> list[Program]:
    """add.cc / addc, sub.cc / subc, mad.lo.cc / madc.hi: PTX ISA 9.7.2."""
    a, b = (np.array([p[i] for p in pairs("u64")], np.uint64) for i in (0, 1))
    n = len(a) // 32 * 32
    a, b = a[:n], b[:n]
    load = "mad.wide.u32 %d0, %t, 8, %p{0};\nld.global.v2.u32 {{%r{1}, %r{2}}}, [%d0];\n"
    store = "mad.wide.u32 %d0, %t, 8, %p2;\nst.global.v2.u32 [%d0], {%r4, %r5};"
    forms = {
        "add.cc.u32 addc.u32": ("add.cc.u32 %r4, %r0, %r2;\naddc.u32 %r5, %r1, %r3;\n", a + b),
        "sub.cc.u32 subc.u32": ("sub.cc.u32 %r4, %r0, %r2;\nsubc.u32 %r5, %r1, %r3;\n", a - b),
        "mad.lo.cc.u32 madc.hi.u32": (
            "mad.lo.cc.u32 %r4, %r0, %r2, %r1;\nmadc.hi.u32 %r5, %r0, %r2, %r3;\n",
            (a & np.uint64(0xFFFFFFFF)) * (b & np.uint64(0xFFFFFFFF)) + (a >> np.uint64(32)) + (b >> np.uint64(32) << np.uint64(32)),
        ),
    }
    return [
        Program(
            name, "9.7.2", load.format(0, 0, 1) + load.format(1, 2, 3) + code + store,
            (Buffer("a", a), Buffer("b", b), output("d", want)), block=n,
        )
        for name, (code, want) in forms.items()
    ]  # fmt: skip


def _conversions() -> list[Program]:
    """cvt between integers, 9.7.9.21: truncation, sign or zero extension, saturation."""
    out = []
    for dst in INTEGERS:
        for src in INTEGERS:
            if dst != src:
                out.append(elementwise(f"cvt.{dst}.{src}", dst, (src,), [(v,) for v in edges(src)], lambda a: a, "9.7.9.21"))
    for dst, src in (("u16", "s32"), ("s16", "s32"), ("u32", "s64"), ("s32", "s64"), ("u32", "s32")):
        bits = width(dst)
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dst[0] == "s" else (0, (1 << bits) - 1)
        cases = [(v,) for v in edges(src)]
        out.append(elementwise(f"cvt.sat.{dst}.{src}", dst, (src,), cases, lambda a, lo=low, hi=high: min(max(a, lo), hi), "9.7.9.21"))
    # The low byte of a 32-bit register, extended.
    bytes_ = [(v,) for v in (0, 1, 0x7F, 0x80, 0xFF, 0x1234, 0xFFFFFF80)]
    out.append(elementwise("cvt.s32.s8", "s32", ("s32",), bytes_, lambda a: signed(a, 8), "9.7.9.21"))
    out.append(elementwise("cvt.u32.u8", "u32", ("u32",), bytes_, lambda a: a & 0xFF, "9.7.9.21"))
    return out


PROGRAMS = [*_arithmetic(), *_bits(), *_predicates(), *_carries(), *_conversions()]
