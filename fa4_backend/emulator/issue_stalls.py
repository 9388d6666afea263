"""How fast one warp can issue a kernel's loops, from the machine code itself.

Since Volta every instruction carries, in bits 105 to 108 of its 128, the cycles that its warp's scheduler waits before the warp's next
instruction: ptxas writes there what the fixed latencies of the arithmetic need (the field is described in Jia et al., "Dissecting the
NVIDIA Volta GPU Architecture via Microbenchmarking"). Their sum over a loop is the least time that one warp alone takes for it, however
empty its scheduler is; what waits on a scoreboard (special functions, memory, shuffles) comes on top. A role's loop is known by
what it executes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from fa4_backend.kernel_facts import find_cuda_tool

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);\s+/\* 0x[0-9a-f]{16} \*/")
_SECOND_WORD = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_\w+):", re.MULTILINE)
_STALL_SHIFT, _STALL_MASK = 105 - 64, 15
# The first row that a loop has an instruction of; `recording.ROLES` has the same names.
LOOPS = (("HGMMA", "consumer"), ("UTCHMMA", "mma"), ("UTCQMMA", "mma"), ("HMMA", "consumer"), ("LDTM", "softmax"), ("UTMALDG", "load"))
SHORTEST_LOOP = 24  # instructions; shorter ones wait for barriers
FALLBACK = (
    2.0  # cycles an instruction, where there is no disassembler: between the 1.9 and 2.3 that the softmax loops of these kernels have
)


def parse(sass: str) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """((text, stall cycles) of every instruction, index of each label) of what `nvdisasm -c -hex` prints."""
    found: list[tuple[str, int]] = []
    labels: dict[str, int] = {}
    text: str | None = None
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(found)
        elif instruction := _LINE.search(line):
            text = instruction.group(2).strip()
        elif text is not None and (second := _SECOND_WORD.match(line)):
            found.append((text, int(second.group(1), 16) >> _STALL_SHIFT & _STALL_MASK))
            text = None
    return found, labels


def loops(instructions: list[tuple[str, int]], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of every loop without an exit in it, inner ones first."""
    spans = []
    for at, (text, _) in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", text)
        if target and labels.get(target.group(1), at + 1) <= at:
            spans.append((labels[target.group(1)], at))
    return sorted((s for s in spans if not _leaves(instructions, s)), key=lambda span: span[1] - span[0])


def _leaves(instructions: list[tuple[str, int]], span: tuple[int, int]) -> bool:
    return any(re.search(r"\bEXIT\b", text) for text, _ in instructions[span[0] : span[1] + 1])


def ratios_of(sass: str) -> dict[str, float]:
    """Stall cycles an instruction of each role's innermost loops that are long enough to be work; several loops are averaged by length."""
    instructions, labels = parse(sass)
    cycles: dict[str, list[int]] = {}
    taken: list[tuple[int, int]] = []
    for begin, end in loops(instructions, labels):
        if end - begin + 1 < SHORTEST_LOOP or any(begin <= b and e <= end for b, e in taken):
            continue
        body = instructions[begin : end + 1]
        opcodes = {re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text, _ in body}
        role = next((role for opcode, role in LOOPS if opcode in opcodes), None)
        if role == "softmax" and "MUFU" not in opcodes:
            role = "correction"
        if role is None:
            continue
        taken.append((begin, end))
        total = cycles.setdefault(role, [0, 0])
        total[0] += sum(stall for _, stall in body)
        total[1] += len(body)
    return {role: stalls / count for role, (stalls, count) in cycles.items()}


@cache
def disassembly(cubin: bytes) -> str:
    """What `nvdisasm -c -hex` prints of a cubin; empty where there is none, of either."""
    tool = find_cuda_tool("nvdisasm")
    if tool is None or not cubin:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([tool, "-c", "-hex", file.name], capture_output=True, text=True).stdout
