"""Lengths of the sequence a tile belongs to; read once a tile, and never trusted: a call's tensors bound them."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

MAX_INT32 = 2**31 - 1


class SeqlenInfo(NamedTuple):
    """One sequence of the batch."""

    q_begin: Int32  # row of its first query token in q
    seqlen_q: Int32  # query tokens
    seqlen_k: Int32  # valid KV tokens, the new ones included

    @property
    def diagonal(self) -> Int32:
        """Key on the diagonal of query token 0 (bottom-right alignment); negative where queries outnumber keys."""
        return self.seqlen_k - self.seqlen_q


class SeqlenBounds(NamedTuple):
    """What a call's tensors have room for. An engine's dummy and capture batches hold lengths past it, and a graph any lengths."""

    q_rows: Int32  # rows of q and out
    kv_tokens: Int32  # tokens of the pages in a row of the page table

    @staticmethod
    def of(mO: cute.Tensor, mPageTable: cute.Tensor, page_size: Int32) -> SeqlenBounds:
        """The bounds of a call; on the host. mPageTable: (batch, max_pages_per_seq)."""
        tokens = cutlass.min(Int64(mPageTable.shape[1]) * Int64(page_size), Int64(MAX_INT32))
        return SeqlenBounds(Int32(mO.shape[0]), Int32(tokens))

    def cut(self, q_begin: Int32, q_end: Int32, kv_len: Int32) -> SeqlenInfo:
        """A sequence within the bounds; roles that cut the same numbers agree on everything that follows from them."""
        begin = cutlass.min(cutlass.max(q_begin, 0), self.q_rows)
        end = cutlass.max(cutlass.min(q_end, self.q_rows), begin)
        return SeqlenInfo(begin, end - begin, cutlass.min(kv_len, self.kv_tokens))
