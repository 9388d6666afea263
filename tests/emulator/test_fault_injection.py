"""Planted faults in our own kernel are found; a sample here, all of them with `python -m tests.emulator.fault_injection`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fa4_backend import emulator
from tests.emulator import fault_injection as fi
from tests.emulator import fault_order, fault_reasons
from tests.emulator.engine_kernel import write_late
from tests.emulator.fault_edits import EDITS, Edit
from tests.emulator.fault_mutations import DROPS, Mutant
from tests.emulator.fault_reasons import STATIC_REASONS
from tests.emulator.fault_targets import OWN_TARGETS
from tests.emulator.harness import check_program, run_program
from tests.emulator.programs import load_family
from tests.emulator.programs.program import Program, output
from tests.emulator.right_schedules import alarms_of

PTX = """
    mbarrier.init.shared.b64 [%r0], 1;
    ld.shared.b32 %r9, [%r8];
    mbarrier.arrive.shared.b64 %d5, [%r0];
    @%p1 mbarrier.arrive.expect_tx.shared.b64 %d5, [%r0], 64;
    mbarrier.try_wait.parity.shared.b64 %q1, [%r0], %r3;
    cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1+128], [%d1, {%r3, %r4}], [%r0];
    { .reg .pred p; tcgen05.mma.cta_group::1.kind::f16 [%r2], a, b, idesc, p; tcgen05.commit.cta_group::1.b64 [%r5]; }
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %d6, %d7, p, 1, 1;
    wgmma.wait_group.sync.aligned 1;
    fence.proxy.async.shared::cta;
    mbarrier.arrive.shared.b64 %d5, [%r0];
    fence.proxy.async.shared::cta;
    bar.sync 1, 128;
    bar.warp.sync 0xffffffff;
