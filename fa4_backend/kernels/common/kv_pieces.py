"""Where a row's KV is cut in batch-invariant mode: at fixed tiles, counted from the sequence's first key.

Pieces are short where a row is short of work for the GPU and long where a row is long, so that neither the parallelism of
short rows nor the slots of long ones suffer:

    tiles 0 .. 16      pieces of 2 tiles
    tiles 16 .. 64     pieces of 4 tiles
    tiles 64 ..        pieces of `split_blocks` tiles, a constant of the plan

The rule knows neither the row's length nor its batch, so a token's bits do not depend on tokens after it either.
The functions work on ints of the host and, given the compiler's `minimum` and `maximum`, on those of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SHORT, SHORT_END = 2, 16  # tiles of a short piece, and the first tile that is in none
MIDDLE, MIDDLE_END = 4, 64  # the same of the pieces after them
MIDDLE_BEGIN = SHORT_END // SHORT  # first piece of MIDDLE tiles
LONG_BEGIN = MIDDLE_BEGIN + (MIDDLE_END - SHORT_END) // MIDDLE  # first piece of `split_blocks` tiles


def piece_of(tile: Any, split_blocks: Any, minimum: Callable[..., Any] = min, maximum: Callable[..., Any] = max) -> Any:
    """Piece that holds `tile`."""
    middle = (minimum(maximum(tile, SHORT_END), MIDDLE_END) - SHORT_END) // MIDDLE
    return minimum(tile, SHORT_END) // SHORT + middle + (maximum(tile, MIDDLE_END) - MIDDLE_END) // split_blocks


def piece_begin(piece: Any, split_blocks: Any, minimum: Callable[..., Any] = min, maximum: Callable[..., Any] = max) -> Any:
    """First tile of `piece`."""
    middle = minimum(maximum(piece, MIDDLE_BEGIN), LONG_BEGIN) - MIDDLE_BEGIN
    return SHORT * minimum(piece, MIDDLE_BEGIN) + MIDDLE * middle + (maximum(piece, LONG_BEGIN) - LONG_BEGIN) * split_blocks
