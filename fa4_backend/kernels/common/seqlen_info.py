"""Lengths of the sequence a tile belongs to; read once a tile."""

from __future__ import annotations

from typing import NamedTuple

from cutlass import Int32


class SeqlenInfo(NamedTuple):
    """One sequence of the batch."""

    q_begin: Int32  # row of its first query token in q
    seqlen_q: Int32  # query tokens
    seqlen_k: Int32  # valid KV tokens, the new ones included

    @property
    def diagonal(self) -> Int32:
        """Key on the diagonal of query token 0 (bottom-right alignment); negative where queries outnumber keys."""
        return self.seqlen_k - self.seqlen_q
