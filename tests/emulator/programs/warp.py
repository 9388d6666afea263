"""Lanes of a warp that talk to each other: PTX ISA 9.7.9.6, 9.7.13.3 to 9.7.13.10; and divergent control flow (9.7.12)."""

from __future__ import annotations

import numpy as np

from tests.emulator.programs.program import Buffer, Program, output

RNG = np.random.default_rng(11)
VALUES = RNG.integers(0, 1 << 32, 32, dtype=np.uint32)
LANES = np.arange(32)

LOAD = "mad.wide.u32 %d0, %t, 4, %p0;\nld.global.b32 %r0, [%d0];\n"
STORE = "mad.wide.u32 %d0, %t, 4, %p1;\nst.global.b32 [%d0], %r1;\n"


def _shuffle_source(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and the predicate. 9.7.9.6, pseudo-code."""
    bval, cval, segmask = b & 31, c & 31, c >> 8 & 31
    highest, lowest = (lane & segmask) | (cval & ~segmask & 31), lane & segmask
    source = {"up": lane - bval, "down": lane + bval, "bfly": lane ^ bval, "idx": lowest | (bval & ~segmask & 31)}[mode]
    inside = source >= highest if mode == "up" else source <= highest
    return (source if inside else lane), inside


def _shuffles() -> list[Program]:
    out = []
    for mode, settings in {
        "up": [(1, 0), (5, 0), (1, 0x1800), (3, 0x1C00), (31, 0)],
        "down": [(1, 31), (5, 31), (1, 0x1807), (3, 0x181F), (16, 31)],
        "bfly": [(1, 31), (16, 31), (2, 0x1C03), (8, 7)],
        "idx": [(0, 31), (7, 31), (3, 0x181F), (9, 0x1C1F), (40, 31)],
    }.items():
        for b, c in settings:
            moves = [_shuffle_source(mode, lane, b, c) for lane in range(32)]
            want = np.stack([VALUES[[s for s, _ in moves]], np.array([p for _, p in moves], np.uint32)], 1)
            body = (
                f"{LOAD}shfl.sync.{mode}.b32 %r1|%q0, %r0, {b}, {c:#x}, 0xffffffff;\nselp.u32 %r2, 1, 0, %q0;\n"
                "mad.wide.u32 %d0, %t, 8, %p1;\nst.global.v2.b32 [%d0], {%r1, %r2};"
            )
            out.append(Program(f"shfl.sync.{mode}.b32 {b} {c:#x}", "9.7.9.6", body, (Buffer("a", VALUES), output("d", want))))
    # Source lane from a register, different in every lane.
    index = RNG.permutation(32).astype(np.uint32)
    body = LOAD + "mad.wide.u32 %d1, %t, 4, %p2;\nld.global.b32 %r3, [%d1];\nshfl.sync.idx.b32 %r1, %r0, %r3, 31, 0xffffffff;\n" + STORE
    out.append(
        Program("shfl.sync.idx.b32 by register", "9.7.9.6", body, (Buffer("a", VALUES), output("d", VALUES[index]), Buffer("i", index)))
    )
    # Half a warp, with its own member mask.
    body = (
        LOAD
        + "mov.b32 %r1, 77;\nsetp.ge.u32 %q1, %t, 16;\n@%q1 bra done;\nshfl.sync.down.b32 %r1, %r0, 1, 31, 0xffff;\nand.b32 %r2, %t, 15;\n"
        "setp.ne.u32 %q2, %r2, 15;\n@%q2 bra done;\nmov.b32 %r1, 5;\ndone:\nbar.warp.sync 0xffffffff;\n" + STORE
    )
    want = np.where(LANES < 15, np.roll(VALUES, -1), 77).astype(np.uint32)
    want[15] = 5  # its source lane 16 is not in the mask: the result is undefined, so the program replaces it
    out.append(Program("shfl.sync with a member mask", "9.7.9.6", body, (Buffer("a", VALUES), output("d", want))))
    return out


def _votes() -> list[Program]:
    out = []
    for name, predicate in (("odd", LANES & 1 == 1), ("all", LANES >= 0), ("none", LANES < 0), ("one", LANES == 7)):
        flags = predicate.astype(np.uint32)
        ballot = int(sum(1 << int(i) for i in np.flatnonzero(predicate)))
        results = [ballot, int(predicate.all()), int(predicate.any()), int(predicate.all() or not predicate.any())]
        want = np.tile(np.array(results, np.uint32), (32, 1))
        body = (
            LOAD + "setp.ne.u32 %q0, %r0, 0;\nvote.sync.ballot.b32 %r1, %q0, 0xffffffff;\nvote.sync.all.pred %q1, %q0, 0xffffffff;\n"
            "vote.sync.any.pred %q2, %q0, 0xffffffff;\nvote.sync.uni.pred %q3, %q0, 0xffffffff;\n"
            "selp.u32 %r2, 1, 0, %q1;\nselp.u32 %r3, 1, 0, %q2;\nselp.u32 %r4, 1, 0, %q3;\n"
            "mad.wide.u32 %d0, %t, 16, %p1;\nst.global.v4.b32 [%d0], {%r1, %r2, %r3, %r4};"
        )
        out.append(Program(f"vote.sync {name}", "9.7.13.8", body, (Buffer("a", flags), output("d", want))))
    body = (
        LOAD
        + "setp.ne.u32 %q0, %r0, 0;\nmov.b32 %r1, 0;\nsetp.lt.u32 %q1, %t, 8;\n@!%q1 bra done;\nvote.sync.ballot.b32 %r1, !%q0, 0xff;\n"
        "done:\nbar.warp.sync 0xffffffff;\n" + STORE
    )
    want = np.where(LANES < 8, 0x55, 0).astype(np.uint32)
    out.append(Program("vote.sync.ballot of a part", "9.7.13.8", body, (Buffer("a", (LANES & 1).astype(np.uint32)), output("d", want))))
    return out


def _matches() -> list[Program]:
    groups = np.array([3, 1, 3, 7, 1, 1, 3, 9] * 4, np.uint32)
    same = np.array([sum(1 << j for j in range(32) if groups[j] == g) for g in groups], np.uint32)
    equal = np.full(32, 42, np.uint32)
    out = [
        Program(
            "match.any.sync.b32",
            "9.7.13.9",
            LOAD + "match.any.sync.b32 %r1, %r0, 0xffffffff;\n" + STORE,
            (Buffer("a", groups), output("d", same)),
        )
    ]
    for name, data, mask in (("equal", equal, 0xFFFFFFFF), ("different", groups, 0)):
        body = (
            LOAD + "match.all.sync.b32 %r1|%q0, %r0, 0xffffffff;\nselp.u32 %r2, 1, 0, %q0;\nmad.wide.u32 %d0, %t, 8, %p1;\n"
            "st.global.v2.b32 [%d0], {%r1, %r2};"
        )
        want = np.tile(np.array([mask, mask != 0], np.uint32), (32, 1))
        out.append(Program(f"match.all.sync.b32 {name}", "9.7.13.9", body, (Buffer("a", data), output("d", want))))
    return out


def _reductions() -> list[Program]:
    out = []
    as_signed = VALUES.view(np.int32)
    for name, value in (
        ("add.s32", int(VALUES.sum(dtype=np.uint64)) & 0xFFFFFFFF),
        ("add.u32", int(VALUES.sum(dtype=np.uint64)) & 0xFFFFFFFF),
        ("min.s32", int(as_signed.min()) & 0xFFFFFFFF),
        ("max.s32", int(as_signed.max()) & 0xFFFFFFFF),
        ("min.u32", int(VALUES.min())),
        ("max.u32", int(VALUES.max())),
        ("and.b32", int(np.bitwise_and.reduce(VALUES | 0x10101010))),
        ("or.b32", int(np.bitwise_or.reduce(VALUES))),
        ("xor.b32", int(np.bitwise_xor.reduce(VALUES))),
    ):
        data = VALUES | np.uint32(0x10101010) if name == "and.b32" else VALUES
        body = f"{LOAD}redux.sync.{name} %r1, %r0, 0xffffffff;\n{STORE}"
        out.append(Program(f"redux.sync.{name}", "9.7.13.10", body, (Buffer("a", data), output("d", np.full(32, value, np.uint32)))))
    floats = np.array([1.5, -3.0, 7.25, 0.5] * 8, np.float32)
    for name, value in (("min", -3.0), ("max", 7.25)):
        body = f"{LOAD}mov.b32 %f0, %r0;\nredux.sync.{name}.f32 %f1, %f0, 0xffffffff;\nmov.b32 %r1, %f1;\n{STORE}"
        args = (Buffer("a", floats.view(np.uint32)), output("d", np.full(32, value, np.float32).view(np.uint32)))
        out.append(Program(f"redux.sync.{name}.f32", "9.7.13.10", body, args, target="sm_100a"))
    return out


def _elected(got: np.ndarray) -> None:
    rows = got.reshape(32, 2)
    assert rows[:, 1].sum() == 1, f"elect.sync: {rows[:, 1].sum()} lanes elected, expected 1"
    assert (rows[:, 0] == np.flatnonzero(rows[:, 1])[0]).all(), "elect.sync: the lane returned is not the elected one"


def _leaders() -> list[Program]:
    body = "elect.sync %r1|%q0, 0xffffffff;\nselp.u32 %r2, 1, 0, %q0;\nmad.wide.u32 %d0, %t, 8, %p0;\nst.global.v2.b32 [%d0], {%r1, %r2};"
    elect = Program("elect.sync", "9.7.13.11", body, (Buffer("d", np.full((32, 2), 9, np.uint32), check=_elected),))
    body = (
        "mov.b32 %r1, 0;\nsetp.lt.u32 %q1, %t, 13;\n@!%q1 bra done;\nactivemask.b32 %r1;\ndone:\nbar.warp.sync 0xffffffff;\n"
        "mad.wide.u32 %d0, %t, 4, %p0;\nst.global.b32 [%d0], %r1;"
    )

    def contains_itself(got: np.ndarray) -> None:
        # The ISA promises only that the executing lane is in its mask, and no lane that cannot be.
        for lane in range(13):
            assert got[lane] >> lane & 1 and got[lane] < 1 << 13, f"activemask of lane {lane}: {got[lane]:#x}"

    mask = Program("activemask.b32", "9.7.13.6", body, (Buffer("d", np.full(32, 9, np.uint32), check=contains_itself),))
    return [elect, mask]


def _divergence() -> list[Program]:
    out = []
    # A loop whose trip count differs in every lane.
    body = (
        "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nloop:\nadd.u32 %r1, %r1, %r2;\nadd.u32 %r2, %r2, 1;\nsetp.le.u32 %q0, %r2, %t;\n@%q0 bra loop;\n"
        "mad.wide.u32 %d0, %t, 4, %p0;\nst.global.b32 [%d0], %r1;"
    )
    out.append(Program("loop with divergent trip counts", "9.7.12.3", body, (output("d", (LANES * (LANES + 1) // 2).astype(np.uint32)),)))
    # Nested ifs, with a return inside.
    body = (
        "mov.u32 %r1, 1;\nsetp.lt.u32 %q0, %t, 20;\n@!%q0 bra big;\nand.b32 %r2, %t, 1;\nsetp.eq.u32 %q1, %r2, 1;\n@%q1 bra odd;\n"
        "mov.u32 %r1, 2;\n"
        "bra.uni join;\nodd:\nmov.u32 %r1, 3;\nsetp.eq.u32 %q2, %t, 5;\n@%q2 ret;\njoin:\nadd.u32 %r1, %r1, 10;\nbra end;\nbig:\n"
        "mov.u32 %r1, 100;\n"
        "end:\nmad.wide.u32 %d0, %t, 4, %p0;\nst.global.b32 [%d0], %r1;"
    )
    want = np.where(LANES < 20, np.where(LANES % 2, 13, 12), 100).astype(np.uint32)
    want[5] = 0xA5A5A5A5
    out.append(Program("nested branches and an early return", "9.7.12", body, (output("d", want),)))
    body = (
        "and.b32 %r2, %t, 3;\nts: .branchtargets zero, one, two, three;\nbrx.idx %r2, ts;\nzero:\nmov.u32 %r1, 10;\nbra end;\none:\n"
        "mov.u32 %r1, 21;\nbra end;\n"
        "two:\nmov.u32 %r1, 32;\nbra end;\nthree:\nmov.u32 %r1, 43;\nend:\nmad.wide.u32 %d0, %t, 4, %p0;\nst.global.b32 [%d0], %r1;"
    )
    out.append(Program("brx.idx", "9.7.12.4", body, (output("d", np.array([10, 21, 32, 43] * 8, np.uint32)),)))
    # Predicated instructions: the others keep their old value.
    body = (
        "mov.u32 %r1, 7;\nsetp.gt.u32 %q0, %t, 9;\n@%q0 mov.u32 %r1, 8;\n@!%q0 add.u32 %r1, %r1, 100;\nmad.wide.u32 %d0, %t, 4, %p0;\n"
        "@%q0 st.global.b32 [%d0], %r1;\n@!%q0 st.global.b32 [%d0], %t;"
    )
    out.append(Program("guards", "9.7", body, (output("d", np.where(LANES > 9, 8, LANES).astype(np.uint32)),)))
    # An inner block with its own registers and labels, as inline assembly makes them.
    body = (
        "mov.u32 %r1, %t;\n{\n.reg .pred p;\n.reg .b32 x;\nmov.u32 x, 5;\nsetp.gt.u32 p, %t, 3;\n@p bra skip;\nadd.u32 %r1, %r1, x;\n"
        "skip:\n}\n"
        "{\n.reg .pred p;\nsetp.gt.u32 p, %t, 30;\n@p bra skip;\nadd.u32 %r1, %r1, 1000;\nskip:\n}\n"
        "mad.wide.u32 %d0, %t, 4, %p0;\nst.global.b32 [%d0], %r1;"
    )
    want = (LANES + np.where(LANES > 3, 0, 5) + np.where(LANES > 30, 0, 1000)).astype(np.uint32)
    out.append(Program("scoped registers and labels", "5.4", body, (output("d", want),)))
    return out


PROGRAMS = [*_shuffles(), *_votes(), *_matches(), *_reductions(), *_leaders(), *_divergence()]
