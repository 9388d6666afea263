"""Compiled kernels on disk, keyed by content, and their loader, which needs no compiler.

The loader looks among the objects that came with the installation (`fa4_backend.prebuilt`), then in the cache. There one key is compiled
once for all processes of a machine: the first takes the file lock, the others wait and load. A compile in a serving process after `seal()`
is a degradation: logged, counted, and an error in strict mode. `fa4_backend.cache` keeps the files.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fa4_backend import driver, envs
from fa4_backend.cache import entry as cache_entry
from fa4_backend.cache.errors import BrokenObjectError
from fa4_backend.compile import OBJECT_FUNCTION, CompileError, CompileKey, KernelFacts, compile_to_object, describe

logger = logging.getLogger("fa4_backend")

LIBRARY = "kernel.so"
FILES = (LIBRARY, "kernel.ptx", "kernel.cubin")
_PACKAGE = Path(__file__).parent
PREBUILT = _PACKAGE / "prebuilt"  # what a wheel carries, laid out as the cache is; the library of an entry alone
_sealed = False
num_late_compiles = 0  # compiles after `seal()`


def seal() -> None:
    """Say that warm-up is over: from now on a compile is a degradation."""
    global _sealed
    _sealed = True


def reopen() -> None:
    """Say that a warm-up begins: an engine starts, maybe not the first of this process."""
    global _sealed
    _sealed = False


def fingerprinted_files() -> list[Path]:
    """Every source that can change what any builder generates or what is kept of it: all of `kernels`, and what it is made from."""
    outside = ("problem.py", "arch.py", "compile.py", "kernel_facts.py")
    return [*sorted((_PACKAGE / "kernels").rglob("*.py")), *(_PACKAGE / name for name in outside)]


@functools.cache
def source_fingerprint() -> str:
    """Digest of the names and contents of `fingerprinted_files`."""
    digest = hashlib.sha256()
    for path in fingerprinted_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@functools.cache
def dsl_version() -> str | None:
    """Version of the compiler; None where it is not installed."""
    try:
        return importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return None


def object_folder(arch: str, root: Path | None = None, machine: str | None = None) -> Path:
    """Folder of an arch's objects: one for each DSL and host machine; where the DSL is not installed, the newest that exists.

    Args:
        root: of all objects; None: the cache's.
        machine: that will load them, such as "aarch64"; None: this one.
    """
    root, machine = (root or envs.cache_dir() / "kernels") / arch, machine or platform.machine()
    version = dsl_version()
    if version is not None:
        return root / f"dsl-{version}-{machine}"
    return max(root.glob(f"dsl-*-{machine}"), key=_version_numbers, default=root / f"dsl-none-{machine}")


def _version_numbers(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.name.split("-")[1])]


def object_entry(key: CompileKey) -> cache_entry.Entry:
    """Place of a key's object in the cache, and what must stand there."""
    return _entry(key, object_folder(key.arch), FILES)


def prebuilt_entry(key: CompileKey, machine: str | None = None) -> cache_entry.Entry:
    """Place of a key's object among those that came with the installation; `machine` as in `object_folder`."""
    return _entry(key, object_folder(key.arch, PREBUILT, machine), (LIBRARY,))


def _entry(key: CompileKey, folder: Path, files: tuple[str, ...]) -> cache_entry.Entry:
    identity = json.loads(json.dumps({"key": describe(key), "sources": source_fingerprint()}))
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return cache_entry.Entry(folder / f"{key.name}-{digest}", files, identity)


def find_prebuilt(key: CompileKey) -> Path | None:
    """The shared library of `key` that came with the installation; None where there is none, or, with a log line, where it is damaged."""
    entry = prebuilt_entry(key)
    fault = cache_entry.find_fault(entry, is_package=True)
    if fault is None:
        return entry.folder / LIBRARY
    if fault != cache_entry.MISSING:
        logger.warning("%s came with the installation and is damaged (%s): the cache is asked instead", entry.folder, fault)
    return None


def ensure_object(key: CompileKey) -> Path:
    """Path of the shared library of `key`, PTX and cubin beside it; compiled now when the cache has none that is whole.

    Raises:
        CompileError: the kernel could not be compiled or linked.
        CacheError: see `fa4_backend.cache.entry.ensure`.
        RuntimeError: strict mode, and warm-up is over.
    """

    def build(folder: Path) -> dict[str, Any]:
        _note_late_compile(key)
        facts = compile_to_object(key, folder / Path(LIBRARY).stem)
        lacked = "; it is not among the kernels that came with the installation" if (PREBUILT / key.arch).is_dir() else ""
        logger.info("compiled %s in %.1f s%s", key.name, facts.seconds, lacked)
        return asdict(facts)

    cannot_build = None
    if dsl_version() is None:
        cannot_build = (
            "It cannot be compiled here, since nvidia-cutlass-dsl is not installed: install it, or run "
            f"`fa4 compile --arch {key.arch} ...` with this version of fa4-backend where it is installed and copy the cache folder."
        )
    return cache_entry.ensure(object_entry(key), build, cannot_build) / LIBRARY


