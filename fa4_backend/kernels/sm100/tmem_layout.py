"""Tensor memory of a CTA: 128 lanes (query rows of a tile) x 512 columns of 32 bits.

| S 0 | S 1 | O 0 | O 1 |        P i lies over the second half of S i, two weights of 16 bits or four of e4m3 to a cell
| S 0 | S 1 | O         |        one query tile a CTA: blocks take the buffers of S in turns
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.sm100.config import S_STAGE, Sm100Config

if TYPE_CHECKING:
    from cutlass import Int32

# Allocated whole, since the kernel runs alone on its SM, so the allocation can only start at lane 0, column 0: every address is a constant.
TMEM_BASE = 0


@dataclass(frozen=True)
class TmemLayout:
    """First columns of the accumulators of buffer 0, and how far those of buffer 1 lie behind them.

    With two query tiles, each has a buffer of S and one of O. A tile that is alone has both of S, and `o_stride` is 0.
    """

    s: int
    p: int
    o: int
    s_stride: int
    o_stride: int
    end: int  # columns in use
    allocated: int  # all that the SM has: allocations are powers of two
    p_bytes: int  # of an element of P

    @staticmethod
    def of(config: Sm100Config) -> TmemLayout:
        """Columns for a config; two buffers of S and O of all query tiles must fit."""
        tile_n, head_dim_v, q_tiles = config.kernel.tile.tile_n, config.kernel.head_dim_v, config.q_tiles
        o, o_stride = S_STAGE * tile_n, head_dim_v * (q_tiles - 1)
        end, p_bytes = o + q_tiles * head_dim_v, config.kernel.element_bytes
        allocated = ARCHS[config.arch].tmem_columns
        assert end <= allocated, f"{end=} {allocated=}"
        return TmemLayout(0, tile_n // 2, o, s_stride=tile_n, o_stride=o_stride, end=end, allocated=allocated, p_bytes=p_bytes)

    def p_columns(self, weights: int) -> int:
        """Columns that so many weights of a row take."""
        return weights * self.p_bytes // 4

    def s_at(self, tmem_base: Int32, buffer: Int32 | int) -> Int32:
        """TMEM address of buffer `buffer` of S."""
        return tmem_base + self.s + buffer * self.s_stride

    def p_at(self, tmem_base: Int32, buffer: Int32 | int) -> Int32:
        """TMEM address of the P that lies over it."""
        return tmem_base + self.p + buffer * self.s_stride

    def o_at(self, tmem_base: Int32, buffer: Int32 | int) -> Int32:
        """TMEM address of the O that its P is for."""
        return tmem_base + self.o + buffer * self.o_stride
