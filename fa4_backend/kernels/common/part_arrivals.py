"""Who adds up the parts of a row group: all CTAs that made them, a share each, or the one that comes last.

Note [Shares]. A CTA that has written its parts arrives at the row group's counter. If it is to wait, it looks at the counter until all
parts have come, and then adds up its share; after `looks` looks it leaves, which it notes in the counter (one compare-and-swap, so whoever
comes last knows). A CTA that does not wait notes so as it arrives. If anyone has left, the one that comes last adds up the whole row group
and the others nothing. So no CTA depends on another one's running beside it.

Two counters, int32, both 0 between launches:
    parts that came, and in units of `GAVE_UP` those of them whose CTAs left
    parts whose CTAs waited until the end and have looked for the last time; the last of them clears both
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.schedule.work_list import MOST_PARTS

GAVE_UP = 1 << 16
assert MOST_PARTS < GAVE_UP, f"{MOST_PARTS=}: parts that came would run into those that left"
assert MOST_PARTS * (GAVE_UP + 1) < 1 << 31, f"{MOST_PARTS=}: a counter of which all have left would pass int32"
NOTHING, MINE, ALL = range(3)  # what of a row group a CTA adds up


@cute.jit
def arrive(counter: cute.Pointer, here: Int32, expected: Int32, looks: Int32) -> tuple[Int32, Int32]:
    """Arrive with `here` of a row group's `expected` parts, by one thread; what this CTA is to add up, and for whom `leave` waits.

    Barriers before and after carry the release and the acquire of this thread's atomics to the other threads (PTX ISA, "Causality
    order").

    Args:
        counter: the first of the two.
        looks: how often to look before leaving; 0: do not wait.

    Returns:
        NOTHING, MINE or ALL, and the parts whose CTAs must call `leave` with that number; 0: this CTA need not.
    """
    amount = cutlass.select_(looks > 0, here, here * (GAVE_UP + 1))
    seen = cute.arch.atomic_add(counter, amount, sem="acq_rel", scope="gpu") + amount
    share, stayers = Int32(NOTHING), Int32(0)
    if seen % GAVE_UP == expected:
        stayers = expected - seen // GAVE_UP
        share = cutlass.select_(stayers == expected, Int32(MINE), Int32(ALL))
        if stayers == 0:
            _clear(counter)
        if looks == 0:
            stayers = Int32(0)
    else:
        while looks > 0:
            looks -= 1
            if looks > 0:
                seen = Int32(cute.arch.load(counter, Int32, sem="acquire", scope="gpu"))
            else:
                # One look more that is an atomic: either all parts have come, or the last one will know.
                before = seen
                seen = cute.arch.atomic_cas(counter, cmp=before, val=before + here * GAVE_UP, sem="acq_rel", scope="gpu")
                if seen != before and seen % GAVE_UP != expected:
                    looks = Int32(1)
            if seen % GAVE_UP == expected:
                looks = Int32(0)
                stayers = expected - seen // GAVE_UP
                if stayers == expected:
                    share = Int32(MINE)
    return share, stayers


@cute.jit
def leave(counter: cute.Pointer, left: cute.Pointer, here: Int32, stayers: Int32):
    """This CTA, whose `arrive` said `stayers`, will not look at the counter again; the last one clears both."""
    if stayers > 0:
        gone = cute.arch.atomic_add(left, here, sem="acq_rel", scope="gpu") + here
        if gone == stayers:
            _clear(counter)
            _clear(left)


def _clear(counter: cute.Pointer) -> None:
    cute.make_tensor(counter, cute.make_layout(1))[0] = Int32(0)
