"""What goes wrong has a name and a place; the interpreter never crashes and never runs on. And a right neighbour of each fault passes."""

from __future__ import annotations

import numpy as np
import pytest

from fa4_backend import emulator
from fa4_backend.emulator import native_core
from fa4_backend.emulator.race_actors import BARRIERS_PER_CTA, Layout
from tests.emulator.harness import run_program
from tests.emulator.programs import load_family
from tests.emulator.programs.program import Buffer, Program, output


def program(body: str, *args: Buffer, **options: object) -> Program:
    return Program("fault", "", body, args or (output("d", np.zeros(32, np.uint32)),), **options)  # type: ignore[arg-type]


STORE = "mad.wide.u32 %d0, %t, 4, %p0;\nst.global.u32 [%d0{offset}], %t;"


def test_truncated_text_at_every_tenth_line() -> None:
    text = load_family("barriers")[0].ptx
    lines = text.split("\n")
    for end in range(0, len(lines) - 3, 10):
        with pytest.raises(emulator.PtxSyntaxError):
            emulator.load_program("\n".join(lines[:end]))
    emulator.load_program(text)


@pytest.mark.parametrize("count", [0, 2])
def test_wrong_number_of_arguments(count: int) -> None:
    with emulator.session(arch="sm_90a") as session, pytest.raises(emulator.LaunchError, match="takes 1"):
        session.launch(program(STORE.format(offset="")).ptx, 1, 32, [np.zeros(32, np.uint32)] * count)


def test_argument_of_a_wrong_size() -> None:
    with emulator.session(arch="sm_90a") as session, pytest.raises(emulator.LaunchError, match="3 bytes, expected 8"):
        session.launch(program(STORE.format(offset="")).ptx, 1, 32, [b"abc"])


@pytest.mark.parametrize("offset", ["+4", "-4", "+1048576"])
def test_store_outside_of_every_buffer_names_the_place(offset: str) -> None:
    with pytest.raises(emulator.MemoryFault) as caught:
        run_program(program(STORE.format(offset=offset)))
    text = str(caught.value)
    for part in ("k_fault", "CTA (0,0,0)", "warp 0", "lane", "st.global.u32", "0x"):
        assert part in text, f"{part!r} is missing in: {text}"
    run_program(program(STORE.format(offset="")))


@pytest.mark.parametrize(
    "body",
    ["ld.global.b32 %r1, [%p0+2];", "mov.u32 %r0, smem;\nst.shared.v2.b32 [%r0+4], {%r0, %r0};"],
    ids=["global", "shared"],
)
def test_misaligned_access(body: str) -> None:
    with pytest.raises(emulator.MemoryFault, match="misaligned"):
        run_program(program(body, smem_bytes=1024))


def test_shared_access_past_the_end() -> None:
    with pytest.raises(emulator.MemoryFault, match="shared"):
        run_program(program("mov.u32 %r0, smem;\nst.shared.b32 [%r0+1048576], %r0;", smem_bytes=1024))


@pytest.mark.parametrize("instruction", ["frobnicate.u32 %r0, %r1;", "ld.shared.magic.b32 %r0, [%r1];", "wgmma.mma_async.sp.sync %r0;"])
def test_unknown_instruction(instruction: str) -> None:
    with pytest.raises(emulator.UnsupportedInstruction):
        run_program(program(instruction))


INIT = (
    "mov.u32 %r0, smem;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra ready;\nmbarrier.init.shared.b64 [%r0], {count};\n"
    "fence.mbarrier_init.release.cluster;\nready:\nbar.sync 0;\n"
)
WAIT = "spin:\nmbarrier.try_wait.parity.shared.b64 %q1, [%r0], 0;\n@!%q1 bra spin;\n"


def test_deadlock_says_who_waits_for_what() -> None:
    body = INIT.format(count=33) + "mbarrier.arrive.shared.b64 _, [%r0];\n" + WAIT
    with pytest.raises(emulator.Deadlock) as caught:
        run_program(program(body.replace("_,", "%d5,"), smem_bytes=1024))
    text = str(caught.value)
    for part in ("warp 0", "parity 0", "pending 1 of 33", "mbarrier.try_wait"):
        assert part in text, f"{part!r} is missing in: {text}"


@pytest.mark.parametrize("arrivals", [31, 32])
def test_over_arrival(arrivals: int) -> None:
    body = INIT.format(count=arrivals) + "mbarrier.arrive.shared.b64 %d5, [%r0];\n"
    if arrivals == 32:
        run_program(program(body + WAIT, smem_bytes=1024))
    else:
        # The 32nd arrival belongs to the next phase: legal for one arrival, fatal where a phase gets more than its count at once.
        with pytest.raises(emulator.BarrierMisuse):
            run_program(program(body + "mbarrier.arrive.shared.b64 %d5, [%r0], 31;", smem_bytes=1024))


def test_barrier_that_was_never_initialised() -> None:
    with pytest.raises(emulator.BarrierMisuse, match="no mbarrier"):
        run_program(program("mov.u32 %r0, smem;\nmbarrier.arrive.shared.b64 %d5, [%r0];", smem_bytes=1024))


