"""Of a grid: griddepcontrol (PTX ISA 9.7.13.12), clusterlaunchcontrol (9.7.13.17), special registers and clocks (10)."""

from __future__ import annotations

import numpy as np

from tests.emulator.programs.program import Buffer, Program, output


def _special() -> list[Program]:
    names = ("tid.x", "tid.y", "ntid.x", "ntid.y", "ctaid.x", "ctaid.y", "nctaid.x", "nctaid.y", "laneid")
    body = (
        "mov.u32 %r42, %ctaid.x;\nmov.u32 %r43, %ntid.x;\nmad.lo.u32 %r43, %r42, %r43, %t;\nmul.wide.u32 %d0, %r43, 48;\n"
        "add.s64 %d0, %d0, %p0;\n"
    )
    columns = []
    for name in names:
        body += f"mov.u32 %r1, %{name};\nst.global.u32 [%d0+{4 * len(columns)}], %r1;\n"
        columns.append(name)
    body += (
        "mov.u32 %r1, %lanemask_lt;\nst.global.u32 [%d0+36], %r1;\nmov.u32 %r1, %lanemask_ge;\nst.global.u32 [%d0+40], %r1;\n"
        "mov.u32 %r1, %lanemask_eq;\nst.global.u32 [%d0+44], %r1;"
    )
    want = np.zeros((3, 64, 12), np.uint32)
    for cta in range(3):
        for tid in range(64):
            lane = tid % 32
            want[cta, tid] = [tid, 0, 64, 1, cta, 0, 3, 1, lane, (1 << lane) - 1, 0xFFFFFFFF << lane & 0xFFFFFFFF, 1 << lane]
    special = Program("special registers", "10", body, (output("d", want),), block=64, grid=3)

    def clocks(got: np.ndarray) -> None:
        first, second, third, fourth = (int(v) for v in got)
        assert second > first, f"%clock64 went from {first} to {second}"
        assert fourth >= third > 0, f"%globaltimer went from {third} to {fourth}"

    body = (
        "mov.u64 %d1, %clock64;\nmov.u64 %d3, %globaltimer;\nmov.u32 %r1, 0;\nwork:\nadd.u32 %r1, %r1, 1;\nsetp.lt.u32 %q0, %r1, 50;\n"
        "@%q0 bra work;\n"
        "mov.u64 %d2, %clock64;\nmov.u64 %d4, %globaltimer;\nst.global.v2.u64 [%p0], {%d1, %d2};\nst.global.v2.u64 [%p0+16], {%d3, %d4};"
    )
    clock = Program("clocks", "10.23, 10.26", body, (Buffer("d", np.zeros(4, np.uint64), check=clocks),))
    body = (
        "mov.u32 %r1, %dynamic_smem_size;\nmov.u32 %r2, %total_smem_size;\nsetp.ge.u32 %q0, %r2, %r1;\nselp.u32 %r2, 1, 0, %q0;\n"
        "st.global.v2.u32 [%p0], {%r1, %r2};"
    )
    smem = Program("shared memory sizes", "10.30", body, (output("d", np.array([4096, 1], np.uint32)),), smem_bytes=4096)
    return [special, clock, smem]


def _dependent() -> list[Program]:
    """Programmatic dependent launch, both halves in one kernel that is launched alone: both are then no-ops."""
    body = "griddepcontrol.wait;\nmad.wide.u32 %d0, %t, 4, %p0;\nst.global.u32 [%d0], %t;\ngriddepcontrol.launch_dependents;"
    return [Program("griddepcontrol", "9.7.13.12", body, (output("d", np.arange(32, dtype=np.uint32)),))]


def _launch_control() -> list[Program]:
    """CTAs take over the work of CTAs that have not started; every cell is written once, whoever does it (sm_100a)."""
    body = (
        "mov.u32 %r0, smem;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra ready;\nmbarrier.init.shared.b64 [%r0+16], 1;\n"
        "fence.mbarrier_init.release.cluster;\nready:\nbar.sync 0;\n"
        "mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, 0;\nwork:\nmad.lo.u32 %r3, %r1, 32, %t;\nmad.wide.u32 %d0, %r3, 4, %p0;\n"
        "red.global.add.u32 [%d0], %r1;\n"
        "@%q0 bra wait;\nfence.proxy.async.shared::cta;\nmbarrier.arrive.expect_tx.shared.b64 %d5, [%r0+16], 16;\nadd.u32 %r4, %r0, 16;\n"
        "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r0], [%r4];\nwait:\n"
        "spin:\nmbarrier.try_wait.parity.shared.b64 %q1, [%r0+16], %r2;\n@!%q1 bra spin;\nxor.b32 %r2, %r2, 1;\n"
        "{\n.reg .b128 handle;\n.reg .b64 lo, hi;\nld.shared.v2.b64 {lo, hi}, [%r0];\nmov.b128 handle, {lo, hi};\n"
        "clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %q3, handle;\n"
        "@%q3 clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r1, %r5, %r6, %r7}, handle;\n}\n"
        "fence.proxy.async.shared::cta;\nbar.sync 0;\n@%q3 bra work;"
    )
    want = np.repeat(np.arange(12, dtype=np.uint32), 32)
    cells = Buffer("d", np.zeros(12 * 32, np.uint32), want)
    return [Program("clusterlaunchcontrol", "9.7.13.17", body, (cells,), grid=12, smem_bytes=1024, target="sm_100a")]


PROGRAMS = [*_special(), *_dependent(), *_launch_control()]
