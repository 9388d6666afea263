"""Which keys a query token sees. Every mask here is one interval of KV columns a row; integer arithmetic only.

Presence of a bound is compile-time, its value is an argument: one kernel serves every window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, const_expr

from fa4_backend.kernels.common.seqlen_info import SeqlenInfo
from fa4_backend.problem import MaskFeatures


class Columns(NamedTuple):
    """Half-open range of KV columns; empty when `begin >= end`."""

    begin: Int32
    end: Int32


class MaskValues(NamedTuple):
    """What a mask's features are worth in one call, and what scales its scores."""

    softmax_scale: Float32  # multiplies raw logits
    softcap: Float32
    window_left: Int32
    window_right: Int32  # 0 for causal


@dataclass(frozen=True)
class MaskSpec:
    """The bounds that a kernel has, and the columns they leave."""

    features: MaskFeatures

    @property
    def has_left(self) -> bool:
        """Whether a row may not see its sequence's first keys."""
        return self.features.has_window_left

    @property
    def has_right(self) -> bool:
        """Whether a row may not see its sequence's last keys; a causal mask is a right window of 0."""
        return self.features.is_causal or self.features.has_window_right

    def values(self, softmax_scale: Float32, softcap: Float32, window_left: Int32, window_right: Int32) -> MaskValues:
        """A call's values, in the order of a launch's arguments."""
        return MaskValues(softmax_scale, softcap, window_left, Int32(0) if const_expr(self.features.is_causal) else window_right)

    def columns(self, token: Int32, seqlen: SeqlenInfo, values: MaskValues) -> Columns:
        """Columns that query token `token` of a sequence sees. `end` may be negative."""
        diagonal = seqlen.diagonal + token
        end = seqlen.seqlen_k
        if const_expr(self.has_right):
            end = cutlass.min(end, diagonal + values.window_right + 1)
        return Columns(self.first_key(token, seqlen, values), end)

    def first_key(self, token: Int32, seqlen: SeqlenInfo, values: MaskValues) -> Int32:
        """First column that query token `token`, and so any token behind it, sees."""
        if const_expr(self.has_left):
            return cutlass.max(seqlen.diagonal + token - values.window_left, 0)
        return Int32(0)
