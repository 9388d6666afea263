"""Races over global memory: between CTAs, between warps, between the two proxies, and between launches. Each with a right neighbour."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fa4_backend import emulator
from tests.emulator import fault_injection as fi
from tests.emulator.harness import aligned_copy
from tests.emulator.programs.program import Buffer, Program, output


def program(body: str, name: str = "global", **options: object) -> Program:
    buffers = (output("d", np.zeros(1024, np.uint32)), Buffer("flags", np.zeros(64, np.uint32)))
    return Program(name, "8", body, buffers, **options)  # type: ignore[arg-type]


def report_of(*launches: Program, programmatic: bool = False, seed: int | None = None) -> emulator.Report:
    """Run programs one after the other on the same buffers, the later ones with programmatic stream serialization if asked."""
    buffers = [aligned_copy(b.data) for b in launches[0].args]  # type: ignore[union-attr]
    with emulator.session(arch="sm_90a", num_sms=4, seed=seed) as session:
        for number, p in enumerate(launches):
            session.launch(p.ptx, p.grid, p.block, list(buffers), smem=p.smem_bytes, programmatic=programmatic and number > 0)
    return session.report


STORE = "mov.u32 %r1, %ctaid.x;\nmad.wide.u32 %d0, %r1, {stride}, %p0;\n{store}"


@pytest.mark.parametrize(
    ("store", "stride", "races"),
    [
        ("st.global.u32 [%d0], %t;", 0, True),
        ("st.global.u32 [%d0], %t;", 4, False),
        ("red.global.add.u32 [%d0], %t;", 0, False),
        ("st.relaxed.gpu.global.u32 [%d0], %t;", 0, False),
        ("ld.global.u32 %r2, [%d0];", 0, False),
        ("setp.eq.u32 %q0, %r1, 0;\n@%q0 ld.global.u32 %r2, [%d0];\n@!%q0 st.global.u32 [%d0], %t;", 0, True),
        ("setp.eq.u32 %q0, %r1, 0;\n@%q0 red.global.add.u32 [%d0], %t;\n@!%q0 st.global.u32 [%d0], %t;", 0, True),
    ],
    ids=["same word", "own words", "atomics", "relaxed stores", "reads", "read and write", "atomic and plain"],
)
def test_two_ctas_at_one_word(store: str, stride: int, races: bool) -> None:
    report = report_of(program(STORE.format(store=store, stride=stride), grid=2))
    assert bool(report.races) == races, report.races
    if races:
        for part in ("global memory", "CTA (0,0,0)", "CTA (1,0,0)", "PTX line"):
            assert part in report.races[0], report.races[0]


# CTA 0 writes data and raises a flag; CTA 1 waits for the flag and reads the data.
MESSAGE = """
mov.u32 %r1, %ctaid.x;
setp.ne.u32 %q0, %r1, 0;
setp.ne.u32 %q1, %t, 0;
mad.wide.u32 %d0, %t, 4, %p0;
@%q0 bra reader;
st.global.u32 [%d0], %t;
bar.warp.sync 0xffffffff;
{before}
@%q1 bra end;
mov.u32 %r2, 1;
{raise}
bra end;
reader:
@%q1 bra read;
spin:
{look}
setp.eq.u32 %q2, %r3, 0;
@%q2 bra spin;
read:
{after}
bar.warp.sync 0xffffffff;
ld.global.u32 %r4, [%d0];
end:
"""
RELEASE, ACQUIRE = "st.release.gpu.global.u32 [%p1], %r2;", "ld.acquire.gpu.global.u32 %r3, [%p1];"
RELAXED_STORE, RELAXED_LOAD, FENCE = "st.relaxed.gpu.global.u32 [%p1], %r2;", "ld.relaxed.gpu.global.u32 %r3, [%p1];", "fence.acq_rel.gpu;"


@pytest.mark.parametrize(
    ("before", "up", "look", "after", "races"),
    [
        ("", RELEASE, ACQUIRE, "", False),
        (FENCE, RELAXED_STORE, RELAXED_LOAD, FENCE, False),
        ("membar.gl;", "red.global.add.u32 [%p1], %r2;", "ld.volatile.global.u32 %r3, [%p1];", "membar.gl;", False),
        ("", "atom.acq_rel.gpu.global.add.u32 %r5, [%p1], %r2;", "atom.acq_rel.gpu.global.or.b32 %r3, [%p1], 0;", "", False),
        ("", RELAXED_STORE, ACQUIRE, "", True),
        (FENCE, RELAXED_STORE, RELAXED_LOAD, "", True),
        ("", RELEASE, RELAXED_LOAD, "", True),
        ("fence.acq_rel.cta;", RELAXED_STORE, ACQUIRE, "", True),
        ("", RELEASE.replace("gpu", "cta"), ACQUIRE.replace("gpu", "cta"), "", True),
        (FENCE, "st.global.u32 [%p1], %r2;", ACQUIRE, "", True),
    ],
    ids=[
        "release, acquire", "fences", "membar", "atomics", "no release", "no acquire fence", "no acquire", "fence of a CTA",
        "scope of a CTA", "plain flag",
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", [None, 1])
def test_message_between_ctas(before: str, up: str, look: str, after: str, races: bool, seed: int | None) -> None:
    body = MESSAGE.format(before=before, look=look, after=after, **{"raise": up})
    assert bool(report_of(program(body, grid=2), seed=seed).races) == races


@pytest.mark.parametrize(
    ("writer", "reader", "races"), [("bar.sync 0;", "bar.sync 0;", False), ("", "bar.sync 0;", True), ("bar.sync 0;", "", True)]
)
def test_barriers_hand_on_what_a_release_covers(writer: str, reader: str, races: bool) -> None:
    """Both warps of a CTA write, one releases; one acquires, both read."""
    body = MESSAGE.format(before=writer, look=ACQUIRE, after=reader, **{"raise": RELEASE})
    if not writer:
        body = body.replace("@%q1 bra end;", "setp.ne.u32 %q1, %t, 0;\n@%q1 bra end;", 1)
    assert bool(report_of(program(body, grid=2, block=64)).races) == races


def test_a_third_cta_hears_of_the_first_through_the_second() -> None:
    """CTA 1 acquires from CTA 0 and releases to CTA 2, which reads what CTA 0 wrote."""
    body = """
