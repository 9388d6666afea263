"""One launch of one kernel: its configuration, its clusters and the order in which they start and take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.cta import Cluster
from fa4_backend.emulator.errors import Deadlock, LaunchError
from fa4_backend.emulator.lowering import RESERVED_SMEM, Program
from fa4_backend.emulator.parser import Variable
from fa4_backend.emulator.warp import Warp

if TYPE_CHECKING:
    from fa4_backend.emulator.session import Session

MAX_DYNAMIC_SMEM = 232448  # 227 KiB, CUDA programming guide, compute capabilities 9.0 and 10.x
REGISTERS_PER_SM = 65536
MAX_BLOCK, MAX_GRID = (1024, 1024, 64), (2**31 - 1, 65535, 65535)


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
        non_portable: bool = False,
        cubin: bytes = b"",
    ) -> None:
        self.cubin = cubin  # the machine code of the kernel, where it is known
        self.session, self.program, self.memory = session, program, session.memory
        self.grid, self.block, self.cluster = grid, block, cluster
        self.explicit_cluster = cluster != (1, 1, 1)
        self.num_sms, self.dynamic_smem = session.num_sms, dynamic_smem
        self.programmatic = programmatic  # may start before the launch before it is complete
        self.has_waited = False  # some thread executed griddepcontrol.wait
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

    def dependency(self, warp: Warp, action: str) -> None:
        """griddepcontrol: launches run one after the other, so there is nothing to wait for but what the race detector knows."""
        self.has_waited |= action == "wait"
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
        self.session.global_races.end_launch(self)


def three(value: object) -> tuple[int, int, int]:
    """A number or up to three of them as dimensions in x, y and z."""
    numbers = (value,) if isinstance(value, int) else tuple(value)  # type: ignore[call-overload]
    x, y, z = (*numbers, 1, 1, 1)[:3]
    return x, y, z
