"""Every environment variable this package reads, in one place; `tests/host/test_cli.py` holds the rest of the package to it.

Its own are named FA4_BACKEND_*. The others belong to conventions that it follows: XDG's cache folder, a C compiler named by CC, the
folder where the DSL keeps what it was told to keep. An engine's own variables are read through the engine: VLLM_BATCH_INVARIANT through
`vllm.envs`.
"""

from __future__ import annotations

import os
from pathlib import Path

# name -> (default, what it does); `fa4 doctor` prints this table.
VARIABLES: dict[str, tuple[str, str]] = {
    "FA4_BACKEND_STRICT": ("0", "1: a compile after an engine's start is an error instead of a warning; the one degradation that there is"),
    "FA4_BACKEND_CPU": ("reference", "kernel on a machine without a GPU: reference, emulate-sm90 or emulate-sm100"),
    "FA4_BACKEND_EXACT": ("0", "1: with an engine's batch-invariant mode, a token's bits are those of its prefill too (slower decode)"),
    "FA4_BACKEND_FP8_QUERY": ("0", "1: beside K and V in FP8, vLLM quantises queries too (faster, less exact; Blackwell's kernels)"),
    "FA4_BACKEND_CONVERT_MIB": (
        "256",
        "MiB of room at most for K and V in FP8 that Hopper's prefill converts once a call; 0: it never does",
    ),
    "FA4_BACKEND_CACHE_DIR": ("$XDG_CACHE_HOME/fa4-backend", "folder of compiled kernels, the emulator's core and converted models"),
    "FA4_BACKEND_CACHE_GIB": ("4", "size in GiB that compiled kernels may take on disk; the least recently used go"),
    "FA4_BACKEND_SGLANG_OVERRIDE_FA4": ("0", "1: SGLang's own name fa4 means this backend too, for models whose lists of backends hold it"),
    "FA4_BACKEND_TRACE_FILE": ("", "append one line a process and forward kernel to this file: which kernel really ran"),
    "XDG_CACHE_HOME": ("~/.cache", "folder of all caches of this user; used where FA4_BACKEND_CACHE_DIR is not set"),
    "CC": ("cc, gcc or clang", "C compiler that links kernels and builds the emulator's core, with its options"),
    "CUTE_DSL_DUMP_DIR": (".", "where the emulator looks for the PTX of a cubin that nobody registered"),
}

PREFIX = "FA4_BACKEND_"
MAX_CONVERT_MIB = 1 << 16  # 64 GiB: more than any step needs, and a slip of the pen
FLAGS = ("FA4_BACKEND_STRICT", "FA4_BACKEND_EXACT", "FA4_BACKEND_FP8_QUERY", "FA4_BACKEND_SGLANG_OVERRIDE_FA4")  # 0 or 1

# FA4_BACKEND_CPU -> arch whose kernels the emulator runs; None: the torch reference.
EMULATED_ARCH: dict[str, str | None] = {"reference": None, "emulate-sm90": "sm_90a", "emulate-sm100": "sm_100a"}


def _read(name: str) -> str:
    return os.environ.get(name, VARIABLES[name][0])


def set_default(name: str, value: str) -> str:
    """Set a library's variable where the user has not; returns what it is then."""
    return os.environ.setdefault(name, value)


def environment_of_child(more: dict[str, str], defaults: dict[str, str] | None = None) -> dict[str, str]:
    """This process's whole environment, with `more` on top, and `defaults` where it has nothing: for a process that it starts."""
    return {**(defaults or {}), **os.environ, **more}


def settings() -> dict[str, str | None]:
    """Value of every variable of the table, None where it is not set; those named like ours that are not in it come last."""
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in VARIABLES)
    return {name: os.environ.get(name) for name in (*VARIABLES, *unknown)}


