"""What a compiled kernel is made of, read from its PTX, its host code and, with the toolkit's own tools, its machine code."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+|@!?UPT\s+|@!?PT\s+)?([A-Z][A-Z0-9_]*)")
# The launch configuration that the host code fills in: grid, block, bytes of dynamic shared memory, attributes, stream, their number.
_CONFIG_BYTES = re.compile(
    r"(%\w+) = llvm\.getelementptr %\w+\[0, 2\] : .*!llvm\.struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"
)
_STATIC_SMEM = re.compile(r"^\s*(?:\.visible\s+)?\.shared\s+\.align\s+\d+\s+\.b8\s+\S+\[(\d+)\];", re.MULTILINE)
_TMEM_ALLOC = re.compile(r"\btcgen05\.alloc\.\S+\s+\[[^]]*\],\s*(\S+);")


@dataclass(frozen=True)
class KernelFacts:
    """What was seen while one key was compiled; stored beside its object. None: nothing here tells it."""

    name: str
    arch: str
    seconds: float
    cpu_seconds: float
    registers: int | None  # per thread at launch, before setmaxnreg
    spills: int | None  # bytes of local memory a thread uses
    smem_bytes: int | None  # static and dynamic shared memory of a CTA
    tmem_columns: int | None  # tensor memory that a CTA allocates
    ptx_instructions: int


def count_instructions(ptx: str) -> int:
    """Instructions in a PTX text: lines that end a statement inside a body and are no directive."""
    return sum(1 for line in ptx.splitlines() if line.rstrip().endswith(";") and not line.lstrip().startswith((".", "//")))


def launch_smem_bytes(ptx: str, host_code: str) -> int | None:
    """Bytes of shared memory of one CTA: what the PTX declares and what the host code launches with.

    Args:
        host_code: MLIR text of the compiled host function, in the llvm dialect.

    Returns:
        None where the host code fills in no launch configuration as it is known here, or a size that is no constant.
    """
    static = sum(int(size) for size in _STATIC_SMEM.findall(ptx))
    dynamic = []
    for field in _CONFIG_BYTES.finditer(host_code):
        stored = re.compile(rf"llvm\.store (%\w+), {field[1]} : i64").search(host_code, field.end())
        # Names count anew in every function: the last definition before the store is the one.
        sizes = re.findall(rf"{stored[1]} = llvm\.mlir\.constant\((\d+) : i64\)", host_code[: field.start()]) if stored else []
        if sizes:
            dynamic.append(int(sizes[-1]))
    return static + max(dynamic) if dynamic else None


def tmem_columns(ptx: str) -> int | None:
    """Columns of tensor memory that a CTA allocates: the sum over the PTX's allocations; None where a size is no constant."""
    columns = 0
    for operand in _TMEM_ALLOC.findall(ptx):
        values = [operand] if operand.isdigit() else re.findall(rf"\bmov\.[bu]32\s+{re.escape(operand)},\s*(\d+);", ptx)
        if len(values) != 1:
            return None
        columns += int(values[0])
    return columns


def find_cuda_tool(name: str) -> str | None:
    """Path of `cuobjdump`, `nvdisasm`, `ptxas` or triton's `ptxas-blackwell`: on PATH or in triton's package; None where there is none."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        tool = Path(folder) / "backends" / "nvidia" / "bin" / name
        if tool.is_file():
            return str(tool)
    return None


def resource_usage(cubin: Path) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL ... of the kernel in `cubin` as cuobjdump prints them; empty where the tool is missing.

    SHARED counts the 1024 bytes that the system keeps for itself in each CTA, and no dynamic shared memory.
    """
    tool = find_cuda_tool("cuobjdump")
    if tool is None:
        return {}
    done = subprocess.run([tool, "--dump-resource-usage", str(cubin)], capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", done.stdout)}


def disassemble(cubin: Path) -> str:
    """SASS text of a cubin; empty where nvdisasm is not installed."""
    tool = find_cuda_tool("nvdisasm")
    if tool is None:
        return ""
    return subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True).stdout


def sass_counts(cubin: Path) -> Counter[str]:
    """Instructions by opcode without modifiers (HGMMA, MUFU, UTMALDG, LDL ...), as they stand in the code, not as often as they run."""
    return Counter(match.group(1) for line in disassemble(cubin).splitlines() if (match := _INSTRUCTION.match(line)))
