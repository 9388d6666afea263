"""Approximate functions, within the error that the PTX ISA states: each program gives what the PTX ISA states."""

from __future__ import annotations

import pytest

from tests.emulator.harness import check_program, name_of
from tests.emulator.programs import load_family
from tests.emulator.programs.program import Program

PROGRAMS = load_family("approx")


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_approx(program: Program) -> None:
    check_program(program)
