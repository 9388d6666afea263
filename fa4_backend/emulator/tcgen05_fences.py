"""Where a kernel leaves out a tcgen05.fence that the ISA's text asks for. PTX ISA 9.0, 9.7.16.6.3 and 9.7.16.12.

    python -m fa4_backend.emulator.tcgen05_fences kernel.ptx

A lint, not a part of a run: kernels that are right on silicon do without most of these fences, so their absence is no finding there. It
reads the text alone. A tcgen05 operation behind a wait or barrier needs `fence::after_thread_sync` between the two on every way; a
`tcgen05.ld` or `st` before an arrival or barrier needs `fence::before_thread_sync` (`tcgen05.commit` implies it for what it tracks).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from fa4_backend.emulator.parser import parse_module
from fa4_backend.emulator.syntax import Kernel
from fa4_backend.emulator.undefined import successors

_OPERATION = re.compile(r"tcgen05\.(mma|ld|st|cp|shift)\b")
_MOVE = re.compile(r"tcgen05\.(ld|st)\b")
_WAIT = re.compile(r"mbarrier\.(try_wait|test_wait)|bar\.(sync|red)|barrier\.(sync|red)|barrier\.cluster\.wait")
_ARRIVAL = re.compile(r"mbarrier\.arrive|bar\.(sync|arrive|red)|barrier\.(sync|arrive|red)|barrier\.cluster\.arrive")
AFTER, BEFORE = "tcgen05.fence::after_thread_sync", "tcgen05.fence::before_thread_sync"


class Missing(NamedTuple):
    """A fence that is missing between two instructions of a kernel."""

    fence: str
    first: int
    second: int

    def describe(self, kernel: Kernel) -> str:
        """Both instructions with their lines."""
        a, b = (kernel.instructions[pc] for pc in (self.first, self.second))
        return f"{self.fence} between line {a.line}: {a.text[:80]} | and line {b.line}: {b.text[:80]}"


def missing_fences(kernel: Kernel) -> list[Missing]:
    """Every operation and the first synchronisation that reaches it, or that it reaches, past no fence."""
    found = []
    after = [successors(kernel, pc) for pc in range(len(kernel.instructions))]
    before: list[list[int]] = [[] for _ in after]
    for pc, targets in enumerate(after):
        for target in targets:
            before[target].append(pc)
    for pc, instruction in enumerate(kernel.instructions):
        if _OPERATION.match(instruction.opcode):
            found += [Missing(AFTER, sync, pc) for sync in _first(kernel, pc, before, _WAIT, AFTER)]
        if _MOVE.match(instruction.opcode):
            found += [Missing(BEFORE, pc, sync) for sync in _first(kernel, pc, after, _ARRIVAL, BEFORE)]
    return found


def _first(kernel: Kernel, start: int, edges: list[list[int]], wanted: re.Pattern[str], fence: str) -> list[int]:
    """The first such instructions on the ways from `start` that pass no fence."""
    found, seen, work = [], set(), list(edges[start])
    while work:
        pc = work.pop()
        opcode = kernel.instructions[pc].opcode
        if pc in seen or opcode.startswith(fence):
            continue
        seen.add(pc)
        if wanted.match(opcode):
            found.append(pc)
        else:
            work += edges[pc]
    return sorted(found)


def main(arguments: list[str]) -> None:
    """Print what each kernel of a PTX file lacks."""
    for kernel in parse_module(Path(arguments[0]).read_text()).values():
        missing = missing_fences(kernel)
        print(f"{kernel.name[:80]}: {len(missing)} places")
        for place in missing:
            print(f"  {place.describe(kernel)}")


if __name__ == "__main__":
    main(sys.argv[1:])
