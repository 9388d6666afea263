"""Asynchronous warpgroup matrix products: PTX ISA 9.7.15. Small whole numbers, so that every order of summation gives the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.emulator.programs.bulk import copy_in
from tests.emulator.programs.numerics import FORMATS, encode
from tests.emulator.programs.program import Buffer, Program, output
from tests.emulator.programs.tensor_copy import swizzle

RNG = np.random.default_rng(81)
SWIZZLE_BYTES = {"none": 16, "32B": 32, "64B": 64, "128B": 128}
LAYOUT_BITS = {"none": 0, "128B": 1, "64B": 2, "32B": 3}  # bits 62 and 63 of the matrix descriptor, 9.7.15.5.1
ELEMENT_BYTES = {"f16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1, "tf32": 4}


def to_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Bit patterns of whole numbers that `kind` holds exactly."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if kind == "tf32":
        return values.astype(np.float32).view(np.uint32)
    from fractions import Fraction

    table = {int(v): encode(Fraction(int(v)) if v else 0.0, FORMATS[kind]) for v in np.unique(values)}
    return np.array([table[int(v)] for v in values.reshape(-1)], np.uint8).reshape(values.shape)


@dataclass(frozen=True)
class Operand:
    """A matrix in shared memory: its bytes, and what its descriptor holds."""

    image: np.ndarray  # bytes
    lbo: int  # leading dimension byte offset
    sbo: int  # stride byte offset
    k_offsets: tuple[int, ...]  # bytes from the start to each instruction's K


def canonical(matrix: np.ndarray, mode: str, *, k_major: bool) -> Operand:
    """Lay out `matrix` (rows of M or N, columns of K) in the canonical layout of one swizzle mode. 9.7.15.5.1

    The unit of all layouts is 16 bytes. With K as the major dimension a row of one swizzle span holds consecutive K; groups of 8 rows lie
    `sbo` apart, spans `lbo` apart (which only the unswizzled layout needs: one instruction reads 32 bytes of K). With M or N as the
    major dimension a span holds consecutive M or N of one k; 8 k follow each other, then further spans `lbo` apart, further k `sbo`.
    Unswizzled, the roles of the two offsets are exchanged.
    """
    rows, depth = matrix.shape
    size = matrix.dtype.itemsize
    span_bytes = SWIZZLE_BYTES[mode]
    span, group = span_bytes // size, 8 * span_bytes
    outer, inner = (rows, depth) if k_major else (depth, rows)
    table = matrix if k_major else matrix.T
    # Spans outermost: all rows of the first span, then all rows of the second.
    along_inner = outer // 8 * group
    image = np.zeros(-(-inner // span) * along_inner, np.uint8)
    for o in range(outer):
        for i in range(inner):
            place = swizzle((i // span) * along_inner + (o // 8) * group + (o % 8) * span_bytes + (i % span) * size, mode)
            image[place : place + size] = table[o : o + 1, i].copy().view(np.uint8)
    steps = depth * size // 32
    if k_major:
        offsets = tuple(32 * s // span_bytes * along_inner + 32 * s % span_bytes for s in range(steps))
        return Operand(image, along_inner, group, offsets)
    offsets = tuple(2 * group * s for s in range(steps))  # 16 elements of k are two groups of 8
    lbo, sbo = (group, along_inner) if mode == "none" else (along_inner, group)
    return Operand(image, lbo, sbo, offsets)


def descriptor_high(operand: Operand, mode: str) -> int:
    """Bits 16 to 63; the start address (bits 0 to 13) is added in the kernel."""
    return (operand.lbo >> 4 & 0x3FFF) << 16 | (operand.sbo >> 4 & 0x3FFF) << 32 | LAYOUT_BITS[mode] << 62


def accumulator(matrix: np.ndarray) -> np.ndarray:
    """(128, N / 2): the registers of each thread for D of 64 rows. 9.7.15.5.2, figure of wgmma .m64nNk16 D"""
    n = matrix.shape[1]
    out = np.zeros((128, n // 2), matrix.dtype)
    for t in range(128):
        for r in range(n // 2):
            row = 16 * (t // 32) + t % 32 // 4 + 8 * (r >> 1 & 1)
            out[t, r] = matrix[row, 8 * (r // 4) + 2 * (t % 4) + (r & 1)]
    return out


def a_registers(bits: np.ndarray) -> np.ndarray:
    """(128, 4) words of each thread for A of 64 rows and 32 bytes of K. 9.7.15.5.1"""
    out = np.zeros((128, 4), np.uint32)
    per_word = 4 // bits.dtype.itemsize
    for t in range(128):
        for r in range(4):
            row = 16 * (t // 32) + t % 32 // 4 + 8 * (r & 1)
            column = per_word * (t % 4) + 4 * per_word * (r >> 1)
            out[t, r] = np.ascontiguousarray(bits[row, column : column + per_word]).view(np.uint32)[0]
    return out


def _descriptor(register: str, address: str, offset: int, high: int) -> str:
    return (
        f"add.u32 %r5, {address}, {offset};\nshr.u32 %r5, %r5, 4;\nand.b32 %r5, %r5, 0x3fff;\ncvt.u64.u32 {register}, %r5;\n"
        f"mov.b64 %d8, {high:#x};\nor.b64 {register}, {register}, %d8;\n"
    )


def product(
    name: str,
    kind: str,
    n: int,
    mode: str = "128B",
    *,
    k_steps: int = 2,
    a_major_k: bool = True,
    b_major_k: bool = True,
    registers: bool = False,
    negate: tuple[bool, bool] = (False, False),
    accumulate: bool = True,
    d_type: str = "f32",
    kind_b: str = "",
    groups: int = 0,
) -> Program:
    """D = A B + D for 64 x n x (k_steps of 32 bytes); `registers`: A from registers; `groups`: that many wgmma groups in flight."""
    kind_b = kind_b or kind
    size = ELEMENT_BYTES[kind]
    depth = 32 // size
    limit = 4 if size == 1 else 8
    a = RNG.integers(-limit, limit + 1, (64, depth * k_steps)).astype(np.float32)
    b = RNG.integers(-limit, limit + 1, (n, depth * k_steps)).astype(np.float32)
    start = RNG.integers(-50, 51, (64, n)).astype(np.float32)
    total = (a * (-1 if negate[0] else 1)) @ (b * (-1 if negate[1] else 1)).T + (start if accumulate else 0)
    a_bits, b_bits = to_bits(a, kind), to_bits(b, kind_b)
    operand_b = canonical(b_bits, mode, k_major=b_major_k)
    base_a = -(-len(operand_b.image) // 1024) * 1024
    operand_a = canonical(a_bits, mode, k_major=a_major_k)
    args: list[Buffer] = [Buffer("b", operand_b.image)]
    body = "mov.u32 %r1, smem;\n" + copy_in(len(operand_b.image), 0)
    if registers:
        words = np.concatenate([a_registers(a_bits[:, depth * s : depth * (s + 1)]) for s in range(k_steps)], 1)
        args.append(Buffer("a", words))
        body += f"mad.wide.u32 %d0, %t, {16 * k_steps}, %p1;\n"
        for s in range(k_steps):
            names = ", ".join(f"%r{200 + 4 * s + i}" for i in range(4))
            body += f"ld.global.v4.b32 {{{names}}}, [%d0+{16 * s}];\n"
    else:
        args.append(Buffer("a", operand_a.image))
        second = copy_in(len(operand_a.image), 1, "%r2").replace("copy_in", "copy_a").replace("copy_done", "copy_a_done")
        body += f"add.u32 %r2, %r1, {base_a};\n{second}"
    half = d_type == "f16"
    count = n // 4 if half else n // 2
    start_registers, want = accumulator(start), accumulator(total)
    if half:
        start_registers, want = (v.astype(np.float16).view(np.uint32) for v in (start_registers, want))
        prefix, kind_word = "%r1", "b32"
    else:
        start_registers, want = start_registers.view(np.uint32), want.view(np.uint32)
        prefix, kind_word = "%f1", "f32"
    d_names = [f"{prefix}{i:02d}" if count <= 100 else f"%f{100 + i}" for i in range(count)]
    args += [Buffer("c", start_registers), output("d", want)]
    body += f"mad.wide.u32 %d1, %t, {4 * count}, %p2;\nmad.wide.u32 %d2, %t, {4 * count}, %p3;\n"
    body += "".join(f"ld.global.{kind_word} {r}, [%d1+{4 * i}];\n" for i, r in enumerate(d_names))
    body += "wgmma.fence.sync.aligned;\n"
    signs = f"{-1 if negate[0] else 1}, {-1 if negate[1] else 1}"
    for s in range(k_steps):
        body += _descriptor("%d6", "%r1", operand_b.k_offsets[s], descriptor_high(operand_b, mode))
        if registers:
            first = "{" + ", ".join(f"%r{200 + 4 * s + i}" for i in range(4)) + "}"
        else:
            body += _descriptor("%d7", "%r2", operand_a.k_offsets[s], descriptor_high(operand_a, mode))
            first = "%d7"
        transposes = ""
        if size == 2:
            transposes = f", {int(not b_major_k)}" if registers else f", {int(not a_major_k)}, {int(not b_major_k)}"
        scale = "%q7"
        body += f"setp.ne.b32 %q7, {int(accumulate or s > 0)}, 0;\n"
        shape = f"m64n{n}k{depth}.{d_type}.{kind}.{kind_b}"
        body += f"wgmma.mma_async.sync.aligned.{shape} {{{', '.join(d_names)}}}, {first}, %d6, {scale}, {signs}{transposes};\n"
        if groups:
            body += "wgmma.commit_group.sync.aligned;\n"
    if groups:
        body += f"wgmma.wait_group.sync.aligned {groups};\n"
    else:
        body += "wgmma.commit_group.sync.aligned;\n"
    body += "wgmma.wait_group.sync.aligned 0;\n"
    body += "".join(f"st.global.{kind_word} [%d2+{4 * i}], {r};\n" for i, r in enumerate(d_names))
    return Program(name, "9.7.15.5", body, tuple(args), block=128, smem_bytes=base_a + len(operand_a.image))


def _programs() -> list[Program]:
    out = []
    for kind in ("f16", "bf16"):
        for mode in SWIZZLE_BYTES:
            out.append(product(f"wgmma SS {kind} K-major {mode}", kind, 64, mode))
            out.append(product(f"wgmma SS {kind} MN-major {mode}", kind, 64, mode, a_major_k=False, b_major_k=False))
        out.append(product(f"wgmma SS {kind} A MN-major", kind, 32, "64B", a_major_k=False))
        out.append(product(f"wgmma RS {kind}", kind, 64, registers=True))
        out.append(product(f"wgmma RS {kind} B MN-major", kind, 128, registers=True, b_major_k=False))
    for n in (8, 24, 96, 128, 256):
        out.append(product(f"wgmma n{n}", "bf16", n, k_steps=4))
    # M-major A is 64 wide: one span of 128 bytes; B of 128 columns needs two, so that the leading offset counts.
    out.append(product("wgmma B MN-major of two spans", "bf16", 128, "128B", b_major_k=False, k_steps=4))
    out.append(product("wgmma B MN-major of four spans", "bf16", 128, "64B", b_major_k=False))
    out.append(product("wgmma negated A", "f16", 16, negate=(True, False)))
    out.append(product("wgmma negated B", "bf16", 16, negate=(False, True)))
    out.append(product("wgmma without accumulation", "bf16", 32, accumulate=False))
    out.append(product("wgmma with f16 accumulators", "f16", 32, d_type="f16"))
    out.append(product("wgmma groups in flight", "bf16", 64, k_steps=4, groups=1))
    for kind in ("e4m3", "e5m2"):
        for mode in ("128B", "32B", "none"):
            out.append(product(f"wgmma SS {kind} {mode}", kind, 64, mode))
        out.append(product(f"wgmma RS {kind}", kind, 64, registers=True))
    out.append(product("wgmma e4m3 by e5m2", "e4m3", 64, kind_b="e5m2"))
    out.append(product("wgmma tf32", "tf32", 32))
    return out


PROGRAMS = _programs()
