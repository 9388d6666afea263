"""Where a row's KV is cut in batch-invariant mode: at fixed tiles, counted from the sequence's first key.

Pieces are short where a row is short of work for the GPU and long where a row is long, so that neither the parallelism of
short rows nor the slots of long ones suffer:

    tiles 0 .. 16      pieces of 1 tile
    tiles 16 .. 64     pieces of 2 tiles
    tiles 64 ..        pieces of `split_blocks` tiles, a constant of the plan

The rule knows neither the row's length nor its batch, so a token's bits do not depend on tokens after it either.
The functions work on ints of the host and, given the compiler's `minimum` and `maximum`, on those of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SINGLE_TILES = 16  # tiles before this one are pieces of their own
PAIRED_TILES = 64  # tiles before this one are pieces of two
PAIRS_BEGIN = SINGLE_TILES  # first piece of two tiles
LONG_BEGIN = PAIRS_BEGIN + (PAIRED_TILES - SINGLE_TILES) // 2  # first piece of `split_blocks` tiles


def piece_of(tile: Any, split_blocks: Any, minimum: Callable[..., Any] = min, maximum: Callable[..., Any] = max) -> Any:
    """Piece that holds `tile`."""
    pairs = (minimum(maximum(tile, SINGLE_TILES), PAIRED_TILES) - SINGLE_TILES) // 2
    return minimum(tile, SINGLE_TILES) + pairs + (maximum(tile, PAIRED_TILES) - PAIRED_TILES) // split_blocks


def piece_begin(piece: Any, split_blocks: Any, minimum: Callable[..., Any] = min, maximum: Callable[..., Any] = max) -> Any:
    """First tile of `piece`."""
    pairs = minimum(maximum(piece, PAIRS_BEGIN), LONG_BEGIN) - PAIRS_BEGIN
    return minimum(piece, PAIRS_BEGIN) + 2 * pairs + (maximum(piece, LONG_BEGIN) - LONG_BEGIN) * split_blocks