"""


def test_every_class_of_fault_is_made() -> None:
    split = fi.one_statement_a_line(PTX)
    made = list(fi.mutants(split, set(range(1, split.count("\n") + 2))))
    kinds = {m.kind for m in made}
    assert kinds >= {
        *DROPS,
        "drop wait",
        "change phase",
        "change tx",
        "loosen wait_group",
        "change descriptor",
        "change copy target",
        "move up",
        "fence too late",
    }
    for mutant in made:
        assert mutant.ptx != split, mutant.name
    tx = [m.ptx for m in made if m.kind == "change tx"]
    assert len(tx) == 2 and "add.s32 fi_t, 64, -16;" in tx[0] and "[%r0], fi_t;" in tx[0]
    assert sum(m.kind == "fence too late" for m in made) == 1, "not behind a barrier"
    moved = next(m.ptx for m in made if m.kind == "move up" and "mbarrier.arrive.shared" in m.text)
    assert moved.index("mbarrier.arrive.shared") < moved.index("ld.shared")


def test_splitting_statements_changes_no_program() -> None:
    from dataclasses import replace

    for program in load_family("barriers")[:6] + load_family("tcgen05")[:2]:
        check_program(replace(program, body=fi.one_statement_a_line(program.body.replace(";\n", "; "))))


STATEMENTS = """
atom.global.acq_rel.add.u32 %r1, [%rd1], 1;
mbarrier.arrive.shared.b64 %rd2, [%r1+16], %r2;
mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];
mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r5], %r6;
mbarrier.try_wait.parity.shared.b64 P1, [%r1+8], %r3, 10000000;
barrier.cluster.arrive.aligned;
fence.acq_rel.gpu;
fence.proxy.async.shared::cta;
fence.proxy.async;
bra.uni LAB_WAIT;
bar.sync 1, 128;
griddepcontrol.wait;
mbarrier.init.shared.b64 [%r1], 2;
@issue tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];
cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1+128], [%rd1, {%r3, %r4}], [%r7];
@%p1 st.shared.b32 [%r1+4], %r2;
shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;
vote.sync.any.pred %p1, %p2, -1;
st.global.b32 [%rd1], %r2;
ld.shared.b32 %r1, [%r2+8];
ld.global.b32 %r1, [%rd2];
cp.async.bulk.tensor.3d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r3, %r4, %r5}], [%r7];
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];
ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd6, %rd7, p, 1, 1, 0, 0;
tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r2];
tcgen05.st.sync.aligned.32x32b.x1.b32 [%r2], {%r1};
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 512;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, 512;
mov.b16 ranks, 3;
setmaxnreg.dec.sync.aligned.u32 64;
max.f32 %r1, %r2, %r3;
min.s32 %r1, %r2, %r3;
add.f32 %r1, %r2, %r3;
sub.f32 %r1, %r2, %r3;
cvt.rn.bf16x2.f32 %r1, %r2, %r3;
ld.acquire.gpu.global.b32 %r1, [%rd1];
stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r3, %r4, %r5};
mov.b32 %r1, %r2;
elect.sync _|issue, 0xffffffff;
bar.warp.sync -1;
mapa.shared::cluster.u32 remote, %r1, %r2;
tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r1], %r2;
""".strip().split("\n")


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.kind)
def test_every_edit_has_a_place_and_changes_it(edit: Edit) -> None:
    changed = [(line, new) for line in STATEMENTS if (new := edit.apply(line)) is not None]
    assert changed and all(new != line for line, new in changed)


@pytest.fixture(scope="module")
def target() -> Iterator[fi.Target]:
    found = fi.load_target("sm100_prefill", Path())
    found.run(None)
    yield found


@pytest.mark.emulated
def test_one_fault_of_each_class_is_caught(target: fi.Target) -> None:
    """Of the first four faults of a class, one at least shows under the deterministic schedule."""
    split = fi.one_statement_a_line(target.ptx)
    with fi.planted(target, split):
        right = fi.run_right(target)
    by_kind: dict[str, list[fi.Mutant]] = {}
    sampled = {edit.kind for edit in EDITS}  # one-statement changes: see the test of their patterns below
    for mutant in fi.mutants(split, right.reached):
        if mutant.kind not in sampled and not STATIC_REASONS.search(mutant.text):
            by_kind.setdefault(mutant.kind, []).append(mutant)
    assert set(by_kind) >= {"drop wait", "drop arrive", "drop commit", "drop barrier", "drop fence", "change phase", "change tx"}
    missed = [
        kind for kind, some in by_kind.items() if kind != "move up" and not any(fi.verdict(target, m, right, [None])[0] for m in some[:4])
    ]
    assert not missed


@pytest.mark.emulated
def test_no_alarm_on_the_right_kernel(target: fi.Target) -> None:
    """200 seeds of every program were run by hand (tests/emulator/results/right_schedules.json); a few here."""
    assert alarms_of(target, range(2)) == []


RESULTS = Path(__file__).parent / "results"
# Program -> faults caught, of those that change something in its case, and those whose values reach no output of it.
SCORES = {
    "schedule": (89, 95, 6),
    "sm100_decode": (56, 57, 1),
    "sm100_fp8": (69, 71, 2),
    "sm100_mla": (70, 74, 0),
    "sm100_mla_fp8": (67, 73, 1),
    "sm100_pair": (385, 389, 5),
    "sm100_peaked": (62, 63, 2),
    "sm100_prefill": (355, 356, 5),
    "sm90_decode": (167, 167, 3),
    "sm90_decode_fp8": (56, 56, 2),
    "sm90_fp8": (65, 66, 0),
    "sm90_mla": (65, 69, 0),
    "sm90_parts": (64, 66, 1),
    "sm90_prefill": (309, 311, 7),
    "step_decode": (53, 54, 1),
    "step_prefill": (62, 64, 4),
    "upstream_causal": (92, 92, 0),
}


@pytest.mark.parametrize("name", SCORES)
def test_recorded_scores(name: str) -> None:
    """The scores on file are these, and of every fault that is missed it is said why."""
    result = json.loads((RESULTS / f"faults_{name}.json").read_text())
    faults = [fault for some in result["classes"].values() for fault in some]
    real = [fault for fault in faults if fault["caught"] or not fault["vacuous"]]
    untold = sum(not f["caught"] and f["vacuous"].startswith(fault_reasons.NOT_TOLD) for f in faults)
    missed = [fault for fault in real if not fault["caught"]]
    assert (len(real) - len(missed), len(real), untold) == SCORES[name]
    assert all(fault["missed"] for fault in missed), "a fault is missed and nobody knows why"
    if name in OWN_TARGETS:
        assert result["shares"][0] == result["shares"][1] and result["stamp"]["date"], "a part of the list was not run"


def test_every_kernel_has_a_score() -> None:
    """Of each of ours and one of flash-attn-4's; 98.2 % of all real faults in ours are found."""
    assert {path.stem.removeprefix("faults_") for path in RESULTS.glob("faults_*.json")} == set(SCORES) == {*OWN_TARGETS, "upstream_causal"}
    caught, real = (sum(SCORES[name][i] for name in OWN_TARGETS) for i in (0, 1))
    assert (caught, real) == (1994, 2031)


def test_right_programs_on_file_raised_no_alarm() -> None:
    """200 random schedules of every right program: `python -m tests.emulator.sweep --parts schedules`."""
    found = json.loads((RESULTS / "right_schedules.json").read_text())
    assert set(found) == set(OWN_TARGETS)
    assert all(result["alarms"] == [] and result["seeds"] == 200 and result["stamp"]["date"] for result in found.values())


