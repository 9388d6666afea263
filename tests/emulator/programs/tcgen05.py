"""Tensor memory and the fifth-generation tensor core (sm_100a): PTX ISA 9.7.16. No GPU here runs these: the ISA alone gives the values."""

from __future__ import annotations

import numpy as np

from tests.emulator.programs.bulk import copy_in
from tests.emulator.programs.program import Buffer, Program, output
from tests.emulator.programs.wgmma import ELEMENT_BYTES, Operand, canonical, to_bits

RNG = np.random.default_rng(101)
TARGET = "sm_100a"
SWIZZLE_CODES = {"none": 0, "128B": 2, "64B": 4, "32B": 6}  # bits 61 to 63 of the matrix descriptor, 9.7.16.4.1
TYPE_CODES = {"f16": 0, "bf16": 1, "e4m3": 0, "e5m2": 1, "tf32": 2}

# Warp 0 allocates; the address lies at smem + 0, an mbarrier at smem + 8. %r2 holds the tensor memory address.
ALLOCATE = (
    "mov.u32 %r0, smem;\nsetp.ne.u32 %q0, %warp, 0;\n@%q0 bra.uni allocated;\n"
    "tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%r0], {columns};\n"
    "tcgen05.relinquish_alloc_permit.cta_group::{group}.sync.aligned;\nallocated:\nsetp.ne.u32 %q1, %t, 0;\n@%q1 bra made;\n"
    "mbarrier.init.shared.b64 [%r0+8], 1;\nfence.mbarrier_init.release.cluster;\nmade:\n{sync}ld.shared.b32 %r2, [%r0];\n"
    "shl.b32 %r3, %warp, 21;\nadd.u32 %r3, %r2, %r3;\n"  # %r3: this warp's 32 lanes
)
FREE = "{sync}@%q0 bra.uni end;\ntcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %r2, {columns};\nend:"
SYNC = "tcgen05.fence::before_thread_sync;\nbar.sync 0;\ntcgen05.fence::after_thread_sync;\n"


def allocate(columns: int, group: int = 1, sync: str = SYNC) -> str:
    return ALLOCATE.format(columns=columns, group=group, sync=sync)


def free(columns: int, group: int = 1, sync: str = SYNC) -> str:
    return FREE.format(columns=columns, group=group, sync=sync)


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def cell(shape: str, lane: int, register: int) -> tuple[int, int]:
    """(row, column) that a register of a lane moves. 9.7.16.2.3, figures of the .32x32b to .16x256b fragments"""
    if shape == "32x32b":
        return lane, register
    if shape == "16x64b":
        return lane // 4 + 8 * (lane % 2), lane // 2 % 2 + 2 * register
    if shape == "16x128b":
        return lane // 4 + 8 * (register % 2), lane % 4 + 4 * (register // 2)
    return lane // 4 + 8 * (register // 2 % 2), register % 2 + 2 * (lane % 4) + 8 * (register // 4)


REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4}


