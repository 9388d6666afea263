"""The programs' results on a real GPU, committed as data: complete, of this version, and near what the emulator gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.emulator.harness import name_of, run_program
from tests.emulator.programs import FAMILIES, load_family
from tests.emulator.programs.program import Program, as_float, ulp_distance

RESULTS = Path(__file__).parents[1] / "device/results"
RECORD = json.loads((RESULTS / "programs_h200.json").read_text())
GPU_TARGET = RECORD["target"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_was_right_on_the_gpu(family: str) -> None:
    """A program that was changed must be run again: python -m tests.device.run_programs."""
    recorded = RECORD["families"].get(family, {})
    programs = [p for p in load_family(family) if p.target == GPU_TARGET]
    assert {p.name for p in programs} == set(recorded)
    for program in programs:
        verdict = recorded[program.name]
        assert verdict["status"] == "equal", f"{program.name}: {verdict}"
        assert verdict["digest"] == program.digest, f"{program.name}: the recorded result is of another version of the program"


@pytest.mark.parametrize("program", load_family("approx"), ids=name_of)
def test_approximate_functions_are_near_the_gpu(program: Program) -> None:
    """Hardware and emulator are each within the ISA's bound of the true value, so at most two bounds apart."""
    hardware = np.load(RESULTS / "approximate_h200.npz")[f"approx-{program.entry}/d"].reshape(-1)
    results, _ = run_program(program)
    got = results["d"].reshape(-1)
    buffer = next(b for b in program.buffers if b.name == "d")
    a, b = (v.view(f"u{v.dtype.itemsize}") for v in (got, hardware))
    x, y = as_float(a, buffer.floats), as_float(b, buffer.floats)
    with np.errstate(invalid="ignore"):
        near = (ulp_distance(a, b) <= 2 * buffer.ulp) | (np.abs(x - y) <= 2 * buffer.absolute) | (a == b) | (np.isnan(x) & np.isnan(y))
    assert near.all(), f"{int((~near).sum())} of {near.size} elements"
