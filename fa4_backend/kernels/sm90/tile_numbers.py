"""The numbers of a tile in shared memory, which the load warp hands to the consumers: `sWork`, (WORK_INTS, WORK_STAGE) int32."""

import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common.seqlen_info import SeqlenInfo
from fa4_backend.kernels.common.tile_scheduler import TilePart, WorkTile

WORK_INTS = 20  # fields of a tile, and what a consumer warpgroup tells its threads of it
# Fields that `tile_numbers` names: 0 .. FIRST_PART of the tile, then those of its part up to WORK_FLAGS.
FIRST_PART = 7
WORK_FLAGS = 10  # the first of the consumers' flags, one a warpgroup
K_SCALE = 13  # bits of the scale of the tile's KV head, where K and V have scales
O_FACTOR = 14  # bits of `fp8.result_factor`, where K and V have scales, or out is FP8
IS_TILE = 15  # 1; 0: the empty tile behind the last one
TAKEN_TILE = 16  # entry of the work list, from the warp that loads K to the one that loads V: a ring of its own
LINK = 17  # of a piece, where tiles have pieces, to others of its entry: a sum of the below

# Flags: the entry has the piece before this one too, which comes next; this one is added to those behind it. And, as often as PIECES_UNIT
# is in it, how many slots the entry has filled when this piece is in its own.
IS_CONTINUED, HAS_BEGUN, PIECES_UNIT = 1, 2, 4


def tile_numbers(work: WorkTile, part: TilePart | None) -> tuple[Int32, ...]:
    """Fields from 0 on. The sequence's index is not needed by consumers; part: None where tiles are whole."""
    tile = (work.kv_head_idx, work.m_block, work.n_block_begin, work.n_block_end, *work.seqlen)
    return tile if part is None else (*tile, *part)


def read_tile(sWork: cute.Tensor, work_slot: Int32) -> WorkTile:
    """The tile whose numbers lie in `work_slot`."""
    kv_head_idx, m_block, n_block_begin, n_block_end, *seqlen = (sWork[i, work_slot] for i in range(FIRST_PART))
    return WorkTile(Int32(0), kv_head_idx, m_block, n_block_begin, n_block_end, SeqlenInfo(*seqlen))


def read_part(sWork: cute.Tensor, work_slot: Int32) -> TilePart:
    """Which part of its tile that is."""
    return TilePart(*(sWork[i, work_slot] for i in range(FIRST_PART, WORK_FLAGS)))
