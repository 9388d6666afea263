"""Warp-level matrices: ldmatrix, stmatrix, movmatrix, mma.sync. PTX ISA 9.7.14.5."""

from __future__ import annotations

import numpy as np

from tests.emulator.programs.elementwise import constant
from tests.emulator.programs.program import Buffer, Program, output

RNG = np.random.default_rng(41)


def _fragment(tile: np.ndarray, transposed: bool) -> np.ndarray:
    """The register of each lane for one 8x8 tile of 16-bit elements: lane i holds row i / 4, columns 2 (i % 4) and the next."""
    tile = tile.T if transposed else tile
    return np.array([int(tile[i // 4, 2 * (i % 4)]) | int(tile[i // 4, 2 * (i % 4) + 1]) << 16 for i in range(32)], np.uint32)


def _load() -> list[Program]:
    out = []
    for count in (1, 2, 4):
        for transposed in (False, True):
            tiles = RNG.integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16)
            # Row r of tile m lies where lane 8 m + r says: here in a scrambled order.
            order = RNG.permutation(32)
            memory = np.zeros((32, 8), np.uint16)
            for lane in range(32):
                memory[order[lane]] = tiles[lane // 8, lane % 8]
            want = np.stack([_fragment(tiles[m], transposed) for m in range(count)], 1)
            names = ", ".join(f"%r{10 + i}" for i in range(count))
            vector = f".v{count}" if count > 1 else ""
            operand = f"{{{names}}}" if count > 1 else names
            body = (
                "mov.u32 %r0, smem;\nmad.wide.u32 %d0, %t, 16, %p0;\nld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0];\n"
                "mad.lo.u32 %r5, %t, 16, %r0;\n"
                "st.shared.v4.b32 [%r5], {%r1, %r2, %r3, %r4};\nmad.wide.u32 %d1, %t, 4, %p1;\nld.global.u32 %r6, [%d1];\n"
                "mad.lo.u32 %r7, %r6, 16, %r0;\n"
                f"bar.sync 0;\nldmatrix.sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16 {{{names}}}, [%r7];\n"
                f"mad.wide.u32 %d2, %t, {4 * count}, %p2;\nst.global{vector}.b32 [%d2], {operand};"
            )
            args = (Buffer("a", memory), Buffer("order", order.astype(np.uint32)), output("d", want))
            out.append(Program(f"ldmatrix.x{count}{'.trans' * transposed}", "9.7.14.5.15", body, args, smem_bytes=1024))
    return out


def _store() -> list[Program]:
    out = []
    for count in (1, 2, 4):
        for transposed in (False, True):
            tiles = RNG.integers(0, 1 << 16, (count, 8, 8), dtype=np.uint16)
            registers = np.stack([_fragment(tiles[m], transposed) for m in range(count)], 1)
            order = RNG.permutation(32)
            want = np.zeros((32, 8), np.uint16)
            for lane in range(8 * count):
                want[order[lane]] = tiles[lane // 8, lane % 8]
            names = ", ".join(f"%r{10 + i}" for i in range(count))
            vector = f".v{count}" if count > 1 else ""
            operand = f"{{{names}}}" if count > 1 else names
            body = (
                f"mov.u32 %r0, smem;\nmad.wide.u32 %d0, %t, {4 * count}, %p0;\nld.global{vector}.b32 {operand}, [%d0];\n"
                f"mad.lo.u32 %r5, %t, 16, %r0;\n"
                "mov.b32 %r1, 0;\nst.shared.v4.b32 [%r5], {%r1, %r1, %r1, %r1};\nmad.wide.u32 %d1, %t, 4, %p1;\nld.global.u32 %r6, [%d1];\n"
                f"mad.lo.u32 %r7, %r6, 16, %r0;\nbar.sync 0;\n"
                f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16 [%r7], {{{names}}};\n"
                "bar.sync 0;\nld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];\nmad.wide.u32 %d2, %t, 16, %p2;\n"
                "st.global.v4.b32 [%d2], {%r1, %r2, %r3, %r4};"
            )
            args = (Buffer("a", registers), Buffer("order", order.astype(np.uint32)), output("d", want))
            out.append(Program(f"stmatrix.x{count}{'.trans' * transposed}", "9.7.14.5.16", body, args, smem_bytes=1024))
    tile = RNG.integers(0, 1 << 16, (8, 8), dtype=np.uint16)
    body = (
        "mad.wide.u32 %d0, %t, 4, %p0;\nld.global.b32 %r1, [%d0];\nmovmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;\n"
        "mad.wide.u32 %d1, %t, 4, %p1;\n"
        "st.global.b32 [%d1], %r2;"
    )
    args = (Buffer("a", _fragment(tile, False)), output("d", _fragment(tile, True)))
    out.append(Program("movmatrix.trans", "9.7.14.5.17", body, args))
    return out


def to_16(values: np.ndarray, kind: str) -> np.ndarray:
    """Bits of exactly representable values."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _accumulator(matrix: np.ndarray) -> np.ndarray:
    """(32, 4): the registers of each lane for a 16x8 float32 matrix."""
    return np.array([[matrix[i // 4 + 8 * (r >> 1), 2 * (i % 4) + (r & 1)] for r in range(4)] for i in range(32)], np.float32)


def _mma() -> list[Program]:
    """mma.sync m16n8k16 and m16n8k8 with small whole numbers, whose sums are exact in every order."""
    out = []
    for kind in ("f16", "bf16"):
        for k in (8, 16):
            a = RNG.integers(-8, 9, (16, k)).astype(np.float32)
            b = RNG.integers(-8, 9, (k, 8)).astype(np.float32)
            c = RNG.integers(-100, 101, (16, 8)).astype(np.float32)
            d = a @ b + c
            a16, b16 = to_16(a, kind), to_16(b, kind)
            # Row group g = lane / 4, column pair 2 (lane % 4). 9.7.14.5.8
            pair = lambda m, r, col: int(m[r, col]) | int(m[r, col + 1]) << 16  # noqa: E731
            a_regs = [[pair(a16, i // 4 + 8 * (r & 1), 2 * (i % 4) + 8 * (r >> 1)) for r in range(k // 4)] for i in range(32)]
            b_regs = [
                [int(b16[2 * (i % 4) + 8 * r, i // 4]) | int(b16[2 * (i % 4) + 8 * r + 1, i // 4]) << 16 for r in range(k // 8)]
                for i in range(32)
            ]
            na, nb = k // 4, k // 8
            regs_a = ", ".join(f"%r{10 + i}" for i in range(na))
            regs_b = ", ".join(f"%r{20 + i}" for i in range(nb))
            load_b = f"ld.global{'.v2' if nb == 2 else ''}.b32 {'{' + regs_b + '}' if nb == 2 else regs_b}, [%d1];\n"
            body = (
                f"mad.wide.u32 %d0, %t, {4 * na}, %p0;\nld.global.v{na}.b32 {{{regs_a}}}, [%d0];\nmad.wide.u32 %d1, %t, {4 * nb}, %p1;\n"
                f"{load_b}"
                "mad.wide.u32 %d2, %t, 16, %p2;\nld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%d2];\n"
                f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%f4, %f5, %f6, %f7}}, "
                f"{{{regs_a}}}, {{{regs_b}}}, {{%f0, %f1, %f2, %f3}};\n"
                "mad.wide.u32 %d3, %t, 16, %p3;\nst.global.v4.f32 [%d3], {%f4, %f5, %f6, %f7};"
            )
            args = (
                Buffer("a", np.array(a_regs, np.uint32)),
                Buffer("b", np.array(b_regs, np.uint32)),
                Buffer("c", _accumulator(c)),
                output("d", _accumulator(d)),
            )
            out.append(Program(f"mma.sync m16n8k{k} {kind}", "9.7.14.5.8", body, args))
    return out


PROGRAMS = [*_load(), *_store(), *_mma()]
assert to_16(np.array([1.0]), "bf16")[0] == constant(1.0, "bf16")
