"""Compiled kernels of this package, run on the emulator over CPU tensors: what `fa4_backend.kernels.launch` calls for an emulated plan."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from fa4_backend.compile import OBJECT_FUNCTION, CompileKey
from fa4_backend.compile_cache import ensure_object
from fa4_backend.emulator.launch import install, register_program, session


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


@functools.cache
def load_emulated(key: CompileKey) -> Callable[..., None]:
    """A launcher of `key` that takes CPU tensors where the GPU's takes CUDA tensors.

    Every call runs in a session of its own, without race detection (tests open sessions with it).

    Raises:
        EmulatorError: the kernel used an instruction that is not modelled, or failed.
    """
    function = load_function(key)

    def launch(*arguments: object) -> None:
        with session(arch=key.arch, detect_races=False) as emu:
            emu.run(function, *arguments)

    return launch
