"""The replay with modelled times: what it must hold for any kernel, and units by hand for small recordings."""

from dataclasses import replace

import numpy as np
import pytest

from fa4_backend.emulator.recorded_step import Step
from fa4_backend.emulator.recording import PIPES, Recording, lag, pipe_cycles, port_bytes
from fa4_backend.emulator.replay import Replay
from fa4_backend.emulator.timing import TIMINGS
from tests.emulator.harness import run_program
from tests.emulator.programs import load_family

# Round figures, so that sums by hand name what went in.
TIMING = replace(
    TIMINGS["sm_100a"], barrier=0.0, copy_latency=500.0, remote=70.0, product_ss=100.0, product_ts=80.0, pair_ss=160.0, shuffle=24.0
)


def steps(*events: tuple[str, int, list[tuple[int, int]]]) -> list[Step]:
    """(kind, issue slots before it, edges)."""
    return [Step(kind, np.array([issue, 0, 0, 0, 0]), 0, edges) for kind, issue, edges in events]


def test_a_wait_ends_with_the_last_arrival_and_the_latency() -> None:
    recording = Recording(
        [steps(("arrive", 10, [(0, 0)])), steps(("arrive", 100, [(0, 0)])), steps(("wait", 5, [(0, 0)]), ("end", 1, []))],
        ["early", "late", "waiter"],
        warps_per_cta=3,
    )
    times = Replay(recording, replace(TIMING, barrier=20.0)).run()
    assert times.total == pytest.approx(121)
    assert times.waits["waiter"] == pytest.approx({"late": 115})
    assert sum(times.critical.values()) == pytest.approx(times.total)


def test_warps_of_a_scheduler_share_its_slots() -> None:
    work = [steps(("end", 64, [])) for _ in range(5)]  # warps 0 and 4 are on one scheduler
    assert Replay(Recording(work, ["warp"] * 5, warps_per_cta=5), TIMING).run().total == pytest.approx(128)


def test_copies_and_products_by_hand() -> None:
    copy, product, commit = steps(("copy", 1, [(0, 0)]), ("mma", 1, []), ("commit", 0, [(1, 0)]))
    copy.smem_bytes = {0: 4096}
    product.smem_bytes, product.flops = {0: 4096}, {0: 8192 * 64}
    waits = steps(("wait", 0, [(0, 0)]))[0], steps(("wait", 0, [(1, 0)]))[0]
    recording = Recording([[copy], [waits[0], product, commit, waits[1]]], ["load", "mma"], warps_per_cta=2)
    times = Replay(recording, TIMING).run()
    # One slot, 4096 bytes at 64 a cycle, the latency; one slot, 64 cycles of product, and its way out of the tensor core.
    assert times.total == pytest.approx(1 + 64 + 500 + 1 + 64 + 100)
    assert (times.tensor_busy, times.smem_busy) == pytest.approx((64, 64))


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("ex2.approx.ftz.f32", (1, 8, 0, 0, 0)),
        ("fma.rn.f32x2", (1, 0, 2, 0, 0)),
        ("add.f32", (1, 0, 1, 0, 0)),
        ("max.f32", (1, 0, 0, 2, 0)),
        ("cvt.rn.bf16x2.f32", (1, 0, 0, 2, 0)),
        ("cvt.f32.f16", (1, 0, 1, 0, 0)),
        ("cvt.rn.f16x2.e4m3x2", (1, 0, 0, 2, 0)),
        ("tcgen05.ld.sync.aligned.32x32b.x32.b32", (1, 0, 0, 0, 32)),
        ("mbarrier.try_wait.parity.shared.b64", (1, 0, 0, 0, 0)),
        ("mov.b64", (0, 0, 0, 0, 0)),
    ],
)
def test_cycles_of_an_instruction(opcode: str, expected: tuple[int, ...]) -> None:
    assert pipe_cycles(opcode, "sm_100a") == expected


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("ld.shared.v4.b32", 512),
        ("st.shared.v2.b64", 512),
        ("st.shared.b32", 128),
        ("ld.shared.b16", 64),
        ("stmatrix.sync.aligned.m8n8.x4.shared.b16", 512),
        ("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", 256),
        ("ld.global.v4.b32", 0),
        ("shl.b32", 0),
    ],
)
def test_shared_memory_bytes_of_an_instruction(opcode: str, expected: int) -> None:
    assert port_bytes(opcode) == expected