def faults() -> dict[str, str]:
    """What is wrong with each variable of this package that cannot be used as it is set, in a sentence, by its name."""
    flags = ((name, os.environ.get(name, "")) for name in FLAGS)
    found = {name: f"{name}: expected 0 or 1, got {value!r}" for name, value in flags if value not in ("", "0", "1")}
    for name, read in (
        ("FA4_BACKEND_CPU", cpu_kernel),
        ("FA4_BACKEND_CONVERT_MIB", convert_bytes),
        ("FA4_BACKEND_CACHE_DIR", cache_dir),
        ("FA4_BACKEND_CACHE_GIB", cache_limit_bytes),
        ("FA4_BACKEND_TRACE_FILE", trace_file),
    ):
        try:
            read()
        except ValueError as error:
            found[name] = str(error)
    known = ", ".join(name for name in VARIABLES if name.startswith(PREFIX))
    return found | {name: f"{name}: expected one of {known}, got an unknown variable" for name in settings() if name not in VARIABLES}


def strict() -> bool:
    """Whether a degradation, which is a compile after warm-up, is an error instead of a logged warning."""
    return _read("FA4_BACKEND_STRICT") == "1"


def exact() -> bool:
    """Whether batch invariance shall hold between decode and prefill too."""
    return _read("FA4_BACKEND_EXACT") == "1"


def fp8_query() -> bool:
    """Whether an engine that can shall hand over queries in FP8, where K and V are."""
    return _read("FA4_BACKEND_FP8_QUERY") == "1"


def convert_bytes() -> int:
    """Bytes that the room for K and V of a step's prefill rows, brought from FP8 to 16 bits once a call, may take.

    Raises:
        ValueError: the variable holds no number of MiB.
    """
    text = _read("FA4_BACKEND_CONVERT_MIB")
    if not text.isdecimal() or int(text) > MAX_CONVERT_MIB:
        raise ValueError(f"FA4_BACKEND_CONVERT_MIB: expected 0 to {MAX_CONVERT_MIB}, got {text!r}")
    return int(text) << 20


def sglang_override_fa4() -> bool:
    """Whether SGLang's own backend name `fa4` shall mean this backend."""
    return _read("FA4_BACKEND_SGLANG_OVERRIDE_FA4") == "1"


def cpu_kernel() -> str:
    """Which kernel serves CPU tensors.

    Raises:
        ValueError: the variable holds a name that is not in `EMULATED_ARCH`.
    """
    name = _read("FA4_BACKEND_CPU")
    if name not in EMULATED_ARCH:
        raise ValueError(f"FA4_BACKEND_CPU: expected one of {', '.join(EMULATED_ARCH)}, got {name!r}")
    return name


def cache_dir() -> Path:
    """Folder of all that this package keeps on disk; not created here. See `fa4_backend.cache`.

    Raises:
        ValueError: no variable names one, and this user has no home: neither HOME nor an entry in the user database.
    """
    named, base = os.environ.get("FA4_BACKEND_CACHE_DIR"), Path(_read("XDG_CACHE_HOME"))
    try:
        if named:
            return Path(named).expanduser().absolute()
        base = base.expanduser()
        # The convention says that a relative path is no setting.
        return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "fa4-backend"
    except RuntimeError:  # of expanduser
        raise ValueError(
            f"FA4_BACKEND_CACHE_DIR: expected a folder, since user {os.geteuid()} has no home, got {named or 'none'}"
        ) from None


def cache_limit_bytes() -> int:
    """Bytes that compiled kernels may take on disk.

    Raises:
        ValueError: the variable holds no positive number.
    """
    text = _read("FA4_BACKEND_CACHE_GIB")
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise ValueError(f"FA4_BACKEND_CACHE_GIB: expected a positive number of GiB, got {text!r}")
    return int(gib * 2**30)


def c_compiler() -> str | None:
    """The C compiler that the user named, with its options; None: whichever is found."""
    return os.environ.get("CC") or None


def dsl_dump_dir() -> Path:
    """Folder where the DSL keeps PTX and cubins when it is told to."""
    return Path(_read("CUTE_DSL_DUMP_DIR"))


def trace_file() -> Path | None:
    """File that records which kernel ran in which process, or None.

    Raises:
        ValueError: the variable names no file in a folder that is there.
    """
    name = _read("FA4_BACKEND_TRACE_FILE")
    if name and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
        raise ValueError(f"FA4_BACKEND_TRACE_FILE: expected a file in a folder that is there, got {name}")
    return Path(name) if name else None
