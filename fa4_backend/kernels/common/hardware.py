"""Numbers of the hardware that every family builds on: a warp, a quad, a lane's widest access, swizzled rows. Imports no compiler."""

from __future__ import annotations

LANES = 32  # of a warp
QUAD = 4  # neighbouring lanes that share the rows of an accumulator of mma.sync or wgmma (PTX ISA, "Matrix Fragments")
ACCESS_BYTES = 16  # of a lane's widest access to global and to shared memory
VEC = ACCESS_BYTES // 4  # float32 of such an access
SWIZZLED_ROWS = (128, 64, 32)  # bytes of a row of shared memory that TMA and MMAs swizzle (PTX ISA, "Swizzling modes"), widest first
SWIZZLE_ALIGN = 1024  # bytes after which any swizzle's pattern begins anew


def swizzle_bits(row_bytes: int) -> int:
    """Bits of the index of a row's 16-byte chunk that its swizzle changes: of `cute.make_swizzle(bits, 4, 3)`."""
    return (row_bytes // ACCESS_BYTES).bit_length() - 1


def widest_row(*num_bytes: int) -> int:
    """Bytes of the widest swizzled row that divides all of `num_bytes`, those of heads."""
    for row_bytes in SWIZZLED_ROWS:
        if all(n % row_bytes == 0 for n in num_bytes):
            return row_bytes
    raise AssertionError(f"bytes of a head: expected multiples of {SWIZZLED_ROWS[-1]}, got {num_bytes}")
