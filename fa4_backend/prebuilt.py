"""Kernels that come with an installation: a wheel carries their objects, so that a server starts without a compiler.

`fa4_backend.compile_cache` loads them (`PREBUILT`). Here is what fills the folder before a wheel is built, and what `fa4 doctor` says. An
object fits one version of the DSL's launch runtime, one machine and the very sources of the kernels that stand beside it.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fa4_backend import compile_cache
from fa4_backend.cache import entry as cache_entry
from fa4_backend.cache import prune
from fa4_backend.compile import OBJECT_FUNCTION, CompileError, CompileKey, link_shared, trace_and_compile

# Machines whose host code can be made elsewhere, as LLVM names them.
TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
PLAIN = r"(?:i32|i64|ptr)(?: noundef)?"
PLAIN_FUNCTION = re.compile(rf"declare (?:void|{PLAIN}) @\w+\((?:{PLAIN}(?:, {PLAIN})*)?\)")


def add(key: CompileKey, machine: str | None = None) -> Path:
    """Put the object of `key` into the folder, compiled or taken from the cache; one for another machine is always compiled.

    Args:
        machine: that will load it, such as "aarch64"; None: this one. For another one CC names a clang that makes its code.

    Raises:
        CompileError, CacheError: as `compile_cache.ensure_object`.
        ValueError: a machine that is not in TRIPLES.
    """
    machine = machine or platform.machine()
    entry = compile_cache.prebuilt_entry(key, machine)
    if cache_entry.find_fault(entry, is_package=True) is None:
        return entry.folder
    shutil.rmtree(entry.folder, ignore_errors=True)
    entry.folder.mkdir(parents=True)
    library = entry.folder / compile_cache.LIBRARY
    if machine == platform.machine():
        shutil.copy(compile_cache.ensure_object(key), library)
    else:
        _compile_for(machine, key, library)
    cache_entry.write_record(entry, entry.folder, facts={})
    return entry.folder


def _compile_for(machine: str, key: CompileKey, library: Path) -> None:
    """The DSL exports launchers of tvm-ffi for its own machine only. Their host code is plain LLVM IR, though: it passes integers and
    pointers, which lie alike on both machines, and names its machine in two lines, so another's compiler can take it from there."""
    if machine not in TRIPLES:
        raise ValueError(f"machine: expected {' or '.join(TRIPLES)}, got {machine}")
    with tempfile.TemporaryDirectory() as name:
        compiled = trace_and_compile(key, Path(name))
        source = Path(name) / "kernel.ll"
        compiled.export_to_c(str(source), function_name=OBJECT_FUNCTION)
        source.write_text(retarget(source.read_text(), TRIPLES[machine]))
        link_shared([source], library, "-O3", "-fPIC", "-nostdlib", "-Wno-override-module")


def retarget(ir: str, triple: str) -> str:
    """LLVM IR for another machine.

    Raises:
        CompileError: it does not name the machine that it is for, or is more than integers and pointers between this and other libraries.
    """
    text, count = re.subn(r"^target datalayout = .*\ntarget triple = .*$", f'target triple = "{triple}"', ir, flags=re.MULTILINE)
    if count != 1:
        raise CompileError(f"LLVM IR: expected one line of a data layout and one of a triple, got {count}")
    for line in re.findall(r"^declare .*$", ir, flags=re.MULTILINE):
        if "@llvm." not in line and not PLAIN_FUNCTION.match(line):
            raise CompileError(f"LLVM IR: expected functions of integers and pointers, got {line}")
    return text


def records() -> list[tuple[str, dict[str, Any]]]:
    """(arch and folder of its DSL version and machine, identity) of every object in the folder."""
    found = []
    for path in sorted(compile_cache.PREBUILT.glob(f"*/*/*/{prune.RECORD}")):
        place = path.relative_to(compile_cache.PREBUILT).parts
        found.append((f"{place[0]} {place[1]}", json.loads(path.read_bytes())["identity"]))
    return found


def describe(found: Iterable[tuple[str, dict[str, Any]]]) -> tuple[bool, str]:
    """Whether all objects can be used here, and which there are, in words."""
    usable: Counter[str] = Counter()
    unusable: Counter[str] = Counter()
    for place, identity in found:
        arch, folder = place.split(" ")
        if identity["sources"] != compile_cache.source_fingerprint():
            unusable["of other sources"] += 1
        elif folder.rpartition("-")[2] != platform.machine():
            unusable[f"for {folder.rpartition('-')[2]}"] += 1
        elif folder != compile_cache.object_folder(arch, compile_cache.PREBUILT).name:
            unusable[f"for another launch runtime ({folder})"] += 1
        else:
            usable[arch] += 1
    if not usable and not unusable:
        return True, "none in this installation: the first start of an engine compiles what it needs"
    words = [f"{count} for {arch}" for arch, count in sorted(usable.items())] or ["none that can be used here"]
    words += [f"{count} {why}, not used" for why, count in sorted(unusable.items())]
    return not unusable, ", ".join(words)
