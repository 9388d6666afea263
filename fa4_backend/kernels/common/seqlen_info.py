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
    kv_tokens: Int32  # tokens of the pages in a row of the page table; without pages, rows of k and v
    mCuSeqlensK: cute.Tensor | None = None  # (batch + 1,) int32, first row of each sequence in k and v; None where they have pages

    @staticmethod
    def of(
        mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v)
        mPageTable: cute.Tensor,  # (batch, max_pages_per_seq) int32
        page_size: Int32,
    ) -> SeqlenBounds:
        """The bounds of a call; on the host."""
        tokens = cutlass.min(Int64(mPageTable.shape[1]) * Int64(page_size), Int64(MAX_INT32))
        return SeqlenBounds(Int32(mO.shape[0]), Int32(tokens))

    @staticmethod
    def of_ragged(
        mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v)
        mK: cute.Tensor,  # (total_k, num_kv_heads, head_dim)
        mCuSeqlensK: cute.Tensor,  # (batch + 1,) int32
    ) -> SeqlenBounds:
        """The bounds of a call whose K and V have no pages; on the host."""
        return SeqlenBounds(Int32(mO.shape[0]), Int32(mK.shape[0]), mCuSeqlensK)

    def k_begin(self, seq_idx: Int32) -> Int32:
        """Row of a sequence's first key in k and v, which have no pages."""
        assert self.mCuSeqlensK is not None
        return cutlass.min(cutlass.max(self.mCuSeqlensK[seq_idx], 0), self.kv_tokens)

    def cut(self, q_begin: Int32, q_end: Int32, kv_len: Int32, seq_idx: Int32 | None = None) -> SeqlenInfo:
        """A sequence within the bounds; roles that cut the same numbers agree on everything that follows from them.

        seq_idx: its index in the batch, needed where K and V have no pages.
        """
        begin = cutlass.min(cutlass.max(q_begin, 0), self.q_rows)
        end = cutlass.max(cutlass.min(q_end, self.q_rows), begin)
        kv_tokens = self.kv_tokens
        if self.mCuSeqlensK is not None:
            assert seq_idx is not None
            kv_tokens = kv_tokens - self.k_begin(seq_idx)
        return SeqlenInfo(begin, end - begin, cutlass.min(kv_len, kv_tokens))
