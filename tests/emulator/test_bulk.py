"""Bulk copies and reductions: every small program of the family gives the values that the PTX ISA states."""

from __future__ import annotations

import pytest

from tests.emulator.harness import check_program, name_of
from tests.emulator.programs import load_family
from tests.emulator.programs.program import Program

PROGRAMS = load_family("bulk")


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_bulk(program: Program) -> None:
    check_program(program)


@pytest.mark.parametrize("seed", range(3))
def test_bulk_under_random_schedules(seed: int) -> None:
    """The order in which warps run and asynchronous operations finish changes no result."""
    for program in PROGRAMS:
        check_program(program, seed=seed)
