"""A place in a ring of shared-memory buffers and the parity of its mbarriers' phase: one step for every ring whose roles pass it on."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
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
