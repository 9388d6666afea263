"""Lanes of one warp are ordered by bar.warp.sync and by barriers, not by running together: each fault beside its right neighbour."""

from __future__ import annotations

import numpy as np
import pytest

from fa4_backend import emulator
from tests.emulator.harness import run_program
from tests.emulator.programs.program import Program, output

SYNC = "bar.warp.sync 0xffffffff;\n"
# Two mbarriers of one arrival, made by thread 0; %q0: not lane 0, %q1: not warp 0.
START = """
mov.u32 %r0, smem;
setp.ne.u32 %q0, %lane, 0;
setp.ne.u32 %q1, %warp, 0;
setp.ne.u32 %q2, %t, 0;
@%q2 bra ready;
mbarrier.init.shared.b64 [%r0], 1;
mbarrier.init.shared.b64 [%r0+8], 32;
fence.mbarrier_init.release.cluster;
ready:
bar.sync 0;
mad.lo.u32 %r2, %lane, 4, %r0;
@%q1 bra second;
"""
WAIT = "spin:\nmbarrier.try_wait.parity{sem}.shared.b64 %q3, [%r0], 0;\n@!%q3 bra spin;\n"
READ = "ld.shared.u32 %r3, [%r2+256];\nadd.u32 %r4, %r3, 1;\n"


def program(body: str, **options: object) -> Program:
    return Program("lanes", "9.7.13", body, (output("d", np.zeros(64, np.uint32)),), block=64, smem_bytes=1024, **options)  # type: ignore[arg-type]


def races(body: str, seed: int | None = None) -> list[str]:
    return run_program(program(body), seed=seed)[1].races


def hand_over(before: str, arrive: str = "mbarrier.arrive.shared.b64 %d1, [%r0];", sem: str = "", after: str = "") -> str:
    """Warp 0 stores a word a lane and lane 0 arrives; warp 1 waits and reads."""
    first = f"st.shared.u32 [%r2+256], %t;\n{before}@%q0 bra end;\n{arrive}\nbra end;\n"
    return START + first + "second:\n" + WAIT.format(sem=sem) + after + READ + "end:\n"


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_an_elected_arrive_covers_what_the_warp_synchronised_for(seed: int | None) -> None:
    assert races(hand_over(SYNC), seed) == []
    assert "is read before its write is known" in races(hand_over(""), seed)[0]


def test_shuffles_votes_and_elect_order_no_memory() -> None:
    vote = "setp.eq.u32 %q4, %t, 3;\nvote.sync.any.pred %q5, %q4, 0xffffffff;\nelect.sync %r5|%q6, 0xffffffff;\n"
    assert races(hand_over(vote)) != []


def test_a_barrier_of_the_cta_orders_lanes_too() -> None:
    store, read = "st.shared.u32 [%r2+256], %t;\n", "xor.b32 %r2, %r2, 4;\n" + READ
    assert races(START + store + "second:\nbar.sync 0;\n@%q1 bra end;\n" + read + "end:\n") == []
    assert races(START + store + SYNC + read + "second:\n") == []
    assert races(START + store + read + "second:\n") != []


def test_a_part_of_the_warp_may_synchronise() -> None:
    """Lanes 0 and 1 meet; lane 2 does not know what they know."""
    part = "setp.gt.u32 %q4, %lane, 1;\n@%q4 bra past;\nbar.warp.sync 3;\npast:\n"
    read = "setp.ne.u32 %q5, %lane, {lane};\n@%q5 bra end;\nld.shared.u32 %r3, [%r0+256];\nadd.u32 %r4, %r3, 1;\n"
    body = START + "@!%q0 st.shared.u32 [%r2+256], %t;\n" + part + read + "second:\nend:\n"
    assert races(body.format(lane=1)) == [] and races(body.format(lane=2)) != []


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_what_one_lane_waited_for_the_others_know_after_a_synchronisation(seed: int | None) -> None:
    body = START + f"st.shared.u32 [%r2+256], %t;\n{SYNC}@%q0 bra end;\nmbarrier.arrive.shared.b64 %d1, [%r0];\nbra end;\n"
    body += "second:\n@%q0 bra past;\n" + WAIT.format(sem="") + "past:\n{sync}" + READ + "end:\n"
    assert races(body.format(sync=SYNC), seed) == []
    assert races(body.format(sync=""), seed) != []


