"""Where a lane finds its part of a fragment of K and V (`common/warp_mma.py`) in a box in shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Int32

from fa4_backend.kernels.decode.config import BOX_KEYS


@dataclass(frozen=True)
class BoxLayout:
    """A box of 16 keys in shared memory as TMA writes it: parts of a head one behind the other, each 16 rows of `part_bytes`, swizzled.

    The swizzle XORs the 16-byte chunk within a row with the number of the row's 128-byte line (PTX ISA, "Swizzling modes"),
    so a lane's offset is computed once and later chunks differ by an XOR of a constant.
    """

    part_bytes: int  # 128, 64 or 32

    def lane_offset(self, key: Int32, chunk: Int32) -> Int32:
        """Offset of 16-byte chunk `chunk` (0 or 1) of row `key`, in bytes."""
        line = key // (128 // self.part_bytes)
        bits = (line % (self.part_bytes // 16)) * 16
        return key * self.part_bytes + ((chunk * 16) ^ bits)

    def step_address(self, lane_address: Int32, step: int) -> Int32:
        """Address of the lane's chunk for the `step`-th 32 bytes of a head."""
        part, within = divmod(32 * step, self.part_bytes)
        return (lane_address ^ within) + part * BOX_KEYS * self.part_bytes

    def key_matrices(self, lane_idx: Int32) -> Int32:
        """This lane's offset for `load_matrices` of K: words (keys 0-7, k 0-7), (keys 0-7, k 8-15), then keys 8-15."""
        return self.lane_offset(lane_idx % 8 + lane_idx // 16 * 8, lane_idx // 8 % 2)

    def value_matrices(self, lane_idx: Int32) -> Int32:
        """This lane's offset for the transposed `load_matrices` of V: words (keys 0-7, n 0-7), (keys 8-15, n 0-7), then n 8-15."""
        return self.lane_offset(lane_idx % 16, lane_idx // 16)