mov.u32 %r1, %ctaid.x;
setp.eq.u32 %q0, %r1, 0;
@!%q0 bra wait;
st.global.u32 [%p0], %t;
bra up;
wait:
sub.u32 %r2, %r1, 1;
mad.wide.u32 %d1, %r2, 4, %p1;
ld.acquire.gpu.global.u32 %r3, [%d1];
setp.ne.u32 %q1, %r1, 2;
@%q1 bra up;
ld.global.u32 %r4, [%p0];
up:
mad.wide.u32 %d1, %r1, 4, %p1;
st.release.gpu.global.u32 [%d1], 1;
"""
    assert not report_of(program(body, grid=3)).races
    assert report_of(program(body.replace("ld.acquire", "ld.relaxed"), grid=3)).races


BULK_STORE = """
mov.u32 %r1, smem;
setp.ne.u32 %q0, %t, 0;
st.shared.u32 [%r1], %t;
fence.proxy.async.shared::cta;
bar.warp.sync 0xffffffff;
@%q0 bra end;
cp.async.bulk.global.shared::cta.bulk_group [%p0], [%r1], 16;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group{read} 0;
ld.global.u32 %r2, [%p0];
end:
"""


@pytest.mark.parametrize(("read", "races"), [("", False), (".read", True)])
def test_bulk_store_has_written_when_its_group_is_complete(read: str, races: bool) -> None:
    assert bool(report_of(program(BULK_STORE.format(read=read), smem_bytes=1024)).races) == races


BULK_LOAD = """
mov.u32 %r1, smem;
setp.ne.u32 %q0, %t, 0;
@%q0 bra end;
mbarrier.init.shared.b64 [%r1], 1;
fence.mbarrier_init.release.cluster;
st.global.u32 [%p0], %t;
{fence}
mbarrier.arrive.expect_tx.shared.b64 %d5, [%r1], 16;
cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+16], [%p0], 16, [%r1];
spin:
mbarrier.try_wait.parity.shared.b64 %q1, [%r1], 0;
@!%q1 bra spin;
end:
"""


@pytest.mark.parametrize(
    ("fence", "races"),
    [("fence.proxy.async;", False), ("fence.proxy.async.global;", False), ("fence.proxy.async.shared::cta;", True), ("", True)],
)
def test_bulk_load_of_what_a_thread_stored_needs_a_proxy_fence(fence: str, races: bool) -> None:
    assert bool(report_of(program(BULK_LOAD.format(fence=fence), smem_bytes=1024)).races) == races


# CTA 0 writes data and raises a flag; CTA 1 waits for the flag and copies the data to its shared memory.
BULK_MESSAGE = MESSAGE.replace(
    "ld.global.u32 %r4, [%d0];",
    """
