"""Approximate functions, within the error that the PTX ISA states: each program gives what the PTX ISA states."""

from __future__ import annotations

import pytest

from tests.emulator.harness import check_program, name_of, runnable
from tests.emulator.programs.program import Program

PROGRAMS = runnable("approx")


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_approx(program: Program) -> None:
    check_program(program)
