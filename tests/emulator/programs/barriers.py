"""mbarrier objects (PTX ISA 9.7.13.15), named barriers (9.7.13.1) and setmaxnreg (9.7.19.5)."""

from __future__ import annotations

import numpy as np

from tests.emulator.programs.program import Buffer, Program, output

RNG = np.random.default_rng(51)
WORDS = RNG.integers(0, 1 << 32, 512, dtype=np.uint32)

# Thread 0 makes the barrier at smem + 0; everybody waits until it is there.
INIT = (
    "mov.u32 %r0, smem;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra ready;\nmbarrier.init.shared.b64 [%r0], {count};\n"
    "fence.mbarrier_init.release.cluster;\n"
    "ready:\nbar.sync 0;\n"
)
GLOBAL = "mad.wide.u32 %d0, %t, 4, %p0;\nld.global.b32 %r1, [%d0];\nmad.wide.u32 %d1, %t, 4, %p1;\nmad.lo.u32 %r3, %t, 4, %r0;\n"


def _exchange(name: str, section: str, count: int, arrive: str, wait: str, init: str = INIT) -> Program:
    """All 128 threads write a word, arrive, wait, and read the word of another warp."""
    data = WORDS[:128]
    body = (
        init.format(count=count) + GLOBAL + "st.shared.b32 [%r3+64], %r1;\n" + arrive + wait
        + "sub.u32 %r4, 127, %t;\nmad.lo.u32 %r4, %r4, 4, %r0;\nld.shared.b32 %r5, [%r4+64];\nst.global.b32 [%d1], %r5;"
    )  # fmt: skip
    return Program(name, section, body, (Buffer("a", data), output("d", data[::-1].copy())), block=128, smem_bytes=1024)


PARITY_WAIT = "spin:\nmbarrier.{op}.parity{mods}.b64 %q1, [%r0], 0;\n@!%q1 bra spin;\n"


def _mbarrier_forms() -> list[Program]:
    plain = "mbarrier.arrive.shared.b64 %d5, [%r0];\n"
    waits = {
        "try_wait.parity.shared": PARITY_WAIT.format(op="try_wait", mods=".shared"),
        "try_wait.parity.shared::cta": PARITY_WAIT.format(op="try_wait", mods=".shared::cta"),
        "try_wait.parity.acquire.cta": PARITY_WAIT.format(op="try_wait", mods=".acquire.cta.shared::cta"),
        "test_wait.parity": PARITY_WAIT.format(op="test_wait", mods=".shared"),
        "try_wait with state": "spin:\nmbarrier.try_wait.shared.b64 %q1, [%r0], %d5;\n@!%q1 bra spin;\n",
        "test_wait with state": "spin:\nmbarrier.test_wait.shared.b64 %q1, [%r0], %d5;\n@!%q1 bra spin;\n",
        "try_wait with time limit": "mov.u32 %r9, 0x989680;\nspin:\nmbarrier.try_wait.parity.shared.b64 %q1, [%r0], 0, %r9;\n"
        "@!%q1 bra spin;\n",
        # The DSL's form: branch to a label past the loop.
        "try_wait in a loop block": (
            "{\n.reg .pred P1;\nLAB_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P1, [%r0], 0, 0x989680;\n@P1 bra.uni DONE;\n"
            "bra.uni LAB_WAIT;\nDONE:\n}\n"
        ),
    }
    out = [_exchange(f"mbarrier {name}", "9.7.13.15.16", 128, plain, wait) for name, wait in waits.items()]
    wait = waits["try_wait.parity.shared"]
    out += [
        _exchange("mbarrier.arrive sink", "9.7.13.15.13", 128, "mbarrier.arrive.shared::cta.b64 _, [%r0];\n", wait),
        _exchange("mbarrier.arrive.release.cta", "9.7.13.15.13", 128, "mbarrier.arrive.release.cta.shared::cta.b64 %d5, [%r0];\n", wait),
        _exchange("mbarrier.arrive with count", "9.7.13.15.13", 384, "mbarrier.arrive.shared.b64 %d5, [%r0], 3;\n", wait),
        _exchange(
            "mbarrier.arrive.noComplete", "9.7.13.15.13", 256,
            "mbarrier.arrive.noComplete.shared.b64 %d6, [%r0], 1;\n" + plain, wait,
        ),
        _exchange(
            "mbarrier.arrive one a warp", "9.7.13.15.13", 4,
            "bar.warp.sync 0xffffffff;\nsetp.eq.u32 %q2, %lane, 0;\n@%q2 mbarrier.arrive.shared.b64 %d5, [%r0];\n", wait,
        ),
        # The transaction count must be used up too: one thread expects 64 bytes, another completes them.
        _exchange(
            "mbarrier.arrive.expect_tx and complete_tx", "9.7.13.15.11", 128,
            "setp.eq.u32 %q2, %t, 0;\n@%q2 mbarrier.arrive.expect_tx.shared.b64 %d5, [%r0], 64;\n"
            "@!%q2 mbarrier.arrive.shared.b64 %d5, [%r0];\n"
            "setp.eq.u32 %q3, %t, 77;\n@%q3 mbarrier.complete_tx.shared::cta.relaxed.cluster.b64 [%r0], 64;\n", wait,
        ),
        _exchange(
            "mbarrier.expect_tx then arrive", "9.7.13.15.11", 128,
            "setp.eq.u32 %q2, %t, 0;\n@%q2 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r0], 32;\n"
            "@%q2 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r0], 32;\nmbarrier.arrive.shared.b64 %d5, [%r0];\n", wait,
        ),
    ]  # fmt: skip
    return [fix_complete_tx(p) for p in out]


