"""Bulk copies and reductions without a tensor map: PTX ISA 9.7.9.25.4 and .5."""

from __future__ import annotations

import numpy as np

from tests.emulator.programs.matrix import to_16
from tests.emulator.programs.program import Buffer, Program, output

RNG = np.random.default_rng(61)
BYTES = RNG.integers(0, 256, 8192, dtype=np.uint8)

# The mbarrier lies at smem + 0, data from smem + 128 on.
BARRIER = (
    "mov.u32 %r0, smem;\nadd.u32 %r1, %r0, 128;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra ready;\nmbarrier.init.shared::cta.b64 [%r0], 1;\n"
    "fence.mbarrier_init.release.cluster;\nready:\nbar.sync 0;\n"
)
WAIT = "spin:\nmbarrier.try_wait.parity.shared.b64 %q1, [%r0], 0;\n@!%q1 bra spin;\n"


def copy_out(count: int, argument: int, source: str = "%r1") -> str:
    """All threads copy `count` bytes of shared memory to a buffer, one word at a time."""
    return (
        f"mov.u32 %r20, %t;\ncopy_out:\nsetp.ge.u32 %q2, %r20, {count // 4};\n@%q2 bra copy_end;\nmad.lo.u32 %r21, %r20, 4, {source};\n"
        f"ld.shared.b32 %r22, [%r21];\nmad.wide.u32 %d20, %r20, 4, %p{argument};\nst.global.b32 [%d20], %r22;\nmov.u32 %r23, %ntid.x;\n"
        "add.u32 %r20, %r20, %r23;\nbra copy_out;\ncopy_end:\n"
    )


def copy_in(count: int, argument: int, target: str = "%r1") -> str:
    """All threads copy `count` bytes of a buffer to shared memory; then every thread may hand it to the async proxy."""
    return (
        f"mov.u32 %r20, %t;\ncopy_in:\nsetp.ge.u32 %q2, %r20, {count // 4};\n@%q2 bra copy_done;\nmad.lo.u32 %r21, %r20, 4, {target};\n"
        f"mad.wide.u32 %d20, %r20, 4, %p{argument};\nld.global.b32 %r22, [%d20];\nst.shared.b32 [%r21], %r22;\nmov.u32 %r23, %ntid.x;\n"
        "add.u32 %r20, %r20, %r23;\nbra copy_in;\ncopy_done:\nfence.proxy.async.shared::cta;\nbar.sync 0;\n"
    )


def poison(count: int, target: str = "%r1") -> str:
    """Fill shared memory with the poison of outputs, so that bytes a copy must not write are seen."""
    return (
        f"mov.u32 %r20, %t;\npoison:\nsetp.ge.u32 %q2, %r20, {count // 4};\n@%q2 bra poison_done;\nmad.lo.u32 %r21, %r20, 4, {target};\n"
        "mov.u32 %r22, 0xA5A5A5A5;\nst.shared.b32 [%r21], %r22;\nmov.u32 %r23, %ntid.x;\nadd.u32 %r20, %r20, %r23;\nbra poison;\n"
        "poison_done:\n"
        "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
    )


def _loads() -> list[Program]:
    out = []
    for form in ("shared::cluster.global", "shared::cta.global"):
        for size in (16, 1024, 4096):
            body = (
                BARRIER + f"@%q0 bra started;\nmbarrier.arrive.expect_tx.shared.b64 %d5, [%r0], {size};\n"
                f"cp.async.bulk.{form}.mbarrier::complete_tx::bytes [%r1], [%p0], {size}, [%r0];\nstarted:\n" + WAIT + copy_out(size, 1)
            )
            args = (Buffer("a", BYTES[:size]), output("d", BYTES[:size].copy()))
            out.append(Program(f"cp.async.bulk.{form} {size}", "9.7.9.25.4.1", body, args, block=64, smem_bytes=8192))
    # Several copies on one barrier, the expectation announced before the arrival, with a cache policy.
    body = (
        BARRIER + "@%q0 bra started;\ncreatepolicy.fractional.L2::evict_last.b64 %d9, 1.0;\n"
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r0], 768;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%r1+512], [%p0], 256, [%r0], %d9;\n"
        "add.s64 %d10, %p0, 256;\ncp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d10], 512, [%r0];\n"
        "mbarrier.arrive.shared.b64 %d5, [%r0];\nstarted:\n" + WAIT + copy_out(768, 1)
    )
    want = np.concatenate([BYTES[256:768], BYTES[:256]])
    out.append(
        Program(
            "two bulk copies on one barrier", "9.7.9.25.4.1", body, (Buffer("a", BYTES[:768]), output("d", want)), block=64, smem_bytes=4096
        )
    )
    body = "setp.ne.u32 %q0, %t, 0;\n@!%q0 cp.async.bulk.prefetch.L2.global [%p0], 1024;\nst.global.u8 [%p1], 1;"
    body = body.replace("st.global.u8 [%p1], 1;", "mov.u16 %h1, 1;\nst.global.u8 [%p1], %h1;")
    out.append(Program("cp.async.bulk.prefetch", "9.7.9.25.4.2", body, (Buffer("a", BYTES[:1024]), output("d", np.ones(1, np.uint8)))))
    return out


