"""Single precision and packed pairs of it: every small program of the family gives the values that the PTX ISA states."""

from __future__ import annotations

import pytest

from tests.emulator.harness import check_program, name_of
from tests.emulator.programs import load_family
from tests.emulator.programs.program import Program

PROGRAMS = load_family("fp32")


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_fp32(program: Program) -> None:
    check_program(program)
