"""Programs that apply one instruction to vectors of operands: thread i handles element i."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tests.emulator.programs.numerics import FORMATS, encode
from tests.emulator.programs.program import Buffer, Program, output

# operand type -> (register prefix, suffix of ld and st, bytes)
REGISTER = {
    **dict.fromkeys(("s16", "u16", "b16", "f16", "bf16", "e4m3x2", "e5m2x2"), ("%h", "b16", 2)),
    **dict.fromkeys(("s32", "u32", "b32", "f16x2", "bf16x2", "s16x2", "u16x2"), ("%r", "b32", 4)),
    **dict.fromkeys(("s64", "u64", "b64", "f32x2"), ("%d", "b64", 8)),
    "f32": ("%f", "f32", 4),
    "f64": ("%d", "b64", 8),
    "pred": ("%q", "b32", 4),
}
FLOATS = {"f32": "f32", "f16": "f16", "bf16": "bf16", "f32x2": "f32", "f16x2": "f16", "bf16x2": "bf16"}


def width(kind: str) -> int:
    return 8 * REGISTER[kind][2] if kind != "pred" else 1


def signed(value: int, bits: int) -> int:
    """The value of the low `bits` bits, as two's complement."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def read(value: int, kind: str) -> int:
    return signed(value, width(kind)) if kind[0] == "s" and kind[1:].isdigit() else value & ((1 << width(kind)) - 1)