def ensure_objects(keys: Iterable[CompileKey], *, jobs: int | None = None, prepare: Callable[[], None] | None = None) -> int:
    """Compile those of `keys` that the cache lacks, in a process each: a key takes 3 to 10 s of a core.

    Args:
        jobs: processes side by side; None: as many as there are cores.
        prepare: runs first in each process that compiles.

    Returns:
        How many were compiled.

    Raises:
        CompileError, CacheError, RuntimeError: as `ensure_object`.
    """
    missing = [key for key in dict.fromkeys(keys) if not _is_whole(key)]
    jobs = min(len(missing), jobs or len(os.sched_getaffinity(0)))
    if jobs <= 1 and prepare is None:
        for key in missing:
            ensure_object(key)
        return len(missing)
    if not missing:
        return 0
    try:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=prepare) as pool:
            list(pool.map(ensure_object, missing))
    except BrokenProcessPool:
        raise CompileError(
            f"expected {jobs} processes to compile {len(missing)} kernels, got one that was ended from outside. Is the memory full? "
            "What is compiled is kept: run the same again, on fewer cores (taskset -c 0,1 ...)."
        ) from None
    return len(missing)


def _is_whole(key: CompileKey) -> bool:
    try:
        return cache_entry.find_fault(object_entry(key)) is None
    except OSError:
        return False  # `ensure_object` says what is wrong with the cache


def library_of(key: CompileKey) -> Path:
    """The shared library that is loaded for `key`: the installation's, else the cache's, compiled now when that has none that is whole.

    Raises:
        CompileError, CacheError, RuntimeError: as `ensure_object`.
    """
    return find_prebuilt(key) or ensure_object(key)


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
    ensure_object(key)
    return KernelFacts(**cache_entry.read_record(object_entry(key))["facts"])


@functools.cache
def load_kernel(key: CompileKey) -> Callable[..., None]:
    """The launcher of `key`, a tvm-ffi function over torch tensors; compiles where neither installation nor cache has its object.

    Raises:
        CompileError: the kernel could not be compiled or linked.
        CacheError: see `fa4_backend.cache.entry.ensure`; BrokenObjectError also where the loader refuses a whole object.
        FileNotFoundError: the launch runtime is not installed, or too new for the driver.
    """
    import tvm_ffi

    load_runtime()
    library = library_of(key)
    try:
        return tvm_ffi.load_module(str(library))[OBJECT_FUNCTION]
    except (OSError, RuntimeError, AttributeError) as error:
        raise BrokenObjectError(f"{library}: as it was compiled, but it cannot be loaded here: {error}") from error


@functools.cache
def load_runtime() -> Any:
    """Load the DSL's launch runtime, whose symbols the objects need, without importing the DSL.

    Raises:
        FileNotFoundError: as `find_runtime`.
    """
    return ctypes.CDLL(str(find_runtime()), mode=ctypes.RTLD_GLOBAL)


def find_runtime() -> Path:
    """Path of `libcute_dsl_runtime.so`: of the CUDA variants installed the newest that the driver runs, which is what the DSL takes too.

    Raises:
        FileNotFoundError: the package that carries it is not installed, or only variants that are too new for the driver.
    """
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    found = {int(path.parts[-3][2:]): path for folder in folders for path in folder.glob("cu[0-9]*/lib/libcute_dsl_runtime.so")}
    if not found:
        raise FileNotFoundError("libcute_dsl_runtime.so: expected in the package nvidia-cutlass-dsl (cu12 or cu13), found none")
    newest, _ = driver.cuda_version() or (max(found), 0)
    usable = [cuda for cuda in found if cuda <= newest]
    if not usable:
        variants = ", ".join(f"cu{cuda}" for cuda in sorted(found))
        raise FileNotFoundError(
            f"libcute_dsl_runtime.so: expected a variant for CUDA {newest}, the newest that the driver runs, found {variants}; "
            "update the driver, or install nvidia-cutlass-dsl without its extra cu13"
        )
    return found[max(usable)]
