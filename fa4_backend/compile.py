"""From a compile key to an object on disk, for the GPU present or for any named arch; no GPU is needed.

A key is a frozen dataclass that names its arch and its builder, such as `fa4_backend.kernels.common.prefill_config.PrefillConfig`.
The builder returns the host function to trace and fake arguments; nothing else decides what is compiled. This module imports the
compiler (`cutlass`); a serving process loads what it finds in `fa4_backend.compile_cache` and does not need it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import resource
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

OBJECT_FUNCTION = "fa4_kernel"  # symbol of the launcher in each object


class CompileKey(Protocol):
    """What a compile key tells the compiler; any frozen dataclass with these three."""

    @property
    def arch(self) -> str:
        """Target, such as "sm_90a"."""

    @property
    def builder(self) -> str:
        """`module:function`; the function takes the key and returns (host function, fake arguments)."""

    @property
    def name(self) -> str:
        """Short name for people and file names."""


class CompileError(RuntimeError):
    """The compiler or the linker refused a kernel; the message holds its output."""


@dataclass(frozen=True)
class KernelFacts:
    """What was seen while one key was compiled; stored beside its object."""

    name: str
    arch: str
    seconds: float
    cpu_seconds: float
    registers: int | None  # per thread at launch, before setmaxnreg
    spills: int | None  # bytes of local memory a thread uses
    smem_bytes: int | None  # static shared memory; a kernel's dynamic part is in its config
    ptx_instructions: int


def cpu_seconds() -> float:
    """CPU time of this process and its finished children, user and system, in seconds."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usages)


def trace_and_compile(key: CompileKey, dump_dir: Path) -> Any:
    """The DSL's compiled function for `key`; PTX and cubin are kept in `dump_dir`."""
    import cutlass.cute as cute

    module_name, function_name = key.builder.split(":")
    host_function, arguments = getattr(importlib.import_module(module_name), function_name)(key)
    options = f"--enable-tvm-ffi --gpu-arch {key.arch} --keep-ptx --keep-cubin --dump-dir {dump_dir}"
    return cute.compile(host_function, *arguments, options=options)


def compile_to_object(key: CompileKey, stem: Path) -> KernelFacts:
    """Compile `key` into `stem`.so, with `stem`.ptx, `stem`.cubin and `stem`.json (KernelFacts) beside it.

    Raises:
        CompileError: no C compiler or linker was found, or it failed.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    dump_dir = stem.with_suffix(".dump")
    dump_dir.mkdir(exist_ok=True)
    wall, cpu = time.perf_counter(), cpu_seconds()
    compiled = trace_and_compile(key, dump_dir)
    object_file = stem.with_suffix(".o")
    compiled.export_to_c(str(object_file), function_name=OBJECT_FUNCTION)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    ptx = compiled.__ptx__ or ""
    stem.with_suffix(".ptx").write_text(ptx.rstrip("\0"))
    cubin = stem.with_suffix(".cubin")
    cubin.write_bytes(compiled.__cubin__ or b"")
    link_shared([object_file], stem.with_suffix(".so"))
    object_file.unlink()
    shutil.rmtree(dump_dir, ignore_errors=True)
    usage = resource_usage(cubin)
    facts = KernelFacts(
        key.name, key.arch, round(wall, 3), round(cpu, 3), usage.get("REG"), usage.get("STACK"), usage.get("SHARED"),
        count_instructions(ptx),
    )  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps({"key": describe(key), "facts": asdict(facts)}, indent=1))
    return facts


def describe(key: CompileKey) -> dict[str, Any]:
    """All fields of a key and the name of its class, as JSON can hold them."""
    return {"type": type(key).__name__, "name": key.name, "builder": key.builder, **asdict(key)}  # type: ignore[call-overload]


def link_shared(inputs: list[Path], library: Path, *options: str) -> None:
    """Link objects and libraries into a shared library that tvm-ffi can load; a kernel's undefined symbols are the launch runtime's.

    Raises:
        CompileError: no C compiler was found, or it failed.
    """
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise CompileError("linking a kernel: expected cc, gcc or clang on PATH, found none")
    done = subprocess.run([compiler, "-shared", "-o", str(library), *options, *map(str, inputs)], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{compiler} failed with {done.returncode}: {done.stderr.strip()}")


def count_instructions(ptx: str) -> int:
    """Instructions in a PTX text: lines that end a statement inside a body and are no directive."""
    return sum(1 for line in ptx.splitlines() if line.rstrip().endswith(";") and not line.lstrip().startswith((".", "//")))


def find_cuda_tool(name: str) -> str | None:
    """Path of `cuobjdump`, `nvdisasm` or `ptxas`: on PATH or in triton's package; None where there is none."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        tool = Path(folder) / "backends" / "nvidia" / "bin" / name
        if tool.is_file():
            return str(tool)
    return None


def resource_usage(cubin: Path) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL ... of the kernel in `cubin` as cuobjdump prints them; empty where the tool is missing."""
    tool = find_cuda_tool("cuobjdump")
    if tool is None:
        return {}
    done = subprocess.run([tool, "--dump-resource-usage", str(cubin)], capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", done.stdout)}
