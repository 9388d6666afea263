"""Kernels are there before a script asks for them one by one, and those of a script that changes them in a cache of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

from fa4_backend import envs
from fa4_backend.compile import CompileKey
from fa4_backend.compile_cache import ensure_objects, find_prebuilt


def compile_lacking(keys: Iterable[CompileKey], prepare: Callable[[], None] | None = None, processes: int | None = None) -> None:
    """Compile what neither the installation nor the cache has, side by side.

    Args:
        prepare: runs first in each process that compiles.
        processes: None: as many as there are cores.
    """
    begin, chosen = time.perf_counter(), [*dict.fromkeys(keys)]
    compiled = ensure_objects((key for key in chosen if find_prebuilt(key) is None), jobs=processes, prepare=prepare)
    print(f"compiled {compiled} of {len(chosen)} kernels in {time.perf_counter() - begin:.0f} s", flush=True)


def use_own_cache(name: str, source: Path) -> None:
    """Keep this process's objects, and those of processes that it starts, apart from others of the same keys, until `source` changes."""
    folder = f"{name}-{sha256(source.read_bytes()).hexdigest()[:12]}"
    if envs.cache_dir().name != folder:  # a process that this one starts inherits it
        os.environ["FA4_BACKEND_CACHE_DIR"] = str(envs.cache_dir() / folder)