def test_what_warps_load_and_store_takes_the_port() -> None:
    """Two warps of different schedulers, 4096 bytes each beside 16 issue slots: the port's 128 bytes a cycle are the bound."""
    work = [steps(("end", 16, [])) for _ in range(2)]
    for (step,) in work:
        step.port = 4096
    recording = Recording(work, ["warp"] * 2, warps_per_cta=2)
    times = Replay(recording, TIMING).run()
    assert (times.total, times.smem_busy) == pytest.approx((64, 64)) and recording.port_bytes() == 8192


def test_bulk_stores_are_waited_for_until_the_port_has_read_them() -> None:
    """4096 bytes at 64 a cycle beside a copy of as many; the port serves both, and no latency is waited for."""
    copy, store, wait = steps(("copy", 1, [(0, 0)]), ("store", 0, [(-5, 0)]), ("wait", 0, [(-5, 0)]))
    copy.smem_bytes, store.smem_bytes = {0: 4096}, {0: 4096}
    times = Replay(Recording([[copy, store, wait]], ["epilogue"], warps_per_cta=1), TIMING).run()
    assert times.total == pytest.approx(1 + 64, rel=0.2) and times.smem_busy == pytest.approx(64)
    assert times.waits["epilogue"]["stores"] == pytest.approx(times.total - 1)


def test_a_recording_keeps_bulk_stores_and_who_waits_for_them() -> None:
    """A step of the store's bytes and a wait for its group, in the replay as well."""
    program = next(p for p in load_family("bulk") if p.name == "cp.async.bulk.global.shared::cta wait_group.read")
    recording = Recording()
    run_program(program, trace=recording)
    (store,) = (step for steps in recording.warps for step in steps if step.kind == "store")
    waits = [step for steps in recording.warps for step in steps if step.kind == "wait" and step.edges == store.edges]
    assert store.smem_bytes == {0: next(b for b in program.buffers if b.name == "d").data.nbytes} and len(waits) == 1
    assert Replay(recording, TIMING).run().waits["other"]["stores"] > 0


def test_a_store_that_all_lanes_issue_alike_is_one() -> None:
    """flash-attn-4 stores its tiles by whole warps."""
    program = next(p for p in load_family("bulk") if p.name == "cp.async.bulk.global.shared::cta wait_group.read")
    recording, body = Recording(), program.body.replace("setp.ne.u32 %q0, %t, 0;", "setp.ge.u32 %q0, %t, 32;")
    assert body != program.body
    run_program(replace(program, body=body), trace=recording, detect_races=True)
    (store,) = (step for steps in recording.warps for step in steps if step.kind == "store")
    assert store.smem_bytes == {0: 2048}


def test_an_arrival_from_another_sm_comes_later() -> None:
    arrival, wait = steps(("arrive", 10, [(0, 0)])), steps(("wait", 0, [(0, 0)]))
    arrival[0].is_remote = True
    assert Replay(Recording([arrival, wait], ["a", "b"], warps_per_cta=1), TIMING).run().total == pytest.approx(10 + 70)


@pytest.mark.parametrize(("is_ts", "ctas", "drain"), [(False, 1, 100), (True, 1, 80), (False, 2, 160)])
def test_products_leave_the_tensor_core_later_than_they_end(is_ts: bool, ctas: int, drain: int) -> None:
    """A barrier's own cost is in the measured figure already: it must not be counted twice."""
    product, commit, wait = steps(("mma", 0, []), ("commit", 0, [(0, 0)]), ("wait", 0, [(0, 0)]))
    product.flops, product.is_ts = dict.fromkeys(range(ctas), 8192 * 64), is_ts
    warps = [[product, commit, wait]] + [[] for _ in range(ctas - 1)]
    for barrier in (0.0, 30.0):
        recording = Recording(warps, ["mma"] * ctas, warps_per_cta=1)
        assert Replay(recording, replace(TIMING, barrier=barrier)).run().total == pytest.approx(64 + drain)