BULK = "cp.async.bulk.global.shared::cta.bulk_group [%p0], [%r0+256], 128;\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"
FENCE = "fence.proxy.async.shared::cta;\n"


@pytest.mark.parametrize(
    ("between", "right"),
    [
        (FENCE + SYNC, True),
        (SYNC + "@!%q0 " + FENCE, True),  # the lane that issues knows of all stores and fences them
        (FENCE, False),
        (SYNC + "setp.ne.u32 %q4, %lane, 1;\n@!%q4 " + FENCE, False),  # another lane fences, and the one that issues does not know
        (SYNC + "setp.ne.u32 %q4, %lane, 1;\n@!%q4 " + FENCE + SYNC, True),
        ("@!%q0 " + FENCE + SYNC, False),  # of the stores, lane 0 knows only its own
    ],
    ids=[
        "all fence, then meet",
        "meet, the issuer fences",
        "no meeting",
        "another fences",
        "another fences, then meet",
        "fenced too early",
    ],
)
def test_the_lane_that_fences_knows_of_the_stores_and_is_known(between: str, right: bool) -> None:
    found = races(START + "st.shared.u32 [%r2+256], %t;\n" + between + "@%q0 bra end;\n" + BULK + "second:\nend:\n")
    assert (found == []) == right, found


def test_one_instruction_may_write_a_word_from_many_lanes_and_two_may_not() -> None:
    store = "st.shared.u32 [%r0+256], 7;\n"
    assert races(START + store + "second:\n") == []
    assert "written twice" in races(START + store + store + "second:\n")[0]
    assert "written twice" in races(START.replace("@%q1 bra second;", "") + store)[0]


@pytest.mark.parametrize(
    ("arrive", "sem", "before", "after", "right"),
    [
        (".release.cta", ".acquire.cta", "", "", True),
        (".relaxed.cta", "", "", "", False),
        ("", ".relaxed.cta", "", "", False),
        (".relaxed.cta", ".relaxed.cta", "fence.acq_rel.cta;\n", "fence.acq_rel.cta;\n", True),
        (".relaxed.cta", ".relaxed.cta", "fence.acq_rel.gpu;\n", "", False),
    ],
    ids=["release, acquire", "relaxed arrive", "relaxed wait", "fences", "no fence behind the wait"],
)
def test_relaxed_operations_order_only_what_is_fenced(arrive: str, sem: str, before: str, after: str, right: bool) -> None:
    found = races(hand_over(SYNC + before, f"mbarrier.arrive{arrive}.shared.b64 %d1, [%r0];", sem, after))
    assert (found == []) == right, found


def test_a_wait_may_return_before_its_phase_completes() -> None:
    """Without the loop around it, the reader runs into data that are not there; without a seed the wait lasts as long as it takes."""
    once = hand_over(SYNC).replace("@!%q3 bra spin;\n", "")
    assert races(once) == []
    assert any(races(once, seed) for seed in range(8))
    assert not any(races(hand_over(SYNC), seed) for seed in range(8))


@pytest.mark.parametrize("instruction", ["bar.sync 0;", "setmaxnreg.dec.sync.aligned.u32 24;", "barrier.cluster.arrive.aligned;"])
def test_some_lanes_do_not_arrive_for_all(instruction: str) -> None:
    body = "setp.lt.u32 %q0, %lane, 16;\n{guard}" + instruction + "\n"
    with pytest.raises(emulator.KernelFault, match="all lanes of a warp"):
        run_program(program(body.format(guard="@%q0 "), directives=".maxnreg 128\n"))


def test_lanes_may_run_in_any_order() -> None:
    """Two lanes take a number each on their own way: the lower address goes first, or with some seeds the other."""
    body = (
        "mov.u32 %r0, smem;\nsetp.ne.u32 %q0, %t, 0;\n@!%q0 st.shared.u32 [%r0], 0;\nbar.sync 0;\nsetp.ge.u32 %q1, %t, 2;\n@%q1 bra end;\n"
        "@%q0 bra other;\natom.shared.add.u32 %r1, [%r0], 1;\nbra store;\nother:\natom.shared.add.u32 %r1, [%r0], 1;\nstore:\n"
        "mad.wide.u32 %d0, %t, 4, %p0;\nst.global.u32 [%d0], %r1;\nend:\n"
    )
    orders = {tuple(run_program(program(body), seed=seed)[0]["d"][:2].tolist()) for seed in (None, *range(12))}
    assert orders == {(0, 1), (1, 0)}