def elementwise(
    op: str,
    dst: str,
    srcs: Sequence[str],
    cases: Iterable[Sequence[int]],
    function: Callable[..., int],
    section: str,
    *,
    name: str = "",
    ulp: float = 0,
    absolute: float = 0.0,
    target: str = "sm_90a",
    form: str = "{op} {d}, {s};",
) -> Program:
    """A program for `op`.

    Args:
        dst, srcs: operand types, keys of REGISTER.
        cases: one tuple of source bit patterns an element.
        function: of the operands as Python integers (two's complement for s16/s32/s64), returns the result's bits.
        form: the statement(s); {d} and {s} (or {a}, {b}, {c}, {e}) are the operands.
    """
    rows = list(cases)
    count = len(rows)
    padded = -(-count // 32) * 32
    rows += [rows[i % count] for i in range(padded - count)]
    block = min(padded, 1024)
    grid = -(-padded // block)
    rows += [rows[i % count] for i in range(block * grid - padded)]
    buffers, body, names = [], ["mov.u32 %r60, %ctaid.x;", "mov.u32 %r61, %ntid.x;", "mad.lo.u32 %r60, %r60, %r61, %t;"], []
    for i, kind in enumerate(srcs):
        prefix, suffix, size = REGISTER[kind]
        data = np.array([row[i] & ((1 << 8 * size) - 1) for row in rows], dtype=f"u{size}")
        buffers.append(Buffer("abce"[i], data))
        register = f"{prefix}{i + 1}"
        body.append(f"mad.wide.u32 %d60, %r60, {size}, %p{i};")
        if kind == "pred":
            body += [f"ld.global.b32 %r{50 + i}, [%d60];", f"setp.ne.b32 {register}, %r{50 + i}, 0;"]
        else:
            body.append(f"ld.global.{suffix} {register}, [%d60];")
        names.append(register)
    prefix, suffix, size = REGISTER[dst]
    result = f"{prefix}0"
    named = dict(zip("abce", names, strict=False))
    body.append(form.format(op=op, d=result, s=", ".join(names), **named))
    body.append(f"mad.wide.u32 %d60, %r60, {size}, %p{len(srcs)};")
    if dst == "pred":
        body += [f"selp.u32 %r50, 1, 0, {result};", "st.global.b32 [%d60], %r50;"]
    else:
        body.append(f"st.global.{suffix} [%d60], {result};")
    mask = (1 << 8 * size) - 1
    results = {row: int(function(*(read(v, k) for v, k in zip(row, srcs, strict=True)))) & mask for row in map(tuple, rows[:count])}
    want = np.array([results[tuple(row)] for row in rows], dtype=f"u{size}")
    floats = FLOATS.get(dst, "")
    if floats and size * 8 != {"f32": 32, "f16": 16, "bf16": 16}[floats]:
        want = want.view("u4" if floats == "f32" else "u2")
    return Program(
        name or op,
        section,
        "\n".join(body),
        (*buffers, output("d", want, floats=floats, ulp=ulp, absolute=absolute)),
        block=block,
        grid=grid,
        target=target,
    )


def edges(kind: str) -> list[int]:
    """Bit patterns worth trying for an integer type."""
    bits = width(kind)
    top = 1 << (bits - 1)
    return [
        0,
        1,
        2,
        3,
        7,
        (1 << bits) - 1,
        (1 << bits) - 2,
        top,
        top - 1,
        top + 1,
        0x5A5A5A5A5A5A5A5A & ((1 << bits) - 1),
        100,
        (1 << bits) - 100,
    ]


def pairs(kind: str) -> list[tuple[int, int]]:
    values = edges(kind)
    return [(a, b) for a in values for b in values]


def triples(kind: str, third: Sequence[int] = (0, 1, 0xFFFF, 12345)) -> list[tuple[int, int, int]]:
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(edges(kind)) for j, b in enumerate(edges(kind))]


# Zeros, ones, a half-way case of every rounding, the largest and smallest normals, subnormals, infinities, NaN.
_F32 = [
    0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x3F800001, 0x3F7FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x00800000, 0x80800000,
    0x00000001, 0x807FFFFF,
    0x7F800000, 0xFF800000, 0x7FC00000, 0x4B800001, 0x33800000, 0xB3800000, 0x40490FDB, 0xC2F6E979, 0x1F800000, 0x5F123456,
]  # fmt: skip
_F16 = [
    0x0000,
    0x8000,
    0x3C00,
    0xBC00,
    0x3C01,
    0x3BFF,
    0x7BFF,
    0xFBFF,
    0x0400,
    0x8400,
    0x0001,
    0x83FF,
    0x7C00,
    0xFC00,
    0x7E00,
    0x6401,
    0x1000,
    0x4248,
    0xD7B6,
    0x2345,
]
_BF16 = [
    0x0000,
    0x8000,
    0x3F80,
    0xBF80,
    0x3F81,
    0x3F7F,
    0x7F7F,
    0xFF7F,
    0x0080,
    0x8080,
    0x0001,
    0x807F,
    0x7F80,
    0xFF80,
    0x7FC0,
    0x4381,
    0x3B80,
    0x4049,
    0xC2F7,
    0x1234,
]
FLOAT_EDGES = {"f32": _F32, "f16": _F16, "bf16": _BF16}


def float_pairs(kind: str, count: int = 128) -> list[tuple[int, int]]:
    values = FLOAT_EDGES[kind]
    return [(a, b) for a in values for b in values] + random_floats(kind, 2, count)


def float_triples(kind: str, count: int = 512) -> list[tuple[int, int, int]]:
    values = FLOAT_EDGES[kind]
    rng = np.random.default_rng(2)
    some = [tuple(int(values[i]) for i in rng.integers(0, len(values), 3)) for _ in range(384)]
    return some + random_floats(kind, 3, count)


def random_floats(kind: str, arity: int, count: int) -> list[tuple[int, ...]]:
    """Operands of similar magnitude, so that roundings and cancellations happen."""
    fmt = FORMATS[kind]
    rng = np.random.default_rng([fmt.mantissa_bits, arity])
    mantissas = rng.integers(0, 1 << fmt.mantissa_bits, (count, arity))
    exponents = fmt.bias + rng.integers(-4, 5, (count, arity))
    signs = rng.integers(0, 2, (count, arity)) * fmt.sign
    return [tuple(int(v) for v in row) for row in (mantissas | exponents << fmt.mantissa_bits | signs)]


def halves(cases: Sequence[Sequence[int]], bits: int) -> list[tuple[int, ...]]:
    """Pack neighbouring cases into pairs: the low half of element i is case i, the high half case -1-i."""
    return [tuple(lo | hi << bits for lo, hi in zip(a, b, strict=True)) for a, b in zip(cases, reversed(cases), strict=True)]


def packed(function: Callable[..., int], bits: int) -> Callable[..., int]:
    """`function` on both halves of packed operands."""
    mask = (1 << bits) - 1

    def apply(*operands: int) -> int:
        low = function(*(v & mask for v in operands))
        return low | function(*(v >> bits & mask for v in operands)) << bits

    return apply


def constant(value: float, kind: str = "f32") -> int:
    from fractions import Fraction

    return encode(Fraction(value) if value else value, FORMATS[kind])