def _stores() -> list[Program]:
    out = []
    for read in ("", ".read"):
        size = 2048
        body = (
            "mov.u32 %r1, smem;\n"
            + copy_in(size, 0)
            + f"setp.ne.u32 %q0, %t, 0;\n@%q0 bra end;\ncp.async.bulk.global.shared::cta.bulk_group [%p1], [%r1], {size};\n"
            f"cp.async.bulk.commit_group;\ncp.async.bulk.wait_group{read} 0;\nend:"
        )
        args = (Buffer("a", BYTES[:size]), output("d", BYTES[:size].copy()))
        out.append(Program(f"cp.async.bulk.global.shared::cta wait_group{read}", "9.7.9.25.4.1", body, args, block=64, smem_bytes=4096))
    # The source may be overwritten after wait_group.read: the first half is stored twice with different contents.
    body = (
        "mov.u32 %r1, smem;\n"
        + copy_in(1024, 0)
        + "setp.ne.u32 %q0, %t, 0;\n@%q0 bra wait;\ncp.async.bulk.global.shared::cta.bulk_group [%p1], [%r1], 1024;\n"
        "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;\nwait:\nbar.sync 0;\nmad.lo.u32 %r3, %t, 4, %r1;\n"
        "st.shared.u32 [%r3], %t;\n"
        "fence.proxy.async.shared::cta;\nbar.sync 0;\n@%q0 bra end;\nadd.s64 %d9, %p1, 1024;\n"
        "cp.async.bulk.global.shared::cta.bulk_group [%d9], [%r1], 256;\n"
        "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nend:"
    )
    want = np.concatenate([BYTES[:1024], np.arange(64, dtype=np.uint32).view(np.uint8)])
    args = (Buffer("a", BYTES[:1024]), output("d", want))
    out.append(Program("bulk store, source reused", "9.7.9.25.4.1", body, args, block=64, smem_bytes=4096))
    return out


def _reductions() -> list[Program]:
    out = []
    count = 64
    a = RNG.integers(0, 1 << 20, count, dtype=np.uint32)
    b = RNG.integers(0, 1 << 20, count, dtype=np.uint32)
    signed_a, signed_b = a.view(np.int32) - (1 << 19), b.view(np.int32) - (1 << 19)
    whole_a, whole_b = (RNG.integers(-60, 61, count).astype(np.float32) for _ in range(2))
    table: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = [
        ("add.u32", a, b, a + b),
        ("add.s32", signed_a, signed_b, signed_a + signed_b),
        ("min.u32", a, b, np.minimum(a, b)),
        ("max.s32", signed_a, signed_b, np.maximum(signed_a, signed_b)),
        ("and.b32", a, b, a & b),
        ("or.b32", a, b, a | b),
        ("xor.b32", a, b, a ^ b),
        ("add.f32", whole_a, whole_b, whole_a + whole_b),
        ("add.u64", a.astype(np.uint64) << np.uint64(30), b.astype(np.uint64), (a.astype(np.uint64) << np.uint64(30)) + b),
    ]
    for kind in ("f16", "bf16"):
        table.append((f"add.noftz.{kind}", to_16(whole_a, kind), to_16(whole_b, kind), to_16(whole_a + whole_b, kind)))
        table.append((f"min.{kind}", to_16(whole_a, kind), to_16(whole_b, kind), to_16(np.minimum(whole_a, whole_b), kind)))
        table.append((f"max.{kind}", to_16(whole_a, kind), to_16(whole_b, kind), to_16(np.maximum(whole_a, whole_b), kind)))
    for name, first, second, want in table:
        size = first.nbytes
        body = (
            "mov.u32 %r1, smem;\n"
            + copy_in(size, 0)
            + f"setp.ne.u32 %q0, %t, 0;\n@%q0 bra end;\ncp.reduce.async.bulk.global.shared::cta.bulk_group.{name} [%p1], [%r1], {size};\n"
            "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nend:"
        )
        args = (Buffer("a", first), Buffer("d", second, want.astype(second.dtype)))
        out.append(Program(f"cp.reduce.async.bulk.{name}", "9.7.9.25.5", body, args, block=32, smem_bytes=1024))
    return out


PROGRAMS = [*_loads(), *_stores(), *_reductions()]
