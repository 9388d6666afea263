"""A CTA's entries of the work list (`fa4_backend.kernels.schedule.work_list`): its own, or taken from the queue by its load warp."""

from __future__ import annotations

from typing import NamedTuple

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


def tile_range(mBegin: cute.Tensor, cluster_size: int = 1) -> tuple[Int32, Int32]:
    """Entries `begin .. end` of this CTA, or of its cluster. mBegin: (num_ctas + 1,) or (num_clusters + 1,) int32."""
    cta_idx, _, _ = cute.arch.block_idx()
    if cluster_size > 1:
        cta_idx = cta_idx // cluster_size
    return mBegin[cta_idx], mBegin[cta_idx + 1]


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
def leave_queue(mQueue: cute.Tensor):
    """After the last `take_tile` of a CTA, by the same warp: the CTA that leaves last readies the queue for the next launch."""
    num_ctas, _, _ = cute.arch.grid_dim()
    if cute.arch.lane_idx() == 0:
        left = cute.arch.atomic_add(mQueue.iterator + QUEUE_LEFT, Int32(1), sem="acq_rel", scope="gpu")
        if left + 1 == num_ctas:
            mQueue[0, QUEUE_NEXT] = Int32(0)
            mQueue[0, QUEUE_LEFT] = Int32(0)


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
