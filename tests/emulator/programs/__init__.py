"""Small PTX programs, one module a family of instructions, with the values the PTX ISA says they produce."""

from __future__ import annotations

import importlib

from tests.emulator.programs.program import Program

FAMILIES = (
    "integer", "fp32", "half", "approx", "warp", "memory", "async_copy", "matrix", "barriers", "bulk", "tensor_copy", "wgmma",
    "cluster", "tcgen05", "grid",
)  # fmt: skip


def load_family(name: str) -> list[Program]:
    """The programs of one family; their names are unique in it."""
    programs: list[Program] = importlib.import_module(f"tests.emulator.programs.{name}").PROGRAMS
    names = [p.entry for p in programs]
    twice = {n for n in names if names.count(n) > 1}
    assert not twice, f"{name}: two programs are called {sorted(twice)}"
    return programs
