"""A CTA's entries of the work list (`fa4_backend.kernels.schedule.work_list`), which its load warp takes from the queue."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from fa4_backend.kernels.common.seqlen_info import SeqlenBounds, SeqlenInfo
from fa4_backend.kernels.schedule.work_list import (
    FIRST_SLOT,
    KV_HEAD_IDX,
    M_BLOCK,
    N_BLOCK_BEGIN,
    N_BLOCK_END,
    NUM_PIECES,
    PARTIAL_SLOT,
    QUEUE_LEFT,
    QUEUE_NEXT,
    QUEUE_OWN,
    QUEUE_TOTAL,
    SEQ_IDX,
    TILE_INTS,
    TILE_KV_LEN,
    TILE_Q_BEGIN,
    TILE_QUERY_LEN,
)


class WorkTile(NamedTuple):
    """One entry of a prefill list and the lengths of its sequence."""

    seq_idx: Int32
    kv_head_idx: Int32
    m_block: Int32
    n_block_begin: Int32
    n_block_end: Int32
    seqlen: SeqlenInfo


class Queue(NamedTuple):
    """What a launch's list is, as a warp knows it."""

    total: Int32  # entries
    own: Int32  # of them the first ones, which are not taken: CTA c, or pair c, begins with entry c. 0: every entry is taken

    @property
    def is_taken(self) -> Boolean:
        """Whether CTAs take entries at all."""
        return self.total > self.own


@cute.jit
def wait_alone(queue: Queue, is_dependent: cutlass.Constexpr[bool]):
    """In a step of prefill rows alone, wait for the kernel before in the stream; before the first access to what kernels write but the
    schedule. A warp calls; others that it hands data to need not.

    A kernel that runs beside decode rows is launched programmatically, behind a decode kernel that waited itself. Where that one is left
    out, it may be any kernel of the engine that lets its dependents go early.
    """
    if const_expr(is_dependent):
        if queue.own > 0:
            cute.arch.griddepcontrol_wait()


def read_queue(mQueue: cute.Tensor) -> Queue:
    """The queue of a launch; before its first `take_tile`, by a warp."""
    return Queue(mQueue[0, QUEUE_TOTAL], mQueue[0, QUEUE_OWN])


@cute.jit
def take_tile(mQueue: cute.Tensor) -> Int32:
    """Take the next entry, counted from those that are not taken; one warp of a CTA calls.

    Not before the CTA needs it: with one entry taken ahead, 128 tiles of equal length went to 64 of 132 CTAs (512 of 128K on an H100: 2704
    us for 1902). The ring of K and V tiles, full at that moment, hides the atomic's latency.
    """
    taken = Int32(0)
    if cute.arch.lane_idx() == 0:
        taken = cute.arch.atomic_add(mQueue.iterator + QUEUE_NEXT, Int32(1), sem="relaxed", scope="gpu")
    return cute.arch.shuffle_sync(taken, 0)


@cute.jit
def leave_queue(mQueue: cute.Tensor, cluster_size: cutlass.Constexpr[int] = 1):
    """After the last `take_tile` of a CTA, by the same warp: the CTA that leaves last readies the queue for the next launch.

    cluster_size: CTAs for which one takes.
    """
    num_ctas, _, _ = cute.arch.grid_dim()
    if cute.arch.lane_idx() == 0:
        left = cute.arch.atomic_add(mQueue.iterator + QUEUE_LEFT, Int32(1), sem="acq_rel", scope="gpu")
        if left + 1 == num_ctas // cluster_size:
            mQueue[0, QUEUE_NEXT] = Int32(0)
            mQueue[0, QUEUE_LEFT] = Int32(0)


class PartTensors(NamedTuple):
    """The split-KV workspace of the prefill list."""

    mSlots: cute.Tensor | None  # (max_part_slots + own_part_slots, part_floats) float32; None: the list has whole tiles only
    mArrivals: cute.Tensor | None  # (max_part_slots, PART_COUNTERS) int32


class TilePart(NamedTuple):
    """Which part of its tile's KV an entry is."""

    slot: Int32  # the first that it fills; WHOLE: the whole tile; NOTHING
    first_slot: Int32  # of the tile's first part
    num_parts: Int32  # slots of the tile


def read_entry(mTiles: cute.Tensor, tile_idx: Int32) -> Int32:
    """This lane's int of entry `tile_idx`, or of the last one there is room for. mTiles: (max_tiles, TILE_INTS) int32."""
    return mTiles[cutlass.min(tile_idx, mTiles.shape[0] - 1), cute.arch.lane_idx() % TILE_INTS]


def part_of_entry(word: Int32) -> TilePart:
    """Which part an entry is. word: the lane's, of `read_entry`; the warp calls."""
    return TilePart(*(cute.arch.shuffle_sync(word, field) for field in (PARTIAL_SLOT, FIRST_SLOT, NUM_PIECES)))


def tile_of_entry(word: Int32, bounds: SeqlenBounds) -> WorkTile:
    """The tile that an entry holds, or a part of. word: the lane's, of `read_entry`; the warp calls."""
    seq_idx, *where = (cute.arch.shuffle_sync(word, field) for field in (SEQ_IDX, KV_HEAD_IDX, M_BLOCK, N_BLOCK_BEGIN, N_BLOCK_END))
    q_begin, query_len, kv_len = (cute.arch.shuffle_sync(word, field) for field in (TILE_Q_BEGIN, TILE_QUERY_LEN, TILE_KV_LEN))
    return WorkTile(seq_idx, *where, bounds.cut(q_begin, q_begin + query_len, kv_len, seq_idx))