mov.u32 %r5, smem;
@%q1 bra end;
mbarrier.init.shared.b64 [%r5], 1;
fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared.b64 %d5, [%r5], 128;
cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r5+16], [%p0], 128, [%r5];
arrived:
mbarrier.try_wait.parity.shared.b64 %q3, [%r5], 0;
@!%q3 bra arrived;
""",
)


@pytest.mark.parametrize(
    ("writer", "reader", "races"),
    [
        ("", "fence.proxy.async;", False),
        ("fence.proxy.async.global;", "", False),
        ("", "fence.proxy.async.shared::cta;", True),
        ("", "", True),
    ],
    ids=["reader fences", "writer fences", "shared memory only", "none"],
)
def test_bulk_load_of_what_another_cta_stored_needs_a_proxy_fence_on_the_way(writer: str, reader: str, races: bool) -> None:
    body = BULK_MESSAGE.format(before=f"{writer}\nbar.warp.sync 0xffffffff;", look=ACQUIRE, after=reader, **{"raise": RELEASE})
    report = report_of(program(body, grid=2, smem_bytes=1024))
    assert bool(report.races) == races, report.races[:1]


@pytest.mark.parametrize("early", [False, True])
def test_a_proxy_fence_before_the_acquire_does_not_help(early: bool) -> None:
    look = f"{ACQUIRE}\nfence.proxy.async;" if not early else f"fence.proxy.async;\n{ACQUIRE}"
    body = BULK_MESSAGE.format(before="", look=look, after="", **{"raise": RELEASE})
    # A spin that looks twice fences after its first look; a flag that is up at once shows the order.
    report = report_of(program(body, grid=2, smem_bytes=1024), seed=None)
    assert bool(report.races) == early, report.races[:1]


PRODUCE = "mad.wide.u32 %d0, %t, 4, %p0;\n{launch}\nst.global.u32 [%d0], %t;"
CONSUME = "mad.wide.u32 %d0, %t, 4, %p0;\n{wait}\nld.global.u32 %r1, [%d0];"
LAUNCH, WAIT = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"


@pytest.mark.parametrize(
    ("launch", "wait", "programmatic", "races"),
    [(LAUNCH, "", True, True), (LAUNCH, WAIT, True, False), ("", "", True, False), (LAUNCH, "", False, False)],
    ids=["no wait", "wait", "launched at the end", "stream order"],
)
def test_a_dependent_launch_waits_before_it_reads(launch: str, wait: str, programmatic: bool, races: bool) -> None:
    report = report_of(program(PRODUCE.format(launch=launch)), program(CONSUME.format(wait=wait), "reader"), programmatic=programmatic)
    assert bool(report.races) == races
    if races:
        assert "of the earlier kernel" in report.races[0]


@pytest.mark.parametrize(
    ("middle", "races"),
    [(f"{LAUNCH}\n{WAIT}", True), (f"{WAIT}\n{LAUNCH}", False), (LAUNCH, True)],
    ids=["launch, wait", "wait, launch", "launch"],
)
def test_a_launch_between_two_vouches_for_the_first_only_when_it_waited(middle: str, races: bool) -> None:
    launches = (program(PRODUCE.format(launch=LAUNCH)), program(middle, "middle"), program(CONSUME.format(wait=""), "reader"))
    assert bool(report_of(*launches, programmatic=True).races) == races


@pytest.mark.parametrize(
    ("middle", "last", "races"),
    [(LAUNCH, WAIT, True), ("", WAIT, True), ("", "", True), (f"{WAIT}\n{LAUNCH}", WAIT, False), (f"{LAUNCH}\n{WAIT}", WAIT, False)],
    ids=["launches", "ends", "nobody waits", "waits, launches", "launches, waits"],
)
def test_a_launch_that_never_waits_leaves_the_one_before_running(middle: str, last: str, races: bool) -> None:
    """The last launch's wait is for the middle one, which may end before the first."""
    launches = (program(PRODUCE.format(launch=LAUNCH)), program(middle, "middle"), program(CONSUME.format(wait=last), "reader"))
    report = report_of(*launches, programmatic=True)
    assert bool(report.races) == races
    kinds = [note for note in report.notes if "never" in note or "griddepcontrol.wait" in note]
    assert len(kinds) == (WAIT not in middle) + (WAIT not in last), report.notes


