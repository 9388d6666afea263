"""An entry of the decode list as its kernels read it, and the tensors of the step that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common.seqlen_info import SeqlenBounds, SeqlenInfo
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
