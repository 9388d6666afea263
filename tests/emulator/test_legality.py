"""What the driver or the ISA forbids has a name here: each case beside a legal neighbour."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fa4_backend import emulator
from fa4_backend.emulator.matrices import check_shape, instruction_descriptor
from tests.emulator.harness import run_program
from tests.emulator.programs.program import Buffer, Program, TensorMap, output


def program(body: str, *args: Any, **options: Any) -> Program:
    return Program("legality", "", body, args or (output("d", np.zeros(64, np.uint32)),), **{"smem_bytes": 2048, **options})


NOTHING = re.sub(r"\.reqntid[^\n{]*", "", program("mov.u32 %r0, 0;").ptx)  # for blocks of any shape


@pytest.mark.parametrize(
    ("right", "wrong", "match"),
    [
        ({"block": (1, 1, 64)}, {"block": (1, 1, 65)}, "block"),
        ({"grid": (1, 3)}, {"grid": (1, 65536)}, "grid"),
        ({"grid": (1, 1, 3)}, {"grid": (1, 1, 65536)}, "grid"),
        ({"grid": (1, 1, 1)}, {"grid": (1, 0, 1)}, "grid"),
        ({"block": 256, "registers": 255}, {"block": 512, "registers": 136}, "registers"),
        ({"smem": 232448}, {"smem": 232448 + 16}, "shared memory"),
        ({"grid": 8, "cluster": 8}, {"grid": 16, "cluster": 16}, "cluster of 16"),
        ({"grid": 16, "cluster": 16, "non_portable": True}, {"grid": 32, "cluster": 32, "non_portable": True}, "cluster of 32"),
    ],
)
def test_a_launch_out_of_its_limits_is_refused(right: dict[str, Any], wrong: dict[str, Any], match: str) -> None:
    shape = {"grid": 1, "block": 32, "args": [np.zeros(64, np.uint32)], "smem": 2048}
    with emulator.session(arch="sm_90a") as session:
        session.launch(NOTHING, **{**shape, **right})
        with pytest.raises(emulator.LaunchError, match=match):
            session.launch(NOTHING, **{**shape, **wrong})


def test_static_and_dynamic_shared_memory_count_together() -> None:
    text = program("mov.u32 %r0, fixed;", declarations=".shared .align 16 .b8 fixed[1024];\n").ptx
    with emulator.session(arch="sm_90a") as session:
        session.launch(text, 1, 32, [np.zeros(64, np.uint32)], smem=232448 - 1024)
        with pytest.raises(emulator.LaunchError, match="1024 bytes of static"):
            session.launch(text, 1, 32, [np.zeros(64, np.uint32)], smem=232448 - 512)


MASKS = "setp.lt.u32 %q0, %lane, 16;\nselp.u32 %r1, {low}, {high}, %q0;\n"


@pytest.mark.parametrize(
    ("instruction", "needs_one_mask"),
    [
        ("shfl.sync.idx.b32 %r2, %t, 0, 31, %r1;", False),
        ("bar.warp.sync %r1;", False),
        ("vote.sync.any.pred %q1, %q0, %r1;", True),
        ("redux.sync.add.u32 %r2, %t, %r1;", True),
        ("match.any.sync.b32 %r2, %t, %r1;", True),
        ("elect.sync %r2|%q1, %r1;", True),
    ],
)
def test_member_masks(instruction: str, needs_one_mask: bool) -> None:
    """A lane is in its own mask, and lanes of a mask have the same; halves of a warp may have their own where the result allows it."""
    run_program(program(MASKS.format(low="0xffffffff", high="0xffffffff") + instruction))
    halves = program(MASKS.format(low="0xffff", high="0xffff0000") + instruction)
    if not needs_one_mask:
        run_program(halves)
    for low, high in (("0xffffffff", "0xfffffffe"), ("0xffff", "0xffff"), *([("0xffff", "0xffff0000")] if needs_one_mask else [])):
        with pytest.raises(emulator.KernelFault, match="member mask"):
            run_program(program(MASKS.format(low=low, high=high) + instruction))


def test_setmaxnreg_is_the_same_in_a_warpgroup() -> None:
    body = "setp.eq.u32 %q0, %warp, {warp};\n@%q0 bra other;\nsetmaxnreg.dec.sync.aligned.u32 {first};\nbra end;\nother:\n"
    body += "setmaxnreg.dec.sync.aligned.u32 64;\nend:\n"
    options = {"block": 256, "directives": ".maxnreg 128\n"}
    run_program(program(body.format(warp=3, first=64), **options))
    run_program(program(body.replace("setp.eq", "setp.ge").format(warp=4, first=72), **options))
    with pytest.raises(emulator.KernelFault, match="all must execute the same"):
        run_program(program(body.format(warp=3, first=72), **options))


def test_setmaxnreg_is_executed_by_every_warp_of_a_warpgroup() -> None:
    body = "setp.eq.u32 %q0, %warp, {warp};\n@%q0 bra end;\nsetmaxnreg.dec.sync.aligned.u32 64;\nend:\n"
    options = {"directives": ".maxnreg 128\n"}
    assert run_program(program(body.format(warp=4), block=128, **options))[1].faults == []
    (note,) = run_program(program(body.format(warp=2), block=128, **options))[1].faults
    assert "warp 2 did not execute setmaxnreg 64" in note


ALLOC = "mov.u32 %r0, smem;\ntcgen05.alloc.cta_group::{a}.sync.aligned.shared::cta.b32 [%r0], 32;\nbar.sync 0;\nld.shared.u32 %r1, [%r0];\n"
DEALLOC = "tcgen05.dealloc.cta_group::{b}.sync.aligned.b32 %r1, 32;\n"


def test_cta_group_is_the_same_in_a_kernel() -> None:
    options = {"target": "sm_100a", "grid": 2, "cluster": 2}
    run_program(program((ALLOC + DEALLOC).format(a=1, b=1), **options))
    with pytest.raises(emulator.LaunchError, match="cta_group"):
        run_program(program((ALLOC + DEALLOC).format(a=1, b=2), **options))


@pytest.mark.parametrize(
    ("columns", "alone", "right"),
    [("32", "", True), ("%r8", "", False), ("32", "@%q3 bra end;\n", False)],
    ids=["both", "different sizes", "one"],
)
def test_both_ctas_of_a_pair_allocate_its_tensor_memory(columns: str, alone: str, right: bool) -> None:
    body = (ALLOC + DEALLOC).format(a=2, b=2).replace(" 32;", f" {columns};").replace(", 32;", f", {columns};")
    start = "mov.u32 %r7, %cluster_ctarank;\nsetp.eq.u32 %q3, %r7, 1;\nadd.u32 %r8, %r7, 1;\nshl.b32 %r8, %r8, 5;\n"
    report = run_program(program(start + alone + body + "end:\n" + MEET, target="sm_100a", grid=2, cluster=2))[1]
    assert [note.startswith("tmem-pair") for note in report.faults] == ([] if right else [True])


@pytest.mark.parametrize(
    ("m", "n", "group", "right"),
    [
        (64, 8, 1, True),
        (128, 24, 1, True),
        (128, 12, 1, False),
        (256, 16, 2, True),
        (256, 24, 2, False),
        (128, 32, 2, True),
        (64, 64, 2, False),
    ],
)
def test_shapes_of_tcgen05(m: int, n: int, group: int, right: bool) -> None:
    desc = instruction_descriptor(1 << 4 | 1 << 7 | 1 << 10 | (n >> 3) << 17 | (m >> 4) << 24, "f16")
    if n % 8:
        desc = desc.__class__(**{name: getattr(desc, name) for name in desc.__slots__} | {"n": n})  # type: ignore[attr-defined]
    if right:
        check_shape(desc, group)
    else:
        with pytest.raises(emulator.KernelFault, match="not a legal shape"):
            check_shape(desc, group)


PEER = """
mov.u32 %r0, smem;
setp.ne.u32 %q0, %t, 0;
mov.u32 %r1, %cluster_ctarank;
setp.ne.u32 %q1, %r1, 0;
@%q0 bra end;
@%q1 mbarrier.init.shared.b64 [%r0], 1;
@%q1 fence.mbarrier_init.release.cluster;
end:
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
or.pred %q2, %q0, %q1;
mapa.shared::cluster.u32 %r2, %r0, 1;
@!%q2 {access}
{last}
"""
MEET = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"


@pytest.mark.parametrize(
    "access",
    ["st.shared::cluster.u32 [%r2+64], %t;", "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];"],
    ids=["store", "arrive"],
)
def test_a_peer_has_not_exited(access: str) -> None:
    options = {"grid": 2, "cluster": 2}
    assert run_program(program(PEER.format(access=access, last=MEET), **options))[1].notes == []
    (note,) = run_program(program(PEER.format(access=access, last=""), **options))[1].notes
    assert "may have exited" in note


def test_a_peer_has_started() -> None:
    store = PEER.format(access="st.shared::cluster.u32 [%r2+64], %t;", last=MEET)
    for meet in (MEET, MEET.replace("arrive", "arrive.relaxed")):  # to be there, the other needs to release nothing
        assert run_program(program(store.replace(MEET, meet, 1), grid=2, cluster=2))[1].faults == []
    (note,) = run_program(program(store.replace(MEET, "", 1), grid=2, cluster=2))[1].faults
    assert "may not have started" in note


@pytest.mark.parametrize(("sync", "right"), [("bar.warp.sync 0xffffffff;\n", True), ("", False)])
def test_every_lane_that_used_a_peer_is_known_there(sync: str, right: bool) -> None:
    """All lanes store, lane 0 tells the peer, which may exit then: it must know of the other lanes' stores, too."""
    body = PEER.replace("@!%q2 {access}\n{last}\n", "") + (
        "mad.lo.u32 %r3, %lane, 4, %r2;\n@%q1 bra wait;\nst.shared::cluster.u32 [%r3+64], %t;\n" + sync + "@%q0 bra out;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];\nbra out;\n"
        "wait:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %q3, [%r0], 0;\n@!%q3 bra wait;\nout:\n"
    )
    faults = run_program(program(body, grid=2, cluster=2))[1].faults
    assert (faults == []) == right and (right or "may have exited" in faults[0])


