"""Every environment variable this package reads, in one place. All are named FA4_BACKEND_*."""

from __future__ import annotations

import os
from pathlib import Path

# name -> (default, what it does); `fa4 doctor` prints this table.
VARIABLES: dict[str, tuple[str, str]] = {
    "FA4_BACKEND_STRICT": ("0", "1: any degradation (a compile after warm-up, a slower kernel than planned) is an error"),
    "FA4_BACKEND_CPU": ("reference", "kernel on a machine without a GPU: reference, emulate-sm90 or emulate-sm100"),
    "FA4_BACKEND_EXACT": ("0", "1: with an engine's batch-invariant mode, a token's bits are those of its prefill too (slower decode)"),
    "FA4_BACKEND_CACHE_DIR": ("~/.cache/fa4-backend", "folder of compiled kernels and converted models"),
    "FA4_BACKEND_TRACE_FILE": ("", "append one line a process and forward kernel to this file: which kernel really ran"),
}

# FA4_BACKEND_CPU -> arch whose kernels the emulator runs; None: the torch reference.
EMULATED_ARCH: dict[str, str | None] = {"reference": None, "emulate-sm90": "sm_90a", "emulate-sm100": "sm_100a"}


def _read(name: str) -> str:
    return os.environ.get(name, VARIABLES[name][0])


def strict() -> bool:
    """Whether a degradation is an error instead of a logged warning."""
    return _read("FA4_BACKEND_STRICT") == "1"


def exact() -> bool:
    """Whether batch invariance shall hold between decode and prefill too."""
    return _read("FA4_BACKEND_EXACT") == "1"


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
    """Folder of compiled kernels and converted models; not created here."""
    return Path(_read("FA4_BACKEND_CACHE_DIR")).expanduser()


def trace_file() -> Path | None:
    """File that records which kernel ran in which process, or None."""
    name = _read("FA4_BACKEND_TRACE_FILE")
    return Path(name) if name else None
