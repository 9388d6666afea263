"""Compiled kernels of this package, run on the emulator over CPU tensors: what `fa4_backend.kernels.launch` calls for an emulated plan."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from fa4_backend.compile import OBJECT_FUNCTION, CompileKey
from fa4_backend.compile_cache import ensure_object
from fa4_backend.emulator.launch import install, register_program, session
from fa4_backend.emulator.report import Report
from fa4_backend.emulator.trace import Trace


@functools.cache
def load_function(key: CompileKey) -> Callable[..., None]:
    """The host function of `key`, to be called by `Session.run`; compiles when the cache has no object.

    Raises:
        CompileError: the kernel could not be compiled or linked.
    """
    import tvm_ffi

    # The object's launch functions bind to the first library that has them: the emulator's, not the DSL's runtime.
    ctypes.CDLL(str(install()), mode=ctypes.RTLD_GLOBAL)
    library = ensure_object(key)
    register_program(library.with_suffix(".ptx").read_text(), library.with_suffix(".cubin").read_bytes())
    return tvm_ffi.load_module(str(library))[OBJECT_FUNCTION]


@dataclass
class Observation:
    """How emulated launches run inside `observed`, and what they reported."""

    seed: int | None = None
    trace: Trace | None = None
    reports: list[tuple[str, Report]] = field(default_factory=list)  # (kernel, report) of every launch, in order


_observation: ContextVar[Observation | None] = ContextVar("observation", default=None)


@contextmanager
def observed(seed: int | None = None, trace: Trace | None = None) -> Iterator[Observation]:
    """Emulated launches inside run with race detection, under the schedule of `seed`; their reports are kept."""
    observation = Observation(seed, trace)
    token = _observation.set(observation)
    try:
        yield observation
    finally:
        _observation.reset(token)


@functools.cache
def load_emulated(key: CompileKey) -> Callable[..., None]:
    """A launcher of `key` that takes CPU tensors where the GPU's takes CUDA tensors.

    Every call runs in a session of its own, without race detection unless the call is `observed`.

    Raises:
        EmulatorError: the kernel used an instruction that is not modelled, or failed.
    """
    function = load_function(key)

    def launch(*arguments: object) -> None:
        seen = _observation.get()
        seed, trace = (seen.seed, seen.trace) if seen else (None, None)
        with session(arch=key.arch, seed=seed, detect_races=seen is not None, trace=trace) as emu:
            emu.run(function, *arguments)
        if seen:
            seen.reports.append((key.name, emu.report))

    return launch
