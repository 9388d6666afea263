"""One launch of one kernel: its configuration, its clusters and the order in which they start and take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fa4_backend.emulator.cta import Cluster
from fa4_backend.emulator.errors import Deadlock, LaunchError
from fa4_backend.emulator.lowered_program import RESERVED_SMEM, Program
from fa4_backend.emulator.syntax import Variable
from fa4_backend.emulator.warp import Warp

if TYPE_CHECKING:
    import random

    from fa4_backend.emulator.global_races import GlobalRaces, LaunchOrder
    from fa4_backend.emulator.memory import GlobalMemory
    from fa4_backend.emulator.races import Races
    from fa4_backend.emulator.report import Report

MAX_DYNAMIC_SMEM = 232448  # 227 KiB, CUDA programming guide, compute capabilities 9.0 and 10.x
REGISTERS_PER_SM = 65536
MAX_BLOCK, MAX_GRID = (1024, 1024, 64), (2**31 - 1, 65535, 65535)


class Device(Protocol):
    """What a launch and its clusters ask of the session that they run in."""

    arch: str
    num_sms: int
    isa_order: bool  # products of different shape or accumulator are not in order (`tcgen05.py`)
    max_resident: int  # CTAs that run side by side
    step_limit: int  # warp instructions without progress that are a livelock
    num_launches: int
    memory: GlobalMemory
    report: Report
    global_races: GlobalRaces

    def rng_for(self, launch: int, cluster: int) -> random.Random | None: ...

    def in_order(self, grid: Grid) -> list[tuple[int, tuple[int, int, int]]]: ...

    def new_races(self, cluster: Cluster) -> Races | None: ...


class Grid:
    """One launch of one kernel."""

    def __init__(
        self,
        session: Device,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        dynamic_smem: int,
        params: bytes,
        registers: int | None = None,
        programmatic: bool = False,
        non_portable: bool = False,
        cubin: bytes = b"",
    ) -> None:
        self.cubin = cubin  # the machine code of the kernel, where it is known
        self.session, self.program, self.memory = session, program, session.memory
        self.grid, self.block, self.cluster = grid, block, cluster
        self.explicit_cluster = cluster != (1, 1, 1)
        self.num_sms, self.dynamic_smem = session.num_sms, dynamic_smem
        self.programmatic = programmatic  # may start before the launch before it is complete
        self.order: LaunchOrder  # what is known to have happened before it
        self.predecessor: Grid | None = None  # the launch before, which may still run
        self.launched: set[tuple[int, int, int]] = set()  # CTAs that executed griddepcontrol.launch_dependents
        self.dependents: list[tuple[Warp, int]] = []  # lanes of later launches that wait until this one is complete
        self.has_ended = False
        self.number = session.num_launches
        session.num_launches += 1
        self.check(registers, non_portable)
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
        self.active: deque[Cluster] = deque()
        self.turns = 0  # of clusters

    def check(self, registers: int | None, non_portable: bool) -> None:
        """What the CUDA driver refuses (CUDA programming guide, compute capabilities 9.0 and 10.x), and one rule of the kernel's text.

        Raises:
            LaunchError: a number is out of its limits.
        """
        threads = self.block[0] * self.block[1] * self.block[2]
        if not 1 <= threads <= 1024:
            raise LaunchError(f"{threads} threads a CTA, expected 1 to 1024")
        for what, sizes, limits in (("block", self.block, MAX_BLOCK), ("grid", self.grid, MAX_GRID)):
            if not all(1 <= size <= limit for size, limit in zip(sizes, limits, strict=True)):
                raise LaunchError(f"{what} {sizes}, expected 1 to {limits}")
        num_ctas = self.cluster[0] * self.cluster[1] * self.cluster[2]
        if not 1 <= num_ctas <= (16 if non_portable else 8):
            raise LaunchError(f"cluster of {num_ctas} CTAs, expected 1 to 8, or to 16 with cudaFuncAttributeNonPortableClusterSizeAllowed")
        warps = -(-threads // 32)
        if registers and warps * -(-32 * registers // 256) * 256 > REGISTERS_PER_SM:
            raise LaunchError(f"{threads} threads of {registers} registers, but an SM has {REGISTERS_PER_SM}")
        if len(groups := self.program.cta_groups) > 1:
            raise LaunchError(
                f"tcgen05 instructions of one kernel have {' and '.join(sorted(groups))}: all must have the same (PTX ISA 9.7.16)"
            )
        required = self.program.kernel.directives.get("reqntid")
        if required and tuple(required) + (1,) * (3 - len(required)) != self.block:
            raise LaunchError(f"block {self.block}, but the kernel was compiled for {required}")
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise LaunchError(f"grid {self.grid} is not a multiple of the cluster {self.cluster}")
        if not 0 <= self.dynamic_smem <= MAX_DYNAMIC_SMEM - self.program.static_smem:
            static = self.program.static_smem
            raise LaunchError(f"{static} bytes of static and {self.dynamic_smem} of dynamic shared memory, at most {MAX_DYNAMIC_SMEM}")

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

    def dependency(self, warp: Warp, action: str) -> bool | None:
        """griddepcontrol; True: the lanes have to wait."""
        if action == "launch_dependents":
            self.launched.add(warp.cta.ctaid)
            warp.yields = True  # what may start beside it, starts
        elif self.predecessor is not None and not self.predecessor.has_ended:
            warp.wait(f"the end of kernel {self.predecessor.program.name[:80]}")
            self.predecessor.dependents.append((warp, warp.waiting_lanes))
            return True
        else:
            self.order.has_waited = True
        if warp.races:
            self.session.global_races.dependency(warp, waits=action == "wait")
        return None

    def clusters(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        (gx, gy, gz), (cx, cy, cz) = self.grid, self.cluster
        index = 0
        for z in range(0, gz, cz):
            for y in range(0, gy, cy):
                for x in range(0, gx, cx):
                    yield index, (x, y, z)
                    index += 1

    # -- running, in turns with other grids of the stream ---------------------------------------------------------------------

    def begin(self, side_by_side: bool) -> None:
        """Be ready to run. `side_by_side`: beside other grids, so that all CTAs for which there is room start at once.

        So do CTAs that share a queue, counters or flags: one after the other, the first would take all of it, or wait for another that has
        not begun.
        """
        for name in self.program.kernel.variables.values():
            if name.space in ("global", "const"):
                self.global_symbol(name)
        self.order = self.session.global_races.start_launch(self.programmatic)
        self.memory.register("kernel parameters", self.params.ctypes.data, self.params.size, self.params, read_only=True)
        self.waiting = deque(self.session.in_order(self))
        program = self.program
        if side_by_side and (program.launches_dependents or program.ctas_communicate or self.predecessor is not None):
            while self.waiting and len(self.active) < self.session.max_resident:
                self.active.append(Cluster(self, *self.waiting.popleft()))

    @property
    def is_done(self) -> bool:
        """Every CTA has exited."""
        return not self.waiting and not self.active

    def turn(self, picks: int | None) -> None:
        """Let one cluster run until it is done or only spins; `picks`: or until so many of its warps had their turns.

        A cluster that spins on global memory needs the others: they take turns, at most as many as the device holds.

        Raises:
            Deadlock: no cluster makes progress.
        """
        active, limit = self.active, self.session.max_resident
        if self.waiting and (not active or (len(active) < limit and all(c.spinning for c in active))):
            active.appendleft(Cluster(self, *self.waiting.popleft()))
        elif all(c.exhausted() for c in active):
            places = "\n".join(c.where() for c in active)
            raise Deadlock(
                f"livelock in kernel {self.program.name[:80]}: no progress in {self.session.step_limit} warp instructions\n{places}"
            )
        cluster = active[0]
        self.turns += 1
        if cluster.run(picks):
            active.remove(cluster)
            for other in active:
                other.spinning = False
        else:
            active.rotate(-1)

    def lets_dependents_start(self) -> bool:
        """Every CTA has executed griddepcontrol.launch_dependents or has exited."""
        ctas = [cta for cluster in self.active for cta in cluster.ctas]
        return not self.waiting and all(cta.ctaid in self.launched or all(warp.exited for warp in cta.warps) for cta in ctas)

    def waits_for_predecessor(self) -> bool:
        """No CTA can go on before the launch before is complete."""
        if self.predecessor is None or self.predecessor.has_ended or not self.active:
            return False
        return all(cluster.is_blocked for cluster in self.active) and (not self.waiting or len(self.active) == self.session.max_resident)

    def end(self) -> None:
        """All CTAs have exited: whoever waits for that goes on."""
        self.release_params()
        self.has_ended, self.predecessor = True, None
        for warp, lanes in self.dependents:
            warp.wake(lanes)
        self.session.global_races.end_launch(self)

    def release_params(self) -> None:
        """The parameters' memory is no kernel's any more."""
        self.memory.forget(self.params.ctypes.data)


def three(value: object) -> tuple[int, int, int]:
    """A number or up to three of them as dimensions in x, y and z."""
    numbers = (value,) if isinstance(value, int) else tuple(value)  # type: ignore[call-overload]
    x, y, z = (*numbers, 1, 1, 1)[:3]
    return x, y, z
