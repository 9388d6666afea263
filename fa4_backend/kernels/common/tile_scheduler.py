"""A CTA's entries of the work list (`fa4_backend.kernels.schedule.work_list`), which its load warp takes from the queue."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

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
    SEQ_IDX,
    TILE_KV_LEN,
)


class WorkTile(NamedTuple):
    """One entry of a prefill list and the lengths of its sequence."""

    seq_idx: Int32
    kv_head_idx: Int32
    m_block: Int32
    n_block_begin: Int32
    n_block_end: Int32
    seqlen: SeqlenInfo


@cute.jit
def take_tile(mQueue: cute.Tensor) -> Int32:
    """Take the next entry; one warp of a CTA calls.

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

    mSlots: cute.Tensor | None  # (max_part_slots, part_floats) float32; None: the list has whole tiles only
    mArrivals: cute.Tensor | None  # (max_part_slots, PART_COUNTERS) int32


class TilePart(NamedTuple):
    """Which part of its tile's KV an entry is."""

    slot: Int32  # its slot; -1: the whole tile
    first_slot: Int32  # of the tile's first part
    num_parts: Int32


def read_part(mTiles: cute.Tensor, tile_idx: Int32) -> TilePart:
    """Which part entry `tile_idx` is. mTiles: (max_tiles, TILE_INTS) int32."""
    return TilePart(mTiles[tile_idx, PARTIAL_SLOT], mTiles[tile_idx, FIRST_SLOT], mTiles[tile_idx, NUM_PIECES])


def read_tile(mTiles: cute.Tensor, mCuSeqlensQ: cute.Tensor, tile_idx: Int32, bounds: SeqlenBounds) -> WorkTile:
    """Entry `tile_idx`. mTiles: (max_tiles, TILE_INTS) int32; mCuSeqlensQ: (batch + 1,)."""
    seq_idx = mTiles[tile_idx, SEQ_IDX]
    return WorkTile(
        seq_idx,
        mTiles[tile_idx, KV_HEAD_IDX],
        mTiles[tile_idx, M_BLOCK],
        mTiles[tile_idx, N_BLOCK_BEGIN],
        mTiles[tile_idx, N_BLOCK_END],
        bounds.cut(mCuSeqlensQ[seq_idx], mCuSeqlensQ[seq_idx + 1], mTiles[tile_idx, TILE_KV_LEN], seq_idx),
    )
