"""What both roles know of an entry: its KV blocks, its rows, and who they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_backend.kernels.common.decode_entry import Entry
from fa4_backend.kernels.common.kv_pieces import PieceRule, piece_begin, piece_of, short_piece
from fa4_backend.kernels.common.mask import MaskSpec, MaskValues
from fa4_backend.kernels.common.pack_gqa import PackedRow
from fa4_backend.kernels.common.seqlen_info import SeqlenInfo
from fa4_backend.kernels.mla_decode.config import TILE_M, TILE_N, MlaDecodeConfig, slot_vectors


class Blocks(NamedTuple):
    """KV blocks `begin .. end` of an entry, possibly none; those before `full_end` are seen whole by every row."""

    begin: Int32
    end: Int32
    full_end: Int32


@dataclass(frozen=True)
class MlaWork:
    """Entry arithmetic of one kernel."""

    config: MlaDecodeConfig

    @property
    def mask(self) -> MaskSpec:
        """Which keys a token sees."""
        return MaskSpec(self.config.mask)

    def rank(self) -> Int32 | int:
        """This CTA's place in its cluster."""
        return 0 if self.config.cluster_size == 1 else Int32(cute.arch.block_idx_in_cluster())

    def list_idx(self) -> Int32:
        """Which of the list's CTAs this cluster is."""
        return cute.arch.block_idx()[0] // self.config.cluster_size

    def first_row(self, entry: Entry) -> Int32:
        """First packed row of this CTA's tile."""
        return (entry.kv_head_idx * self.config.cluster_size + self.rank()) * TILE_M

    def has_rows(self, entry: Entry) -> bool:
        """Whether the row group has any row: a query may be shorter than the longest."""
        return entry.kv_head_idx * self.config.cluster_size * TILE_M < entry.seqlen.seqlen_q * self.config.num_heads

    def row(self, row: Int32, seqlen: SeqlenInfo) -> PackedRow:
        """Packed row `row` of a sequence."""
        token = row // self.config.num_heads
        return PackedRow(token, row - token * self.config.num_heads, token < seqlen.seqlen_q)

    def blocks(self, entry: Entry, values: MaskValues) -> Blocks:
        """Blocks of an entry that any row sees; none where the row group has no row."""
        first = self.mask.columns(Int32(0), entry.seqlen, values)
        last = self.mask.columns(entry.seqlen.seqlen_q - 1, entry.seqlen, values)
        end = cutlass.min((cutlass.max(last.end, 0) + TILE_N - 1) // TILE_N, entry.n_block_end)
        end = cutlass.select_(self.has_rows(entry), cutlass.max(end, entry.n_block_begin), entry.n_block_begin)
        return Blocks(entry.n_block_begin, end, cutlass.max(first.end, 0) // TILE_N)

    # -- pieces of batch-invariant mode -------------------------------------------------------------------------------------------

    def _rule(self, split_blocks: Int32) -> PieceRule:
        return PieceRule(short_piece(slot_vectors(self.config)), split_blocks)

    def pieces(self, entry: Entry, split_blocks: Int32) -> tuple[Int32, Int32]:
        """Pieces of an entry, half-open; numbered from the sequence's first key in batch-invariant mode."""
        if const_expr(not self.config.has_pieces):
            return Int32(0), Int32(1)
        first = piece_of(entry.n_block_begin, self._rule(split_blocks), cutlass.min, cutlass.max)
        last = piece_of(entry.n_block_end - 1, self._rule(split_blocks), cutlass.min, cutlass.max)
        return first, cutlass.max(last, first) + 1

    def piece_blocks(self, piece: Int32, blocks: Blocks, split_blocks: Int32) -> tuple[Int32, Int32]:
        """Blocks of a piece, `end` at least `begin`."""
        if const_expr(not self.config.has_pieces):
            return blocks.begin, blocks.end
        begin, end = (piece_begin(piece + i, self._rule(split_blocks), cutlass.min, cutlass.max) for i in (0, 1))
        begin = cutlass.max(blocks.begin, begin)
        return begin, cutlass.max(cutlass.min(blocks.end, end), begin)
