"""The replay with modelled times: what it must hold for any kernel, and units by hand for small recordings."""

import numpy as np
import pytest

from fa4_backend.emulator.recording import Recording, Step, pipe_cycles, port_bytes
from fa4_backend.emulator.replay import Replay
from fa4_backend.emulator.trace import COPY_LATENCY


def steps(*events: tuple[str, int, list[tuple[int, int]]]) -> list[Step]:
    """(kind, issue slots before it, edges)."""
    return [Step(kind, np.array([issue, 0, 0, 0, 0]), 0, edges) for kind, issue, edges in events]


def test_a_wait_ends_with_the_last_arrival_and_the_latency() -> None:
    recording = Recording(
        [steps(("arrive", 10, [(0, 0)])), steps(("arrive", 100, [(0, 0)])), steps(("wait", 5, [(0, 0)]), ("end", 1, []))],
        ["early", "late", "waiter"],
        warps_per_cta=3,
    )
    times = Replay(recording, "sm_100a", latency=20).run()
    assert times.total == pytest.approx(121)
    assert times.waits["waiter"] == pytest.approx({"late": 115})
    assert sum(times.critical.values()) == pytest.approx(times.total)


def test_warps_of_a_scheduler_share_its_slots() -> None:
    work = [steps(("end", 64, [])) for _ in range(5)]  # warps 0 and 4 are on one scheduler
    assert Replay(Recording(work, ["warp"] * 5, warps_per_cta=5), "sm_100a").run().total == pytest.approx(128)


def test_copies_and_products_by_hand() -> None:
    copy, product, commit = steps(("copy", 1, [(0, 0)]), ("mma", 1, []), ("commit", 0, [(1, 0)]))
    copy.smem_bytes = {0: 4096}
    product.smem_bytes, product.flops = {0: 4096}, {0: 8192 * 64}
    waits = steps(("wait", 0, [(0, 0)]))[0], steps(("wait", 0, [(1, 0)]))[0]
    recording = Recording([[copy], [waits[0], product, commit, waits[1]]], ["load", "mma"], warps_per_cta=2)
    times = Replay(recording, "sm_100a").run()
    # One slot, 4096 bytes at 64 a cycle, the latency; one slot, 64 cycles of product.
    assert times.total == pytest.approx(1 + 64 + COPY_LATENCY + 1 + 64)
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
    times = Replay(recording, "sm_100a").run()
    assert (times.total, times.smem_busy) == pytest.approx((64, 64)) and recording.port_bytes() == 8192


@pytest.mark.emulated
def test_our_kernel_keeps_the_tensor_core_busy_for_its_flops() -> None:
    from tests.support.emulated_prefill import run_prefill
    from tests.support.paged_case import PagedCase

    case = PagedCase((256,), (384,), num_q_heads=1, num_kv_heads=1, head_dim=128, page_size=128, is_causal=False, arch="emulated-sm_100a")
    recording = Recording()
    run_prefill(case, num_ctas=1, trace=recording).check()
    soon, late = (Replay(recording, "sm_100a", latency).run() for latency in (0, 64))
    assert soon.tensor_busy == 2 * 256 * 384 * (128 + 128) / 8192
    assert soon.tensor_busy < soon.total < late.total
    assert sum(soon.critical.values()) == pytest.approx(soon.total)
    assert recording.smem_bytes("copy") == 2 * 32768 + 3 * 2 * 32768  # two tiles of Q, three of K and V
    assert recording.roles.count("softmax") == 8 and recording.roles.count("mma") == 1
