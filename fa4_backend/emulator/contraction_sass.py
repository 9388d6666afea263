"""Which products and sums ptxas made one FMA: the lint of `contraction.py` beside the machine code of the same cubin.

    python -m fa4_backend.emulator.contraction_sass kernel.ptx kernel.cubin

ptxas numbers nothing in its output, so it is asked: the PTX is assembled with one sum given a rounding modifier, which forbids that fusion,
and an FMA fewer in the result says that the sum was one. That holds for the cubin when the assembler makes the same mix of
instructions of the unchanged PTX.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fa4_backend.emulator import contraction
from fa4_backend.emulator.contraction import Fusion
from fa4_backend.emulator.errors import EmulatorError
from fa4_backend.emulator.parser import parse_module
from fa4_backend.emulator.syntax import Kernel
from fa4_backend.kernel_facts import disassemble, find_cuda_tool

_ARITHMETIC = re.compile(r"\b([FHD](?:FMA|ADD|MUL)2?)\b")
_ASSEMBLERS = ("ptxas", "ptxas-blackwell")


class NoAssembler(EmulatorError):
    """No ptxas here makes the cubin's machine code of its PTX."""


def arithmetic(cubin: Path) -> Counter[str]:
    """How many FMAs, products and sums of floats the machine code has."""
    return Counter(_ARITHMETIC.findall(disassemble(cubin)))


def num_fused(counts: Counter[str]) -> int:
    """FMAs among them, pairs counted once."""
    return sum(n for name, n in counts.items() if "FMA" in name)


def assemble(tool: str, ptx: str, arch: str, cubin: Path | None = None) -> Counter[str] | None:
    """What `tool` makes of a PTX text, kept in `cubin`; None when it refuses."""
    with tempfile.TemporaryDirectory(prefix="fa4-contraction-") as folder:
        source, target = Path(folder) / "kernel.ptx", cubin or Path(folder) / "kernel.cubin"
        source.write_text(ptx.rstrip("\0"))
        done = subprocess.run([tool, f"-arch={arch}", "-O3", str(source), "-o", str(target)], capture_output=True, check=False)
        return arithmetic(target) if done.returncode == 0 else None


def matching_assembler(ptx: str, arch: str, counts: Counter[str]) -> str:
    """The ptxas that makes this mix of instructions of the PTX.

    Raises:
        NoAssembler: none does.
    """
    tried = []
    for tool in filter(None, map(find_cuda_tool, _ASSEMBLERS)):
        made = assemble(tool, ptx, arch)
        if made == counts:
            return tool
        tried.append(f"{tool}: {'refused the PTX' if made is None else dict(made)}")
    raise NoAssembler(f"expected {dict(counts)}, got {'; '.join(tried) or 'no ptxas at all'}")


def with_rounding(ptx: str, fusions: Iterable[Fusion], kernel: Kernel) -> str:
    """The PTX with these sums rounded by themselves."""
    lines = ptx.split("\n")
    for fusion in fusions:
        number = kernel.instructions[fusion.sum].line - 1
        lines[number], changed = re.subn(r"\b(add|sub)\.", r"\1.rn.", lines[number], count=1)
        assert changed, lines[number]
    return "\n".join(lines)


def none_fused(ptx: str, cubin: Path, kernel: Kernel, pairs: Iterable[Fusion]) -> bool:
    """Whether the cubin has none of these sums as an FMA: rounding them by themselves changes no count.

    Raises:
        NoAssembler: no ptxas here makes the cubin's machine code.
    """
    counts, by_sum = arithmetic(cubin), {fusion.sum: fusion for fusion in pairs}
    tool = matching_assembler(ptx, kernel.target, counts)
    return assemble(tool, with_rounding(ptx, by_sum.values(), kernel), kernel.target) == counts


def fused_sums(ptx: str, cubin: Path, kernel: Kernel, pick: Iterable[Fusion] | None = None) -> dict[int, bool]:
    """For each sum (by its instruction) of the contractable pairs in `pick`, all by default: whether the cubin has it as an FMA.

    Raises:
        NoAssembler: no ptxas here makes the cubin's machine code.
    """
    counts = arithmetic(cubin)
    tool = matching_assembler(ptx, kernel.target, counts)
    by_sum = {fusion.sum: fusion for fusion in (contraction.contractable(kernel) if pick is None else pick)}
    fused = {}
    for pc, fusion in by_sum.items():
        without = assemble(tool, with_rounding(ptx, [fusion], kernel), kernel.target)
        assert without is not None, contraction.describe(kernel, fusion)
        fused[pc] = num_fused(without) < num_fused(counts)
    return fused


def main(arguments: list[str]) -> None:
    """Print every contractable pair: whether it can cancel and, with a cubin, whether ptxas fused it."""
    ptx = Path(arguments[0]).read_text()
    for kernel in parse_module(ptx).values():
        pairs, warned = contraction.contractable(kernel), set(contraction.cancelling(kernel))
        fused = fused_sums(ptx, Path(arguments[1]), kernel) if len(arguments) > 1 else {}
        print(f"{kernel.name[:80]}: {len(pairs)} contractable pairs, {len(warned)} of them can cancel")
        for pair in pairs:
            verdict = {True: "fused", False: "apart", None: ""}[fused.get(pair.sum)]
            print(f"  {'can cancel' if pair in warned else '':10} {verdict:5} {contraction.describe(kernel, pair)}")


if __name__ == "__main__":
    main(sys.argv[1:])
