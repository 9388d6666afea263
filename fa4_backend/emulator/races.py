"""Happens-before race detector for shared memory and TMEM.

Every source of accesses is an *actor* with a counter (epoch): a warp's own loads and stores, its tensor core queue, its TMEM loads and
TMEM stores, its wgmma, bulk-store and cp.async groups, and the copies that signal an mbarrier. A vector clock says up to which epoch of
every actor things are known to have happened before. Warps carry one; arrives and commits leave it in a barrier, waits take it from
there. An access that touches a cell whose last write (or, for a write, whose last reads) its clock does not cover is a race.

Proxies: what a warp writes with generic stores, the asynchronous proxy (TMA stores, MMA operands) sees only after
`fence.proxy.async`. A second actor stands for "writes of this warp that were fenced"; asynchronous accesses are checked against it.
Bytes written by cp.async need no fence once its completion is known: released kernels (page sizes below a tile) leave it out.
Epochs: a generic epoch ends when the warp releases or fences; an asynchronous one when its group or commit ends.

Cells are 4 bytes of shared memory, and 16 lanes x 1 column of TMEM. Lanes of one warp are actors of their own where they load, store,
arrive, wait and fence (`lanes.py`); what the warp does as a whole is its generic actor's. Global memory is covered by `global_races.py`,
with the clocks kept here.
Shadow memory: `native/shadow.c`, `native/races.c`. PTX ISA 9.0: 8 (memory consistency model), 9.7.16.6 (tcgen05 memory consistency).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fa4_backend.emulator import native_core as native
from fa4_backend.emulator.lanes import ALL_LANES, LaneClocks, indices
from fa4_backend.emulator.race_actors import (
    ACQUIRED,
    BULK,
    BULK_WRITE,
    CP_ASYNC,
    GENERIC,
    NAMES,
    PER_WARP,
    TENSOR,
    TMEM_LOAD,
    TMEM_STORE,
    WGMMA,
    Layout,
)
from fa4_backend.emulator.race_report import note_conflict

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cluster, Cta
    from fa4_backend.emulator.global_races import Learnt
    from fa4_backend.emulator.warp import Warp

READ, WRITE = 0, 1


class Access:
    """One operation that touches memory, with the clock it was issued under."""

    __slots__ = ("actor", "clock", "native", "races", "releases")

    def __init__(self, races: Races, clock: np.ndarray, actor: int, epoch: int, warp: Warp, through_async: bool, lanes: int = 0) -> None:
        self.races, self.clock, self.actor = races, clock, actor
        place = (warp.state.pc, warp.actor)
        self.native = native.Accessor(clock.ctypes.data, actor, epoch, *place, int(through_async), 0, 0, lanes, 0, 0, races.state)
        self.releases: np.ndarray | None = None


class Races:
    """Clocks of a cluster's warps and barriers."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.layout = Layout(cluster.num_warps, cluster.size)
        self.unfenced_barriers: list[Any] = []
        self.extra_actors: dict[object, int] = {}
        self.pipelines: dict[int, set[int]] = {}  # actors of the tensor core's pipelines, by warp
        self.counters = np.ones(self.layout.num_actors, np.uint32)  # epoch that the next operation of an asynchronous actor gets
        # Actor -> the actor that stands for its writes that the asynchronous proxy sees, in shared and in global memory.
        self.fenced, self.fenced_global = (np.arange(self.layout.num_actors, dtype=np.uint32) for _ in range(2))
        self.fenced[self.layout.generic], self.fenced_global[self.layout.generic] = self.layout.visible
        self.core = native.core()
        cells = -(-cluster.grid.smem_bytes // 4)
        self.handle = self.core.emu_race_new(self.fenced.ctypes.data, cluster.size, cells, 8 * 512)
        self.state = ctypes.addressof(cluster.state)
        cluster.state.race = self.handle
        cluster.state.fenced_global = self.fenced_global.ctypes.data
        cluster.state.first_start = self.layout.first_start
        self.in_global = cluster.grid.session.global_races
        self.number = self.in_global.start_cluster(cluster, self.layout)
        self.remote_signals: dict[tuple[int, int], tuple[int, int, int]] = {}  # (rank signalled, actor) -> epoch, warp, instruction
        self.learnt: list[Learnt] = []  # what warps of this cluster know of other clusters
        self.conflicts = (native.Conflict * native.MAX_CONFLICTS)()

    def close(self) -> None:
        if self.handle:
            self.collect()
            self.cluster.state.race = self.cluster.state.global_race = None
            self.core.emu_race_free(self.handle)
            self.handle = None

    def start_warp(self, warp: Warp) -> None:
        first, step = self.layout.lane(warp.actor), 32 * self.layout.num_warps
        pointers = np.ctypeslib.as_array(warp.state.lane_clocks)
        warp.clocks = LaneClocks(self.layout.num_actors, PER_WARP * warp.actor + GENERIC, first, (first + step, first + 2 * step), pointers)
        warp.state.actor, warp.state.epoch = first, warp.clocks.epoch
        warp.clocks.learn_actor(ALL_LANES, self.layout.first_start + warp.cta.rank, 1)

    # -- edges between warps ------------------------------------------------------------------------------------

    def release(self, warp: Warp, edge: Any, lanes: int, relaxed: bool = False) -> None:
        """What these lanes did happens before what acquires the edge; `relaxed`: only what they fenced."""
        if warp.tmem_loads:
            self.settle_loads(warp)
        clock = warp.clocks.known_at_fence(lanes, in_cta=True) if relaxed else warp.clocks.known(lanes)
        if clock is not None:
            self.join(edge, clock)
        self.new_epoch(warp)

    def new_epoch(self, warp: Warp) -> None:
        """What the warp does from here on is not covered by what it has released."""
        warp.clocks.advance()
        warp.state.epoch = warp.clocks.epoch

    def synchronise(self, warp: Warp, lanes: int) -> None:
        """bar.warp.sync, or a barrier of the CTA: lanes know what any of them did."""
        warp.clocks.synchronise(lanes)
        warp.state.epoch = warp.clocks.epoch

    def initialised(self, warp: Warp, barrier: Any, lane: int) -> None:
        barrier.init_by, barrier.init_epoch = self.layout.lane(warp.actor) + lane, warp.clocks.epoch
        barrier.init_known = set()
        self.unfenced_barriers.append(barrier)

    def barriers_fenced(self, warp: Warp) -> None:
        """fence.mbarrier_init: inits that the warp knows of are visible to asynchronous operations and to whoever acquires."""
        self.inits_fenced(warp)
        self.memory_fence(warp)

    def inits_fenced(self, warp: Warp) -> None:
        """Inits that the warp knows of are visible to asynchronous operations."""
        if not self.unfenced_barriers:
            return
        known, left = warp.clocks.known(warp.exec), []
        for barrier in self.unfenced_barriers:
            if known[barrier.init_by] >= barrier.init_epoch:
                barrier.fenced = True
            else:
                left.append(barrier)
        self.unfenced_barriers = left

    def set_barrier(self, barrier: Any, live: bool) -> None:
        """An mbarrier begins or ends: no other store may touch its bytes meanwhile."""
        self.core.emu_race_barrier(self.handle, barrier.cta.rank, barrier.offset, int(live))

    def check_init(self, warp: Warp, barrier: Any, asynchronous: bool) -> None:
        """The running lanes know of the barrier's init, and an asynchronous operation may use it."""
        if warp.actor not in barrier.init_known:
            if not warp.clocks.knows(warp.exec, barrier.init_by, barrier.init_epoch):
                self.cluster.grid.session.report.note("race", f"an mbarrier is used while its init may not be visible\n  by {warp.place()}")
                return
            if all(group.clock[barrier.init_by] >= barrier.init_epoch for group in warp.clocks.groups):
                barrier.init_known.add(warp.actor)
        if asynchronous and not barrier.fenced:
            text = f"an mbarrier is given to an asynchronous operation without a fence after its init\n  by {warp.place()}"
            self.cluster.grid.session.report.note("race", text)

    def release_cluster(self, warp: Warp, edge: Any, releases: bool) -> None:
        """barrier.cluster.arrive; `.relaxed` releases only what an earlier fence did."""
        self.release(warp, edge, warp.exec, relaxed=not releases)

    def peers_started(self, warp: Warp) -> None:
        """The running lanes met all CTAs of the cluster, whatever that ordered."""
        for rank in range(self.cluster.size):
            warp.clocks.learn_actor(warp.exec, self.layout.first_start + rank, 1)

    def join(self, edge: Any, clock: np.ndarray) -> None:
        if edge.clock is None:
            edge.clock = clock.copy()
        else:
            np.maximum(edge.clock, clock, out=edge.clock)

    def snapshot(self, edge: Any) -> np.ndarray:
        return edge.clock.copy()

    def acquire(self, warp: Warp, edge: Any, lanes: int, relaxed: bool = False) -> None:
        """These lanes waited for the edge; `relaxed`: a fence of theirs must follow before they know what it brings."""
        if edge.done_clock is None:
            return
        if relaxed:
            warp.seen_relaxed.append((lanes, edge.done_clock))
        else:
            warp.clocks.learn(lanes, edge.done_clock)

    def proxy_fence(self, warp: Warp, shared: bool = True, in_global: bool = True) -> None:
        """fence.proxy.async: every generic write that the warp knows of is visible to the asynchronous proxy."""
        self.inits_fenced(warp)
        if in_global:
            self.in_global.proxy_fence(warp)
        which = [kind for kind, wanted in enumerate((shared, in_global)) if wanted]
        warp.clocks.fence_proxy(warp.exec, self.layout.generic, self.layout.visible, which)
        warp.state.epoch = warp.clocks.epoch

    def memory_fence(self, warp: Warp, of_cta: bool = False) -> None:
        """fence.acq_rel, fence.mbarrier_init and the like: a later relaxed arrive releases what came before them, and relaxed waits before
        them are acquires."""
        if warp.unacquired and not of_cta:
            self.in_global.fence(warp)
        left = []
        for lanes, clock in warp.seen_relaxed:
            if lanes & warp.exec:
                warp.clocks.learn(lanes & warp.exec, clock)
            if lanes & ~warp.exec:
                left.append((lanes & ~warp.exec, clock))
        warp.seen_relaxed = left
        warp.clocks.fence_memory(warp.exec, of_cta)
        warp.state.epoch = warp.clocks.epoch

    def acquired_actor(self, warp: Warp) -> int:
        return PER_WARP * warp.actor + ACQUIRED

    def publish_learnt(self) -> None:
        """Show the native detector what is known of other clusters."""
        self.known = (native.Knowledge * len(self.learnt))(
            *(native.Knowledge(k.actor, k.epoch, k.number, 0, k.clock.ctypes.data) for k in self.learnt)
        )
        self.cluster.state.knowledge, self.cluster.state.num_knowledge = ctypes.addressof(self.known), len(self.learnt)

    # -- asynchronous operations --------------------------------------------------------------------------------

    def synchronous(self, warp: Warp) -> Access:
        """An access that the warp makes as a whole (`.sync.aligned`)."""
        return Access(self, warp.clocks.known(warp.exec), PER_WARP * warp.actor + GENERIC, warp.clocks.epoch, warp, False)

    def by_lanes(self, warp: Warp, lanes: int) -> Access:
        """An access that some lanes make together: another lane's later arrival does not cover it."""
        return Access(self, warp.clocks.known(lanes), self.layout.lane(warp.actor), warp.clocks.epoch, warp, False, lanes)

    def issue(self, warp: Warp, kind: int, through_async: bool, in_order: bool = False) -> Access:
        """An operation of one of the warp's asynchronous actors; `in_order`: it follows the earlier ones of that actor."""
        actor = PER_WARP * warp.actor + kind
        clock = warp.clocks.known(warp.exec)
        epoch = int(self.counters[actor])
        if in_order:
            clock[actor] = epoch
        return Access(self, clock, actor, epoch, warp, through_async)

    def issue_mma(self, warp: Warp, pipeline: object = None) -> Access:
        """An operation of the warp's tensor core. `pipeline`: what it is in order with; None: with every other."""
        if pipeline is None:
            return self.issue(warp, TENSOR, True, in_order=True)
        actor = self.extra_actor((warp.actor, pipeline))
        self.pipelines.setdefault(warp.actor, set()).add(actor)
        clock, epoch = warp.clocks.known(warp.exec), int(self.counters[actor])
        clock[actor] = epoch
        return Access(self, clock, actor, epoch, warp, True)

    def issue_commit(self, warp: Warp) -> Access:
        access = self.issue(warp, TENSOR, True, in_order=True)
        for actor in (access.actor, *self.pipelines.get(warp.actor, ())):
            access.clock[actor] = self.counters[actor]
            self.counters[actor] += 1
        access.releases = access.clock
        self.new_epoch(warp)
        return access

    def tmem_load(self, warp: Warp, readers: np.ndarray) -> Access:
        """A tcgen05.ld is over when `tcgen05.wait::ld` says so, or when one of its results has been used: the instructions `readers`.

        The ISA asks for the wait; compilers leave it out and rely on the hardware's scoreboard, which the second rule follows.
        """
        access = self.issue(warp, TMEM_LOAD, False, in_order=True)
        self.counters[access.actor] += 1
        warp.tmem_loads.append((access.native.epoch, readers, int(warp.executed(readers).sum())))
        return access

    def settle_loads(self, warp: Warp) -> None:
        """Before the warp releases or stores: which of its TMEM loads are over?"""
        loads = warp.tmem_loads
        for i in range(len(loads) - 1, -1, -1):
            epoch, readers, before = loads[i]
            if int(warp.executed(readers).sum()) != before:
                self.acquire_groups(warp, TMEM_LOAD, epoch)
                del loads[: i + 1]
                return

    def tmem_store(self, warp: Warp) -> Access:
        self.settle_loads(warp)
        return self.issue(warp, TMEM_STORE, False, in_order=True)

    def tmem_wait(self, warp: Warp, is_load: bool) -> None:
        actor = PER_WARP * warp.actor + (TMEM_LOAD if is_load else TMEM_STORE)
        self.acquire_groups(warp, actor % PER_WARP, int(self.counters[actor]))
        self.counters[actor] += 1
        if is_load:
            warp.tmem_loads.clear()

    def issue_wgmma(self, warp: Warp) -> Access:
        return self.issue(warp, WGMMA, True, in_order=True)

    def commit_wgmma(self, warp: Warp) -> None:
        self.counters[PER_WARP * warp.actor + WGMMA] += 1

    def wait_wgmma(self, warp: Warp, allowed: int) -> None:
        self.acquire_groups(warp, WGMMA, int(self.counters[PER_WARP * warp.actor + WGMMA]) - 1 - allowed)

    def acquire_groups(self, warp: Warp, kind: int, epoch: int) -> None:
        warp.clocks.learn_actor(warp.exec, PER_WARP * warp.actor + kind, epoch)

    def issue_bulk_read(self, warp: Warp) -> Access:
        return self.issue(warp, BULK, True, in_order=True)

    def commit_bulk(self, warp: Warp) -> int:
        actor = PER_WARP * warp.actor + BULK
        self.counters[actor] += 1
        return int(self.counters[actor]) - 1

    def acquire_bulk(self, warp: Warp, epoch: int, only_read: bool) -> None:
        """Bulk stores have read their sources, and unless `only_read` written what they write."""
        self.acquire_groups(warp, BULK, epoch)
        if not only_read:
            self.acquire_groups(warp, BULK_WRITE, epoch)

    def issue_bulk_write(self, warp: Warp) -> Access:
        """The writing half of what `issue_bulk_read` reads. What one group writes is in order: kernels store a tile from all lanes."""
        access = self.issue(warp, BULK_WRITE, True)
        access.native.epoch = access.clock[access.actor] = int(self.counters[PER_WARP * warp.actor + BULK])
        return access

    def issue_cp_async(self, warp: Warp) -> Access:
        return self.issue(warp, CP_ASYNC, False, in_order=True)

    def commit_cp_async(self, warp: Warp) -> None:
        self.counters[PER_WARP * warp.actor + CP_ASYNC] += 1

    def wait_cp_async(self, warp: Warp, allowed: int, everything: bool) -> None:
        if everything:
            self.counters[PER_WARP * warp.actor + CP_ASYNC] += 1
        self.acquire_groups(warp, CP_ASYNC, int(self.counters[PER_WARP * warp.actor + CP_ASYNC]) - 1 - allowed)

    def issue_cp_async_arrive(self, warp: Warp) -> Access:
        access = self.issue(warp, CP_ASYNC, False, in_order=True)
        self.counters[access.actor] += 1
        access.releases = access.clock
        self.new_epoch(warp)
        return access

    def issue_copy(self, warp: Warp, barrier: Any) -> Access:
        """A copy that signals an mbarrier: its actor is the barrier, its epoch the phase that it takes part in."""
        actor = self.extra_actor((barrier.cta.rank, barrier.offset))
        clock = warp.clocks.known(warp.exec)
        access = Access(self, clock, actor, barrier.phase + 1, warp, True)
        access.releases = clock.copy()
        access.releases[actor] = barrier.phase + 1
        self.new_epoch(warp)
        return access

    def extra_actor(self, key: object) -> int:
        """The actor of a barrier's copies, or of a pipeline of the tensor core; its number is fixed when it first acts."""
        if key not in self.extra_actors:
            self.extra_actors[key] = self.layout.extra(len(self.extra_actors))
        return self.extra_actors[key]

    def complete(self, access: Access, barrier: Any) -> None:
        """The operation arrives on a barrier: who waits for it knows what the operation knew, and the operation itself."""
        assert access.releases is not None
        self.join(barrier, access.releases)
        self.asynchronous_access(access, barrier.cta)

    def asynchronous_access(self, access: Access, cta: Cta) -> None:
        """An asynchronous operation uses memory of a CTA, perhaps of another than issued it."""
        if cta.rank != access.native.warp // self.cluster.ctas[0].num_warps:
            self.remote_signals[cta.rank, access.actor] = (access.native.epoch, access.native.warp, access.native.pc)

    def remote_access(self, warp: Warp, cta: Cta) -> None:
        """The running lanes arrive at a barrier of another CTA."""
        state = warp.state
        for lane in indices(warp.exec):
            state.remote_epoch[cta.rank][lane] = warp.clocks.epoch
        state.remote_pc[cta.rank] = state.pc

    def check_exits(self) -> None:
        """A CTA whose memory others use must have started, and may not have exited: it must know of every such access (PTX ISA 9.7.9.23
        mapa)."""
        if self.cluster.size == 1:
            return
        for cta in self.cluster.ctas:
            known = np.maximum.reduce([warp.clocks.known(ALL_LANES) for warp in cta.warps])
            late = []
            for warp in self.cluster.warps():
                first = self.layout.lane(warp.actor)
                if (known[first : first + 32] < np.ctypeslib.as_array(warp.state.remote_epoch[cta.rank])).any():
                    late.append(self.who(first, warp.actor, warp.state.remote_pc[cta.rank]))
                if warp.state.early_pc[cta.rank]:
                    text = self.who(first, warp.actor, warp.state.early_pc[cta.rank] - 1)
                    self.cluster.grid.session.report.note("exit", f"a CTA may not have started when its shared memory is used\n  by {text}")
            for (rank, actor), (epoch, number, pc) in self.remote_signals.items():
                if rank == cta.rank and known[actor] < epoch:
                    late.append(self.who(actor, number, pc))
            for text in late:
                self.cluster.grid.session.report.note("exit", f"a CTA may have exited when its shared memory is used\n  by {text}")

    # -- accesses -----------------------------------------------------------------------------------------------

    def smem_chunks(self, access: Access, cta: Cta, chunks: np.ndarray, write: bool) -> None:
        """Chunks of 16 bytes."""
        self.asynchronous_access(access, cta)
        cells = np.ascontiguousarray(chunks, np.int64)
        self.core.emu_race_access(
            self.handle, 0, cta.rank, cells.ctypes.data, cells.size, 4, 4, ctypes.addressof(access.native), int(write)
        )

    def smem_cells(self, access: Access, cta: Cta, cells: np.ndarray, write: bool) -> None:
        cells = np.ascontiguousarray(cells, np.int64)
        self.core.emu_race_access(
            self.handle, 0, cta.rank, cells.ctypes.data, cells.size, 1, 1, ctypes.addressof(access.native), int(write)
        )

    def shared_write(self, warp: Warp, cta: Cta, offset: int, num_bytes: int, lane: int | None) -> None:
        """A store by one lane, or by the warp as a whole."""
        access = self.synchronous(warp) if lane is None else self.by_lanes(warp, 1 << lane)
        self.smem_cells(access, cta, np.arange(offset // 4, -(-(offset + num_bytes) // 4)), write=True)

    def tmem_access(
        self, access: Access, cta: Cta, groups: Sequence[int], column: int, columns: int, write: bool, read: bool = False
    ) -> None:
        """Columns of some groups of 16 lanes; `read`: the operation reads before it writes."""
        where = (self.handle, cta.rank, groups[0], len(groups), column, columns, ctypes.addressof(access.native))
        if read or not write:
            self.core.emu_race_tmem(*where, READ)
        if write:
            self.core.emu_race_tmem(*where, WRITE)

    # -- reports ------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Turn conflicts found since the last call into findings."""
        self.in_global.collect()
        if not self.core.emu_race_num_conflicts(self.handle):
            return
        count = self.core.emu_race_take(self.handle, ctypes.addressof(self.conflicts))
        for conflict in self.conflicts[:count]:
            later = self.who(conflict.new_actor, conflict.new_warp, conflict.new_pc)
            earlier = functools.partial(self.who, conflict.old_actor, conflict.old_warp, conflict.old_pc)
            note_conflict(self.cluster.grid.session.report, "memory", conflict.kind, later, earlier)

    def who(self, actor: int, warp: int, pc: int) -> str:
        per_cta = self.cluster.ctas[0].num_warps
        program = self.cluster.grid.program
        kind = NAMES[TENSOR] if any(actor in some for some in self.pipelines.values()) else self.layout.name(actor)
        rank = f" of CTA rank {warp // per_cta}" if self.cluster.size > 1 else ""
        return f"{kind} by warp {warp % per_cta}{rank}, {program.describe(pc)}"