HAND_OVER = """
mov.u32 %r0, smem;
setp.ne.u32 %q0, %t, 0;
@%q0 bra ready;
mbarrier.init.shared.b64 [%r0], 1;
mbarrier.init.shared.b64 [%r0+8], 1;
fence.mbarrier_init.release.cluster;
ready:
bar.sync 0;
setp.ge.u32 %q1, %t, 32;
@%q1 bra second;
@%q0 bra wait;
mbarrier.arrive.shared.b64 %d5, [%r0];
mbarrier.arrive.shared.b64 %d6, [%r0+8];
wait:
second:
spin:
mbarrier.try_wait.parity.shared.b64 %q2, [%r0], 0;
@!%q2 bra spin;
mov.u32 %r1, 1;
"""


def test_reasons_hold_for_what_they_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An arrival that is waited for and one that is not; a wait that only the exit follows and one before a store."""
    monkeypatch.setattr(fault_reasons, "planted", lambda target, ptx: nullcontext())

    def target_of(body: str) -> fi.Target:
        program = Program("reasons", "", body, (output("d", np.zeros(64, np.uint32)),), block=64, smem_bytes=1024)
        return fi.Target("reasons", program.ptx, lambda seed: ([], run_program(program, seed=seed)[1]))

    def mutant(target: fi.Target, kind: str, part: str) -> Mutant:
        lines = fi.one_statement_a_line(target.ptx).split("\n")
        number = next(i for i, line in enumerate(lines) if part in line)
        return Mutant(kind, number + 1, lines[number], "")

    target = target_of(HAND_OVER)
    assert not fault_reasons.nobody_waits(target, mutant(target, "drop arrive", "%d5,"))
    assert fault_reasons.nobody_waits(target, mutant(target, "drop arrive", "%d6,"))
    assert fault_reasons.only_exit_follows(target, mutant(target, "drop wait", "try_wait"))
    target = target_of(HAND_OVER + "st.shared.u32 [%r0+64], %r1;\n")
    assert not fault_reasons.only_exit_follows(target, mutant(target, "drop wait", "try_wait"))


ALIKE = """
mov.u32 %r0, smem;
{first}
bar.warp.sync 0xffffffff;
{before}
bar.warp.sync 0xffffffff;
{behind}
"""


@pytest.mark.parametrize(
    ("first", "before", "is_harmless"),
    [
        ("st.shared.u32 [%r0+64], %t;", "fence.proxy.async.shared::cta;", True),
        ("", "st.shared.u32 [%r0+64], %t;\nfence.proxy.async.shared::cta;", False),
        ("st.shared.u32 [%r0+64], %t;", "setp.eq.u32 %q0, %t, 3;\n@%q0 fence.proxy.async.shared::cta;", False),
    ],
    ids=["fenced by all", "stored since", "fenced by another lane"],
)
def test_a_second_warp_sync_is_harmless_behind_a_fence_of_all_lanes(first: str, before: str, is_harmless: bool) -> None:
    behind = "mbarrier.arrive.shared.b64 %d5, [%r0];"
    program = Program(
        "alike", "", ALIKE.format(first=first, before=before, behind=behind), (output("d", np.zeros(8, np.uint32)),), smem_bytes=1024
    )
    target = fi.Target("alike", program.ptx, lambda seed: ([], run_program(program, seed=seed)[1]))
    lines = fi.one_statement_a_line(target.ptx).split("\n")
    number = [i for i, line in enumerate(lines) if "bar.warp.sync" in line][1]
    assert fault_reasons.nothing_to_order(target, Mutant("drop warp sync", number + 1, lines[number], "")) == is_harmless


@pytest.mark.parametrize(("lane", "is_harmless"), [(0, True), (3, False)])
def test_a_warp_sync_behind_lane_0_alone_is_harmless(lane: int, is_harmless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lane 0 stores and arrives; if lane 3 stores, the synchronisation is needed."""
    body = f"""
mov.u32 %r0, smem;
setp.ne.u32 %q0, %t, {lane};
@%q0 bra met;
st.shared.u32 [%r0+64], %t;
met:
bar.warp.sync 0xffffffff;
"""
    program = Program("alone", "", body, (output("d", np.zeros(8, np.uint32)),), smem_bytes=1024)

    def run(seed: int | None) -> tuple[list, emulator.Report]:
        return [], run_program(replace(program, body=bodies[-1]), seed=seed)[1]

    bodies = [body]

    @contextmanager
    def planted(target: fi.Target, ptx: str) -> Iterator[None]:
        start = ptx.index("mov.u32 %r0, smem;")
        bodies.append(ptx[start : ptx.rindex("ret;")])
        yield

    monkeypatch.setattr(fault_reasons, "planted", planted)
    target = fi.Target("alone", program.ptx, run)
    lines = fi.one_statement_a_line(target.ptx).split("\n")
    number = next(i for i, line in enumerate(lines) if "bar.warp.sync" in line)
    assert fault_reasons.lane_0_alone_acts(target, Mutant("drop warp sync", number + 1, lines[number], "")) == is_harmless


