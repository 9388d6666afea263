"""Non-bulk asynchronous copies, `cp.async`: PTX ISA 9.7.9.25.3."""

from __future__ import annotations

import numpy as np

from tests.emulator.programs.program import Buffer, Program, output

RNG = np.random.default_rng(31)
BYTES = RNG.integers(0, 256, 4096, dtype=np.uint8)

ADDRESSES = "mad.wide.u32 %d0, %t, {size}, %p0;\nmad.wide.u32 %d1, %t, {size}, %p1;\nmov.u32 %r0, smem;\nmad.lo.u32 %r1, %t, {size}, %r0;\n"
READ = {
    4: "ld.shared.b32 %r4, [%r1{offset}];\nst.global.b32 [%d1{offset}], %r4;\n",
    8: "ld.shared.v2.b32 {{%r4, %r5}}, [%r1{offset}];\nst.global.v2.b32 [%d1{offset}], {{%r4, %r5}};\n",
    16: "ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1{offset}];\nst.global.v4.b32 [%d1{offset}], {{%r4, %r5, %r6, %r7}};\n",
}


def _sizes() -> list[Program]:
    out = []
    for size, cache in ((4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")):
        data = BYTES[: 32 * size]
        head = ADDRESSES.format(size=size)
        tail = "cp.async.commit_group;\ncp.async.wait_group 0;\n" + READ[size].format(offset="")
        body = f"{head}cp.async.{cache}.shared.global [%r1], [%d0], {size};\n{tail}"
        out.append(Program(f"cp.async.{cache} {size}", "9.7.9.25.3.1", body, (Buffer("a", data), output("d", data)), smem_bytes=1024))
        # The source is shorter than the copy: the rest is zeros. A source of 0 bytes reads nothing.
        lengths = np.array([i % (size + 1) for i in range(32)], np.uint32)
        want = data.copy().reshape(32, size)
        for i, length in enumerate(lengths):
            want[i, length:] = 0
        body = (
            f"{head}mad.wide.u32 %d2, %t, 4, %p2;\nld.global.u32 %r3, [%d2];\n"
            f"cp.async.{cache}.shared.global [%r1], [%d0], {size}, %r3;\n{tail}"
        )
        args = (Buffer("a", data), output("d", want.reshape(-1)), Buffer("n", lengths))
        out.append(Program(f"cp.async.{cache} {size} zero fill", "9.7.9.25.3.1", body, args, smem_bytes=1024))
    data = BYTES[:512]
    body = (
        ADDRESSES.format(size=16)
        + "cp.async.cg.shared.global.L2::128B [%r1], [%d0], 16;\ncp.async.wait_all;\n"
        + READ[16].format(offset="")
    )
    out.append(Program("cp.async with L2 prefetch", "9.7.9.25.3.1", body, (Buffer("a", data), output("d", data)), smem_bytes=1024))
    # An ignored source (predicate true) fills with zeros.
    want = data.copy().reshape(32, 16)
    want[1::2] = 0
    body = (
        ADDRESSES.format(size=16) + "and.b32 %r3, %t, 1;\nsetp.eq.u32 %q0, %r3, 1;\ncp.async.cg.shared.global [%r1], [%d0], 16, %q0;\n"
        "cp.async.wait_all;\n" + READ[16].format(offset="")
    )
    out.append(Program("cp.async ignore-src", "9.7.9.25.3.1", body, (Buffer("a", data), output("d", want.reshape(-1))), smem_bytes=1024))
    return out


def _groups() -> list[Program]:
    """Three groups in flight; each is read as soon as its wait allows."""
    data = BYTES[: 3 * 512]
    body = ADDRESSES.format(size=16)
    for i in range(3):
        body += f"cp.async.cg.shared.global [%r1+{512 * i}], [%d0+{512 * i}], 16;\ncp.async.commit_group;\n"
    for i in range(3):
        body += f"cp.async.wait_group {2 - i};\n" + READ[16].format(offset=f"+{512 * i}")
    out = [Program("cp.async.wait_group in order", "9.7.9.25.3.3", body, (Buffer("a", data), output("d", data)), smem_bytes=2048)]
    # Threads read what their neighbours copied: a barrier after the wait.
    data = BYTES[: 128 * 16]
    want = data.reshape(128, 16)[::-1].reshape(-1).copy()
    body = (
        ADDRESSES.format(size=16)
        + "cp.async.cg.shared.global [%r1], [%d0], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;\nbar.sync 0;\n"
        "sub.u32 %r2, 127, %t;\nmad.lo.u32 %r1, %r2, 16, %r0;\n" + READ[16].format(offset="")
    )
    out.append(Program("cp.async across warps", "9.7.9.25.3", body, (Buffer("a", data), output("d", want)), block=128, smem_bytes=4096))
    # Arrival on an mbarrier when the thread's copies are done.
    for noinc in (False, True):
        # Without .noinc the arrival first raises the pending count, so that every thread still owes its own.
        arrive = "" if noinc else "mbarrier.arrive.shared.b64 %d5, [%r10];\n"
        count = 128
        body = (
            ADDRESSES.format(size=16)
            + f"add.u32 %r10, %r0, 4096;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra ready;\nmbarrier.init.shared.b64 [%r10], {count};\n"
            "ready:\nbar.sync 0;\ncp.async.cg.shared.global [%r1], [%d0], 16;\n"
            f"cp.async.mbarrier.arrive{'.noinc' * noinc}.shared.b64 [%r10];\n{arrive}"
            "spin:\nmbarrier.try_wait.parity.shared.b64 %q1, [%r10], 0;\n@!%q1 bra spin;\n"
            "sub.u32 %r2, 127, %t;\nmad.lo.u32 %r1, %r2, 16, %r0;\n" + READ[16].format(offset="")
        )
        out.append(
            Program(
                f"cp.async.mbarrier.arrive{'.noinc' * noinc}", "9.7.13.15.15", body, (Buffer("a", data), output("d", want)), block=128,
                smem_bytes=8192,
            )
        )  # fmt: skip
    return out


PROGRAMS = [*_sizes(), *_groups()]
