"""The registers of a wgmma.mma_async belong to the tensor core until its group was waited for, and need a fence before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.emulator.harness import run_program
from tests.emulator.programs import load_family
from tests.emulator.programs.program import Program

SHARED = next(p for p in load_family("wgmma") if p.name == "wgmma SS bf16 K-major 128B")
REGISTERS = next(p for p in load_family("wgmma") if p.name == "wgmma RS bf16")  # A in registers
FENCE, COMMIT, WAIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
TOUCH = "add.f32 %f100, %f100, 0f00000000;"  # an accumulator
TOUCH_A = "add.u32 %r204, %r204, 0;"


def change(program: Program, *replacements: tuple[str, str]) -> Program:
    body = program.body
    for old, new in replacements:
        assert old in body, old
        body = body.replace(old, new)
    return replace(program, body=body)


@pytest.mark.parametrize("program", [SHARED, REGISTERS], ids=["SS", "RS"])
@pytest.mark.parametrize("seed", [None, 3])
def test_right_programs_raise_no_alarm(program: Program, seed: int | None) -> None:
    _, report = run_program(program, seed=seed)
    assert not report.races, report.races


WRONG = {
    "no fence": ((FENCE, ""),),
    "accumulator after the fence": ((FENCE, f"{FENCE}\n{TOUCH}"),),
    "A after the fence": ((FENCE, f"{FENCE}\n{TOUCH_A}"),),
    "accumulator before the wait": ((COMMIT, f"{COMMIT}\n{TOUCH}"),),
    "accumulator before the wait, in one lane": ((COMMIT, f"{COMMIT}\nsetp.eq.u32 %q8, %t, 0;\n@%q8 {TOUCH}"),),
    "A before the wait": ((COMMIT, f"{COMMIT}\n{TOUCH_A}"),),
    "no wait": ((WAIT, ""),),
    "wait that allows the group": ((WAIT, WAIT.replace("0", "1")),),
    "no commit": ((COMMIT, ""),),
    "commit after the wait": ((COMMIT, ""), (WAIT, f"{WAIT}\n{COMMIT}")),
}
RIGHT = {
    "accumulator before the fence": ((FENCE, f"{TOUCH}\n{FENCE}"),),
    "A after the wait": ((WAIT, f"{WAIT}\n{TOUCH_A}"),),
    "another register meanwhile": ((COMMIT, f"{COMMIT}\nmov.f32 %f1, 0f00000000;"),),
    "access that no lane makes": ((COMMIT, f"{COMMIT}\nsetp.gt.u32 %q8, %t, 4096;\n@%q8 {TOUCH}"),),
    "an empty group besides": ((COMMIT, f"{COMMIT}\n{COMMIT}"), (WAIT, WAIT.replace("0", "1"))),
}


@pytest.mark.parametrize("name", [*WRONG, *RIGHT])
def test_every_rule(name: str) -> None:
    program = change(REGISTERS, *(WRONG | RIGHT)[name])
    _, report = run_program(program)
    assert bool(report.races) == (name in WRONG), report.races
    if name in WRONG:
        assert "wgmma" in report.races[0] and "PTX line" in report.races[0]


def test_products_of_another_shape_need_a_fence_between() -> None:
    """One more product on the same accumulators: of the same shape it may follow at once, of another it may not."""
    last = next(line for line in reversed(SHARED.body.split("\n")) if line.startswith("wgmma.mma_async"))
    assert not run_program(change(SHARED, (COMMIT, f"{last}\n{COMMIT}")))[1].races
    half = ", ".join(f"%f{100 + i}" for i in range(16))
    other = f"wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {{{half}}}, %d7, %d6, %q7, 1, 1, 0, 0;"
    assert run_program(change(SHARED, (COMMIT, f"{other}\n{COMMIT}")))[1].races
    assert run_program(change(SHARED, (COMMIT, f"{FENCE}\n{other}\n{COMMIT}")))[1].races  # the first is still in flight
    assert not run_program(change(SHARED, (COMMIT, f"{COMMIT}\n{WAIT}\n{FENCE}\n{other}\n{COMMIT}")))[1].races


def test_accumulators_are_withheld_until_the_wait() -> None:
    """With a random schedule, a program that reads them too early gets other data; with the deterministic one they are there."""
    early = change(SHARED, (COMMIT, ""), (WAIT, ""))
    right = run_program(SHARED)[0]["d"]
    assert np.array_equal(run_program(early, seed=None)[0]["d"], right)
    assert not np.array_equal(run_program(early, seed=1)[0]["d"], right)
    assert np.array_equal(run_program(SHARED, seed=1)[0]["d"], right)


@pytest.mark.parametrize(("barrier", "races"), [("bar.sync 0;", False), ("", True)])
def test_a_in_shared_memory_is_read_by_the_whole_warpgroup(barrier: str, races: bool) -> None:
    """A warp that has waited for its product may not overwrite even its own 16 rows of A: the ISA does not say who reads which rows."""
    own_row = "mad.lo.u32 %r30, %warp, 2048, %r2;\nmad.lo.u32 %r30, %lane, 4, %r30;\nst.shared.u32 [%r30], %t;"
    program = change(SHARED, (WAIT, f"{WAIT}\n{barrier}\n{own_row}"))
    assert bool(run_program(program)[1].races) == races
