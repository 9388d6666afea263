"""Which keys a query token sees. Every mask here is one interval of KV columns a row; integer arithmetic only.

Presence of a bound is compile-time, its value is an argument: one kernel serves every window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
from cutlass import Int32, const_expr

from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.seqlen_info import SeqlenInfo


class Columns(NamedTuple):
    """Half-open range of KV columns; empty when `begin >= end`."""

    begin: Int32
    end: Int32


@dataclass(frozen=True)
class MaskSpec:
    """The bounds that a kernel has, and the columns they leave."""

    has_left: bool
    has_right: bool  # a causal mask is a right window of 0

    @staticmethod
    def of(config: PrefillConfig) -> MaskSpec:
        """The mask of a kernel."""
        return MaskSpec(config.has_window_left, config.is_causal or config.has_window_right)

    def columns(self, token: Int32, seqlen: SeqlenInfo, window_left: Int32, window_right: Int32) -> Columns:
        """Columns that query token `token` of a sequence sees; `window_right` is 0 for causal. `end` may be negative."""
        diagonal = seqlen.diagonal + token
        end = seqlen.seqlen_k
        if const_expr(self.has_right):
            end = cutlass.min(end, diagonal + window_right + 1)
        return Columns(self.first_key(token, seqlen, window_left), end)

    def first_key(self, token: Int32, seqlen: SeqlenInfo, window_left: Int32) -> Int32:
        """First column that query token `token`, and so any token behind it, sees."""
        if const_expr(self.has_left):
            return cutlass.max(seqlen.diagonal + token - window_left, 0)
        return Int32(0)
