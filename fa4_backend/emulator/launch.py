"""Sessions: launches of compiled kernels are caught at the DSL runtime's C functions and run here.

Generated host code finds `_cudaLaunchKernelEx` and a few others in the native core (`native/shim.c`), which calls back into the open
session with the launch configuration and the kernel's arguments, as it would call CUDA.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

# These modules register the handlers of their instructions.
from fa4_backend.emulator import barriers, cp_async, launch_control, matrix_moves, native_ops, remote, tcgen05, tma, wgmma  # noqa: F401
from fa4_backend.emulator.cta import Cluster
from fa4_backend.emulator.decode import RESERVED_SMEM, Program
from fa4_backend.emulator.errors import Deadlock, EmulatorError, LaunchError, RaceDetected, UnknownProgram
from fa4_backend.emulator.global_races import GlobalRaces
from fa4_backend.emulator.memory import GlobalMemory, host_array
from fa4_backend.emulator.native_core import core, library_path
from fa4_backend.emulator.parser import Variable
from fa4_backend.emulator.programs import LoadedKernel, known_ptx, load_program, read_cubin, register_count, register_program
from fa4_backend.emulator.races import Races
from fa4_backend.emulator.recording import Recording
from fa4_backend.emulator.report import Report
from fa4_backend.emulator.tensors import device_tensor, extent, host_tensor
from fa4_backend.emulator.trace import Trace
from fa4_backend.emulator.warp import Warp

ARCHS = {"sm_90a": (9, 0), "sm_100a": (10, 0), "sm_103a": (10, 3)}
MAX_DYNAMIC_SMEM = 232448  # 227 KiB, CUDA programming guide, compute capabilities 9.0 and 10.x
REGISTERS_PER_SM = 65536
_LAUNCH_CLUSTER_DIMENSION = 4  # cudaLaunchAttributeClusterDimension
_LAUNCH_PROGRAMMATIC = 6  # cudaLaunchAttributeProgrammaticStreamSerialization
_SET_MAX_DYNAMIC_SMEM = 8  # cudaFuncAttributeMaxDynamicSharedMemorySize
_GET_STATIC_SMEM = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
ERROR_EMULATOR = 999


class Grid:
    """One launch of one kernel."""

    def __init__(
        self,
        session: Session,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        dynamic_smem: int,
        params: bytes,
        registers: int | None = None,
        programmatic: bool = False,
    ) -> None:
        self.session, self.program, self.memory = session, program, session.memory
        self.grid, self.block, self.cluster = grid, block, cluster
        self.explicit_cluster = cluster != (1, 1, 1)
        self.num_sms, self.dynamic_smem = session.num_sms, dynamic_smem
        self.programmatic = programmatic  # may start before the launch before it is complete
        self.number = session.num_launches
        session.num_launches += 1
        self.check()
        start = RESERVED_SMEM + program.static_smem
        self.smem_bytes = -(-start // 1024) * 1024 + dynamic_smem if program.has_dynamic_smem else start
        # The parameter block is aligned like the tensor maps in it.
        self.param_store = np.zeros(len(params) + 128, np.uint8)
        skip = -self.param_store.ctypes.data % 64
        self.params = self.param_store[skip : skip + len(params) + 16]
        self.params[: len(params)] = np.frombuffer(params, np.uint8)
        threads = block[0] * block[1] * block[2]
        most = program.kernel.directives.get("maxnreg", (min(255, REGISTERS_PER_SM // max(threads, 128)) // 8 * 8,))
        fallback = most[0]
        self.registers_per_thread = -(-(registers or fallback) // 8) * 8
        self.register_pool = self.registers_per_thread * -(-threads // 32) * 32
        self.free_register_files: list[np.ndarray] = []
        self.globals: dict[str, np.ndarray] = {}
        self.waiting: deque[tuple[int, tuple[int, int, int]]] = deque()  # clusters that have not started

    def check(self) -> None:
        threads = self.block[0] * self.block[1] * self.block[2]
        if not 1 <= threads <= 1024:
            raise LaunchError(f"{threads} threads a CTA, expected 1 to 1024")
        required = self.program.kernel.directives.get("reqntid")
        if required and tuple(required) + (1,) * (3 - len(required)) != self.block:
            raise LaunchError(f"block {self.block}, but the kernel was compiled for {required}")
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise LaunchError(f"grid {self.grid} is not a multiple of the cluster {self.cluster}")
        if not 0 <= self.dynamic_smem <= MAX_DYNAMIC_SMEM:
            raise LaunchError(f"{self.dynamic_smem} bytes of dynamic shared memory, at most {MAX_DYNAMIC_SMEM}")

    def take_registers(self) -> np.ndarray:
        if self.free_register_files:
            return self.free_register_files.pop()
        return np.empty((self.program.num_slots, 32), np.uint32)

    def give_registers(self, file: np.ndarray) -> None:
        self.free_register_files.append(file)

    def global_symbol(self, variable: Variable) -> int:
        """Address of a module variable, allocated at the first use."""
        if variable.name not in self.globals:
            data = np.zeros(max(variable.num_bytes, 16), np.uint8)
            data[: len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
            self.globals[variable.name] = data
            self.memory.register(variable.name, data.ctypes.data, data.size, data, variable.space == "const")
        return self.globals[variable.name].ctypes.data

    def dependency(self, warp: Warp, action: str) -> None:
        """griddepcontrol: launches run one after the other, so there is nothing to wait for but what the race detector knows."""
        if warp.races:
            self.session.global_races.dependency(warp, waits=action == "wait")

    def clusters(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        (gx, gy, gz), (cx, cy, cz) = self.grid, self.cluster
        index = 0
        for z in range(0, gz, cz):
            for y in range(0, gy, cy):
                for x in range(0, gx, cx):
                    yield index, (x, y, z)
                    index += 1

    def run(self) -> None:
        for name in self.program.kernel.variables.values():
            if name.space in ("global", "const"):
                self.global_symbol(name)
        self.session.global_races.start_launch(self)
        with self.memory.temporarily("kernel parameters", self.params.ctypes.data, self.params.size, self.params, read_only=True):
            waiting = self.waiting = deque(self.session.in_order(self))
            active: deque[Cluster] = deque()
            limit = self.session.max_resident
            while waiting or active:
                # A cluster that spins on global memory needs the others: they take turns, at most as many as the device holds.
                if waiting and (not active or (len(active) < limit and all(c.spinning for c in active))):
                    active.appendleft(Cluster(self, *waiting.popleft()))
                elif all(c.exhausted() for c in active):
                    places = "\n".join(c.where() for c in active)
                    raise Deadlock(
                        f"livelock in kernel {self.program.name[:80]}: no progress in {self.session.step_limit} warp instructions\n{places}"
                    )
                cluster = active[0]
                if cluster.run():
                    active.remove(cluster)
                    for other in active:
                        other.spinning = False
                else:
                    active.rotate(-1)


# -- sessions -------------------------------------------------------------------------------------------------------------


class Session:
    """An emulated device. See the package docstring for use; make one with `session(...)`."""

    def __init__(
        self,
        arch: str,
        num_sms: int,
        seed: int | None,
        detect_races: bool | str,
        step_limit: int,
        trace: Trace | Recording | None = None,
    ) -> None:
        if arch not in ARCHS:
            raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
        if num_sms < 1:
            raise ValueError(f"num_sms must be positive, got {num_sms}")
        self.arch, self.num_sms, self.seed = arch, num_sms, seed
        self.detect_races, self.step_limit = detect_races, step_limit
        self.trace = trace
        self.max_resident = num_sms
        self.memory = GlobalMemory()
        self.report = Report()
        self.global_races = GlobalRaces(self.report)
        self.num_launches = 0
        self.error: BaseException | None = None
        self.kept: list[Any] = []
        self.outputs: dict[str, torch.Tensor] = {}

    def rng_for(self, launch: int, cluster: int) -> random.Random | None:
        return None if self.seed is None else random.Random(f"{self.seed}/{launch}/{cluster}")

    def in_order(self, grid: Grid) -> list[tuple[int, tuple[int, int, int]]]:
        """A grid's clusters as they start: nothing promises an order, so a seed draws one."""
        clusters = list(grid.clusters())
        if self.seed is not None:
            random.Random(f"{self.seed}/{self.num_launches}").shuffle(clusters)
        return clusters

    def new_races(self, cluster: Cluster) -> Races | None:
        if self.trace is not None:
            return self.trace.races(cluster)
        return Races(cluster) if self.detect_races else None

    # -- tensors ------------------------------------------------------------------------------------------------

    def tensor(self, value: Any, name: str = "", output: bool = False) -> Any:
        """Register a numpy array or torch CPU tensor and return what a compiled callable takes in its place (no copy).

        `output`: fill it with a NaN pattern now; `report.unwritten` then counts the elements that the kernels left alone.
        """
        tensor = host_tensor(value)
        address, num_bytes = extent(tensor)
        name = name or f"tensor{len(self.memory.buffers)}{tuple(tensor.shape)}"
        self.memory.register(name, address, num_bytes, tensor)
        if output:
            self.outputs[name] = tensor
            poison(tensor)
        handle = device_tensor(tensor)
        self.kept.append((tensor, handle))
        return handle

    def argument(self, value: Any) -> Any:
        if isinstance(value, np.ndarray | torch.Tensor):
            return self.tensor(value)
        if isinstance(value, tuple | list):
            items = [self.argument(v) for v in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a compiled function; torch CPU tensors and numpy arrays among its arguments are used in place.

        Raises what went wrong in a kernel (`KernelFault` and others), not the host code's translation of it.
        """
        artifacts = getattr(compiled, "artifacts", None)
        if artifacts is not None and artifacts.PTX and artifacts.CUBIN:
            register_program(artifacts.PTX, artifacts.CUBIN)
        buffers = dict(self.memory.buffers)
        kept = len(self.kept)
        with self.opened():
            try:
                result = compiled(*(self.argument(a) for a in args), **{k: self.argument(v) for k, v in kwargs.items()})
            except Exception as error:
                if self.error is not None:
                    raise self.error from None
                if "Cuda Runtime Error" in str(error):
                    raise LaunchError(
                        f"the function is bound to the CUDA runtime, which was loaded before the emulator: {error}"
                    ) from error
                raise LaunchError(f"the host code refused the call: {error}") from error
            finally:
                self.error = None
                del self.kept[kept:]
                self.memory.buffers = buffers
                self.memory.rebuild()
        return result

    def launch(
        self,
        ptx: str,
        grid: Any,
        block: Any,
        args: bytes | list[Any],
        *,
        cluster: Any = (1, 1, 1),
        smem: int = 0,
        kernel: str | None = None,
        programmatic: bool = False,
    ) -> None:
        """Run one kernel of a PTX text directly: `args` are numbers, tensors (their address) or raw bytes.

        `programmatic`: with programmatic stream serialization, so that it may start before the launch before it is complete.
        """
        program = load_program(ptx, kernel)
        params = args if isinstance(args, bytes) else self.pack(program, args)
        self.execute(Grid(self, program, _three(grid), _three(block), _three(cluster), smem, params, programmatic=programmatic))

    def pack(self, program: Program, args: list[Any]) -> bytes:
        parameters = list(program.kernel.params.values())
        if len(args) != len(parameters):
            raise LaunchError(f"{len(args)} arguments, but kernel {program.name} takes {len(parameters)}")
        block = bytearray(program.kernel.param_bytes)
        for value, parameter in zip(args, parameters, strict=True):
            if isinstance(value, np.ndarray | torch.Tensor):
                tensor = host_tensor(value)
                address, num_bytes = extent(tensor)
                self.memory.register(parameter.name, address, num_bytes, tensor)
                value = address
            if isinstance(value, float):
                value = struct.pack("<f" if parameter.num_bytes == 4 else "<d", value)
            if isinstance(value, int):
                value = (value & ((1 << 8 * parameter.num_bytes) - 1)).to_bytes(parameter.num_bytes, "little")
            if len(value) != parameter.num_bytes:
                raise LaunchError(f"argument {parameter.name}: {len(value)} bytes, expected {parameter.num_bytes}")
            block[parameter.offset : parameter.offset + parameter.num_bytes] = value
        return bytes(block)

    def execute(self, grid: Grid) -> None:
        start = time.process_time()
        try:
            with np.errstate(all="ignore"):
                grid.run()
        finally:
            self.report.seconds += time.process_time() - start
        if self.detect_races == "raise" and self.report.races:
            raise RaceDetected(f"{len(self.report.races)} races, first: {self.report.races[0]}")

    def finish(self) -> None:
        """Count what was never written of the outputs."""
        for name, tensor in self.outputs.items():
            self.report.unwritten[name] = count_poison(tensor)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make this the session that launches go to."""
        install()
        _open.append(self)
        try:
            yield
        finally:
            _open.remove(self)

    # -- calls of generated host code ---------------------------------------------------------------------------

    def on_launch(self, config: int, kernel: LoadedKernel, args: int) -> None:
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
        program = load_program(kernel.ptx, kernel.name)
        required = program.kernel.directives.get("reqnctapercluster")
        if required and cluster == (1, 1, 1):
            cluster = _three(required)
        if smem > max(kernel.max_dynamic_smem, 49152):
            raise LaunchError(f"{smem} bytes of dynamic shared memory, but the kernel's limit was set to {kernel.max_dynamic_smem}")
        pointers = host_array(args, 8 * len(program.kernel.params)).view(np.uint64) if program.kernel.params else []
        block_of_params = bytearray(program.kernel.param_bytes)
        for pointer, parameter in zip(pointers, program.kernel.params.values(), strict=True):
            end = parameter.offset + parameter.num_bytes
            block_of_params[parameter.offset : end] = host_array(int(pointer), parameter.num_bytes).tobytes()
        registers = register_count(kernel.cubin, kernel.name)
        self.execute(Grid(self, program, grid, block, cluster, smem, bytes(block_of_params), registers, programmatic))

    def device_attribute(self, number: int) -> int:
        major, minor = ARCHS[self.arch]
        known = {
            1: 1024, 2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535, 8: 49152, 10: 32, 12: REGISTERS_PER_SM, 16: self.num_sms,
            39: 2048, 75: major, 76: minor, 81: 233472, 82: REGISTERS_PER_SM, 97: MAX_DYNAMIC_SMEM, 95: 1, 106: 32, 111: 1024, 120: 1,
        }  # fmt: skip
        if number not in known:
            raise LaunchError(f"device attribute {number} is not modelled")
        return known[number]


def _three(value: Any) -> tuple[int, int, int]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return (*numbers, 1, 1, 1)[:3]


def poison(tensor: torch.Tensor) -> None:
    """Fill with a NaN (or, for integers, an odd number) that kernels do not write by chance."""
    _words(tensor).fill_(_POISON[tensor.element_size()])


def count_poison(tensor: torch.Tensor) -> int:
    """Elements that still hold what `poison` wrote."""
    return int((_words(tensor) == _POISON[tensor.element_size()]).sum())


_POISON = {1: 0x7F, 2: 0x7FE7, 4: 0x7FE7A5C3, 8: 0x7FF7A5C37FE7A5C3}


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


# -- the process-wide shim ------------------------------------------------------------------------------------------------

_open: list[Session] = []
_handles: list[Any] = [None]  # what the library and kernel handles given to host code stand for
_callbacks: list[Any] = []


def _guard(function: Any) -> Any:
    def call(*args: Any) -> int:
        session = _open[-1] if _open else None
        try:
            if session is None:
                raise EmulatorError("no emulator session is open: call compiled functions with Session.run")
            function(session, *args)
        except BaseException as error:
            if session is not None and session.error is None:
                session.error = error
            core().emu_shim_set_error(str(error).encode()[:4000])
            return ERROR_EMULATOR
        return 0

    return call


def _on_load(session: Session, image: int, library: Any) -> None:
    cubin = read_cubin(image)
    ptx = known_ptx(cubin)
    if ptx is None:
        raise UnknownProgram(
            f"no PTX is known for a cubin of {len(cubin)} bytes: compile with CUTE_DSL_KEEP=ptx,cubin, or call register_program(ptx, cubin)"
        )
    library[0] = len(_handles)
    _handles.append((ptx, cubin))


def _on_kernel(session: Session, library: int, name: bytes, kernel: Any) -> None:
    ptx, cubin = _handles[library]
    kernel[0] = len(_handles)
    _handles.append(LoadedKernel(ptx, cubin, name.decode()))


def _on_launch(session: Session, config: int, kernel: int, args: int) -> None:
    session.on_launch(config, _handles[kernel], args)


def _on_attribute(session: Session, kind: int, attribute: int, kernel: int, value: Any) -> None:
    if kind == 0:
        value[0] = session.device_attribute(attribute)
    elif kind == 2:
        if attribute == _SET_MAX_DYNAMIC_SMEM:
            _handles[kernel].max_dynamic_smem = value[0]
    elif attribute == _GET_STATIC_SMEM:
        loaded = _handles[kernel]
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


@contextmanager
def session(
    arch: str = "sm_100a",
    num_sms: int = 148,
    seed: int | None = None,
    detect_races: bool | str = True,
    step_limit: int = 50_000_000,
    trace: Trace | Recording | None = None,
) -> Iterator[Session]:
    """An emulated device for the time of a `with` block; see the package docstring. `trace` is filled on the way (no seed then)."""
    emu = Session(arch, num_sms, seed, detect_races, step_limit, trace)
    install()
    _open.append(emu)
    try:
        yield emu
        emu.finish()
    finally:
        emu.global_races.close()
        _open.remove(emu)
