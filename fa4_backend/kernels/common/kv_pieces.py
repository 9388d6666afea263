"""Where a row's KV is cut in batch-invariant mode: at fixed tiles, counted from the sequence's first key.

Pieces are short where a row is short of work for the GPU and long where a row is long, so that neither the parallelism of
short rows nor the slots of long ones suffer:

                             decode rows    prefill tiles (`tile_rule`)
    pieces of `short`        tiles 0 .. 16  blocks 0 .. 16 * short
    pieces of `2 * short`    16 .. 64       16 * short .. 64 * short
    pieces of `long`         64 ..          64 * short ..

The numbers are constants of a plan. The rule knows neither the row's length nor its batch, so a token's bits do not depend on
tokens after it either. The functions work on ints of the host and, given the compiler's `minimum` and `maximum`, on those of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

SHORT_END, MIDDLE_END = 16, 64  # first tiles past the short pieces and past those of twice their size
MAX_SHORT = 4  # tiles; 2 * MAX_SHORT divides both ends


class PieceRule(NamedTuple):
    """The numbers of a plan. `2 * short` divides `short_end` and `middle_end`."""

    short: Any  # tiles of a piece below `short_end`; of decode rows 2 or 4
    long: Any  # tiles of a piece from `middle_end` on
    short_end: Any = SHORT_END
    middle_end: Any = MIDDLE_END


def short_piece(slot_vectors: Any, minimum: Callable[..., Any] = min) -> Any:
    """Tiles of a short piece: 2, or 4 where a slot is more than one vector a thread, and costs as much more to write and to add."""
    return minimum(2 * slot_vectors, MAX_SHORT)


def tile_rule(short: Any) -> PieceRule:
    """The rule of prefill tiles, in n_blocks: their pieces are a CTA's each where tiles are few, a message's over a cached prefix; a prompt
    has many, and whoever has all pieces of a tile adds them up as it goes."""
    return PieceRule(short, 8 * short, 16 * short, 64 * short)


def piece_of(tile: Any, rule: PieceRule, minimum: Callable[..., Any] = min, maximum: Callable[..., Any] = max) -> Any:
    """Piece that holds `tile`."""
    middle = (minimum(maximum(tile, rule.short_end), rule.middle_end) - rule.short_end) // (2 * rule.short)
    return minimum(tile, rule.short_end) // rule.short + middle + (maximum(tile, rule.middle_end) - rule.middle_end) // rule.long


def piece_begin(piece: Any, rule: PieceRule, minimum: Callable[..., Any] = min, maximum: Callable[..., Any] = max) -> Any:
    """First tile of `piece`."""
    middle_begin = rule.short_end // rule.short
    long_begin = middle_begin + (rule.middle_end - rule.short_end) // (2 * rule.short)
    middle = minimum(maximum(piece, middle_begin), long_begin) - middle_begin
    return rule.short * (minimum(piece, middle_begin) + 2 * middle) + (maximum(piece, long_begin) - long_begin) * rule.long