def test_stream_order_ends_what_a_launch_left_running() -> None:
    """The last launch has no attribute: it follows everything."""
    p, middle, last = program(PRODUCE.format(launch=LAUNCH)), program(LAUNCH, "middle"), program(CONSUME.format(wait=""), "reader")
    buffers = [aligned_copy(b.data) for b in p.args]  # type: ignore[union-attr]
    with emulator.session(arch="sm_90a") as session:
        for launch, programmatic in ((p, False), (middle, True), (last, False)):
            session.launch(launch.ptx, launch.grid, launch.block, list(buffers), programmatic=programmatic)
    assert session.report.races == [] and len(session.report.notes) == 1


def test_a_seed_draws_the_order_in_which_ctas_start() -> None:
    """Each CTA takes a number from a counter; without a seed they come in the order of their indices."""
    body = """
mov.u32 %r1, %ctaid.x;
atom.relaxed.gpu.global.add.u32 %r2, [%p1], 1;
mad.wide.u32 %d0, %r1, 4, %p0;
st.global.u32 [%d0], %r2;
"""
    take = program(body, grid=6, block=1)
    orders = []
    for seed in (None, 1, 2, 2):
        buffers = [aligned_copy(b.data) for b in take.args]  # type: ignore[union-attr]
        with emulator.session(arch="sm_90a", num_sms=6, seed=seed) as session:
            session.launch(take.ptx, take.grid, take.block, list(buffers))
        orders.append(buffers[0][:6].tolist())
    assert orders[0] == list(range(6)) and sorted(orders[1]) == list(range(6))
    assert len({tuple(order) for order in orders[:3]}) == 3 and orders[2] == orders[3]


def test_detection_can_be_switched_off() -> None:
    p = program(STORE.format(store="st.global.u32 [%d0], %t;", stride=0), grid=2)
    with emulator.session(arch="sm_90a", detect_races=False) as session:
        session.launch(p.ptx, p.grid, p.block, [np.zeros(1024, np.uint32), np.zeros(64, np.uint32)])
    assert not session.report.races


ATOMIC, FENCE_GPU = "atom.global.acq_rel.add", "fence.acq_rel.gpu;"


@pytest.fixture(scope="module")
def decode() -> Iterator[fi.Target]:
    target = fi.load_target("sm90_decode", Path())
    target.run(None)
    assert target.ptx.count(ATOMIC) == 2 and FENCE_GPU not in target.ptx  # to arrive, and to leave where all add up
    yield target


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("atomic", "fence", "races"),
    [
        (ATOMIC, "", False),
        ("atom.global.acquire.add", FENCE_GPU, False),
        ("atom.global.add", FENCE_GPU, True),
        ("atom.global.acquire.add", "", True),
        ("atom.global.release.add", "", True),
        ("atom.global.add", "", True),
    ],
    ids=["right", "released by a fence", "relaxed behind a fence", "not released", "not acquired", "no order"],
)
def test_split_rows_of_the_decode_kernel(decode: fi.Target, atomic: str, fence: str, races: bool) -> None:
    """The CTA that arrives last at an atomic counter adds up what others wrote.

    The counter's acq_rel alone is enough: release and acquire pass on what barriers brought (8.9.5, causality order). A fence before it
    would release as well; nothing but the atomic acquires.
    """
    with fi.planted(decode, decode.ptx.replace(ATOMIC, f"{fence} {atomic}")):
        for seed in (None, 1):
            _, report = decode.run(seed)
            assert bool(report.races) == races, report.races[:1]