INIT = "mov.u32 %r0, smem;\nsetp.ne.u32 %q0, %t, 0;\n@!%q0 mbarrier.init.shared.b64 [%r0], 1;\n"


def test_a_store_over_an_mbarrier_in_use() -> None:
    store = "@!%q0 st.shared.u32 [%r0+{offset}], 7;\n"
    assert run_program(program(INIT + store.format(offset=8)))[1].races == []
    assert "holds an mbarrier" in run_program(program(INIT + store.format(offset=4)))[1].races[0]
    ended = INIT + "@!%q0 mbarrier.inval.shared.b64 [%r0];\n" + store.format(offset=4)
    assert run_program(program(ended))[1].races == []


def test_an_mbarrier_in_use_is_read_by_its_own_instructions_only() -> None:
    load = "@!%q0 ld.shared.u32 %r3, [%r0];\n"
    assert "is read like other memory" in run_program(program(INIT + load))[1].races[0]
    ended = INIT + "@!%q0 mbarrier.inval.shared.b64 [%r0];\n" + load
    assert run_program(program(ended))[1].races == []


def test_an_mbarrier_is_made_again_only_after_its_end() -> None:
    again = "@!%q0 mbarrier.init.shared.b64 [%r0], 1;\n"
    run_program(program(INIT + "@!%q0 mbarrier.inval.shared.b64 [%r0];\n" + again))
    with pytest.raises(emulator.BarrierMisuse, match=r"mbarrier\.inval did not end"):
        run_program(program(INIT + again))


