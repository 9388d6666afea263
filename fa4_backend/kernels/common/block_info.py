"""The KV blocks a tile works on, and which of them need a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
from cutlass import Int32

from fa4_backend.kernels.common.mask import MaskSpec, MaskValues
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.seqlen_info import SeqlenInfo


class BlockRange(NamedTuple):
    """KV blocks `begin .. end` of a tile, never none; blocks `full_begin .. full_end` are seen whole by every row."""

    begin: Int32
    end: Int32
    full_begin: Int32
    full_end: Int32


@dataclass(frozen=True)
class BlockInfo:
    """Block arithmetic of one kernel; the load warp and the consumers must agree on every number."""

    mask: MaskSpec
    tile_n: int
    tokens_per_tile: int

    @staticmethod
    def of(config: PrefillConfig) -> BlockInfo:
        """The block arithmetic of a kernel."""
        return BlockInfo(MaskSpec(config.mask), config.tile.tile_n, config.tokens_per_tile)

    def blocks(self, m_block: Int32, seqlen: SeqlenInfo, values: MaskValues, n_block_begin: Int32, n_block_end: Int32) -> BlockRange:
        """Blocks of query block `m_block` within the work list's `n_block_begin .. n_block_end`.

        A tile that sees no key gets one block all the same, masked whole: its rows then come out empty on the normal path.
        """
        first_token = m_block * self.tokens_per_tile
        last_token = cutlass.min(first_token + self.tokens_per_tile, seqlen.seqlen_q) - 1
        first = self.mask.columns(first_token, seqlen, values)
        last = self.mask.columns(last_token, seqlen, values)
        # Both bounds grow with the token: the union of the rows' intervals is [first.begin, last.end), their
        # intersection [last.begin, first.end).
        begin = cutlass.max(first.begin // self.tile_n, n_block_begin)
        end = cutlass.min(self._ceil_blocks(cutlass.max(last.end, 0)), n_block_end)
        end = cutlass.max(end, begin + 1)
        full_end = cutlass.max(first.end, 0) // self.tile_n
        full_begin = self._ceil_blocks(last.begin)
        return BlockRange(begin, end, full_begin, full_end)

    def first_key(self, m_block: Int32, seqlen: SeqlenInfo, values: MaskValues) -> Int32:
        """First key that any row of query block `m_block` sees; keys before it may hold anything, and the page table anything there."""
        return self.mask.first_key(m_block * self.tokens_per_tile, seqlen, values)

    def _ceil_blocks(self, tokens: Int32) -> Int32:
        return (tokens + self.tile_n - 1) // self.tile_n
