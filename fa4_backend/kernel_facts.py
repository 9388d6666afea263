"""What a compiled kernel is made of, read from its machine code with the toolkit's own tools."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

from fa4_backend.compile import find_cuda_tool

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+|@!?UPT\s+|@!?PT\s+)?([A-Z][A-Z0-9_]*)")


def disassemble(cubin: Path) -> str:
    """SASS text of a cubin; empty where nvdisasm is not installed."""
    tool = find_cuda_tool("nvdisasm")
    if tool is None:
        return ""
    return subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True).stdout


def sass_counts(cubin: Path) -> Counter[str]:
    """Instructions by opcode without modifiers (HGMMA, MUFU, UTMALDG, LDL ...), as they stand in the code, not as often as they run."""
    return Counter(match.group(1) for line in disassemble(cubin).splitlines() if (match := _INSTRUCTION.match(line)))