@pytest.mark.parametrize(("space", "right"), [("ld.global", True), ("ld.global.nc", False)])
def test_the_read_only_path_reads_what_no_launch_writes(space: str, right: bool) -> None:
    body = "mad.wide.u32 %d0, %t, 4, %p0;\nst.global.u32 [%d0], %t;\n" + space + ".u32 %r1, [%d0];\nadd.u32 %r2, %r1, 1;\n"
    races = run_program(program(body))[1].races
    assert (races == []) == right and (right or "ld.global.nc" in races[0])


COPY = """
mov.u32 %r0, smem;
setp.ne.u32 %q0, %t, 0;
@%q0 bra end;
mbarrier.init.shared.b64 [%r0], 1;
fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared.b64 %d5, [%r0], {num_bytes};
cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r0+{target}], [%p0, {{0, 0}}], [%r0];
spin:
mbarrier.try_wait.parity.shared.b64 %q1, [%r0], 0;
@!%q1 bra spin;
end:
"""


def copy(target: int, width: int, swizzle: str) -> Program:
    data = Buffer("a", np.zeros(4096, np.uint16))
    tensor = TensorMap("a", "bf16", (64, 64), (128,), (width, 2), swizzle=swizzle)
    return program(COPY.format(target=target, num_bytes=width * 4), tensor, data)


def test_targets_and_widths_of_tensor_copies() -> None:
    for target, width, swizzle in ((1024, 64, "128B"), (1024, 32, "64B"), (128, 16, "none")):
        assert run_program(copy(target, width, swizzle))[1].races == []
    for target, width, swizzle, match in (
        (1024, 64, "64B", "swizzle span"),
        (1024, 32, "32B", "swizzle span"),
        (144, 16, "none", "128 bytes"),
    ):
        with pytest.raises(emulator.MemoryFault, match=match):
            run_program(copy(target, width, swizzle))


@pytest.mark.parametrize("offset", [0, 1 << 20])
def test_the_source_of_a_prefetch_exists(offset: int) -> None:
    body = f"setp.ne.u32 %q0, %t, 0;\nadd.u64 %d0, %p0, {offset};\n@!%q0 cp.async.bulk.prefetch.L2.global [%d0], 64;\n"
    if offset:
        with pytest.raises(emulator.MemoryFault, match="outside every registered buffer"):
            run_program(program(body))
    else:
        run_program(program(body))


def test_a_prefetched_tensor_map_is_one() -> None:
    data = Buffer("a", np.zeros(4096, np.uint16))
    tensor = TensorMap("a", "bf16", (64, 64), (128,), (64, 2), swizzle="128B")
    run_program(program("prefetch.tensormap [%p0];\n", tensor, data))
    with pytest.raises(emulator.UnsupportedInstruction, match="tensor map"):
        run_program(program("prefetch.tensormap [%p0];\n"))


@pytest.mark.parametrize(("last", "gets"), [(15, 0xFFFFFFFF), (14, 15)])
def test_a_shuffle_from_a_lane_that_takes_no_part_gives_nothing(last: int, gets: int) -> None:
    """Half a warp shuffles down by one: lane 15 would read lane 16, which is undefined."""
    body = "mad.wide.u32 %d0, %t, 4, %p0;\nsetp.gt.u32 %q0, %lane, 15;\n@%q0 bra end;\nshfl.sync.down.b32 %r2, %t, 1, 31, 0xffff;\n"
    results, _ = run_program(program(body + "st.global.u32 [%d0], %r2;\nend:\n"))
    assert results["d"][last] == gets
