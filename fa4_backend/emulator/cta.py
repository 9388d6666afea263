"""CTAs and clusters: who runs when.

Warps of a cluster take turns. In the deterministic schedule a warp runs until it must wait and asynchronous operations finish at once;
with a seed, a random ready warp runs for a random while and asynchronous operations (TMA, MMA, commits) finish at random legal times.
A warp that waits is woken by what it waits for. When nothing can run, suspended `try_wait`s give up; when that changes nothing
either, the cluster is deadlocked.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fa4_backend.emulator import native_core as native
from fa4_backend.emulator.barrier_state import NUM_NAMED_BARRIERS, MBarrier, NamedBarrier
from fa4_backend.emulator.errors import Deadlock, MemoryFault
from fa4_backend.emulator.warp import Warp

if TYPE_CHECKING:
    from fa4_backend.emulator.grid import Grid
    from fa4_backend.emulator.races import Races

POISON = 0xFF  # shared memory, TMEM and registers start as NaN
TMEM_LANES, TMEM_COLUMNS = 128, 512
SPIN_LIMIT = 300_000  # warp instructions without progress before other clusters get a turn
NAP_SHARE, NAPS = 0.25, (1, 3, 8)  # of the strong accesses behind which a warp stops, with a seed, and for how many turns of its grid


class Cta:
    """One thread block: its shared memory, TMEM, barriers, register pool and warps."""

    def __init__(self, cluster: Cluster, ctaid: tuple[int, int, int], rank: int, sm: int) -> None:
        self.cluster, self.grid, self.ctaid, self.rank, self.sm = cluster, cluster.grid, ctaid, rank, sm
        bx, by, bz = self.grid.block
        self.num_threads = bx * by * bz
        self.num_warps = -(-self.num_threads // 32)
        self.smem = np.full(self.grid.smem_bytes, POISON, np.uint8)
        self.smem16 = self.smem[: self.smem.size // 16 * 16].reshape(-1, 16)
        self.tmem: np.ndarray | None = None
        self.tmem_owner = [0] * TMEM_COLUMNS  # allocation number of each column, 0: free
        self.tmem_allocations: dict[int, int] = {}  # first column -> columns
        self.tmem_permit = True
        self.tmem_waiters: list[tuple[Warp, int]] = []
        self.pair_calls: list[tuple[str, int]] = []  # what the CTA did with tensor memory of a pair, which its peer must do, too
        self.mbarriers: dict[int, MBarrier] = {}
        self.barriers = [NamedBarrier(self, i) for i in range(NUM_NAMED_BARRIERS)]
        self.free_registers = self.grid.register_pool - self.grid.registers_per_thread * 32 * self.num_warps
        self.register_waiters: list[tuple[Warp, int]] = []
        self.register_moves: dict[int, list[int]] = {}  # registers that each setmaxnreg of a warpgroup asks for, in order
        self.warps: list[Warp] = []

    @property
    def name(self) -> str:
        return "CTA (" + ",".join(map(str, self.ctaid)) + ")"

    def tmem_cells(self) -> np.ndarray:
        """(128, 512) uint32: lanes and columns."""
        if self.tmem is None:
            self.tmem = np.full((TMEM_LANES, TMEM_COLUMNS), 0xFFFFFFFF, np.uint32)
        return self.tmem

    def write_smem(self, offset: int, data: bytes, warp: Warp, lane: int | None = None) -> None:
        """A store by one lane of a warp, or by the warp as a whole."""
        if offset + len(data) > self.smem.size:
            raise MemoryFault(f"{len(data)} bytes at shared offset {offset:#x}: the CTA has {self.smem.size} bytes")
        self.smem[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        if warp.races:
            warp.races.shared_write(warp, self, offset, len(data), lane)

    def at_exit(self, warp: Warp) -> None:
        """Bulk stores must have read shared memory before the CTA gives it back."""
        if warp.open_bulk_group is not None:
            what = "bulk stores that were never committed"
        else:
            what = f"{len(warp.bulk_groups)} bulk groups not waited for"
        self.grid.session.report.note("race", f"warp {warp.index} exits with {what}: they may still read shared memory")


class Cluster:
    """CTAs that run together; one without `.cluster` launch attributes holds a single CTA."""

    def __init__(self, grid: Grid, index: int, first: tuple[int, int, int]) -> None:
        self.grid, self.index = grid, index
        self.size = grid.cluster[0] * grid.cluster[1] * grid.cluster[2]
        self.rng: random.Random | None = grid.session.rng_for(grid.number, index)
        # How soon asynchronous operations finish: 0 is when nothing else can happen. It differs from seed to seed.
        self.haste = self.rng.choice((0.0, 0.1, 0.5)) if self.rng else 1.0
        self.progress = 0  # events that can let another warp go on
        self.pending: dict[Any, deque[Callable[[], None]]] = {}
        self.ready: deque[Warp] = deque()
        self.asleep: list[tuple[int, Warp]] = []  # until that turn of the grid
        self.barrier_generation = self.barrier_arrived = 0
        self.barrier_waiters: list[tuple[Warp, int]] = []
        self.state = native.ClusterState()
        self.state.smem_bytes, self.state.size = grid.smem_bytes, self.size
        self.state.regions = ctypes.addressof(grid.memory.table)
        self.state.num_regions = len(grid.memory.table)
        self.regions = grid.memory.table  # kept: a later launch makes another table
        cx, cy, _cz = grid.cluster
        self.ctas = []
        for rank in range(self.size):
            offset = (rank % cx, rank // cx % cy, rank // (cx * cy))
            ctaid = tuple(f + o for f, o in zip(first, offset, strict=True))
            cta = Cta(self, ctaid, rank, (index * self.size + rank) % grid.num_sms)  # type: ignore[arg-type]
            self.ctas.append(cta)
            self.state.smem[rank] = cta.smem.ctypes.data
        self.num_warps = self.size * self.ctas[0].num_warps
        self.races: Races | None = grid.session.new_races(self)
        self.barrier_edge = NamedBarrier(self.ctas[0], 0)
        for cta in self.ctas:
            for w in range(cta.num_warps):
                warp = Warp(cta, w, grid.take_registers())
                cta.warps.append(warp)
                self.ready.append(warp)
        self.live = self.num_warps
        self.steps_at_progress = self.steps = 0  # warp instructions: at the last event that could let another warp go on, and now
        self.spinning = False
        self.is_blocked = False  # until the launch before is complete
        self.last_stall: tuple[int, int] | None = None
        self.stall_rounds = 0

    def cta_at(self, address: int) -> Cta:
        rank = address >> 24
        if rank >= self.size:
            raise MemoryFault(f"shared::cluster address {address:#x} names CTA rank {rank}; the cluster has {self.size}")
        return self.ctas[rank]

    def warps(self) -> Iterator[Warp]:
        for cta in self.ctas:
            yield from cta.warps

    # -- asynchronous operations --------------------------------------------------------------------------------

    def submit(self, queue: object, operation: Callable[[], None]) -> None:
        """Hand over an asynchronous operation. Operations of one queue finish in order; without a seed, at once."""
        if self.rng is None:
            operation()
        else:
            self.pending.setdefault(queue, deque()).append(operation)

    def submit_behind(self, queues: list[Any], operation: Callable[[], None]) -> None:
        """Hand over an operation that comes when all that some queues hold now is complete."""
        if len(queues) == 1:
            self.submit(queues[0], operation)
            return
        left = len(queues)

        def reached() -> None:
            nonlocal left
            left -= 1
            if not left:
                operation()

        for queue in queues:
            self.submit(queue, reached)

    def complete_one(self) -> None:
        assert self.rng is not None
        key = self.rng.choice(list(self.pending))
        queue = self.pending[key]
        operation = queue.popleft()
        if not queue:
            del self.pending[key]
        operation()

    def drain(self) -> None:
        while self.pending:
            self.complete_one()

    def gives_up(self) -> bool:
        """With a seed: whether a suspended wait returns before its phase completes."""
        return self.rng is not None and self.rng.random() < 0.2

    # -- cluster barrier ----------------------------------------------------------------------------------------

    def barrier_arrive(self, warp: Warp, releases: bool) -> None:
        self.barrier_arrived += 1
        self.progress += 1
        if warp.races:
            warp.races.release_cluster(warp, self.barrier_edge, releases)
        self.check_barrier()

    def check_barrier(self) -> None:
        if self.barrier_arrived and self.barrier_arrived >= self.live:
            self.barrier_arrived = 0
            self.barrier_generation += 1
            if self.barrier_edge.clock is not None and self.races:
                self.barrier_edge.done_clock = self.races.snapshot(self.barrier_edge)
            waiters, self.barrier_waiters = self.barrier_waiters, []
            for other, lanes in waiters:
                other.wake(lanes)

    def warp_done(self, warp: Warp) -> None:
        self.live -= 1
        self.progress += 1
        self.check_barrier()

    # -- schedule -----------------------------------------------------------------------------------------------

    def run(self, picks: int | None = None) -> bool:
        """Run warps until all have exited (True), or until they only spin, perhaps on another cluster (False).

        With a seed, a warp may stop for some turns behind a strong access of global memory: what other CTAs do next to it is what matters.

        `picks`: or until so many warps had their turns (False); only beside other launches. False, too, when all wait for the one before.
        """
        rng = self.rng
        self.spinning = self.is_blocked = False
        started = self.steps
        self.wake_sleepers()
        while self.live:
            if not self.ready:
                if self.asleep and not self.pending:
                    return False
                if self.stalled():
                    return False
                continue
            if picks is not None:
                if not picks:
                    return False
                picks -= 1
            if rng is None:
                warp = self.ready.popleft()
                quantum = 100_000
            else:
                if self.pending and rng.random() < self.haste:
                    self.complete_one()
                index = rng.randrange(len(self.ready))
                warp = self.ready[index]
                del self.ready[index]
                quantum = rng.choice((1, 8, 64, 512, 4096))
            steps, progress = warp.state.steps, self.progress
            warp.run(quantum)
            if self.races:
                self.races.collect()
            if warp.ready:
                if warp.was_strong and picks is not None and rng is not None and rng.random() < NAP_SHARE:
                    self.asleep.append((self.grid.turns + rng.choice(NAPS), warp))
                else:
                    self.ready.append(warp)
            self.steps += warp.state.steps - steps
            if self.progress != progress:
                self.steps_at_progress = self.steps
            elif self.steps - max(started, self.steps_at_progress) > SPIN_LIMIT:
                self.spinning = True
                return False
        self.finish()
        return True

    def wake_sleepers(self) -> None:
        """Warps whose time has come go on."""
        self.ready.extend(warp for until, warp in self.asleep if until <= self.grid.turns)
        self.asleep = [(until, warp) for until, warp in self.asleep if until > self.grid.turns]

    def exhausted(self) -> bool:
        return not self.asleep and self.steps - self.steps_at_progress > self.grid.session.step_limit

    def stalled(self) -> bool:
        """Nothing is ready: let an asynchronous operation finish, then let suspended waits give up, else report.

        True: nothing can go on before the launch before is complete.
        """
        if self.pending:
            self.complete_one()
            return False
        candidates = [w for w in self.warps() if any(soft for _, soft in w.waiting_for.values())]
        state = (self.progress, sum(w.state.steps for w in self.warps() if w not in candidates))
        if not candidates or (self.last_stall == state and self.stall_rounds > 4):
            before = self.grid.predecessor
            if before is not None and any(warp.cta.cluster is self for warp, _ in before.dependents):
                self.is_blocked = True
                return True
            raise Deadlock(f"deadlock in kernel {self.grid.program.name[:80]}: no warp can go on\n{self.where()}")
        self.stall_rounds = self.stall_rounds + 1 if self.last_stall == state else 1
        self.last_stall = state
        for warp in candidates:
            for lanes, (_, soft) in list(warp.waiting_for.items()):
                if soft:
                    warp.timed_out = True
                    warp.wake(lanes)
        return False

    def where(self) -> str:
        lines = []
        for warp in self.warps():
            if warp.exited:
                continue
            if warp.waiting_for:
                for what, _ in warp.waiting_for.values():
                    pc = warp.state.lane_pc[0] if not warp.state.active else warp.state.pc
                    lines.append(f"  {warp.cta.name} warp {warp.index} waits for {what}\n    at {warp.program.describe(pc)}")
            else:
                lines.append(f"  {warp.cta.name} warp {warp.index} is running at {warp.program.describe(warp.state.pc)}")
        exited = sum(w.exited for w in self.warps())
        return "\n".join([*lines, f"  {exited} of {self.num_warps} warps have exited"])

    def finish(self) -> None:
        self.drain()
        for cta in self.ctas:
            self.check_warpgroups(cta)
            if cta.rank % 2 and cta.pair_calls != (other := self.ctas[cta.rank - 1]).pair_calls:
                text = f"of a pair, {other.name} did {other.pair_calls} with tensor memory and {cta.name} {cta.pair_calls}"
                self.grid.session.report.note("tmem-pair", f"{text} in kernel {self.grid.program.name[:80]}")
            if cta.tmem_allocations:
                columns = sum(cta.tmem_allocations.values())
                self.grid.session.report.note(
                    "tmem-leak", f"{columns} TMEM columns are not deallocated in kernel {self.grid.program.name[:80]}"
                )
            for barrier in cta.barriers:
                if barrier.arrived:
                    text = f"barrier {barrier.index} ends with {barrier.arrived} of {barrier.expected} threads arrived"
                    self.grid.session.report.note("barrier-leak", f"{text} in kernel {self.grid.program.name[:80]}")
        if self.races:
            self.races.check_exits()
            self.races.close()
        for warp in self.warps():
            self.grid.session.report.add_counts(warp.program, warp.cta.num_warps, warp.index, warp.counts)
            self.grid.give_registers(warp.r)

    def check_warpgroups(self, cta: Cta) -> None:
        """Every warp of a warpgroup has executed what another did of setmaxnreg (PTX ISA 9.7.18.5)."""
        for warp in cta.warps:
            moves = cta.register_moves.get(warp.index // 4, [])
            if warp.num_register_moves < len(moves):
                text = f"setmaxnreg {moves[warp.num_register_moves]}, which another warp of its warpgroup did, in kernel"
                self.grid.session.report.note("registers", f"warp {warp.index} did not execute {text} {self.grid.program.name[:80]}")
