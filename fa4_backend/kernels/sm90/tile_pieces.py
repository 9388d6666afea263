"""A tile's KV piece by piece, in batch-invariant mode: KV is cut at fixed blocks, and a row's result is the sum of its pieces from the last
one down, whoever has which (`kv_pieces.tile_rule`):

    total = last piece;  for each piece before it:  total = total * 2^(old maximum - new) + piece * 2^(its maximum - new)

An entry of the work list is a whole tile; or a tile's last pieces, whose total goes to the tile's first slot; or pieces before those, each
of which goes to a slot of its own, behind that of the piece after it. The load warps work on each piece as on a tile, Q included, so a
piece ends as a tile does, while the other warpgroup's products run. Where it is to be added to others of its entry, its rows meet the
total so far in a slot that is the CTA's (`TileParts.add_before`), in which each thread finds what it left itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Int32

from fa4_backend.kernels.common.block_info import BlockRange
from fa4_backend.kernels.common.kv_pieces import PieceRule, piece_begin, piece_of, tile_rule
from fa4_backend.kernels.common.tile_scheduler import TilePart, WorkTile
from fa4_backend.kernels.sm90.tile_numbers import HAS_BEGUN, IS_CONTINUED, PIECES_UNIT


def is_added_up(part: TilePart) -> Boolean:
    """Whether an entry's pieces are added up by the CTA that has them: a whole tile's, and those in a tile's first slot."""
    return part.slot <= part.first_slot


class Walk(NamedTuple):
    """Blocks of an entry that are left: `begin .. end` of those below `top`, from the last one down."""

    begin: Int32
    end: Int32
    top: Int32


class Piece(NamedTuple):
    """A piece as a tile."""

    work: WorkTile
    part: TilePart | None  # whose slot is the piece's; None: not read yet
    link: Int32  # `tile_numbers.LINK`


@dataclass(frozen=True)
class TilePieces:
    """The pieces of an entry; both load warps must agree on them."""

    piece_blocks: int  # of a short piece

    @property
    def rule(self) -> PieceRule:
        """Where KV is cut."""
        return tile_rule(self.piece_blocks)

    def walk(self, work: WorkTile, part: TilePart, blocks: BlockRange) -> Walk:
        """All of an entry. blocks: those that the mask lets its rows see: what is added up elsewhere needs a number of every piece, if
        only that it has no key."""
        begin, end = (
            cutlass.select_(is_added_up(part), seen, listed)
            for seen, listed in ((blocks.begin, work.n_block_begin), (blocks.end, work.n_block_end))
        )
        return Walk(begin, end, end)

    def next(self, work: WorkTile, part: TilePart, walk: Walk) -> tuple[Piece, Walk]:
        """The piece that ends the blocks that are left, and what is left then."""
        index = self._piece(walk.end - 1)
        begin = cutlass.max(walk.begin, piece_begin(index, self.rule, cutlass.min, cutlass.max))
        # An entry without blocks of its own works on one behind `n_block_end`, of which it sees nothing.
        piece = work._replace(n_block_begin=begin, n_block_end=cutlass.min(walk.end, work.n_block_end))
        behind = self._piece(walk.top - 1) - index
        slots = cutlass.select_(is_added_up(part), Int32(0), behind)  # of the entry before this piece's
        link = cutlass.select_(begin > walk.begin, Int32(IS_CONTINUED), Int32(0)) + PIECES_UNIT * (slots + 1)
        link += cutlass.select_(is_added_up(part) & (behind > 0), Int32(HAS_BEGUN), Int32(0))
        return Piece(piece, part._replace(slot=part.slot + slots), link), walk._replace(end=begin)

    def _piece(self, n_block: Int32) -> Int32:
        return piece_of(n_block, self.rule, cutlass.min, cutlass.max)
