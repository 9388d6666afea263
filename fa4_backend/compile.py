"""From a compile key to an object on disk, for the GPU present or for any named arch; no GPU is needed.

A key is a frozen dataclass that names its arch and its builder, such as `fa4_backend.kernels.sm90.config.Sm90Config`.
The builder returns the host function to trace and fake arguments; nothing else decides what is compiled. This module imports the
compiler (`cutlass`); a serving process loads what it finds in `fa4_backend.compile_cache` and does not need it.
"""

from __future__ import annotations

import importlib
import resource
import shlex
import shutil
import struct
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fa4_backend import envs
from fa4_backend.kernel_facts import KernelFacts, count_instructions, launch_smem_bytes, resource_usage, tmem_columns

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


def cpu_seconds() -> float:
    """CPU time of this process and its finished children, user and system, in seconds."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usages)


def trace_and_compile(key: CompileKey, dump_dir: Path) -> Any:
    """The DSL's compiled function for `key`; PTX and cubin are kept in `dump_dir`."""
    # Named, the DSL asks no driver for it: where GPUs are hidden, its report of that error asks for the chip again, and so on.
    envs.set_default("CUTE_DSL_ARCH", key.arch)
    import cutlass.cute as cute

    module_name, function_name = key.builder.split(":")
    host_function, arguments = getattr(importlib.import_module(module_name), function_name)(key)
    options = f"--enable-tvm-ffi --gpu-arch {key.arch} --keep-ptx --keep-cubin --dump-dir {dump_dir}"
    return cute.compile(host_function, *arguments, options=options)


def compile_to_object(key: CompileKey, stem: Path) -> KernelFacts:
    """Compile `key` into `stem`.so, with `stem`.ptx and `stem`.cubin beside it, in a folder that exists.

    Raises:
        CompileError: no C compiler or linker was found, or it failed, or the DSL left a file that is cut short.
        OSError: a file could not be written.
    """
    dump_dir = stem.with_suffix(".dump")
    dump_dir.mkdir(exist_ok=True)
    wall, cpu = time.perf_counter(), cpu_seconds()
    compiled = trace_and_compile(key, dump_dir)
    object_file = stem.with_suffix(".o")
    compiled.export_to_c(str(object_file), function_name=OBJECT_FUNCTION)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    ptx, cubin = (compiled.__ptx__ or "").rstrip("\0"), compiled.__cubin__ or b""
    _check_whole(key, ptx, cubin)
    stem.with_suffix(".ptx").write_text(ptx)
    stem.with_suffix(".cubin").write_bytes(cubin)
    link_shared([object_file], stem.with_suffix(".so"))
    object_file.unlink()
    shutil.rmtree(dump_dir, ignore_errors=True)
    usage = resource_usage(stem.with_suffix(".cubin"))
    return KernelFacts(
        key.name, key.arch, round(wall, 3), round(cpu, 3), usage.get("REG"), usage.get("STACK"),
        launch_smem_bytes(ptx, str(compiled.ir_module)), tmem_columns(ptx), count_instructions(ptx),
    )  # fmt: skip


def _check_whole(key: CompileKey, ptx: str, cubin: bytes) -> None:
    # The DSL hands both over through files, and a full disk cuts these without an error.
    if not ptx.rstrip().endswith("}") or ptx.count("{") != ptx.count("}"):
        raise CompileError(f"{key.name}: expected PTX to its last brace, got {len(ptx)} characters of it. Is the disk full?")
    size = elf_bytes(cubin)
    if len(cubin) < size:
        raise CompileError(f"{key.name}: expected a cubin of {size} bytes, got {len(cubin)}. Is the disk full?")


def elf_bytes(head: bytes) -> int:
    """Bytes of an ELF file by its header (64 bytes), which says where the two tables lie; one of them ends the file.

    Raises:
        CompileError: it is no 64-bit ELF file.
    """
    if len(head) < 64 or head[:4] != b"\x7fELF":
        raise CompileError(f"expected an ELF header of 64 bytes, got {head[:8].hex()} and {len(head)} bytes. Is the disk full?")
    program_headers, section_headers = struct.unpack_from("<QQ", head, 32)
    entry, count, section_entry, sections = struct.unpack_from("<HHHH", head, 54)
    return max(program_headers + entry * count, section_headers + section_entry * sections)


def describe(key: CompileKey) -> dict[str, Any]:
    """All fields of a key and the name of its class, as JSON can hold them."""
    return {"type": type(key).__name__, "name": key.name, "builder": key.builder, **asdict(key)}  # type: ignore[call-overload]


def find_c_compiler() -> list[str]:
    """Command that runs the C compiler, options included: what CC names, else the first of cc, gcc and clang on PATH.

    Raises:
        CompileError: there is none.
    """
    named = envs.c_compiler()
    for command in [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise CompileError(f"a C compiler: expected {named or 'cc, gcc or clang'} on PATH, found none (set CC, or install gcc)")


def link_shared(inputs: list[Path], library: Path, *options: str) -> None:
    """Link objects and libraries into a shared library that tvm-ffi can load; a kernel's undefined symbols are the launch runtime's.

    Raises:
        CompileError: no C compiler was found, or it failed.
    """
    command = [*find_c_compiler(), "-shared", "-o", str(library), *options, *map(str, inputs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{command[0]} failed with {done.returncode}: {done.stderr.strip()}")
