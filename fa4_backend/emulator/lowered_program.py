"""A kernel as the emulator runs it: an array of fixed-size records for the native loop, and Python handlers for the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fa4_backend.emulator.syntax import Address, Kernel
from fa4_backend.emulator.undefined import registers_in

INST = np.dtype(
    [
        ("op", np.uint16),
        ("negated", np.uint8),
        ("flags", np.uint8),  # INST_*
        *((name, np.int32) for name in ("guard", "d", "a", "b", "c", "e", "f", "target", "count")),
        ("imm", np.int64),
    ],
    align=True,
)
INST_ALIGNED, INST_WATCHED = 1, 2
SINK_SLOT = 0  # two slots that swallow results written to `_`
FIRST_SLOT = 2
SHARED_WINDOW = 1 << 56  # generic address of shared::cluster address 0
LOCAL_WINDOW = 2 << 56
RESERVED_SMEM = 1024  # bytes the system keeps at the start of shared memory (CUDA driver, compute capability 9.0 and later)


@dataclass(eq=False)
class Program:
    """A kernel ready to run. Everything here is independent of a launch."""

    kernel: Kernel
    code: np.ndarray
    aux: np.ndarray
    handlers: list[Callable[[Any], bool | None] | None]  # `opcodes.Handler` of each instruction that the native loop does not run
    num_slots: int
    const_start: int  # slots from here on are set for each warp from `constants`, specials and symbols
    constants: np.ndarray  # (num_slots - const_start, 32) uint32
    specials: dict[str, tuple[int, int]]  # name -> slot, bytes
    symbols: dict[str, tuple[int, int]]
    static_smem: int
    has_dynamic_smem: bool
    local_bytes: int
    watched: np.ndarray  # accesses of registers that may be read before they are written: see undefined.py
    watched_registers: list[int]

    @property
    def name(self) -> str:
        return self.kernel.name

    @functools.cached_property
    def cta_groups(self) -> frozenset[str]:
        """Which `.cta_group` the kernel's tcgen05 instructions have."""
        opcodes = (i.opcode for i in self.kernel.instructions if i.opcode.startswith("tcgen05."))
        return frozenset(part for opcode in opcodes for part in opcode.split(".") if part.startswith("cta_group"))

    @functools.cached_property
    def launches_dependents(self) -> bool:
        """Whether a launch behind this one may start before it is complete."""
        return any(i.opcode == "griddepcontrol.launch_dependents" for i in self.kernel.instructions)

    @functools.cached_property
    def ctas_communicate(self) -> bool:
        """Whether CTAs may tell each other something while they run, such as who takes which entry of a queue: atomics and strong loads."""
        strong = (".acquire", ".relaxed", ".volatile")
        return any(
            ".shared" not in i.opcode
            and (i.opcode.startswith("atom.") or (i.opcode.startswith("ld.") and any(s in i.opcode for s in strong)))
            for i in self.kernel.instructions
        )

    @functools.cached_property
    def register_readers(self) -> dict[int, list[int]]:
        """Instructions that read each register (by its index)."""
        readers: dict[int, list[int]] = {}
        for pc, instruction in enumerate(self.kernel.instructions):
            stores = instruction.opcode.startswith(("st.", "red.", "tcgen05.st", "tcgen05.mma", "wgmma.mma"))
            for number, operand in enumerate(instruction.operands):
                if number or stores or isinstance(operand, Address):
                    for register in registers_in(operand):
                        readers.setdefault(register.index, []).append(pc)
            if instruction.guard is not None:
                readers.setdefault(instruction.guard.index, []).append(pc)
        return readers

    @functools.cached_property
    def register_accesses(self) -> dict[int, list[int]]:
        """Instructions that read or write each register (by its index)."""
        accesses: dict[int, list[int]] = {}
        for pc, instruction in enumerate(self.kernel.instructions):
            for register in {r.index for operand in instruction.operands for r in registers_in(operand)}:
                accesses.setdefault(register, []).append(pc)
        return accesses

    def describe(self, pc: int) -> str:
        if 0 <= pc < len(self.kernel.instructions):
            instruction = self.kernel.instructions[pc]
            return f"instruction {pc} (PTX line {instruction.line}): {instruction.text[:160]}"
        return f"instruction {pc}"