def _moves() -> list[Program]:
    """Write with .32x32b, read with every shape, and the reverse."""
    out = []
    for shape in REGISTERS:
        for repeat in (1, 2, 4, 16) if shape != "32x32b" else (1, 2, 8, 32, 64, 128):
            count = REGISTERS[shape] * repeat
            columns = max(cell(shape, lane, r)[1] for lane in range(32) for r in range(count)) + 1
            width = max(32, columns)
            half = 16 if shape != "32x32b" else 0  # the lower rows are read by a second instruction
            cells = RNG.integers(0, 1 << 32, (128, columns), dtype=np.uint32)
            parts = 2 if half else 1
            spread = np.zeros((128, parts, count), np.uint32)
            for t in range(128):
                for part in range(parts):
                    for r in range(count):
                        row, column = cell(shape, t % 32, r)
                        spread[t, part, r] = cells[32 * (t // 32) + 16 * part + row, column]
            body = allocate(width) + f"mad.wide.u32 %d0, %t, {4 * columns}, %p0;\n"
            body += "".join(f"ld.global.b32 %r{100 + i}, [%d0+{4 * i}];\n" for i in range(columns))
            body += f"tcgen05.st.sync.aligned.32x32b.x{columns}.b32 [%r3], {names(100, columns)};\ntcgen05.wait::st.sync.aligned;\n"
            body += f"mad.wide.u32 %d1, %t, {4 * count * parts}, %p1;\n"
            for part in range(parts):
                body += f"add.u32 %r4, %r3, {16 * part << 16};\ntcgen05.ld.sync.aligned.{shape}.x{repeat}.b32 {names(100, count)}, [%r4];\n"
                body += "tcgen05.wait::ld.sync.aligned;\n"
                body += "".join(f"st.global.b32 [%d1+{4 * (count * part + i)}], %r{100 + i};\n" for i in range(count))
            args = (Buffer("a", cells), output("d", spread))
            out.append(
                Program(
                    f"tcgen05.ld {shape}.x{repeat}",
                    "9.7.16.8",
                    body + free(width),
                    args,
                    block=128,
                    smem_bytes=1024,
                    target=TARGET,
                )
            )
            if shape == "32x32b":
                continue
            body = allocate(width) + f"mad.wide.u32 %d0, %t, {4 * count * parts}, %p0;\n"
            for part in range(parts):
                body += "".join(f"ld.global.b32 %r{100 + i}, [%d0+{4 * (count * part + i)}];\n" for i in range(count))
                body += f"add.u32 %r4, %r3, {16 * part << 16};\ntcgen05.st.sync.aligned.{shape}.x{repeat}.b32 [%r4], {names(100, count)};\n"
            body += f"tcgen05.wait::st.sync.aligned;\ntcgen05.ld.sync.aligned.32x32b.x{columns}.b32 {names(100, columns)}, [%r3];\n"
            body += f"tcgen05.wait::ld.sync.aligned;\nmad.wide.u32 %d1, %t, {4 * columns}, %p1;\n"
            body += "".join(f"st.global.b32 [%d1+{4 * i}], %r{100 + i};\n" for i in range(columns))
            args = (Buffer("a", spread), output("d", cells))
            out.append(
                Program(
                    f"tcgen05.st {shape}.x{repeat}",
                    "9.7.16.8",
                    body + free(width),
                    args,
                    block=128,
                    smem_bytes=1024,
                    target=TARGET,
                )
            )
    return out


def _reducing_loads() -> list[Program]:
    """Eight columns a thread. A NaN among them counts only where the instruction says so; thread 5 has nothing else. 9.7.16.8.1"""
    out = []
    cells = RNG.standard_normal((128, 8)).astype(np.float32)
    cells[3, 2], cells[5, :] = np.nan, np.nan
    for operator, reduce in (("max", np.fmax), ("max.NaN", np.maximum), ("min", np.fmin)):
        values = reduce.reduce(cells, axis=1)
        result = np.where(np.isnan(values), np.uint32(0x7FFFFFFF), values.view(np.uint32))[:, None]
        body = allocate(32) + "mad.wide.u32 %d0, %t, 32, %p0;\n"
        body += "".join(f"ld.global.b32 %r{100 + i}, [%d0+{4 * i}];\n" for i in range(8))
        body += f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r3], {names(100, 8)};\ntcgen05.wait::st.sync.aligned;\n"
        body += f"tcgen05.ld.red.sync.aligned.32x32b.x8.{operator}.f32 {names(110, 8)}, %r120, [%r3];\n"
        body += "tcgen05.wait::ld.sync.aligned;\nmad.wide.u32 %d1, %t, 4, %p1;\nst.global.b32 [%d1], %r120;\n" + free(32)
        buffers = (Buffer("a", cells.view(np.uint32)), output("d", result))
        out.append(Program(f"tcgen05.ld.red {operator}", "9.7.16.8.1", body, buffers, block=128, smem_bytes=1024, target="sm_103a"))
    return out


def _packing() -> list[Program]:
    """.pack::16b reads two neighbouring columns of 16 bits into one register; .unpack::16b writes them back. 9.7.16.8"""
    cells = RNG.integers(0, 1 << 16, (128, 8), dtype=np.uint32)
    packed = cells[:, ::2] | cells[:, 1::2] << np.uint32(16)
    common = {"block": 128, "smem_bytes": 1024, "target": TARGET}
    body = allocate(32) + "mad.wide.u32 %d0, %t, 32, %p0;\n" + "".join(f"ld.global.b32 %r{100 + i}, [%d0+{4 * i}];\n" for i in range(8))
    body += f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r3], {names(100, 8)};\ntcgen05.wait::st.sync.aligned;\n"
    body += f"tcgen05.ld.sync.aligned.32x32b.x4.pack::16b.b32 {names(100, 4)}, [%r3];\ntcgen05.wait::ld.sync.aligned;\n"
    body += f"mad.wide.u32 %d1, %t, 16, %p1;\nst.global.v4.b32 [%d1], {names(100, 4)};\n" + free(32)
    load = Program("tcgen05.ld pack::16b", "9.7.16.8.1", body, (Buffer("a", cells), output("d", packed)), **common)
    body = allocate(32) + f"mad.wide.u32 %d0, %t, 16, %p0;\nld.global.v4.b32 {names(100, 4)}, [%d0];\n"
    body += f"tcgen05.st.sync.aligned.32x32b.x4.unpack::16b.b32 [%r3], {names(100, 4)};\ntcgen05.wait::st.sync.aligned;\n"
    body += (
        f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {names(100, 8)}, [%r3];\ntcgen05.wait::ld.sync.aligned;\nmad.wide.u32 %d1, %t, 32, %p1;\n"
    )
    body += "".join(f"st.global.b32 [%d1+{4 * i}], %r{100 + i};\n" for i in range(8)) + free(32)
    store = Program("tcgen05.st unpack::16b", "9.7.16.8.2", body, (Buffer("a", packed), output("d", cells)), **common)
    return [load, store]