def test_a_warp_alone_is_no_faster_than_its_machine_code() -> None:
    """64 instructions at 2.5 cycles; two warps of a scheduler overlap them, until its slots are full."""
    for warps, cycles in ((1, 160), (2, 160), (4, 256)):
        work = [steps(("end", 64, [])) for _ in range(warps)]
        recording = Recording(work, ["softmax"] * warps, warps_per_cta=1, stalls={"softmax": 2.5})
        recording.warps_per_cta = 4 * warps  # numbers 0, 4, 8: one scheduler
        recording.warps = [work[i // 4] if i % 4 == 0 else [] for i in range(4 * warps)]
        recording.roles = ["softmax"] * (4 * warps)
        assert Replay(recording, TIMING).run().total == pytest.approx(cycles, rel=0.16), warps  # pieces of 16 meet


def test_waits_by_scoreboard_come_on_top() -> None:
    work = steps(("end", 10, []))
    work[0].lags = {"shuffle": 2}
    assert Replay(Recording([work], ["warp"], warps_per_cta=1), TIMING).run().total == pytest.approx(10 + 2 * 24)


def test_warpgroup_products_take_a_quarter_of_the_tensor_core_a_warp() -> None:
    """m64n128k16 of four warps: 64 cycles on sm_90a, as its flops over 4096 a cycle; a commit's wait ends a pipeline later."""
    timing = replace(TIMINGS["sm_90a"], barrier=0.0, product_ss=30.0)
    warps = []
    for warp in range(4):
        product, commit, wait = steps(("wgmma", 0, []), ("wgmma commit", 0, [(-1 - warp, 0)]), ("wait", 0, [(-1 - warp, 0)]))
        product.flops = {0: 2 * 16 * 128 * 16}
        warps.append([product, commit, wait])
    assert Replay(Recording(warps, ["consumer"] * 4, warps_per_cta=4), timing).run().total == pytest.approx(64 + 30)


def test_arithmetic_beside_warpgroup_products_is_slower() -> None:
    work = steps(("end", 64, []))
    recording = Recording([work], ["consumer"], warps_per_cta=1, stalls={"consumer": 2.0})
    timing = replace(TIMINGS["sm_90a"], beside_products=1.5)
    assert Replay(recording, timing).run().total == pytest.approx(64 * 2.0 * 1.5)
    # Three warps of one scheduler: its slots are held as long, but no unit is.
    for special, cycles in ((0, 3 * 64 * 1.5), (8 * 64, 3 * 8 * 64)):
        for step in work:
            step.work[PIPES.index("mufu")] = special
        trio = Recording([work if i % 4 == 0 else [] for i in range(12)], ["consumer"] * 12, warps_per_cta=12, stalls={"consumer": 1.0})
        assert Replay(trio, timing).run().total == pytest.approx(cycles, rel=0.05)


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("shfl.sync.bfly.b32", "shuffle"),
        ("tcgen05.wait::ld.sync.aligned", "tensor_memory"),
        ("ld.global.b32", "far_memory"),
        ("atom.acq_rel.gpu.global.add.u32", "far_memory"),
        ("ld.shared.b32", ""),
        ("st.global.b32", ""),
    ],
)
def test_what_a_warp_waits_for_at_once(opcode: str, expected: str) -> None:
    assert lag(opcode) == expected


@pytest.mark.emulated
def test_our_kernel_keeps_the_tensor_core_busy_for_its_flops() -> None:
    from tests.support.emulated_prefill import run_prefill
    from tests.support.paged_case import PagedCase

    case = PagedCase((64,), (384,), num_q_heads=4, num_kv_heads=1, head_dim=128, is_causal=False, arch="emulated-sm_100a")
    recording = Recording()
    run_prefill(case, num_ctas=1, trace=recording).check()
    soon, late = (Replay(recording, replace(TIMINGS["sm_100a"], barrier=float(latency))).run() for latency in (0, 64))
    assert soon.tensor_busy == 2 * 256 * 384 * (128 + 128) / 8192
    assert soon.tensor_busy < soon.total < late.total
    assert sum(soon.critical.values()) == pytest.approx(soon.total)
    assert recording.smem_bytes("copy") == 2 * 32768 + 3 * 2 * 32768  # two tiles of Q, three of K and V
    assert recording.roles.count("softmax") == 8 and recording.roles.count("mma") == 1
