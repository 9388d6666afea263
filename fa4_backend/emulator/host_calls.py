"""Calls of generated host code: they reach the native core (`native/shim.c`) instead of the DSL's runtime, and from there this module.

Generated host code finds `_cudaLaunchKernelEx` and a few others in the native core, which calls back with the launch configuration and the
kernel's arguments, as it would call CUDA. The launch goes to the session that was opened last.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fa4_backend.emulator.contraction import Contraction
from fa4_backend.emulator.errors import EmulatorError, LaunchError, UnknownProgram
from fa4_backend.emulator.grid import MAX_DYNAMIC_SMEM, REGISTERS_PER_SM, Device, Grid, three
from fa4_backend.emulator.memory import host_array
from fa4_backend.emulator.native_core import core, library_path
from fa4_backend.emulator.programs import LoadedKernel, known_ptx, load_program, read_cubin, register_count

ARCHS = {"sm_90a": (9, 0), "sm_100a": (10, 0), "sm_103a": (10, 3)}  # compute capabilities
_LAUNCH_CLUSTER_DIMENSION = 4  # cudaLaunchAttributeClusterDimension
_LAUNCH_PROGRAMMATIC = 6  # cudaLaunchAttributeProgrammaticStreamSerialization
_SET_MAX_DYNAMIC_SMEM = 8  # cudaFuncAttributeMaxDynamicSharedMemorySize
_SET_NON_PORTABLE_CLUSTER = 14  # cudaFuncAttributeNonPortableClusterSizeAllowed
_GET_STATIC_SMEM = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
_ERROR_EMULATOR = 999


class Launcher(Device, Protocol):
    """What host code asks of the session that its launches go to."""

    contraction: Contraction
    error: BaseException | None  # what the call that is running raised: generated host code hands on a number only

    def execute(self, grid: Grid) -> None: ...


open_sessions: list[Launcher] = []  # launches go to the last
handles: list[Any] = [None]  # what the library and kernel handles given to host code stand for
_callbacks: list[Any] = []


def _guard(function: Any) -> Any:
    def call(*args: Any) -> int:
        session = open_sessions[-1] if open_sessions else None
        try:
            if session is None:
                raise EmulatorError("no emulator session is open: call compiled functions with Session.run")
            function(session, *args)
        except BaseException as error:
            if session is not None and session.error is None:
                session.error = error
            core().emu_shim_set_error(str(error).encode()[:4000])
            return _ERROR_EMULATOR
        return 0

    return call


def _on_load(session: Launcher, image: int, library: Any) -> None:
    cubin = read_cubin(image)
    ptx = known_ptx(cubin)
    if ptx is None:
        raise UnknownProgram(
            f"no PTX is known for a cubin of {len(cubin)} bytes: compile with CUTE_DSL_KEEP=ptx,cubin, or call register_program(ptx, cubin)"
        )
    library[0] = len(handles)
    handles.append((ptx, cubin))


def _on_kernel(session: Launcher, library: int, name: bytes, kernel: Any) -> None:
    ptx, cubin = handles[library]
    kernel[0] = len(handles)
    handles.append(LoadedKernel(ptx, cubin, name.decode()))


def _on_launch(session: Launcher, config: int, kernel: int, args: int) -> None:
    loaded: LoadedKernel = handles[kernel]
    numbers = struct.unpack("<6IQQQI", host_array(config, 52).tobytes())
    grid, block, smem, attributes, count = numbers[:3], numbers[3:6], numbers[6], numbers[8], numbers[9]
    cluster, programmatic = (1, 1, 1), False
    for i in range(count):
        raw = host_array(attributes + 72 * i, 72).tobytes()
        attribute = struct.unpack_from("<I", raw)[0]
        if attribute == _LAUNCH_CLUSTER_DIMENSION:
            cluster = struct.unpack_from("<3I", raw, 8)
        elif attribute == _LAUNCH_PROGRAMMATIC:
            programmatic = bool(struct.unpack_from("<I", raw, 8)[0])
    program = load_program(loaded.ptx, loaded.name, session.contraction)
    required = program.kernel.directives.get("reqnctapercluster")
    if required and cluster == (1, 1, 1):
        cluster = three(required)
    if smem > max(loaded.max_dynamic_smem, 49152):
        raise LaunchError(f"{smem} bytes of dynamic shared memory, but the kernel's limit was set to {loaded.max_dynamic_smem}")
    pointers = host_array(args, 8 * len(program.kernel.params)).view(np.uint64) if program.kernel.params else []
    block_of_params = bytearray(program.kernel.param_bytes)
    for pointer, parameter in zip(pointers, program.kernel.params.values(), strict=True):
        end = parameter.offset + parameter.num_bytes
        block_of_params[parameter.offset : end] = host_array(int(pointer), parameter.num_bytes).tobytes()
    registers = register_count(loaded.cubin, loaded.name)
    session.execute(
        Grid(
            session, program, grid, block, cluster, smem, bytes(block_of_params), registers, programmatic, loaded.non_portable, loaded.cubin
        )
    )


def _device_attribute(session: Launcher, number: int) -> int:
    major, minor = ARCHS[session.arch]
    known = {
        1: 1024, 2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535, 8: 49152, 10: 32, 12: REGISTERS_PER_SM, 16: session.num_sms,
        39: 2048, 75: major, 76: minor, 81: 233472, 82: REGISTERS_PER_SM, 97: MAX_DYNAMIC_SMEM, 95: 1, 106: 32, 111: 1024, 120: 1,
    }  # fmt: skip
    if number not in known:
        raise LaunchError(f"device attribute {number} is not modelled")
    return known[number]


def _on_attribute(session: Launcher, kind: int, attribute: int, kernel: int, value: Any) -> None:
    if kind == 0:
        value[0] = _device_attribute(session, attribute)
    elif kind == 2:
        if attribute == _SET_MAX_DYNAMIC_SMEM:
            handles[kernel].max_dynamic_smem = value[0]
        elif attribute == _SET_NON_PORTABLE_CLUSTER:
            handles[kernel].non_portable = bool(value[0])
    elif attribute == _GET_STATIC_SMEM:
        loaded = handles[kernel]
        value[0] = load_program(loaded.ptx, loaded.name).static_smem
    else:
        raise LaunchError(f"kernel attribute {attribute} is not modelled")


def install() -> Path:
    """Build the native core and make the DSL link generated host code against it. Returns the library's path.

    Functions compiled before this call are bound to the real runtime and cannot be emulated. Called by `session`.
    """
    path = library_path()
    if not _callbacks:
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        kinds = (
            (_on_load, ctypes.CFUNCTYPE(integer, pointer, ctypes.POINTER(pointer))),
            (_on_kernel, ctypes.CFUNCTYPE(integer, pointer, ctypes.c_char_p, ctypes.POINTER(pointer))),
            (_on_launch, ctypes.CFUNCTYPE(integer, pointer, pointer, pointer)),
            (_on_attribute, ctypes.CFUNCTYPE(integer, integer, integer, pointer, ctypes.POINTER(integer))),
        )
        _callbacks.extend(kind(_guard(function)) for function, kind in kinds)
        core().emu_shim_install(*_callbacks)
    os.environ["CUTE_DSL_LIBS"] = str(path)
    _rebind_dsl(str(path))
    return path


def _rebind_dsl(path: str) -> None:
    """The DSL's singletons read CUTE_DSL_LIBS once, when `cutlass` is imported: correct them if that was earlier."""
    module = sys.modules.get("cutlass.base_dsl.dsl")
    for dsl in list(module.DSLSingletonMeta._instances.values()) if module else []:
        if hasattr(getattr(dsl, "envar", None), "shared_libs"):
            dsl.envar.shared_libs = path
