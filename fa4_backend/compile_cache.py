"""Compiled kernels on disk, keyed by content, and their loader, which needs no compiler.

One key is compiled once for all processes of a machine: the first takes the file lock, the others wait and load. A compile in a
serving process after `seal()` is a degradation: logged, counted, and an error in strict mode.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from fa4_backend import envs
from fa4_backend.compile import OBJECT_FUNCTION, CompileKey, KernelFacts, compile_to_object, describe

logger = logging.getLogger("fa4_backend")

_PACKAGE = Path(__file__).parent
_sealed = False
num_late_compiles = 0  # compiles after `seal()`


def seal() -> None:
    """Say that warm-up is over: from now on a compile is a degradation."""
    global _sealed
    _sealed = True


# What kernels share, beside `kernels/common`: read into every fingerprint.
_SHARED_SOURCES = ("kernels/schedule/work_list.py", "problem.py", "arch.py", "compile.py")


def fingerprinted_files(builder: str) -> list[Path]:
    """Every source that can change what `builder` generates.

    That is its own folder (its own file where it lies directly in `kernels`), `kernels/common` and `_SHARED_SOURCES`.
    """
    module = _PACKAGE.joinpath(*builder.split(":")[0].split(".")[1:]).with_suffix(".py")
    own = sorted(module.parent.glob(f"{module.stem}*.py" if module.parent.name == "kernels" else "*.py"))
    return [*own, *sorted((_PACKAGE / "kernels" / "common").glob("*.py")), *(_PACKAGE / name for name in _SHARED_SOURCES)]


@functools.cache
def source_fingerprint(builder: str) -> str:
    """Digest of the names and contents of `fingerprinted_files`."""
    digest = hashlib.sha256()
    for path in fingerprinted_files(builder):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def object_folder(arch: str) -> Path:
    """Folder of an arch's objects: one for each version of the DSL; where the DSL is not installed, the newest that exists."""
    root = envs.cache_dir() / "kernels" / arch
    try:
        return root / f"dsl-{importlib.metadata.version('nvidia-cutlass-dsl')}"
    except importlib.metadata.PackageNotFoundError:
        return max(root.glob("dsl-*"), default=root / "dsl-none")


def object_stem(key: CompileKey) -> Path:
    """Path of a key's files in the cache, without suffix (.so, .ptx, .cubin, .json)."""
    content = json.dumps([describe(key), source_fingerprint(key.builder)], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    return object_folder(key.arch) / f"{key.name}-{digest}"


def ensure_object(key: CompileKey) -> Path:
    """Path of the shared library of `key`; compiled now when the cache has none.

    Raises:
        CompileError: the kernel could not be compiled or linked.
        RuntimeError: strict mode, and warm-up is over.
    """
    library = object_stem(key).with_suffix(".so")
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if library.is_file():
            return library
        _note_late_compile(key)
        # A crash half-way must not leave a library that looks whole: build under another name, then rename.
        partial = library.with_name(f"partial-{library.stem}")
        facts = compile_to_object(key, partial)
        for suffix in (".ptx", ".cubin", ".json", ".so"):
            partial.with_suffix(suffix).rename(library.with_suffix(suffix))
        logger.info("compiled %s for %s in %.1f s", key.name, key.arch, facts.seconds)
    return library


def _note_late_compile(key: CompileKey) -> None:
    global num_late_compiles
    if not _sealed:
        return
    num_late_compiles += 1
    message = f"kernel {key.name}: expected every compile before the end of warm-up, got one after it ({describe(key)})"
    if envs.strict():
        raise RuntimeError(message)
    logger.warning(message)


def read_facts(key: CompileKey) -> KernelFacts:
    """What was seen when `key` was compiled (compiled now when the cache has none)."""
    stored = json.loads(ensure_object(key).with_suffix(".json").read_text())
    return KernelFacts(**stored["facts"])


@functools.cache
def load_kernel(key: CompileKey) -> Callable[..., None]:
    """The launcher of `key`, a tvm-ffi function over torch tensors; compiles when the cache has no object.

    Raises:
        CompileError: the kernel could not be compiled or linked.
        FileNotFoundError: the launch runtime is not installed.
    """
    import tvm_ffi

    load_runtime()
    library = ensure_object(key)
    return tvm_ffi.load_module(str(library))[OBJECT_FUNCTION]


@functools.cache
def load_runtime() -> Any:
    """Load the DSL's launch runtime, whose symbols the objects need, without importing the DSL.

    Raises:
        FileNotFoundError: the package that carries it is not installed.
    """
    return ctypes.CDLL(str(find_runtime()), mode=ctypes.RTLD_GLOBAL)


def find_runtime() -> Path:
    """Path of `libcute_dsl_runtime.so`, the newest CUDA variant installed.

    Raises:
        FileNotFoundError: the package that carries it is not installed.
    """
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    found = sorted(path for folder in folders for path in folder.glob("cu*/lib/libcute_dsl_runtime.so"))
    if not found:
        raise FileNotFoundError("libcute_dsl_runtime.so: expected in the package nvidia-cutlass-dsl (cu12 or cu13), found none")
    return found[-1]