# CTAs 0 and 1 access a word; CTA 2 has heard of what CTA 1 did, not of what CTA 0 did, and accesses the word plainly.
UNHEARD = """
mov.u32 %r1, %ctaid.x;
setp.eq.u32 %q0, %r1, 0;
setp.eq.u32 %q1, %r1, 1;
setp.eq.u32 %q2, %r1, 2;
@%q0 {first}
@%q0 {release_first}
@%q1 {second}
@%q1 st.release.gpu.global.u32 [%p1], 1;
@%q2 ld.acquire.gpu.global.u32 %r3, [%p1];
@%q2 ld.acquire.gpu.global.u32 %r3, [%p1+4];
@%q2 {third}
"""
STRONG_STORE, STRONG_LOAD = "st.relaxed.gpu.global.u32 [%p0], 1;", "ld.relaxed.gpu.global.u32 %r2, [%p0];"
RELAXED_ATOMIC, PLAIN_STORE, PLAIN_LOAD = (
    "atom.relaxed.gpu.global.add.u32 %r2, [%p0], 1;",
    "st.global.u32 [%p0], 2;",
    "ld.global.u32 %r2, [%p0];",
)


@pytest.mark.parametrize(
    ("first", "second", "third", "races"),
    [
        (STRONG_STORE, STRONG_STORE, PLAIN_LOAD, True),
        (STRONG_STORE, STRONG_STORE, PLAIN_STORE, True),
        (RELAXED_ATOMIC, STRONG_STORE, PLAIN_LOAD, True),
        (STRONG_LOAD, STRONG_STORE, PLAIN_STORE, True),
        (STRONG_LOAD, RELAXED_ATOMIC, PLAIN_STORE, True),
        (STRONG_LOAD, RELAXED_ATOMIC, PLAIN_LOAD, False),  # two reads
        (STRONG_STORE, STRONG_STORE, STRONG_STORE, False),
        # What an atomic has read is behind whoever hears of it: PTX ISA 8.10.4 and 8.10.6.
        (RELAXED_ATOMIC, RELAXED_ATOMIC, PLAIN_STORE, False),
        (STRONG_STORE, RELAXED_ATOMIC, PLAIN_LOAD, False),
    ],
)
@pytest.mark.parametrize("is_heard", [False, True])
def test_the_later_of_two_strong_accesses_does_not_hide_the_earlier(
    first: str, second: str, third: str, races: bool, is_heard: bool
) -> None:
    release = "st.release.gpu.global.u32 [%p1+4], 1;" if is_heard else "mov.u32 %r4, 0;"
    body = UNHEARD.format(first=first, release_first=release, second=second, third=third)
    report = report_of(program(body, grid=3, block=1))
    assert bool(report.races) == (races and not is_heard), report.races


def test_an_atomic_follows_what_it_read_and_not_what_that_replaced() -> None:
    """CTA 0 stores, CTA 1 stores over it, CTA 2 counts up and then stores plainly: CTA 0 may still be about to store."""
    body = """
mov.u32 %r1, %ctaid.x;
setp.eq.u32 %q2, %r1, 2;
@!%q2 st.relaxed.gpu.global.u32 [%p0], 1;
@%q2 atom.relaxed.gpu.global.add.u32 %r2, [%p0], 1;
@%q2 st.global.u32 [%p0], 2;
"""
    races = report_of(program(body, grid=3, block=1)).races
    assert len(races) == 1 and "CTA (0,0,0)" in races[0], races


# Each CTA takes a number, leaves, and whoever leaves last sets the numbers back, ordered by nothing.
LAST_SETS_BACK = """
mov.u32 %r1, %ctaid.x;
mov.u32 %r2, 0;
setp.ne.u32 %q0, %t, 0;
mad.lo.u32 %r3, %r1, 900, 100;
work:
add.u32 %r2, %r2, 1;
setp.lt.u32 %q1, %r2, %r3;
@%q1 bra work;
@%q0 bra end;
atom.relaxed.gpu.global.add.u32 %r4, [%p1], 1;
atom.relaxed.gpu.global.add.u32 %r5, [%p1+4], 1;
setp.eq.u32 %q2, %r5, 1;
@%q2 st.global.u32 [%p1], 0;
end:
"""


def test_what_happens_between_two_atomics_is_drawn_often() -> None:
    """It is a race where the other CTA took its number last and left first: one schedule in five; one in twelve without stops."""
    p = program(LAST_SETS_BACK, grid=2, block=128)
    assert sum(bool(report_of(p, seed=seed).races) for seed in range(60)) >= 9
