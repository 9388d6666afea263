"""From compile keys to launchers: of the GPU's runtime, or of the emulator over CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fa4_backend.compile import CompileKey
from fa4_backend.compile_cache import load_kernel
from fa4_backend.kernels.families import KernelSet

Launcher = Callable[..., None]


class LoadedKernels(NamedTuple):
    """The launchers of a plan's kernels."""

    schedule: Launcher
    decode: Launcher | None  # None: the prefill kernel serves every row
    prefill: Launcher | None  # None: the decode kernel does
    convert: Launcher | None = None  # None: no step converts K and V before
    converted: Launcher | None = None  # the prefill kernel of steps that do


def load_kernels(kernels: KernelSet, *, emulated: bool) -> LoadedKernels:
    """Load every kernel of a plan, compiling what the cache on disk lacks.

    Raises:
        CompileError: a kernel could not be compiled or linked.
        RuntimeError: strict mode, warm-up is over and the cache lacks a kernel.
    """
    decode, prefill = (None if key is None else load(key, emulated=emulated) for key in (kernels.decode, kernels.prefill))
    convert = converted = None
    if kernels.converted is not None:
        convert, converted = (load(key, emulated=emulated) for key in (kernels.converted.convert, kernels.converted.prefill))
    return LoadedKernels(load(kernels.schedule, emulated=emulated), decode, prefill, convert, converted)


def load(key: CompileKey, *, emulated: bool) -> Launcher:
    """The launcher of one key; takes CPU tensors where it is emulated, CUDA tensors elsewhere."""
    if emulated:
        from fa4_backend.emulator.kernels import load_emulated

        return load_emulated(key)  # type: ignore[arg-type]  # keys are frozen dataclasses: hashable
    return load_kernel(key)  # type: ignore[arg-type]
