"""What the emulator does not model it refuses by name; it never runs on with a guess."""

from __future__ import annotations

import pytest

from fa4_backend import emulator
from tests.emulator.harness import NOT_MODELLED, name_of, run_program
from tests.emulator.programs import load_family
from tests.emulator.programs.program import Program

REFUSED = [p for family, names in NOT_MODELLED.items() for p in load_family(family) if p.name in names]


@pytest.mark.parametrize("program", REFUSED, ids=name_of)
def test_refused(program: Program) -> None:
    with pytest.raises(emulator.UnsupportedInstruction):
        run_program(program)


def test_every_name_exists() -> None:
    """A program that was renamed or became modelled must leave the list."""
    assert len(REFUSED) == sum(len(names) for names in NOT_MODELLED.values())
