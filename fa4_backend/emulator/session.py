"""Sessions: an emulated device, its memory, and the launches that run on it."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# These modules register the handlers of their instructions.
from fa4_backend.emulator import barriers, cp_async, launch_control, matrix_moves, native_ops, remote, tcgen05, tma, wgmma  # noqa: F401
from fa4_backend.emulator.contraction import NEVER, Contraction, check_contraction
from fa4_backend.emulator.cta import Cluster
from fa4_backend.emulator.errors import LaunchError, RaceDetected
from fa4_backend.emulator.global_races import GlobalRaces
from fa4_backend.emulator.grid import Grid, three
from fa4_backend.emulator.host_calls import ARCHS, install, open_sessions
from fa4_backend.emulator.lowered_program import Program
from fa4_backend.emulator.memory import GlobalMemory
from fa4_backend.emulator.programs import load_program, register_program
from fa4_backend.emulator.races import Races
from fa4_backend.emulator.recording import Recording
from fa4_backend.emulator.report import Report
from fa4_backend.emulator.stream import Stream
from fa4_backend.emulator.tensors import count_poison, device_tensor, extent, host_tensor, is_plain_function, poison, runtime_extent
from fa4_backend.emulator.trace import Trace


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
        contraction: Contraction = NEVER,
        isa_order: bool = False,
    ) -> None:
        if arch not in ARCHS:
            raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
        if num_sms < 1:
            raise ValueError(f"num_sms must be positive, got {num_sms}")
        self.arch, self.num_sms, self.seed = arch, num_sms, seed
        self.detect_races, self.step_limit = detect_races, step_limit
        self.trace = trace
        self.contraction = check_contraction(contraction)
        self.isa_order = isa_order
        self.max_resident = num_sms
        self.memory = GlobalMemory()
        self.report = Report()
        self.global_races = GlobalRaces(self.report)
        self.num_launches = 0
        self.launches, self.in_stream = Stream(seed), False
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
        if (found := runtime_extent(value)) is not None:
            self.memory.register(f"tensor{len(self.memory.buffers)}{tuple(value.shape)}", *found, value)
        if isinstance(value, tuple | list):
            items = [self.argument(v) for v in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def runtime_argument(self, value: Any) -> Any:
        """An argument of a function that was compiled without tvm-ffi."""
        if isinstance(value, np.ndarray | torch.Tensor):
            from cutlass.cute.runtime import from_dlpack

            value = from_dlpack(host_tensor(value))
        return self.argument(value)

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a compiled function; torch CPU tensors and numpy arrays among its arguments are used in place.

        Its kernels are complete when it returns, unless a `stream` is open. Raises what went wrong in a kernel (`KernelFault` and others),
        not the host code's translation of it.
        """
        artifacts = getattr(compiled, "artifacts", None)
        if artifacts is not None and artifacts.PTX and isinstance(artifacts.CUBIN, bytes):
            register_program(artifacts.PTX, artifacts.CUBIN)
        if hasattr(type(compiled), "num_devices"):
            compiled.__dict__["num_devices"] = 1  # host code without tvm-ffi asks the CUDA driver otherwise
        with self.opened(), self.arguments():
            try:
                result = self.call(compiled, args, kwargs)
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
        return result

    @contextmanager
    def arguments(self) -> Iterator[None]:
        """What is registered inside is forgotten once the kernels that were launched inside are complete; by the stream, if one is open."""
        if self.in_stream:
            yield
            return
        buffers, kept = dict(self.memory.buffers), len(self.kept)
        try:
            yield
            self.drain()
        finally:
            self.launches.running.clear()  # of a run that failed
            del self.kept[kept:]
            self.memory.buffers = buffers
            self.memory.rebuild()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Launches inside are of one stream, and their results are there at its end.

        With a seed, a programmatic launch runs beside the launch before, as far as `griddepcontrol` lets it.
        """
        with self.arguments():
            self.in_stream = True
            try:
                yield
            finally:
                self.in_stream = False

    def call(self, compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call host code with tensors that claim to be on a GPU, or as they are where it was compiled for tensors of the CPU."""
        if is_plain_function(compiled):  # it takes what `from_dlpack` makes, not tensors
            return compiled(*(self.runtime_argument(a) for a in args), **{k: self.runtime_argument(v) for k, v in kwargs.items()})
        on_gpu = [self.argument(a) for a in args], {k: self.argument(v) for k, v in kwargs.items()}
        try:
            return compiled(*on_gpu[0], **on_gpu[1])
        except Exception as error:
            if "expected device_type=cpu" not in str(error):
                raise
        return compiled(*args, **kwargs)

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
        registers: int | None = None,
        non_portable: bool = False,
    ) -> None:
        """Run one kernel of a PTX text directly: `args` are numbers, tensors (their address) or raw bytes.

        `programmatic`: with programmatic stream serialization, so that it may start before the launch before it is complete.
        `registers`: of a thread, when it is known. `non_portable`: clusters of more than 8 CTAs are allowed.
        """
        program = load_program(ptx, kernel, self.contraction)
        params = args if isinstance(args, bytes) else self.pack(program, args)
        shape = three(grid), three(block), three(cluster)
        self.execute(Grid(self, program, *shape, smem, params, registers, programmatic, non_portable))
        if not self.in_stream:
            self.drain()

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
        """Launch; `drain` completes it."""
        self.timed(lambda: self.launches.launch(grid))

    def drain(self) -> None:
        """Complete every launch."""
        self.timed(self.launches.drain)

    def timed(self, work: Callable[[], None]) -> None:
        start = time.process_time()
        try:
            with np.errstate(all="ignore"):
                work()
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
        open_sessions.append(self)
        try:
            yield
        finally:
            open_sessions.remove(self)


@contextmanager
def session(
    arch: str = "sm_100a",
    num_sms: int = 148,
    seed: int | None = None,
    detect_races: bool | str = True,
    step_limit: int = 50_000_000,
    trace: Trace | Recording | None = None,
    contraction: Contraction = NEVER,
    isa_order: bool = False,
) -> Iterator[Session]:
    """An emulated device for the time of a `with` block; see the package docstring. `trace` is filled on the way (no seed then).

    `isa_order`: products of different shape or accumulator are not in order (`tcgen05.py`); also kernels that are right on silicon race.
    """
    emu = Session(arch, num_sms, seed, detect_races, step_limit, trace, contraction, isa_order)
    install()
    open_sessions.append(emu)
    try:
        yield emu
        emu.finish()
    finally:
        emu.global_races.close()
        open_sessions.remove(emu)
