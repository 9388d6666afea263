"""Kernels are there before a script asks for them one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

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