TOLD = """
mov.u32 %r0, smem;
shl.b32 %r2, %lane, 2;
add.u32 %r2, %r2, %r0;
setp.ne.u32 %q0, %t, 0;
@%q0 bra ready;
mbarrier.init.shared.b64 [%r0], 1;
fence.mbarrier_init.release.cluster;
ready:
bar.sync 0;
setp.ge.u32 %q1, %t, 32;
@%q1 bra second;
st.shared.u32 [%r2+64], %t;
bar.warp.sync -1;
{between}
@%q0 bra done;
mbarrier.arrive.shared.b64 %d5, [%r0];
bra done;
second:
spin:
mbarrier.try_wait.parity.shared.b64 %q2, [%r0], 0;
@!%q2 bra spin;
ld.shared.u32 %r1, [%r2+64];
done:
"""


@pytest.mark.parametrize(("between", "is_covered"), [("", False), ("bar.warp.sync -1;", True)], ids=["needed", "twice"])
def test_order_is_covered_only_where_the_detector_watches_and_stays_silent(
    between: str, is_covered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all lanes stored is told by one of them: of two synchronisations before it, either covers the other; with one, it is needed."""
    program = Program("told", "", TOLD.format(between=between), (output("d", np.zeros(8, np.uint32)),), block=64, smem_bytes=1024)
    bodies = [program.body]

    @contextmanager
    def planted(target: fi.Target, ptx: str) -> Iterator[None]:
        bodies.append(ptx[ptx.index("mov.u32 %r0, smem;") : ptx.rindex("ret;")])
        yield

    monkeypatch.setattr(fault_order, "planted", planted)
    target = fi.Target("told", program.ptx, lambda seed: ([], run_program(replace(program, body=bodies[-1]), seed=seed)[1]))
    lines = fi.one_statement_a_line(target.ptx).split("\n")
    number = next(i for i, line in enumerate(lines) if "bar.warp.sync" in line)
    dropped = "\n".join([*lines[:number], "", *lines[number + 1 :]])
    mutant = Mutant("drop warp sync", number + 1, lines[number], dropped)
    assert bool(fault_order.lanes_are_ordered(target, mutant)) == is_covered
    # The arrival tells what the lanes did: relaxed, it does not, and the other warp races.
    number = next(i for i, line in enumerate(lines) if "mbarrier.arrive" in line)
    relaxed = "\n".join([*lines[:number], fault_order.relaxed(lines[number]), *lines[number + 1 :]])
    assert fault_order.arrival_is_covered(target, Mutant("relax arrive", number + 1, lines[number], relaxed)) == ""


STORE = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry store(.param .u64 data)
.reqntid 32
{
.reg .b32 %r<2>;
.reg .b64 %rd<3>;
ld.param.u64 %rd1, [data];
mov.u32 %r1, %tid.x;
WAITS
mad.wide.u32 %rd2, %r1, 4, %rd1;
st.global.u32 [%rd2], %r1;
ret;
}
"""


@pytest.mark.parametrize(("waits", "is_covered"), [(1, False), (2, True)], ids=["needed", "twice"])
def test_a_wait_for_the_kernel_before_is_covered_only_by_another(waits: int, is_covered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [STORE.replace("WAITS", "\n".join(["griddepcontrol.wait;"] * waits))]

    @contextmanager
    def planted(target: fi.Target, ptx: str) -> Iterator[None]:
        texts.append(ptx)
        yield

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        data = torch.zeros(32, dtype=torch.int32)
        with emulator.session(arch="sm_90a", seed=seed) as session:
            write_late(session, [data])
            session.launch(texts[-1], 1, 32, [data], programmatic=True)
        return [data], session.report

    monkeypatch.setattr(fault_order, "planted", planted)
    case = fi.Target("stores behind an engine's kernel", texts[0], run)
    lines = fi.one_statement_a_line(case.ptx).split("\n")
    number = max(i for i, line in enumerate(lines) if "griddepcontrol" in line)
    mutant = Mutant("drop dependency wait", number + 1, lines[number], "\n".join([*lines[:number], "", *lines[number + 1 :]]))
    assert bool(fault_order.dependency_is_covered(replace(case, second=case), mutant)) == is_covered
    assert fault_order.dependency_is_covered(case, mutant) == "", "no kernel before it, no reason"