def fix_complete_tx(program: Program) -> Program:
    """`mbarrier.complete_tx` has its modifiers in one order only: .sem.scope.space."""
    from dataclasses import replace

    return replace(program, body=program.body.replace("complete_tx.shared::cta.relaxed.cluster", "complete_tx.relaxed.cluster.shared::cta"))


def _mbarrier_phases() -> list[Program]:
    """A ring of two stages between a producer warp and a consumer warp, eight rounds: phases flip, parity waits follow."""
    rounds, stages = 8, 2
    data = WORDS[: 32 * rounds]
    want = data + np.uint32(1)
    # full[s] at smem + 8 s, empty[s] at smem + 16 + 8 s, data[s] at smem + 64 + 128 s.
    head = (
        "mov.u32 %r0, smem;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra ready;\nmbarrier.init.shared.b64 [%r0], 32;\n"
        "mbarrier.init.shared.b64 [%r0+8], 32;\n"
        "mbarrier.init.shared.b64 [%r0+16], 32;\nmbarrier.init.shared.b64 [%r0+24], 32;\nready:\nbar.sync 0;\nmov.u32 %r10, 0;\n"
        "setp.eq.u32 %q5, %warp, 1;\n@%q5 bra consumer;\n"
    )
    step = (
        f"and.b32 %r11, %r10, {stages - 1};\nshr.u32 %r12, %r10, 1;\nand.b32 %r12, %r12, 1;\nmad.lo.u32 %r13, %r11, 8, %r0;\n"
        "mad.lo.u32 %r14, %r11, 128, %r0;\nmad.lo.u32 %r14, %lane, 4, %r14;\nmad.lo.u32 %r15, %r10, 32, %lane;\n"
    )
    producer = (
        f"produce:\n{step}xor.b32 %r16, %r12, 1;\nwait_empty:\nmbarrier.try_wait.parity.shared.b64 %q1, [%r13+16], %r16;\n"
        f"@!%q1 bra wait_empty;\n"
        "mad.wide.u32 %d0, %r15, 4, %p0;\nld.global.b32 %r17, [%d0];\nst.shared.b32 [%r14+64], %r17;\n"
        "mbarrier.arrive.shared.b64 %d5, [%r13];\n"
        f"add.u32 %r10, %r10, 1;\nsetp.lt.u32 %q2, %r10, {rounds};\n@%q2 bra produce;\nbra end;\n"
    )
    consumer = (
        f"consumer:\nconsume:\n{step}wait_full:\nmbarrier.try_wait.parity.shared.b64 %q1, [%r13], %r12;\n@!%q1 bra wait_full;\n"
        "ld.shared.b32 %r17, [%r14+64];\nadd.u32 %r17, %r17, 1;\nmad.wide.u32 %d1, %r15, 4, %p1;\nst.global.b32 [%d1], %r17;\n"
        f"mbarrier.arrive.shared.b64 %d5, [%r13+16];\nadd.u32 %r10, %r10, 1;\nsetp.lt.u32 %q2, %r10, {rounds};\n@%q2 bra consume;\nend:"
    )
    ring = Program(
        "mbarrier ring of two stages",
        "9.7.13.15",
        head + producer + consumer,
        (Buffer("a", data), output("d", want)),
        block=64,
        smem_bytes=1024,
    )
    # pending_count of a state, and re-initialisation after inval.
    body = (
        "mov.u32 %r0, smem;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra end;\nmbarrier.init.shared.b64 [%r0], 5;\n"
        "mbarrier.arrive.shared.b64 %d5, [%r0], 2;\n"
        "mbarrier.arrive.shared.b64 %d6, [%r0];\nmbarrier.pending_count.b64 %r1, %d5;\nmbarrier.pending_count.b64 %r2, %d6;\n"
        "mbarrier.test_wait.shared.b64 %q1, [%r0], %d5;\nselp.u32 %r3, 1, 0, %q1;\nmbarrier.arrive.shared.b64 %d7, [%r0], 2;\n"
        "mbarrier.test_wait.shared.b64 %q1, [%r0], %d5;\nselp.u32 %r4, 1, 0, %q1;\nmbarrier.inval.shared.b64 [%r0];\n"
        "mbarrier.init.shared.b64 [%r0], 1;\n"
        "mbarrier.test_wait.parity.shared.b64 %q1, [%r0], 1;\nselp.u32 %r5, 1, 0, %q1;\nst.global.v4.b32 [%p0], {%r1, %r2, %r3, %r4};\n"
        "st.global.b32 [%p0+16], %r5;\nend:"
    )
    # The pending count is that before the arrival: 5, then 3. A parity wait for the phase before the first succeeds at once.
    states = Program(
        "mbarrier.pending_count and inval", "9.7.13.15.17", body, (output("d", np.array([5, 3, 0, 1, 1], np.uint32)),), smem_bytes=1024
    )
    return [ring, states]