def instruction_descriptor(
    m: int, n: int, kind: str, kind_b: str, *, transpose: tuple[bool, bool], negate: tuple[bool, bool], f16_result: bool = False
) -> int:
    """32 bits of the instruction descriptor for .kind::f16, tf32 and f8f6f4. 9.7.16.4.2, table of fields"""
    return (
        int(not f16_result) << 4
        | TYPE_CODES[kind] << 7
        | TYPE_CODES[kind_b] << 10
        | negate[0] << 13
        | negate[1] << 14
        | transpose[0] << 15
        | transpose[1] << 16
        | n >> 3 << 17
        | m >> 4 << 24
    )


def descriptor_high(operand: Operand, mode: str) -> int:
    """The matrix descriptor without its start address. 9.7.16.4.1"""
    return (operand.lbo >> 4 & 0x3FFF) << 16 | (operand.sbo >> 4 & 0x3FFF) << 32 | 1 << 46 | SWIZZLE_CODES[mode] << 61


def _descriptor(register: str, address: str, offset: int, high: int) -> str:
    return (
        f"add.u32 %r5, {address}, {offset};\nshr.u32 %r5, %r5, 4;\nand.b32 %r5, %r5, 0x3fff;\ncvt.u64.u32 {register}, %r5;\n"
        f"mov.b64 %d8, {high:#x};\nor.b64 {register}, {register}, %d8;\n"
    )


WAIT = "spin:\nmbarrier.try_wait.parity.shared.b64 %q5, [%r0+8], 0;\n@!%q5 bra spin;\ntcgen05.fence::after_thread_sync;\n"


