"""What both roles know of an entry of the decode list: whose KV, which tiles of it, where the result goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from fa4_backend.kernels.common.mask import Columns, MaskSpec, MaskValues
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds, SeqlenInfo
from fa4_backend.kernels.decode.config import TILE_N
from fa4_backend.kernels.schedule.work_list import (
    FIRST_SLOT,
    KV_HEAD_IDX,
    KV_LEN,
    N_BLOCK_BEGIN,
    N_BLOCK_END,
    NUM_PIECES,
    PARTIAL_SLOT,
    Q_BEGIN,
    QUERY_LEN,
    SEQ_IDX,
)


class StepTensors(NamedTuple):
    """The step, as every layer's launch reads it."""

    mPageTable: cute.Tensor  # (batch, max_pages_per_seq) int32
    mTiles: cute.Tensor  # (max_decode_tiles, DECODE_INTS) int32
    mFirst: cute.Tensor  # (decode_num_ctas, DECODE_INTS) int32
    page_size: Int32  # tokens a page
    split_blocks: Int32  # KV tiles of a long piece (`common/kv_pieces.py`); 0: an entry is one piece
    bounds: SeqlenBounds


class Entry(NamedTuple):
    """One entry of the list."""

    seq_idx: Int32
    kv_head_idx: Int32
    n_block_begin: Int32
    n_block_end: Int32
    partial_slot: Int32  # -1: the result goes to `out`
    first_slot: Int32
    num_pieces: Int32
    seqlen: SeqlenInfo


def entry_of(field: Callable[[int], Int32], bounds: SeqlenBounds) -> Entry:
    """The entry whose ints `field` reads: by shuffle from the lanes that hold them, or from shared memory."""
    q_begin = field(Q_BEGIN)
    seqlen = bounds.cut(q_begin, q_begin + field(QUERY_LEN), field(KV_LEN))
    order = (SEQ_IDX, KV_HEAD_IDX, N_BLOCK_BEGIN, N_BLOCK_END, PARTIAL_SLOT, FIRST_SLOT, NUM_PIECES)
    return Entry(*(field(i) for i in order), seqlen)


@dataclass(frozen=True)
class VisibleTiles:
    """The KV tiles of an entry that its rows see; load warp and consumers must agree."""

    mask: MaskSpec

    def clip(self, entry: Entry, values: MaskValues) -> tuple[Int32, Int32]:
        """`n_block_begin .. n_block_end`, intersected with what the mask lets any row see; may be empty (begin >= end)."""
        first = self.mask.columns(Int32(0), entry.seqlen, values)
        last = self.mask.columns(entry.seqlen.seqlen_q - 1, entry.seqlen, values)
        begin = cutlass.max(first.begin // TILE_N, entry.n_block_begin)
        end = cutlass.min((cutlass.max(last.end, 0) + TILE_N - 1) // TILE_N, entry.n_block_end)
        return begin, end

    def keys(self, entry: Entry, values: MaskValues) -> Columns:
        """Columns from the first that any row of an entry sees to the sequence's end. What lies outside may hold anything, NaN too,
        and the page table anything there."""
        return Columns(self.mask.first_key(Int32(0), entry.seqlen, values), entry.seqlen.seqlen_k)

    def has_any(self, keys: Columns, column: Int32, count: int) -> Boolean:
        """Whether some of `count` columns from `column` on are in `keys`."""
        has_any = column < keys.end
        if const_expr(self.mask.has_left):
            has_any = has_any & (column + count > keys.begin)
        return has_any