def _named() -> list[Program]:
    data = WORDS[:128]
    exchange = (
        "mov.u32 %r0, smem;\n" + GLOBAL + "st.shared.b32 [%r3], %r1;\n{barrier}\nsub.u32 %r4, 127, %t;\nmad.lo.u32 %r4, %r4, 4, %r0;\n"
        "ld.shared.b32 %r5, [%r4];\nst.global.b32 [%d1], %r5;"
    )
    args = (Buffer("a", data), output("d", data[::-1].copy()))
    out = []
    for name, barrier in {
        "bar.sync 0": "bar.sync 0;",
        "bar.sync with count": "bar.sync 3, 128;",
        "barrier.sync": "barrier.sync 1;",
        "barrier.sync.aligned": "barrier.sync.aligned 2, 128;",
        "barrier.cta.sync.aligned.all": "barrier.cta.sync.aligned 15, 128;",
        "bar.sync of a register": "mov.u32 %r9, 7;\nmov.u32 %r10, 128;\nbar.sync %r9, %r10;",
        "bar.sync three times": "bar.sync 1, 128;\nbar.sync 1, 128;\nbar.sync 1, 128;",
    }.items():
        out.append(Program(name, "9.7.13.1", exchange.format(barrier=barrier), args, block=128, smem_bytes=1024))
    # Warps 0 and 1 produce and only arrive; warps 2 and 3 wait and read.
    body = (
        "mov.u32 %r0, smem;\nand.b32 %r2, %t, 63;\nmad.lo.u32 %r3, %r2, 4, %r0;\nmad.wide.u32 %d0, %r2, 4, %p0;\n"
        "mad.wide.u32 %d1, %r2, 4, %p1;\n"
        "setp.ge.u32 %q0, %t, 64;\n@%q0 bra consumer;\nld.global.b32 %r1, [%d0];\nst.shared.b32 [%r3], %r1;\nbar.arrive 5, 128;\nbra end;\n"
        "consumer:\nbar.sync 5, 128;\nsub.u32 %r4, 63, %r2;\nmad.lo.u32 %r4, %r4, 4, %r0;\nld.shared.b32 %r5, [%r4];\n"
        "st.global.b32 [%d1], %r5;\nend:"
    )
    out.append(
        Program(
            "bar.arrive and bar.sync",
            "9.7.13.1",
            body,
            (Buffer("a", data[:64]), output("d", data[:64][::-1].copy())),
            block=128,
            smem_bytes=1024,
        )
    )
    # Ping-pong between two warps over two named barriers: the order of the rounds is fixed.
    body = (
        "mov.u32 %r0, smem;\nsetp.ne.u32 %q9, %t, 0;\n@%q9 bra go;\nmov.u32 %r1, 1;\nst.shared.u32 [%r0], %r1;\ngo:\nbar.sync 0;\n"
        "mov.u32 %r10, 0;\n"
        "setp.eq.u32 %q0, %warp, 1;\n@%q0 bra second;\nfirst:\nsetp.eq.u32 %q1, %lane, 0;\n@!%q1 bra skip1;\nld.shared.u32 %r1, [%r0];\n"
        "mad.lo.u32 %r1, %r1, 3, 0;\n"
        "st.shared.u32 [%r0], %r1;\nskip1:\nbar.arrive 1, 64;\nbar.sync 2, 64;\nadd.u32 %r10, %r10, 1;\nsetp.lt.u32 %q2, %r10, 5;\n"
        "@%q2 bra first;\nbra end;\n"
        "second:\nbar.sync 1, 64;\nsetp.eq.u32 %q1, %lane, 0;\n@!%q1 bra skip2;\nld.shared.u32 %r1, [%r0];\nadd.u32 %r1, %r1, 7;\n"
        "st.shared.u32 [%r0], %r1;\n"
        "skip2:\nbar.arrive 2, 64;\nadd.u32 %r10, %r10, 1;\nsetp.lt.u32 %q2, %r10, 5;\n@%q2 bra second;\nend:\nbar.sync 0;\n"
        "@%q9 bra done;\nld.shared.u32 %r1, [%r0];\nst.global.u32 [%p0], %r1;\ndone:"
    )
    value = 1
    for _ in range(5):
        value = value * 3 + 7
    out.append(
        Program(
            "two named barriers in ping-pong", "9.7.13.1", body, (output("d", np.array([value], np.uint32)),), block=64, smem_bytes=1024
        )
    )
    for op, function in (("or", any), ("and", all)):
        flags = (np.arange(64) == 40).astype(np.uint32) if op == "or" else (np.arange(64) != 40).astype(np.uint32)
        body = (
            "mad.wide.u32 %d0, %t, 4, %p0;\nld.global.u32 %r1, [%d0];\nsetp.ne.u32 %q0, %r1, 0;\n"
            f"bar.red.{op}.pred %q1, 0, %q0;\nselp.u32 %r2, 1, 0, %q1;\nmad.wide.u32 %d1, %t, 4, %p1;\nst.global.u32 [%d1], %r2;"
        )
        args = (Buffer("a", flags), output("d", np.full(64, int(function(flags)), np.uint32)))
        out.append(Program(f"bar.red.{op}", "9.7.13.1", body, args, block=64))
    body = (
        "mad.wide.u32 %d0, %t, 4, %p0;\nld.global.u32 %r1, [%d0];\nsetp.ne.u32 %q0, %r1, 0;\nbar.red.popc.u32 %r2, 0, %q0;\n"
        "mad.wide.u32 %d1, %t, 4, %p1;\nst.global.u32 [%d1], %r2;"
    )
    flags = (np.arange(64) % 3 == 0).astype(np.uint32)
    out.append(Program("bar.red.popc", "9.7.13.1", body, (Buffer("a", flags), output("d", np.full(64, flags.sum(), np.uint32))), block=64))
    return out


def _registers() -> list[Program]:
    """One warpgroup gives registers back, the other takes them: the values survive."""
    body = (
        "mov.u32 %r1, %t;\nsetp.ge.u32 %q0, %t, 128;\n@%q0 bra more;\nsetmaxnreg.dec.sync.aligned.u32 24;\nadd.u32 %r1, %r1, 1000;\n"
        "bra end;\nmore:\n"
        "setmaxnreg.inc.sync.aligned.u32 232;\nadd.u32 %r1, %r1, 5000;\nend:\nmad.wide.u32 %d0, %t, 4, %p0;\nst.global.u32 [%d0], %r1;"
    )
    threads = np.arange(256, dtype=np.uint32)
    want = threads + np.where(threads < 128, 1000, 5000).astype(np.uint32)
    return [Program("setmaxnreg", "9.7.19.5", body, (output("d", want),), block=256, directives=".minnctapersm 1\n.maxnreg 128\n")]


PROGRAMS = [*_mbarrier_forms(), *_mbarrier_phases(), *_named(), *_registers()]
