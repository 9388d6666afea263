"""From raw scores of 16 rows x 16 keys to weights: soft cap, ALiBi, mask, online softmax; two rows a lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.mask import MaskSpec, MaskValues
from fa4_backend.kernels.common.online_softmax import LOG2_E
from fa4_backend.kernels.common.seqlen_info import SeqlenInfo
from fa4_backend.kernels.decode.config import DecodeConfig


class RowView(NamedTuple):
    """One packed row of a lane."""

    begin: Int32  # columns begin .. end are seen
    end: Int32
    diagonal: Int32  # key on the row's diagonal
    slope_log2: Float32  # ALiBi slope in log2 units; 0 without
    scale: Float32  # multiplies raw scores
    is_valid: Boolean  # the row is a token of the sequence


@dataclass(frozen=True)
class ScoreTransform:
    """What happens to a raw score before the softmax; after it a score is an exponent of 2.

    Scaled and rounded by itself: the largest score of a row then weighs exactly 1 whatever its size, and 8 products a box are no cost.
    """

    config: DecodeConfig

    @property
    def mask(self) -> MaskSpec:
        """The kernel's mask."""
        return MaskSpec(self.config.mask)

    def row(
        self,
        row: Int32,
        seqlen: SeqlenInfo,
        kv_head_idx: Int32,
        values: MaskValues,
        slopes: cute.Tensor | None,  # (num_q_heads,) float32
        scale: Float32,
    ) -> RowView:
        """Packed row `row` of a row group; rows past the query see nothing."""
        c = self.config
        token = row // c.q_per_kv
        columns = self.mask.columns(token, seqlen, values)
        is_valid = token < seqlen.seqlen_q
        slope = Float32(0.0)
        if const_expr(slopes is not None):
            head = cutlass.min(kv_head_idx * c.q_per_kv + row % c.q_per_kv, cute.size(slopes) - 1)
            slope = slopes[head] * LOG2_E
        end = cutlass.select_(is_valid, columns.end, Int32(0))
        return RowView(columns.begin, end, seqlen.diagonal + token, slope, scale, is_valid)

    def apply(self, score: Float32, column: Int32, row: RowView, values: MaskValues) -> Float32:
        """The exponent of one key; -inf where the row does not see it (NaN of an unused key included)."""
        if const_expr(self.config.mask.has_softcap):
            scaled = score * (row.scale / values.softcap)
            score = ptx.mul_rn(cute.math.tanh(scaled), values.softcap * LOG2_E)
        else:
            score = ptx.mul_rn(score, row.scale * LOG2_E)
        if const_expr(self.config.mask.has_alibi):
            distance = cutlass.max(row.diagonal - column, column - row.diagonal)
            score = cute.math.fma(Float32(distance), -row.slope_log2, score)
        is_seen = (column >= row.begin) & (column < row.end)
        return cutlass.select_(is_seen, score, -Float32.inf)
