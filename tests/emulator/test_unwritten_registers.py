"""A register that is read before it is written is a finding; copies of one, and what a select leaves out, are not."""

from __future__ import annotations

import numpy as np
import pytest

from fa4_backend import emulator
from tests.emulator.harness import run_program
from tests.emulator.programs import FAMILIES, load_family
from tests.emulator.programs.program import Program, output

STORE = "mad.wide.u32 %d0, %t, 4, %p0;\nst.global.u32 [%d0], %r1;"


def findings(body: str, **options: object) -> list[str]:
    _, report = run_program(Program("unwritten", "", body, (output("d", np.zeros(64, np.uint32)),), **options))  # type: ignore[arg-type]
    return [note for note in report.notes if "before it is written" in note]


LOOP = "mov.u32 %r2, 0;\nloop:\n{inside}\nadd.u32 %r2, %r2, 1;\nsetp.lt.u32 %q0, %r2, 3;\n@%q0 bra loop;"
READS = {
    "arithmetic": "add.u32 %r2, %r1, 1;",
    "stored": STORE,
    "address": "mov.u32 %r2, 1;\nadd.s64 %d0, %p0, %d1;",
    "predicate": "mov.u32 %r1, 1;\n@%q5 mov.u32 %r1, 2;",
    "branch": "@%q5 bra end;\nend:",
    "negated branch": "@!%q5 bra end;\nend:",
    "half of a pair": "mov.u32 %r2, 1;\nmov.b64 %d0, {%r2, %r1};",
    "copied, then used": "mov.u32 %r2, %r1;\nmov.u32 %r3, %r2;\nadd.u32 %r4, %r3, 1;",
    "selector": "mov.u32 %r1, 1;\nselp.u32 %r2, %r1, %r1, %q5;",
    "written on one side of a branch": "setp.lt.u32 %q0, %t, 16;\n@%q0 bra end;\nmov.u32 %r1, 1;\nend:\n" + STORE,
    "written under a guard that half the lanes have": "setp.lt.u32 %q0, %t, 16;\n@%q0 mov.u32 %r1, 1;\n" + STORE,
    "first turn of a loop": LOOP.format(inside="add.u32 %r3, %r1, 1;\nmov.u32 %r1, 1;"),
    "accumulated in a loop": LOOP.format(inside="add.u32 %r1, %r1, 1;"),
    "operand of a handler": "movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;",
}
RIGHT = {
    "written": "mov.u32 %r1, 1;\n" + STORE,
    "copied, never used": "mov.u32 %r2, %r1;",
    "copied, overwritten": "mov.u32 %r2, %r1;\nmov.u32 %r2, 1;\nadd.u32 %r3, %r2, 1;",
    "not selected": "mov.u32 %r2, 1;\nsetp.lt.u32 %q0, %t, 64;\nselp.u32 %r3, %r2, %r1, %q0;\nadd.u32 %r3, %r3, 1;",
    "written and read under one guard": "setp.lt.u32 %q0, %t, 16;\n@%q0 mov.u32 %r1, 1;\n@%q0 add.u32 %r2, %r1, 1;",
    "not reached": "setp.lt.u32 %q0, %t, 64;\n@%q0 bra end;\nadd.u32 %r2, %r1, 1;\nend:",
    "later turns of a loop": LOOP.format(inside="setp.eq.u32 %q1, %r2, 0;\n@%q1 bra first;\nadd.u32 %r3, %r1, 1;\nfirst:\nmov.u32 %r1, 1;"),
}


@pytest.mark.parametrize("name", READS)
def test_reads_before_writes_are_noted(name: str) -> None:
    found = findings(READS[name], smem_bytes=1024)
    assert len(found) == 1, found
    assert "%" in found[0] and "PTX line" in found[0]


@pytest.mark.parametrize("name", RIGHT)
def test_what_compilers_do_is_not_noted(name: str) -> None:
    assert findings(RIGHT[name]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_program_of_a_family_reads_such_a_register(family: str) -> None:
    for program in load_family(family):
        kernel = emulator.load_program(program.ptx)
        assert kernel.watched_registers == [] or (not program.faults and not _noted(program)), program.name


def _noted(program: Program) -> list[str]:
    return [note for note in run_program(program)[1].notes if "before it is written" in note]
