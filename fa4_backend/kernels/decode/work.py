"""Which KV tiles of a decode entry its rows see: what both roles must agree on."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Boolean, Int32, const_expr

from fa4_backend.kernels.common.decode_entry import Entry
from fa4_backend.kernels.common.mask import Columns, MaskSpec, MaskValues
from fa4_backend.kernels.decode.config import TILE_N


@dataclass(frozen=True)
class VisibleTiles:
    """The KV tiles of an entry that its rows see; load warp and consumers must agree."""

    mask: MaskSpec

    def clip(self, entry: Entry, values: MaskValues) -> tuple[Int32, Int32]:
        """`n_block_begin .. n_block_end`, intersected with what the mask lets any row see; may be empty (begin >= end)."""
        first = self.mask.columns(Int32(0), entry.seqlen, values)
        last = self.mask.columns(entry.seqlen.seqlen_q - 1, entry.seqlen, values)
        begin = cutlass.max(first.begin // TILE_N, entry.n_block_begin)
        end = cutlass.min((cutlass.max(last.end, 0) + TILE_N - 1) // TILE_N, entry.n_block_end)
        return begin, end

    def keys(self, entry: Entry, values: MaskValues) -> Columns:
        """Columns from the first that any row of an entry sees to the sequence's end. What lies outside may hold anything, NaN too,
        and the page table anything there."""
        return Columns(self.mask.first_key(Int32(0), entry.seqlen, values), entry.seqlen.seqlen_k)

    def has_any(self, keys: Columns, column: Int32, count: int) -> Boolean:
        """Whether some of `count` columns from `column` on are in `keys`."""
        has_any = column < keys.end
        if const_expr(self.mask.has_left):
            has_any = has_any & (column + count > keys.begin)
        return has_any
