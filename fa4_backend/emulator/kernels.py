"""Compiled kernels of this package, run on the emulator over CPU tensors: what `fa4_backend.kernels.loading` loads for an emulated plan."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fa4_backend.compile import OBJECT_FUNCTION, CompileKey, link_shared
from fa4_backend.compile_cache import ensure_object
from fa4_backend.emulator.contraction import NEVER, Contraction
from fa4_backend.emulator.host_calls import install
from fa4_backend.emulator.programs import register_program
from fa4_backend.emulator.report import Report
from fa4_backend.emulator.session import Session, session
from fa4_backend.emulator.trace import Trace


@functools.cache
def load_function(key: CompileKey) -> Callable[..., None]:
    """The host function of `key`, to be called by `Session.run`; compiles when the cache has no object.

    Raises:
        CompileError: the kernel could not be compiled or linked.
    """
    library = ensure_object(key)
    register_program(library.with_suffix(".ptx").read_text(), library.with_suffix(".cubin").read_bytes())
    return load_object(library)[OBJECT_FUNCTION]


def load_object(library: Path) -> Any:
    """The tvm-ffi module of a compiled object, its launch functions bound to the emulator.

    A process that has compiled or launched anything holds the DSL's runtime in its global scope, where the same symbols would be found
    first. So the object is first opened as a dependency of a library that depends on the emulator too, and whose own scope goes first
    (RTLD_DEEPBIND); opened again, it keeps those bindings.

    Raises:
        CompileError: no C compiler was found, or it failed.
    """
    import tvm_ffi

    emulator_library = install()
    with tempfile.TemporaryDirectory(prefix="fa4-emulated-") as folder:
        binder = Path(folder) / "binder.so"
        link_shared([library.resolve(), emulator_library.resolve()], binder, "-Wl,--no-as-needed")
        ctypes.CDLL(str(binder), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
    return tvm_ffi.load_module(str(library))


@dataclass
class Observation:
    """How emulated launches run inside `observed`: in one session, as launches of one stream."""

    seed: int | None = None
    trace: Trace | None = None
    contraction: Contraction = NEVER
    names: dict[str, str] = field(default_factory=dict)  # of the kernels launched, by their names in the PTX
    reports: list[Report] = field(default_factory=list)  # of the session, complete when the block ends
    session: Session | None = None  # opened by the first launch
    opened: ExitStack = field(default_factory=ExitStack)

    def session_for(self, arch: str) -> Session:
        """The session of all launches inside.

        Raises:
            ValueError: an earlier launch was for another arch.
        """
        if self.session is None:
            options = {"seed": self.seed, "trace": self.trace, "contraction": self.contraction}
            self.session = self.opened.enter_context(session(arch=arch, **options))  # type: ignore[arg-type]
            self.opened.enter_context(self.session.stream())
            self.reports.append(self.session.report)
        if self.session.arch != arch:
            raise ValueError(f"observed launches of one stream: expected arch {self.session.arch}, got {arch}")
        return self.session


_observation: ContextVar[Observation | None] = ContextVar("observation", default=None)


@contextmanager
def observed(seed: int | None = None, trace: Trace | None = None, contraction: Contraction = NEVER) -> Iterator[Observation]:
    """Emulated launches inside run with race detection, under the schedule of `seed`, in one stream: it is complete at the end."""
    observation = Observation(seed, trace, contraction)
    token = _observation.set(observation)
    try:
        with observation.opened:
            yield observation
    finally:
        _observation.reset(token)


@functools.cache
def load_emulated(key: CompileKey) -> Callable[..., None]:
    """A launcher of `key` that takes CPU tensors where the GPU's takes CUDA tensors.

    A call runs in a session of its own without race detection, or in that of `observed`.

    Raises:
        EmulatorError: the kernel used an instruction that is not modelled, or failed.
    """
    function = load_function(key)
    names = re.findall(r"\.entry\s+([\w$]+)", ensure_object(key).with_suffix(".ptx").read_text())

    def launch(*arguments: object) -> None:
        seen = _observation.get()
        if seen is None:
            with session(arch=key.arch, detect_races=False) as emu:
                emu.run(function, *arguments)
            return
        seen.names |= dict.fromkeys(names, key.name)
        seen.session_for(key.arch).run(function, *arguments)

    return launch