def test_named_barrier_with_two_thread_counts() -> None:
    body = "setp.lt.u32 %q0, %t, 32;\n@%q0 bar.arrive 1, 64;\n@!%q0 bar.sync 1, 96;"
    with pytest.raises(emulator.KernelFault):
        run_program(program(body, block=96))


def test_registers_past_the_pool() -> None:
    """setmaxnreg.inc waits for registers that nobody gives back: the hardware hangs (seen on an H200), here it is a deadlock."""
    right = next(p for p in load_family("barriers") if p.name == "setmaxnreg")
    from dataclasses import replace

    with pytest.raises(emulator.Deadlock):
        run_program(replace(right, body=right.body.replace("dec.sync.aligned.u32 24", "dec.sync.aligned.u32 40")))
    run_program(right)


def test_tensor_map_off_64_bytes() -> None:
    copy = next(p for p in load_family("tensor_copy") if p.name == "load 2d 0")
    from dataclasses import replace

    with pytest.raises(emulator.MemoryFault, match="64 bytes"):
        run_program(replace(copy, body="add.s64 %p0, %p0, 16;\n" + copy.body))


def test_wgmma_operand_off_16_bytes_or_outside() -> None:
    product = next(p for p in load_family("wgmma") if p.name == "wgmma SS bf16 K-major 128B")
    from dataclasses import replace

    with pytest.raises(emulator.MemoryFault):
        run_program(replace(product, body=product.body.replace("and.b32 %r5, %r5, 0x3fff;", "or.b32 %r5, %r5, 0x3ff0;")))


def test_tensor_memory_that_is_not_allocated() -> None:
    body = "mov.u32 %r3, 0;\ntcgen05.ld.sync.aligned.32x32b.x1.b32 {%r4}, [%r3];\ntcgen05.wait::ld.sync.aligned;"
    with pytest.raises(emulator.MemoryFault, match="not allocated"):
        run_program(program(body, target="sm_100a"))


def test_tensor_memory_that_is_never_freed_is_noted() -> None:
    body = (
        "mov.u32 %r0, smem;\ntcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r0], 64;\n"
        "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
    )
    _, report = run_program(program(body, smem_bytes=1024, target="sm_100a"))
    assert any("tmem-leak" in note for note in report.notes), report.notes


EXCHANGE = (
    "mov.u32 %r0, smem;\nmad.lo.u32 %r1, %t, 4, %r0;\nst.shared.u32 [%r1], %t;\n{between}\nxor.b32 %r2, %r1, 128;\n"
    "ld.shared.u32 %r3, [%r2];"
)


def test_missing_barrier_is_a_race() -> None:
    _, report = run_program(program(EXCHANGE.format(between=""), block=64, smem_bytes=1024))
    assert report.races
    _, report = run_program(program(EXCHANGE.format(between="bar.sync 0;"), block=64, smem_bytes=1024))
    assert not report.races


def test_missing_proxy_fence_is_a_race() -> None:
    product = next(p for p in load_family("wgmma") if p.name == "wgmma SS bf16 K-major 128B")
    from dataclasses import replace

    _, report = run_program(replace(product, body=product.body.replace("fence.proxy.async.shared::cta;", "")))
    assert report.races
    _, report = run_program(product)
    assert not report.races


def test_missing_wait_for_a_product_is_a_race() -> None:
    product = next(p for p in load_family("tcgen05") if p.name == "tcgen05.mma bf16 K-major 128B")
    from dataclasses import replace

    body = product.body.replace("mbarrier.try_wait.parity.shared.b64 %q5, [%r0+8], 0;", "setp.eq.u32 %q5, 0, 0;")
    assert body != product.body
    _, report = run_program(replace(product, body=body))
    assert report.races


def test_shared_memory_that_nobody_wrote_is_noted() -> None:
    _, report = run_program(program("mov.u32 %r0, smem;\nld.shared.u32 %r3, [%r0+64];", smem_bytes=1024))
    assert any("uninitialised" in note for note in report.notes), report.notes


def test_races_can_be_errors() -> None:
    text = program(EXCHANGE.format(between=""), block=64, smem_bytes=1024).ptx
    with emulator.session(arch="sm_90a", detect_races="raise") as session, pytest.raises(emulator.RaceDetected):
        session.launch(text, 1, 64, [np.zeros(32, np.uint32)], smem=1024)


def test_missing_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(emulator.NativeBuildError, match="no-such-compiler"):
        native_core._compiler()


def test_failing_c_compiler_shows_its_message() -> None:
    with pytest.raises(emulator.NativeBuildError, match="oops"):
        native_core._run(["sh", "-c", "echo oops >&2; exit 3"])


def test_unknown_arch_and_empty_machine() -> None:
    for arguments in ({"arch": "sm_80"}, {"num_sms": 0}):
        with pytest.raises(ValueError, match="must be"), emulator.session(**arguments):  # type: ignore[arg-type]
            pass


def test_more_barriers_than_actors_are_told() -> None:
    """One more would be taken for a lane of the first warp, whose races it would hide."""
    layout = Layout(4, 2)
    assert layout.extra(2 * BARRIERS_PER_CTA - 1) == layout.lane(0) - 1
    with pytest.raises(emulator.EmulatorError, match=r"expected at most 192 mbarriers .* got more"):
        layout.extra(2 * BARRIERS_PER_CTA)
