"""What the lanes of a warp know of each other and of the rest, for the race detector.

A warp's lanes are actors of their own: what lane 3 stored is ordered before what lane 0 does only by `bar.warp.sync`, or by a barrier in
which both took part (PTX ISA 9.0, 9.7.13.1 and 9.7.13.2; shuffles, votes and `elect` order no memory). Mostly all lanes know the same,
so clocks are kept by groups of lanes: one group until some of the lanes learn something alone, a wait or a fence under `elect`, and one
again when the warp synchronises.

What a lane knows is its group's clock and its own accesses, all of which it made at the warp's current epoch or before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

ALL_LANES = 0xFFFFFFFF


@dataclass(slots=True)
class Group:
    """Lanes that know the same."""

    lanes: int  # bit mask
    clock: np.ndarray


@dataclass(frozen=True, slots=True)
class Fence:
    """What some lanes knew at a fence, each besides its own accesses up to `epoch`."""

    lanes: int
    clock: np.ndarray
    epoch: int
    own_fenced: np.ndarray
    of_cta: bool  # its scope is the CTA: nothing outside of it is ordered


def indices(lanes: int) -> list[int]:
    """Lanes of a mask."""
    return [lane for lane in range(32) if lanes >> lane & 1]


class LaneClocks:
    """Clocks of one warp's lanes.

    Actors: `generic` stands for what the warp does as a whole, which every lane knows; lane l's accesses are those of `first + l`, and the
    parts of them that the asynchronous proxy sees are `visible[0] + l` in shared and `visible[1] + l` in global memory.
    """

    def __init__(self, num_actors: int, generic: int, first: int, visible: tuple[int, int], pointers: np.ndarray) -> None:
        self.generic, self.first, self.visible = generic, first, visible
        self.pointers = pointers  # (32,) uint64, read by the native core: the clock of each lane's group
        self.epoch = 1
        self.own_fenced = np.zeros((2, 32), np.uint32)  # epoch up to which each lane fenced its own accesses, in shared and global memory
        self.fences: list[Fence] = []
        clock = np.zeros(num_actors, np.uint32)
        clock[generic] = 1
        self.groups = [Group(ALL_LANES, clock)]
        self.publish()

    def publish(self) -> None:
        """Tell the native core which clock is whose."""
        for group in self.groups:
            address = group.clock.ctypes.data
            if group.lanes == ALL_LANES:
                self.pointers[:] = address
            else:
                self.pointers[indices(group.lanes)] = address

    # -- knowledge ----------------------------------------------------------------------------------------------

    def known(self, lanes: int) -> np.ndarray:
        """All that some lanes know together, their own accesses included."""
        return self.together(((group.lanes & lanes, group.clock) for group in self.groups), self.epoch, self.own_fenced)

    def known_at_fence(self, lanes: int, in_cta: bool) -> np.ndarray | None:
        """What these lanes knew together at their last fences, those of a CTA's scope only with `in_cta`; None without any."""
        found = [
            self.together([(fence.lanes & lanes, fence.clock)], fence.epoch, fence.own_fenced)
            for fence in self.fences
            if fence.lanes & lanes and (in_cta or not fence.of_cta)
        ]
        return np.maximum.reduce(found) if found else None

    def together(self, parts: Iterator[tuple[int, np.ndarray]] | list[tuple[int, np.ndarray]], epoch: int, own: np.ndarray) -> np.ndarray:
        """The clocks of some lanes with the accesses of each."""
        result: np.ndarray | None = None
        mask = 0
        for lanes, clock in parts:
            if lanes:
                mask |= lanes
                result = clock.copy() if result is None else np.maximum(result, clock, out=result)
        assert result is not None, "no lane"
        which: slice | list[int] = slice(0, 32) if mask == ALL_LANES else indices(mask)
        for start, value in ((self.first, epoch), (self.visible[0], own[0, which]), (self.visible[1], own[1, which])):
            part = result[start : start + 32]
            part[which] = np.maximum(part[which], value)
        return result

    def knows(self, lanes: int, actor: int, epoch: int) -> bool:
        """Every one of the lanes knows what the actor did up to the epoch."""
        unsure = 0
        for group in self.groups:
            if group.lanes & lanes and group.clock[actor] < epoch:
                unsure |= group.lanes & lanes
        return not unsure or (actor - self.first in range(32) and unsure == 1 << (actor - self.first))

    def of(self, lanes: int) -> list[np.ndarray]:
        """The clocks of some lanes, to be changed in place: lanes of a group that are not among them keep theirs."""
        clocks, split = [], False
        for group in list(self.groups):
            inside = group.lanes & lanes
            if not inside:
                continue
            if inside != group.lanes:
                split = True
                group.lanes &= ~inside
                group = Group(inside, group.clock.copy())
                self.groups.append(group)
            clocks.append(group.clock)
        if split:
            self.publish()
        return clocks

    def learn(self, lanes: int, clock: np.ndarray) -> None:
        """These lanes know what the clock says."""
        for own in self.of(lanes):
            np.maximum(own, clock, out=own)

    def learn_actor(self, lanes: int, actor: int, epoch: int) -> None:
        """These lanes know what one actor did up to the epoch."""
        for own in self.of(lanes):
            own[actor] = max(int(own[actor]), epoch)

    # -- events -------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """What lanes do from here on is not covered by what was released or fenced."""
        self.epoch += 1
        for group in self.groups:
            group.clock[self.generic] = self.epoch

    def synchronise(self, lanes: int) -> None:
        """Some lanes met: each knows what any of them knows."""
        clock = self.known(lanes)
        rest = [Group(group.lanes & ~lanes, group.clock) for group in self.groups if group.lanes & ~lanes]
        met = lanes if rest else ALL_LANES  # lanes that exited, or never were, go along
        self.groups = [Group(met, clock), *rest]
        self.advance()
        self.publish()

    def fence_proxy(self, lanes: int, generic: np.ndarray, visible: list[np.ndarray], which: list[int]) -> None:
        """These lanes make every generic write that they know of visible to the asynchronous proxy.

        `generic`, `visible`: actors of the cluster and what stands for their visible writes, by kind of memory; `which`: the kinds.
        """
        for clock in self.of(lanes):
            for kind in which:
                clock[visible[kind]] = np.maximum(clock[visible[kind]], clock[generic])
        for kind in which:
            self.own_fenced[kind, indices(lanes)] = self.epoch
        self.advance()

    def fence_memory(self, lanes: int, of_cta: bool) -> None:
        """These lanes fence: a later relaxed arrive or store of theirs releases what they know of now."""
        kept = []
        for fence in self.fences:
            left = fence.lanes if of_cta and not fence.of_cta else fence.lanes & ~lanes
            if left:
                kept.append(replace(fence, lanes=left))
        for group in self.groups:
            if group.lanes & lanes:
                kept.append(Fence(group.lanes & lanes, group.clock.copy(), self.epoch, self.own_fenced.copy(), of_cta))
        self.fences = kept
        self.advance()
