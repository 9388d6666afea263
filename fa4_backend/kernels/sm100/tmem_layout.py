"""Tensor memory of a CTA: 128 lanes (query rows of a tile) x 512 columns of 32 bits.

| S 0 | S 1 | O 0 | O 1 |        P i lies over the second half of S i, two 16-bit columns to a cell
"""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common.prefill_config import PrefillConfig

ALL_COLUMNS = 512  # allocated whole: the kernel runs alone on its SM, and allocations are powers of two
TMEM_BASE = 0  # so the allocation can only start at lane 0, column 0, and every address is a constant


@dataclass(frozen=True)
class TmemLayout:
    """First columns of query tile 0's accumulators, and how far query tile 1's lie behind them."""

    s: int
    p: int
    o: int
    s_stride: int
    o_stride: int

    @staticmethod
    def of(config: PrefillConfig) -> TmemLayout:
        """Columns for a config; two tiles of S and O must fit."""
        tile_n, head_dim_v = config.tile.tile_n, config.head_dim_v
        layout = TmemLayout(s=0, p=tile_n // 2, o=2 * tile_n, s_stride=tile_n, o_stride=head_dim_v)
        assert layout.end <= ARCHS[config.arch].tmem_columns, f"{layout.end=}"
        return layout

    @property
    def end(self) -> int:
        """Columns in use."""
        return self.o + 2 * self.o_stride

    def s_at(self, place, q_idx):
        """TMEM address of S of query tile `q_idx` (runtime)."""
        return place.tmem_base + self.s + q_idx * self.s_stride

    def p_at(self, place, q_idx):
        """TMEM address of P of query tile `q_idx`."""
        return place.tmem_base + self.p + q_idx * self.s_stride

    def o_at(self, place, q_idx):
        """TMEM address of O of query tile `q_idx`."""
        return place.tmem_base + self.o + q_idx * self.o_stride
