"""Tensor memory of a CTA: 128 lanes (query rows of a tile) x 512 columns of 32 bits.

| S 0 | S 1 | O 0 | O 1 |        P i lies over the second half of S i, two 16-bit columns to a cell
"""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.config import KernelConfig

ALL_COLUMNS = 512  # allocated whole: the kernel runs alone on its SM, and allocations are powers of two
TMEM_BASE = 0  # so the allocation can only start at lane 0, column 0, and every address is a constant


@dataclass(frozen=True)
class TmemLayout:
    """First column of each accumulator."""

    s: tuple[int, int]
    p: tuple[int, int]
    o: tuple[int, int]

    @staticmethod
    def of(config: KernelConfig) -> TmemLayout:
        """Columns for a config; two tiles of S and O must fit."""
        tile_n, head_dim_v = config.tile.tile_n, config.head_dim_v
        s = (0, tile_n)
        o = (2 * tile_n, 2 * tile_n + head_dim_v)
        end = o[1] + head_dim_v
        assert end <= ARCHS[config.arch].tmem_columns, f"{end=}"
        return TmemLayout(s, tuple(col + tile_n // 2 for col in s), o)
