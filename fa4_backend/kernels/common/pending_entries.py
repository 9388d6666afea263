"""Entries of a decode CTA whose split-KV slots are written: their arrival waits until the CTA is done, so that all share its barriers.

`sPending` has a row of DECODE_INTS for each, with the ints of the work list under their names and PIECES_HERE behind them.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common.decode_entry import Entry
from fa4_backend.kernels.schedule.work_list import (
    DECODE_INTS,
    FIRST_SLOT,
    KV_HEAD_IDX,
    NUM_PIECES,
    PARTIAL_SLOT,
    Q_BEGIN,
    QUERY_LEN,
    TOTAL_Q,
)

MAX_PENDING = 2  # entries of a CTA with slots: only its first and its last can share a row group with another CTA
PIECES_HERE = DECODE_INTS - 1  # pieces that this CTA wrote
assert PIECES_HERE > TOTAL_Q, "the work list's last int"


def note_pending(
    sPending: cute.Tensor,  # (MAX_PENDING, DECODE_INTS) int32
    place: Int32,
    entry: Entry,
    pieces_here: Int32,
) -> None:
    """Keep what adding up an entry's slots needs of it, in row `place`; one thread calls."""
    q = entry.seqlen
    fields = (
        (KV_HEAD_IDX, entry.kv_head_idx), (PARTIAL_SLOT, entry.partial_slot), (FIRST_SLOT, entry.first_slot),
        (NUM_PIECES, entry.num_pieces), (Q_BEGIN, q.q_begin), (QUERY_LEN, q.seqlen_q), (PIECES_HERE, pieces_here),
    )  # fmt: skip
    for field, value in fields:
        sPending[place, field] = value


def counter_of(
    sPending: cute.Tensor,  # (MAX_PENDING, DECODE_INTS) int32
    place: Int32,
    mArrivals: cute.Tensor,  # (max_slots,) int32
) -> tuple[cute.Pointer, Int32]:
    """A pending entry's first arrival counter (`part_arrivals.py`), and the pieces that this CTA wrote."""
    return mArrivals.iterator + sPending[place, FIRST_SLOT], sPending[place, PIECES_HERE]