def rows_to_lanes(m: int) -> list[int]:
    """Lane of every row of D for one CTA: M = 128 has a row a lane; M = 64 uses 16 of each warp's 32 lanes. 9.7.16.10.5, layouts D and F"""
    return list(range(128)) if m == 128 else [32 * (r // 16) + r % 16 for r in range(64)]


def product(
    name: str,
    kind: str,
    n: int,
    *,
    m: int = 128,
    mode: str = "128B",
    k_steps: int = 2,
    a_major_k: bool = True,
    b_major_k: bool = True,
    a_in_tmem: bool = False,
    negate: tuple[bool, bool] = (False, False),
    accumulate: bool = False,
    kind_b: str = "",
) -> Program:
    """D = A B (+ D) on one CTA, m x n x (k_steps of 32 bytes)."""
    kind_b = kind_b or kind
    size = ELEMENT_BYTES[kind]
    depth = 32 // size
    limit = 4 if size == 1 else 8
    a = RNG.integers(-limit, limit + 1, (m, depth * k_steps)).astype(np.float32)
    b = RNG.integers(-limit, limit + 1, (n, depth * k_steps)).astype(np.float32)
    start = RNG.integers(-50, 51, (m, n)).astype(np.float32)
    total = (a * (-1 if negate[0] else 1)) @ (b * (-1 if negate[1] else 1)).T + (start if accumulate else 0)
    lanes = rows_to_lanes(m)
    spread_start, spread_total = np.zeros((128, n), np.float32), np.zeros((128, n), np.float32)
    spread_start[lanes], spread_total[lanes] = start, total
    a_bits, b_bits = to_bits(a, kind), to_bits(b, kind_b)
    operand_b = canonical(b_bits, mode, k_major=b_major_k)
    operand_a = canonical(a_bits, mode, k_major=a_major_k)
    base_b = 1024
    base_a = base_b + -(-len(operand_b.image) // 1024) * 1024
    a_columns = a_bits.nbytes // m // 4
    columns = 1 << max(5, (n + a_columns - 1).bit_length())
    body = allocate(columns) + f"add.u32 %r6, %r0, {base_b};\n" + copy_in(len(operand_b.image), 0, "%r6")
    args: list[Buffer] = [Buffer("b", operand_b.image)]
    if a_in_tmem:
        args.append(Buffer("a", np.ascontiguousarray(a_bits).view(np.uint32)))
        body += f"mad.wide.u32 %d0, %t, {4 * a_columns}, %p1;\n"
        body += "".join(f"ld.global.b32 %r{100 + i}, [%d0+{4 * i}];\n" for i in range(a_columns))
        body += f"add.u32 %r7, %r3, {n};\ntcgen05.st.sync.aligned.32x32b.x{a_columns}.b32 [%r7], {names(100, a_columns)};\n"
    else:
        args.append(Buffer("a", operand_a.image))
        second = copy_in(len(operand_a.image), 1, "%r7").replace("copy_in", "copy_a").replace("copy_done", "copy_a_done")
        body += f"add.u32 %r7, %r0, {base_a};\n{second}"
    args += [Buffer("c", spread_start), output("d", spread_total)]
    body += f"mad.wide.u32 %d1, %t, {4 * n}, %p2;\nmad.wide.u32 %d2, %t, {4 * n}, %p3;\n"
    for chunk in range(0, n, 32):
        body += "".join(f"ld.global.b32 %r{200 + i}, [%d1+{4 * (chunk + i)}];\n" for i in range(min(32, n - chunk)))
        part = names(200, min(32, n - chunk))
        body += f"add.u32 %r8, %r3, {chunk};\ntcgen05.st.sync.aligned.32x32b.x{min(32, n - chunk)}.b32 [%r8], {part};\n"
    body += "tcgen05.wait::st.sync.aligned;\n" + SYNC + "@%q1 bra issued;\n"
    word = "f8f6f4" if size == 1 else "tf32" if size == 4 else "f16"
    idesc = instruction_descriptor(m, n, kind, kind_b, transpose=(not a_major_k, not b_major_k), negate=negate)
    for s in range(k_steps):
        body += _descriptor("%d6", "%r6", operand_b.k_offsets[s], descriptor_high(operand_b, mode))
        if a_in_tmem:
            body += f"add.u32 %r9, %r2, {n + 8 * s};\n"
            first = "[%r9]"
        else:
            body += _descriptor("%d7", "%r7", operand_a.k_offsets[s], descriptor_high(operand_a, mode))
            first = "%d7"
        body += f"mov.u32 %r10, {idesc:#x};\nsetp.ne.b32 %q6, {int(accumulate or s > 0)}, 0;\n"
        body += f"tcgen05.mma.cta_group::1.kind::{word} [%r2], {first}, %d6, %r10, %q6;\n"
    body += "add.u32 %r11, %r0, 8;\ntcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r11];\nissued:\n" + WAIT
    for chunk in range(0, n, 32):
        width = min(32, n - chunk)
        body += f"add.u32 %r8, %r3, {chunk};\ntcgen05.ld.sync.aligned.32x32b.x{width}.b32 {names(200, width)}, [%r8];\n"
        body += "tcgen05.wait::ld.sync.aligned;\n" + "".join(f"st.global.b32 [%d2+{4 * (chunk + i)}], %r{200 + i};\n" for i in range(width))
    if m == 64:
        # The other lanes keep what they were given.
        args[-1] = output("d", np.where(np.isin(np.arange(128), lanes)[:, None], spread_total, spread_start).astype(np.float32))
    return Program(
        name,
        "9.7.16.10",
        body + free(columns),
        tuple(args),
        block=128,
        smem_bytes=base_a + len(operand_a.image),
        target=TARGET,
    )


def _pair_product(name: str, kind: str, m: int, n: int, mode: str = "128B") -> Program:
    """cta_group::2: each CTA of a pair holds half of the rows of A and D, and half of the rows (columns of the product) of B.

    With M = 128 every CTA has 64 rows, and the two halves of N lie one below the other in its lanes. 9.7.16.10.5, layouts A and B
    """
    k_steps, depth = 2, 16
    a = RNG.integers(-8, 9, (m, depth * k_steps)).astype(np.float32)
    b = RNG.integers(-8, 9, (n, depth * k_steps)).astype(np.float32)
    total = a @ b.T
    a_images = [canonical(to_bits(part, kind), mode, k_major=True) for part in np.split(a, 2)]
    b_images = [canonical(to_bits(part, kind), mode, k_major=True) for part in np.split(b, 2)]
    operand_a, operand_b = a_images[0], b_images[0]
    width = n if m == 256 else n // 2
    halves = np.split(total, 2)
    if m == 128:
        halves = [np.concatenate([h[:, :width], h[:, width:]]) for h in halves]
    want = np.stack(halves).astype(np.float32)
    columns = 1 << max(5, (width - 1).bit_length())
    cluster_sync = (
        "tcgen05.fence::before_thread_sync;\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
        "tcgen05.fence::after_thread_sync;\n"
    )
    base_b = 1024
    base_a = base_b + -(-len(operand_b.image) // 1024) * 1024
    body = "mov.u32 %r40, %cluster_ctarank;\n" + allocate(columns, 2, cluster_sync)
    for argument, size in ((0, len(operand_b.image)), (1, len(operand_a.image))):
        body += f"mad.wide.u32 %d15, %r40, {size}, %p{argument};\nmov.u64 %p{argument}, %d15;\n"
    second = copy_in(len(operand_a.image), 1, "%r7").replace("copy_in", "copy_a").replace("copy_done", "copy_a_done")
    body += f"add.u32 %r6, %r0, {base_b};\n{copy_in(len(operand_b.image), 0, '%r6')}add.u32 %r7, %r0, {base_a};\n{second}"
    body += cluster_sync + "setp.ne.u32 %q3, %r40, 0;\nor.pred %q3, %q3, %q1;\n@%q3 bra issued;\n"
    idesc = instruction_descriptor(m, n, kind, kind, transpose=(False, False), negate=(False, False))
    for s in range(k_steps):
        body += _descriptor("%d6", "%r6", operand_b.k_offsets[s], descriptor_high(operand_b, mode))
        body += _descriptor("%d7", "%r7", operand_a.k_offsets[s], descriptor_high(operand_a, mode))
        body += f"mov.u32 %r10, {idesc:#x};\nsetp.ne.b32 %q6, {int(s > 0)}, 0;\n"
        body += "tcgen05.mma.cta_group::2.kind::f16 [%r2], %d7, %d6, %r10, %q6;\n"
    body += (
        "add.u32 %r11, %r0, 8;\nmov.u16 %h1, 3;\n"
        "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r11], %h1;\nissued:\n" + WAIT
    )
    body += f"mov.u32 %r41, %ctaid.x;\nmad.lo.u32 %r41, %r41, 128, %t;\nmad.wide.u32 %d2, %r41, {4 * width}, %p2;\n"
    for chunk in range(0, width, 32):
        count = min(32, width - chunk)
        body += f"add.u32 %r8, %r3, {chunk};\ntcgen05.ld.sync.aligned.32x32b.x{count}.b32 {names(200, count)}, [%r8];\n"
        body += "tcgen05.wait::ld.sync.aligned;\n" + "".join(f"st.global.b32 [%d2+{4 * (chunk + i)}], %r{200 + i};\n" for i in range(count))
    args = (
        Buffer("b", np.concatenate([o.image for o in b_images])),
        Buffer("a", np.concatenate([o.image for o in a_images])),
        output("d", want),
    )
    return Program(
        name,
        "9.7.16.10",
        body + free(columns, 2, cluster_sync),
        args,
        block=128,
        grid=2,
        cluster=2,
        smem_bytes=base_a + len(operand_a.image),
        target=TARGET,
    )


def _copies() -> list[Program]:
    """tcgen05.cp .128x256b: 32 bytes a lane from shared memory, unswizzled canonical layout. 9.7.16.9.2"""
    cells = RNG.integers(0, 1 << 16, (128, 16), dtype=np.uint16)
    operand = canonical(cells, "none", k_major=True)
    body = allocate(32) + "add.u32 %r6, %r0, 1024;\n" + copy_in(len(operand.image), 0, "%r6") + SYNC + "@%q1 bra issued;\n"
    body += _descriptor("%d6", "%r6", 0, descriptor_high(operand, "none"))
    body += "tcgen05.cp.cta_group::1.128x256b [%r2], %d6;\nadd.u32 %r11, %r0, 8;\n"
    body += "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r11];\nissued:\n" + WAIT
    body += (
        f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {names(100, 8)}, [%r3];\ntcgen05.wait::ld.sync.aligned;\nmad.wide.u32 %d1, %t, 32, %p1;\n"
    )
    body += "".join(f"st.global.b32 [%d1+{4 * i}], %r{100 + i};\n" for i in range(8)) + free(32)
    args = (Buffer("a", operand.image), output("d", np.ascontiguousarray(cells).view(np.uint32)))
    return [Program("tcgen05.cp 128x256b", "9.7.16.9.2", body, args, block=128, smem_bytes=1024 + len(operand.image), target=TARGET)]


def _products() -> list[Program]:
    out = []
    for kind in ("f16", "bf16"):
        for mode in SWIZZLE_CODES:
            out.append(product(f"tcgen05.mma {kind} K-major {mode}", kind, 64, mode=mode))
            out.append(product(f"tcgen05.mma {kind} MN-major {mode}", kind, 64, mode=mode, a_major_k=False, b_major_k=False))
        out.append(product(f"tcgen05.mma {kind} A in tensor memory", kind, 64, a_in_tmem=True))
        out.append(product(f"tcgen05.mma {kind} A in tensor memory, B MN-major", kind, 128, a_in_tmem=True, b_major_k=False))
    for n in (8, 16, 96, 256):
        out.append(product(f"tcgen05.mma m64 n{n}" if n == 8 else f"tcgen05.mma n{n}", "bf16", n, m=64 if n == 8 else 128, k_steps=4))
    out += [
        product("tcgen05.mma m64", "bf16", 64, m=64),
        product("tcgen05.mma accumulates", "bf16", 64, accumulate=True),
        product("tcgen05.mma negated A", "f16", 32, negate=(True, False)),
        product("tcgen05.mma negated B", "bf16", 32, negate=(False, True)),
        product("tcgen05.mma e4m3", "e4m3", 64),
        product("tcgen05.mma e5m2", "e5m2", 64, mode="64B"),
        product("tcgen05.mma e4m3 by e5m2", "e4m3", 32, kind_b="e5m2"),
        product("tcgen05.mma e4m3 A in tensor memory", "e4m3", 64, a_in_tmem=True),
        product("tcgen05.mma tf32", "tf32", 32),
        _pair_product("tcgen05.mma pair m256", "bf16", 256, 64),
        _pair_product("tcgen05.mma pair m256 n128", "f16", 256, 128, "64B"),
        _pair_product("tcgen05.mma pair m128", "bf16", 128, 64),
    ]
    return out


PROGRAMS = [*_moves(), *_packing(), *_products(), *_copies(), *_reducing_loads()]
