"""A search that a thread does alone."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def upper_bound(
    table: cute.Tensor,  # (length or more,) int32
    length: Int32,
    value: Int32,
) -> Int32:
    """Number of entries of the ascending `table[0 .. length]` that are at most `value`."""
    low, high = Int32(0), length
    while low < high:
        middle = (low + high) // 2
        if table[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low
