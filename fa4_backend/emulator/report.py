"""What a session found and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fa4_backend.emulator.lowered_program import Program


FAULTS = ("tmem-leak", "tmem-pair", "registers", "uninitialised", "dependency", "exit")  # kinds of notes that matter


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect: `kind` names its class; `text` says what happened and where."""

    kind: str
    text: str


@dataclass(slots=True)
class KernelCounts:
    """Executions of every instruction, summed over CTAs: (warps of a CTA, instructions)."""

    program: Program
    launches: int = 0
    ctas: int = 0
    executed: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))


@dataclass(slots=True)
class Report:
    """Results of everything run in a session; `races` and `faults` are empty for a right kernel."""

    findings: Counter[Finding] = field(default_factory=Counter)
    kernels: dict[str, KernelCounts] = field(default_factory=dict)
    seconds: float = 0.0
    tensor_flops: int = 0
    tma_bytes: int = 0
    unwritten: dict[str, int] = field(default_factory=dict)

    def note(self, kind: str, text: str) -> None:
        self.findings[Finding(kind, text)] += 1

    @property
    def races(self) -> list[str]:
        return [f"{f.text} ({n} times)" if n > 1 else f.text for f, n in self.findings.items() if f.kind == "race"]

    @property
    def notes(self) -> list[str]:
        return [f"{f.kind}: {f.text}" for f in self.findings if f.kind != "race"]

    @property
    def faults(self) -> list[str]:
        """The notes that a right kernel does not have. A named barrier that ends half full is none: it may have been somebody's turn."""
        return [f"{f.kind}: {f.text}" for f in self.findings if f.kind in FAULTS]

    @property
    def instructions(self) -> int:
        """Warp instructions executed."""
        return int(sum(k.executed.sum() for k in self.kernels.values()))

    def add(self, other: Report) -> None:
        """Take in what another session found and executed."""
        self.findings.update(other.findings)
        self.seconds += other.seconds
        self.tensor_flops += other.tensor_flops
        self.tma_bytes += other.tma_bytes
        self.unwritten.update(other.unwritten)
        for name, counts in other.kernels.items():
            mine = self.kernels.setdefault(name, KernelCounts(counts.program, executed=np.zeros_like(counts.executed)))
            mine.launches, mine.ctas = mine.launches + counts.launches, mine.ctas + counts.ctas
            mine.executed += counts.executed

    def add_counts(self, program: Program, num_warps: int, warp_idx: int, executed: np.ndarray) -> None:
        """Take in how often a warp, of `num_warps` of its CTA, ran each instruction."""
        counts = self.kernels.setdefault(program.name, KernelCounts(program))
        if counts.executed.size == 0:
            counts.executed = np.zeros((num_warps, len(program.code)), np.int64)
        counts.executed[warp_idx] += executed
        counts.ctas += warp_idx == 0

    def opcodes(self, kernel: str | None = None) -> dict[str, int]:
        """Executed warp instructions by opcode, of all kernels or of one."""
        total: Counter[str] = Counter()
        for counts in self.kernels.values() if kernel is None else [self.kernels[kernel]]:
            per_instruction = counts.executed.sum(axis=0)
            for instruction, number in zip(counts.program.kernel.instructions, per_instruction, strict=False):
                if number:
                    total[instruction.opcode] += int(number)
        return dict(total.most_common())

    def as_dict(self) -> dict[str, Any]:
        return {
            "races": self.races,
            "faults": self.faults,
            "notes": self.notes,
            "instructions": self.instructions,
            "seconds": round(self.seconds, 3),
            "kernels": {name: {"ctas": k.ctas, "instructions": int(k.executed.sum())} for name, k in self.kernels.items()},
            "tensor_flops": self.tensor_flops,
            "tma_bytes": self.tma_bytes,
            "unwritten": self.unwritten,
        }
