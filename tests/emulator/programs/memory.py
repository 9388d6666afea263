"""Loads, stores and atomics in every state space: PTX ISA 9.7.9 and 9.7.13.13 to 9.7.13.15."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator.programs.program import Buffer, Program, output

RNG = np.random.default_rng(21)
WORDS = RNG.integers(0, 1 << 32, 256, dtype=np.uint32)


def _vectors() -> list[Program]:
    out = []
    for count, kind, size, prefix in (
        (1, "b32", 4, "%r"),
        (2, "b32", 8, "%r"),
        (4, "b32", 16, "%r"),
        (2, "b64", 16, "%d"),
        (1, "b64", 8, "%d"),
        (4, "b16", 8, "%h"),
    ):
        vector = f".v{count}" if count > 1 else ""
        names = ", ".join(f"{prefix}{i + 10}" for i in range(count))
        operand = f"{{{names}}}" if count > 1 else names
        data = np.resize(WORDS.view(np.uint8), 32 * size)
        args = (Buffer("a", data), output("d", data))
        plain = (
            f"mad.wide.u32 %d0, %t, {size}, %p0;\nmad.wide.u32 %d1, %t, {size}, %p1;\n"
            f"ld.global{vector}.{kind} {operand}, [%d0];\nst.global{vector}.{kind} [%d1], {operand};"
        )
        out.append(Program(f"ld.global{vector}.{kind}", "9.7.9.8", plain, args))
        shared = (
            f"mad.wide.u32 %d0, %t, {size}, %p0;\nmad.wide.u32 %d1, %t, {size}, %p1;\nmov.u32 %r0, smem;\n"
            f"mad.lo.u32 %r1, %t, {size}, %r0;\n"
            f"ld.global{vector}.{kind} {operand}, [%d0];\nst.shared{vector}.{kind} [%r1+1024], {operand};\n"
            f"ld.shared{vector}.{kind} {operand}, [%r1+1024];\nst.global{vector}.{kind} [%d1], {operand};"
        )
        out.append(Program(f"ld.shared{vector}.{kind}", "9.7.9.8", shared, args, smem_bytes=2048))
    data = np.resize(WORDS.view(np.uint8), 1024)
    names = "{%r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17}"
    body = (
        f"mad.wide.u32 %d0, %t, 32, %p0;\nmad.wide.u32 %d1, %t, 32, %p1;\nld.global.v8.b32 {names}, [%d0];\n"
        f"st.global.v8.b32 [%d1], {names};"
    )
    out.append(Program("ld.global.v8.b32", "9.7.9.8", body, (Buffer("a", data), output("d", data)), target="sm_100a"))
    return out


def _widths() -> list[Program]:
    """Narrow loads extend to the register by their type; narrow stores write only their bytes."""
    out = []
    raw = WORDS.view(np.uint8)[:64].copy()
    for kind, dtype in (("u8", np.uint8), ("s8", np.int8), ("u16", np.uint16), ("s16", np.int16)):
        size = np.dtype(dtype).itemsize
        data = raw[: 32 * size].view(dtype)
        want = data.astype(np.int64).astype(np.uint32)
        body = f"mad.wide.u32 %d0, %t, {size}, %p0;\nmad.wide.u32 %d1, %t, 4, %p1;\nld.global.{kind} %r1, [%d0];\nst.global.b32 [%d1], %r1;"
        out.append(Program(f"ld.global.{kind} extends", "9.4.1", body, (Buffer("a", data), output("d", want))))
    for kind, size in (("u8", 1), ("u16", 2)):
        want = np.full(32 * 4, 0xA5, np.uint8)
        values = WORDS[:32]
        want.reshape(32, 4)[:, :size] = values.view(np.uint8).reshape(32, 4)[:, :size]
        body = f"mad.wide.u32 %d0, %t, 4, %p0;\nmad.wide.u32 %d1, %t, 4, %p1;\nld.global.b32 %r1, [%d0];\nst.global.{kind} [%d1], %r1;"
        out.append(Program(f"st.global.{kind} narrow", "9.4.1", body, (Buffer("a", values), output("d", want))))
    return out


def _spaces() -> list[Program]:
    out = []
    args = (Buffer("a", WORDS[:32]), output("d", WORDS[:32][::-1].copy()))
    head = "mad.wide.u32 %d0, %t, 4, %p0;\nld.global.b32 %r1, [%d0];\nmad.wide.u32 %d1, %t, 4, %p1;\nsub.u32 %r2, 31, %t;\n"
    bodies = {
        "static shared array": (
            "mov.u32 %r3, st_array;\nmad.lo.u32 %r4, %t, 4, %r3;\nst.shared.b32 [%r4], %r1;\nbar.sync 0;\n"
            "mad.lo.u32 %r4, %r2, 4, %r3;\nld.shared.b32 %r5, [%r4];\nst.global.b32 [%d1], %r5;",
            ".shared .align 16 .b8 st_array[128];\n",
        ),
        "generic address of shared": (
            "mov.u32 %r3, gen_array;\ncvt.u64.u32 %d2, %r3;\ncvta.shared.u64 %d2, %d2;\nmad.wide.u32 %d3, %t, 4, %d2;\n"
            "st.b32 [%d3], %r1;\nbar.sync 0;\n"
            "mad.wide.u32 %d3, %r2, 4, %d2;\nld.b32 %r5, [%d3];\nst.global.b32 [%d1], %r5;",
            ".shared .align 16 .b8 gen_array[128];\n",
        ),
        "generic address back to shared": (
            "mov.u32 %r3, back_array;\ncvt.u64.u32 %d2, %r3;\ncvta.shared.u64 %d2, %d2;\ncvta.to.shared.u64 %d2, %d2;\n"
            "cvt.u32.u64 %r3, %d2;\n"
            "mad.lo.u32 %r4, %t, 4, %r3;\nst.shared.b32 [%r4], %r1;\nbar.sync 0;\nmad.lo.u32 %r4, %r2, 4, %r3;\nld.shared.b32 %r5, [%r4];\n"
            "st.global.b32 [%d1], %r5;",
            ".shared .align 16 .b8 back_array[128];\n",
        ),
        "constant array": (
            "mov.u64 %d2, con_array;\nand.b32 %r6, %t, 3;\nmad.wide.u32 %d2, %r6, 4, %d2;\nld.const.b32 %r7, [%d2];\n"
            "xor.b32 %r1, %r1, %r7;\n"
            "xor.b32 %r1, %r1, %r7;\nshfl.sync.bfly.b32 %r5, %r1, 31, 31, 0xffffffff;\nst.global.b32 [%d1], %r5;",
            ".const .align 4 .b32 con_array[4] = {11, 22, 33, 44};\n",
        ),
        "local array": (
            ".local .align 16 .b8 depot[32];\nmov.u64 %d2, depot;\nst.local.b32 [%d2+4], %r1;\ncvta.local.u64 %d3, %d2;\n"
            "ld.b32 %r5, [%d3+4];\n"
            "shfl.sync.bfly.b32 %r5, %r5, 31, 31, 0xffffffff;\nst.global.b32 [%d1], %r5;",
            "",
        ),
    }
    for name, (body, declarations) in bodies.items():
        out.append(Program(name, "5.1, 9.7.9.20", head + body, args, declarations=declarations))
    for modifier in (
        "volatile.global",
        "relaxed.gpu.global",
        "acquire.gpu.global",
        "global.nc",
        "global.ca",
        "global.cg",
        "global.L1::no_allocate",
        "weak.global",
    ):
        body = f"mad.wide.u32 %d0, %t, 4, %p0;\nmad.wide.u32 %d1, %t, 4, %p1;\nld.{modifier}.b32 %r1, [%d0];\nst.global.b32 [%d1], %r1;"
        out.append(Program(f"ld.{modifier}.b32", "9.7.9.8", body, (Buffer("a", WORDS[:32]), output("d", WORDS[:32].copy()))))
    for modifier in ("volatile.global", "relaxed.gpu.global", "release.gpu.global", "global.wb", "global.cs", "weak.global"):
        body = f"mad.wide.u32 %d0, %t, 4, %p0;\nmad.wide.u32 %d1, %t, 4, %p1;\nld.global.b32 %r1, [%d0];\nst.{modifier}.b32 [%d1], %r1;"
        out.append(Program(f"st.{modifier}.b32", "9.7.9.11", body, (Buffer("a", WORDS[:32]), output("d", WORDS[:32].copy()))))
    body = (
        "mad.wide.u32 %d0, %t, 4, %p0;\nmad.wide.u32 %d1, %t, 4, %p1;\nprefetch.global.L2 [%d0];\n"
        "createpolicy.fractional.L2::evict_first.b64 %d2, 1.0;\n"
        "ld.global.L2::cache_hint.b32 %r1, [%d0], %d2;\nst.global.L2::cache_hint.b32 [%d1], %r1, %d2;"
    )
    out.append(Program("cache hints", "9.7.9.8, 9.7.9.15, 9.7.9.17", body, (Buffer("a", WORDS[:32]), output("d", WORDS[:32].copy()))))
    return out


def _atomics() -> list[Program]:
    """Two CTAs of 64 threads on one cell each per operation; the final value does not depend on the order."""
    out = []
    data = RNG.integers(1, 1 << 31, 128, dtype=np.uint32)
    signed_data = data.view(np.int32) * np.where(np.arange(128) % 3 == 0, -1, 1).astype(np.int32)
    u64 = RNG.integers(0, 1 << 63, 128, dtype=np.uint64)
    start = np.uint32(0x40000000)

    def fold(function: Callable[[int, int], int], values: np.ndarray, initial: int) -> int:
        for v in values:
            initial = function(initial, int(v))
        return initial

    table: list[tuple[str, np.ndarray, int, int]] = [
        ("add.u32", data, int(start), fold(lambda x, y: (x + y) & 0xFFFFFFFF, data, int(start))),
        ("add.s32", signed_data, 5, fold(lambda x, y: x + y, signed_data, 5)),
        ("min.u32", data, int(start), fold(min, data, int(start))),
        ("max.u32", data, int(start), fold(max, data, int(start))),
        ("min.s32", signed_data, 0, fold(min, signed_data, 0)),
        ("max.s32", signed_data, 0, fold(max, signed_data, 0)),
        ("and.b32", data | 0x00F0F0F0, 0xFFFFFFFF, fold(lambda x, y: x & y, data | 0x00F0F0F0, 0xFFFFFFFF)),
        ("or.b32", data, 0, fold(lambda x, y: x | y, data, 0)),
        ("xor.b32", data, 0, fold(lambda x, y: x ^ y, data, 0)),
        ("add.u64", u64, 7, fold(lambda x, y: (x + y) & ((1 << 64) - 1), u64, 7)),
        ("min.u64", u64, 1 << 62, fold(min, u64, 1 << 62)),
        ("max.s64", u64, 0, fold(max, u64, 0)),
        ("inc.u32", np.full(128, 99, np.uint32), 0, 128 % 100),
        ("dec.u32", np.full(128, 99, np.uint32), 0, (-128) % 100),
    ]
    for name, values, initial, final in table:
        size = values.itemsize
        dtype = np.uint64 if size == 8 else np.uint32
        mask = (1 << 8 * size) - 1
        register = "%d5" if size == 8 else "%r5"
        kind = f"b{8 * size}"
        cell = Buffer("cell", np.array([initial & mask], dtype), np.array([final & mask], dtype))
        load = (
            f"mov.u32 %r1, %ctaid.x;\nmad.lo.u32 %r1, %r1, 64, %t;\nmad.wide.u32 %d0, %r1, {size}, %p0;\n"
            f"ld.global.{kind} {register}, [%d0];\n"
        )
        args = (Buffer("a", values), cell)
        out.append(Program(f"red.global.{name}", "9.7.13.14", f"{load}red.global.{name} [%p1], {register};", args, block=64, grid=2))
        other = register.replace("5", "6")
        for suffix in ("", ".relaxed.gpu", ".acq_rel.gpu"):
            scoped = f"atom{suffix}.global.{name}"
            out.append(Program(scoped, "9.7.13.13", f"{load}{scoped} {other}, [%p1], {register};", args, block=64, grid=2))
        shared = (
            f"mov.u32 %r1, smem;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra ready;\nld.global.{kind} {other}, [%p1];\n"
            f"st.shared.{kind} [%r1], {other};\n"
            f"ready:\nbar.sync 0;\nmad.wide.u32 %d0, %t, {size}, %p0;\nld.global.{kind} {register}, [%d0];\n"
            f"atom.shared.{name} {other}, [%r1], {register};\n"
            f"bar.sync 0;\n@%q0 bra end;\nld.shared.{kind} {register}, [%r1];\nst.global.{kind} [%p1], {register};\nend:"
        )
        out.append(Program(f"atom.shared.{name}", "9.7.13.13", shared, args, block=128, smem_bytes=1024))
    # Small integers: their sums are exact in every order.
    whole = (np.arange(128) - 50).astype(np.float32)
    total = np.array([whole.sum() + 3], np.float32)
    load = "mov.u32 %r1, %ctaid.x;\nmad.lo.u32 %r1, %r1, 64, %t;\nmad.wide.u32 %d0, %r1, 4, %p0;\nld.global.f32 %f5, [%d0];\n"
    args = (Buffer("a", whole), Buffer("cell", np.array([3], np.float32), total))
    out.append(Program("red.global.add.f32", "9.7.13.14", load + "red.global.add.f32 [%p1], %f5;", args, block=64, grid=2))
    out.append(Program("atom.global.add.f32", "9.7.13.13", load + "atom.global.add.f32 %f6, [%p1], %f5;", args, block=64, grid=2))
    pair = np.array([whole.sum() + 3, 2 * whole.sum() + 4], np.float32)
    out.append(
        Program(
            "red.global.add.v2.f32", "9.7.13.14", load + "add.f32 %f7, %f5, %f5;\nred.global.add.v2.f32 [%p1], {%f5, %f7};",
            (Buffer("a", whole), Buffer("cell", np.array([3, 4], np.float32), pair)), block=64, grid=2,
        )
    )  # fmt: skip
    # Every ticket is drawn once, whichever thread draws it.
    body = "atom.global.add.u32 %r2, [%p0], 1;\nmad.wide.u32 %d0, %r2, 4, %p1;\nst.global.u32 [%d0], 1;"
    out.append(
        Program(
            "tickets by atom.add", "9.7.13.13", body,
            (Buffer("cell", np.zeros(1, np.uint32), np.array([256], np.uint32)), output("d", np.ones(256, np.uint32))), block=64, grid=4,
        )
    )  # fmt: skip
    # exch and cas: a lock-free maximum.
    loop = (
        "mov.u32 %r1, %ctaid.x;\nmad.lo.u32 %r1, %r1, 64, %t;\nmad.wide.u32 %d0, %r1, 4, %p0;\nld.global.u32 %r5, [%d0];\n"
        "ld.relaxed.gpu.global.u32 %r6, [%p1];\n"
        "again:\nmax.u32 %r7, %r6, %r5;\natom.global.cas.b32 %r8, [%p1], %r6, %r7;\nsetp.eq.u32 %q0, %r8, %r6;\nmov.u32 %r6, %r8;\n"
        "@!%q0 bra again;"
    )
    args = (Buffer("a", data), Buffer("cell", np.array([1], np.uint32), np.array([data.max()], np.uint32)))
    out.append(Program("atom.global.cas.b32", "9.7.13.13", loop, args, block=64, grid=2))
    body = (
        "mov.u32 %r1, 77;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra end;\natom.global.exch.b32 %r2, [%p0], %r1;\nst.global.u32 [%p1], %r2;\nend:"
    )
    args = (Buffer("cell", np.array([1234], np.uint32), np.array([77], np.uint32)), output("d", np.array([1234], np.uint32)))
    out.append(Program("atom.global.exch.b32", "9.7.13.13", body, args))
    for kind, dtype in (("f16x2", np.float16), ("bf16x2", None)):
        values = (np.arange(64) % 5).astype(np.float32)
        total16 = np.array([values.sum(), 0], np.float32)  # at most 128: exact in bfloat16's 8 bits too
        encode = (lambda v: v.astype(np.float16).view(np.uint16)) if dtype else (lambda v: (v.view(np.uint32) >> 16).astype(np.uint16))
        pairs = np.stack([encode(values), encode(np.zeros_like(values))], 1).copy().view(np.uint32).reshape(-1)
        body = f"mad.wide.u32 %d0, %t, 4, %p0;\nld.global.b32 %r5, [%d0];\nred.global.add.noftz.{kind} [%p1], %r5;"
        args = (Buffer("a", pairs), Buffer("cell", np.zeros(1, np.uint32), encode(total16).view(np.uint32)))
        out.append(Program(f"red.global.add.noftz.{kind}", "9.7.13.14", body, args, block=64))
    return out


def _messages() -> list[Program]:
    """Release and acquire between two CTAs: the second waits for the first's flag, then reads its data."""
    values = WORDS[:64]
    body = (
        "mov.u32 %r1, %ctaid.x;\nsetp.eq.u32 %q0, %r1, 1;\n@%q0 bra reader;\nmad.wide.u32 %d0, %t, 4, %p0;\nld.global.b32 %r2, [%d0];\n"
        "mad.wide.u32 %d1, %t, 4, %p1;\nst.global.b32 [%d1], %r2;\nbar.sync 0;\nsetp.ne.u32 %q1, %t, 0;\n@%q1 bra end;\n"
        "fence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [%p2], 1;\nbra end;\n"
        "reader:\nspin:\nld.acquire.gpu.global.u32 %r3, [%p2];\nsetp.eq.u32 %q2, %r3, 0;\n@%q2 bra spin;\nbar.sync 0;\n"
        "mad.wide.u32 %d1, %t, 4, %p1;\n"
        "ld.global.b32 %r2, [%d1];\nmad.wide.u32 %d3, %t, 4, %p3;\nst.global.b32 [%d3], %r2;\nend:"
    )
    args = (
        Buffer("a", values),
        output("middle", values.copy()),
        Buffer("flag", np.zeros(1, np.uint32), np.ones(1, np.uint32)),
        output("d", values.copy()),
    )
    return [Program("flag between two CTAs", "8, 9.7.13.4", body, args, block=64, grid=2)]


PROGRAMS = [*_vectors(), *_widths(), *_spaces(), *_atomics(), *_messages()]
