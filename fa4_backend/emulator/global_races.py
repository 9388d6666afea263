"""Happens-before race detector for global memory: between warps, CTAs and launches.

Within a cluster the vector clocks of `races.py` order accesses. What a warp knows of *other* clusters it learnt at a strong access of
global memory: a release leaves the releasing warp's clock at the address, an acquire takes what lies there. The warp has an actor of its
own for that (ACQUIRED), with an epoch for each thing it learnt; barriers hand these epochs on like any other, so whoever is ordered after
the acquire knows what it brought, and a later release passes it all on.

PTX ISA 9.0, 8.8 to 8.10: a release is `.release`, `.acq_rel`, or a fence of gpu scope and a strong write after it by the same warp, and
covers what its warp knows of by then; an acquire mirrors it. Two strong accesses do not race. Accesses of scope `.cta` order nothing
between clusters.

Launches follow each other, unless one is launched with programmatic stream serialization and its predecessor has executed
`griddepcontrol.launch_dependents`: then nothing of the predecessor is known before `griddepcontrol.wait`. That waits for the predecessor
alone: what the predecessor did not wait for itself may still run (`gap`), also when the predecessor is complete. So a programmatic launch
none of whose threads waits is a finding, whatever it accesses.

Cells are 4 bytes; two accesses of less than a cell do not race. Shadow memory: `native/global_races.c`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fa4_backend.emulator import native_core as native
from fa4_backend.emulator.lanes import indices
from fa4_backend.emulator.race_actors import Layout
from fa4_backend.emulator.race_report import note_conflict
from fa4_backend.emulator.races import Access, Races

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cluster
    from fa4_backend.emulator.grid import Grid
    from fa4_backend.emulator.lowered_program import Program
    from fa4_backend.emulator.report import Report
    from fa4_backend.emulator.warp import Warp

SEM_ACQUIRE, SEM_RELEASE, SEM_STRONG, SEM_CTA, SEM_NON_COHERENT = 1, 2, 4, 8, 16  # ordering of a memory instruction
ALL_EARLIER = 0xFFFFFFFF  # as a cluster number: all clusters of earlier launches
Clocks = dict[int, np.ndarray]  # cluster number -> clock of that cluster's actors


class Learnt(NamedTuple):
    """From epoch `epoch` of `actor` on, `clock` of cluster `number` is known."""

    actor: int
    epoch: int
    number: int
    clock: np.ndarray


@dataclass(slots=True)
class LaunchOrder:
    """What happened before a launch, and what it did that later launches go by. Clusters are numbered in the order of their starts."""

    first: int  # number of its first cluster
    settled: int  # clusters with lower numbers happened before it,
    gap: tuple[int, int]  # but not those of this range, which the completion of the launch before says nothing of
    is_early: bool  # it may have started before the launch before was complete
    before: LaunchOrder | None  # of the launch before
    has_waited: bool = False  # some thread executed griddepcontrol.wait
    launched_dependents: bool = False
    waited_before: bool = False  # some CTA had waited when it launched its dependents

    def gap_behind(self) -> tuple[int, int]:
        """Clusters that the completion of this launch says nothing of."""
        if not self.is_early:
            return 0, 0
        if self.has_waited:
            return self.gap
        # It may end before those that it should have waited for.
        return self.gap[0] if self.gap[1] else self.settled, self.first


class Origin(NamedTuple):
    """A cluster, for reports."""

    program: Program
    ctas: list[str]
    layout: Layout


class GlobalRaces:
    """Global memory of a session: its shadow, and what strong accesses left at their addresses."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.core = native.core()
        self.handle = self.core.emu_global_new()
        self.conflicts = (native.Conflict * native.MAX_CONFLICTS)()
        self.edges: dict[Any, Clocks] = {}  # by address; by address and cluster for the scope of a CTA
        self.next_number = 1
        self.origins: dict[int, Origin] = {}  # by cluster number, since the shadow was last forgotten
        self.last = LaunchOrder(1, 1, (0, 0), False, None)  # of the launch that started last

    def close(self) -> None:
        if self.handle:
            self.core.emu_global_free(self.handle)
            self.handle = None

    # -- launches and clusters ----------------------------------------------------------------------------------

    def start_launch(self, programmatic: bool) -> LaunchOrder:
        """A launch begins: what is known to have happened before it."""
        last, number = self.last, self.next_number
        gap, settled = last.gap_behind(), last.settled
        is_early = programmatic and (last.launched_dependents or gap[1] > 0)
        if programmatic and last.launched_dependents:
            # A predecessor that waited before it launched its dependents vouches for all before it.
            if last.waited_before:
                settled = last.first
        elif is_early:
            settled = number
        else:
            self.core.emu_global_forget(self.handle)
            self.edges.clear()
            self.origins.clear()
            settled, gap = number, (0, 0)
        self.last = LaunchOrder(number, settled, gap, is_early, last if is_early else None)
        return self.last

    def end_launch(self, grid: Grid) -> None:
        """All of a launch has run."""
        if grid.programmatic and not grid.order.has_waited:
            text = f"no thread of kernel {grid.program.name[:80]}, launched programmatically, executed griddepcontrol.wait"
            self.report.note("dependency", f"{text}: kernels before it may run on after it has ended")

    def start_cluster(self, cluster: Cluster, layout: Layout) -> int:
        state, number, order = cluster.state, self.next_number, cluster.grid.order
        self.next_number += 1
        state.global_race, state.number = self.handle, number
        state.settled, state.first_of_launch = order.settled, order.first
        state.gap_begin, state.gap_end = order.gap
        self.origins[number] = Origin(cluster.grid.program, [cta.name for cta in cluster.ctas], layout)
        return number

    # -- accesses -----------------------------------------------------------------------------------------------

    def access(self, access: Access, addresses: np.ndarray, num_bytes: int, write: bool, strong: bool = False) -> None:
        """Runs of `num_bytes` bytes at some addresses."""
        if num_bytes and addresses.size:
            where = np.ascontiguousarray(addresses, np.uint64)
            access.native.strong = int(strong)
            self.core.emu_global_access(self.handle, where.ctypes.data, where.size, num_bytes, ctypes.addressof(access.native), int(write))
            access.native.strong = 0

    # -- order --------------------------------------------------------------------------------------------------

    def strong_access(self, warp: Warp, semantics: int) -> None:
        """The warp has just made a strong access of global memory."""
        state, races = warp.state, warp.races
        assert races
        mask, state.strong_mask = state.strong_mask, 0
        opcode = warp.program.kernel.instructions[state.pc_now].opcode
        reads, writes = not opcode.startswith(("st", "red")), not opcode.startswith("ld")
        by_address: dict[int, int] = {}
        for lane in indices(mask):
            by_address[state.strong_addresses[lane]] = by_address.get(state.strong_addresses[lane], 0) | 1 << lane
        for address, lanes in by_address.items():
            key = (address, races.number) if semantics & SEM_CTA else address
            if reads and key in self.edges:
                if semantics & SEM_ACQUIRE:
                    self.learn(warp, self.edges[key].items(), lanes)
                else:
                    warp.unacquired[key] = {number: clock.copy() for number, clock in self.edges[key].items()}
            if writes:
                released = warp.clocks.known(lanes) if semantics & SEM_RELEASE else warp.clocks.known_at_fence(lanes, in_cta=False)
                if released is not None:
                    merge(self.edges.setdefault(key, {}), known_by(races, released))
        if writes and semantics & SEM_RELEASE:
            races.new_epoch(warp)

    def fence(self, warp: Warp) -> None:
        """A fence turns the strong reads before it into acquires."""
        found, warp.unacquired = warp.unacquired, {}
        for clocks in found.values():
            self.learn(warp, clocks.items(), warp.exec)

    def proxy_fence(self, warp: Warp) -> None:
        """The fence lies on the path from other clusters' writes that the warp knows of to what it does next (8.9.6, "Proxy-preserved
        base causality order")."""
        fenced = []
        for number, clock in known_by_warp(warp):
            if number not in self.origins:
                continue  # of an earlier launch, which has ended
            origin, seen = self.origins[number], clock.copy()
            generic, (_, visible) = origin.layout.generic, origin.layout.visible
            seen[visible] = np.maximum(seen[visible], seen[generic])
            fenced.append((number, seen))
        self.learn(warp, fenced, warp.exec)

    def dependency(self, warp: Warp, waits: bool) -> None:
        """griddepcontrol"""
        order = warp.cta.grid.order
        if waits:
            if order.before is not None:  # which is complete: whether it waited itself is known
                order.gap = order.before.gap_behind()
                for cluster in warp.cta.grid.active:
                    cluster.state.gap_begin, cluster.state.gap_end = order.gap
            self.learn(warp, [(ALL_EARLIER, np.zeros(0, np.uint32))], warp.exec)
        else:
            assert warp.races
            order.launched_dependents = True
            order.waited_before |= any(number == ALL_EARLIER for number, _ in known_by_warp(warp))

    def learn(self, warp: Warp, clocks: Iterable[tuple[int, np.ndarray]], lanes: int) -> None:
        """These lanes know what the clocks say of other clusters."""
        races = warp.races
        assert races
        new = []
        known = {group.lanes: group.clock for group in warp.clocks.groups if group.lanes & lanes}
        for number, clock in clocks:
            if number == races.number:
                warp.clocks.learn(lanes, clock)
            elif not any(
                k.number == number and all(own[k.actor] >= k.epoch for own in known.values()) and (k.clock >= clock).all()
                for k in races.learnt
            ):
                new.append((number, clock))
        if new:
            actor = races.acquired_actor(warp)
            epoch = int(races.counters[actor])
            races.counters[actor] += 1
            warp.clocks.learn_actor(lanes, actor, epoch)
            races.learnt += [Learnt(actor, epoch, number, clock.copy()) for number, clock in new]
            races.publish_learnt()

    # -- reports ------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        if not self.core.emu_race_num_conflicts(self.handle):
            return
        count = self.core.emu_race_take(self.handle, ctypes.addressof(self.conflicts))
        for c in self.conflicts[:count]:
            later = self.who(c.new_cluster, c.new_actor, c.new_warp, c.new_pc)
            earlier = functools.partial(self.who, c.old_cluster, c.old_actor, c.old_warp, c.old_pc)
            note_conflict(self.report, "global memory", c.kind, later, earlier)

    def who(self, number: int, actor: int, warp: int, pc: int) -> str:
        program, ctas, layout = self.origins[number]
        per_cta = layout.num_warps // len(ctas)
        launch = "" if number >= self.last.first else f" of the earlier kernel {program.name[:80]}"
        return f"{layout.name(actor)} by {ctas[warp // per_cta]}{launch}, warp {warp % per_cta}, {program.describe(pc)}"


def known_by_warp(warp: Warp) -> list[tuple[int, np.ndarray]]:
    """What the running lanes of a warp know of other clusters."""
    races = warp.races
    assert races
    if not races.learnt:
        return []
    known = warp.clocks.known(warp.exec)
    return [(item.number, item.clock) for item in races.learnt if known[item.actor] >= item.epoch]


def known_by(races: Races, clock: np.ndarray) -> Clocks:
    """All that whoever has this clock knows."""
    known: Clocks = {races.number: clock.copy()}
    for item in races.learnt:
        if clock[item.actor] >= item.epoch:
            merge(known, {item.number: item.clock})
    return known


def merge(into: Clocks, other: Clocks) -> None:
    """Add what `other` knows."""
    for number, clock in other.items():
        into[number] = np.maximum(into[number], clock) if number in into else clock.copy()
