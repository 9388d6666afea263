"""A place in a ring of shared-memory buffers and the parity of its mbarriers' phase: one step for every ring whose roles pass it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32


class RingPosition(NamedTuple):
    """A stage of a ring, and the parity of its use; a ring begins at (0, 0)."""

    slot: Int32
    phase: Int32


def advance(position: RingPosition, stages: int) -> RingPosition:
    """The next stage; the parity flips at each round."""
    wraps = position.slot == stages - 1
    slot = cutlass.select_(wraps, Int32(0), position.slot + 1)
    return RingPosition(slot, cutlass.select_(wraps, position.phase ^ 1, position.phase))


@dataclass(frozen=True)
class RingSlots:
    """Where the stages of a ring of tiles lie: even ones and odd ones may differ in size."""

    stages: int
    even_elems: int
    odd_elems: int

    def __post_init__(self) -> None:
        assert self.even_elems == self.odd_elems or self.stages % 2 == 0, f"{self}"

    @property
    def total_elems(self) -> int:
        """Elements of the ring."""
        return self.stages // 2 * (self.even_elems + self.odd_elems) + self.stages % 2 * self.even_elems

    @property
    def layout(self) -> cute.Layout:
        """(stages): elements from the ring's begin to a stage's."""
        if self.even_elems == self.odd_elems:
            return cute.make_layout(self.stages, stride=self.even_elems)
        return cute.make_layout((2, self.stages // 2), stride=(self.even_elems, self.even_elems + self.odd_elems))

    def offset(self, slot: Int32) -> Int32:
        """The same of stage `slot`."""
        if self.even_elems == self.odd_elems:
            return slot * self.even_elems
        return slot // 2 * (self.even_elems + self.odd_elems) + slot % 2 * self.even_elems
