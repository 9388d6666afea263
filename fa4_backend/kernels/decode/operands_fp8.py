"""Fragments of K and V in FP8 (e4m3): converted to float16 in registers, where every e4m3 number is exact; products are of float16.

A box's row of a head has half the bytes, so an ldmatrix, which moves 16-byte rows of pairs of bytes, brings two chunks of 16 elements.

**K.** Lane (group, pair) gets elements 4 pair .. 4 pair + 3 of a chunk of key `group`, where mma.sync has 2 pair, + 1 and 2 pair + 8, + 9.
A product sums over all 16, so Q is put in the same order: a lane loads four neighbours too, 8 bytes of each of its two rows.

**V.** The transposed ldmatrix gives a lane elements 2 group, 2 group + 1 of keys 2 pair and 2 pair + 1. A prmt puts the keys of an element
side by side and zeros in place of a key that is not kept (0x7F is NaN), and the two halves become B words of two tiles of O: one holds a
chunk's even elements, the other the odd ones. A lane's four accumulators of a row and chunk are four neighbours.

Q in e4m3 is converted likewise, once an entry, and exact; its scale joins the softmax's. A bfloat16 Q becomes float16, once an entry
(`common/fp8.py`, Note [bfloat16 Q]): nine operations on bits for every 4 elements of K would be a third of a box's work.

Note [float16 P]. Weights are rounded to float16, whose normal numbers end at 2^-14 and all of them at 2^-24. So a row's reference is put 7
below its largest score: that one weighs 2^7, those down to 2^-21 of it keep 11 bits and those down to 2^-31 some. The reference moves where
a block's largest score, less 7, is more than 7 above it. A weight is at most 2^15 then, also where scores are so large that `- 7` is
rounded: at most 8 are taken away, for where float32 numbers are 8 apart 7 becomes 8, and where they are 16 apart it becomes 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.fp8 import e4m3_to_float16, scaled_to_float16
from fa4_backend.kernels.common.warp_mma import load_matrices, permute_bytes
from fa4_backend.kernels.decode.config import MMA_ROWS, DecodeConfig
from fa4_backend.kernels.decode.operands import WeightRange
from fa4_backend.kernels.decode.warp_mma import BoxLayout

# Nibbles of a prmt's selector, of each of two keys: nibbles 0 and 2 take the first one's elements, 1 and 3 the second one's, or zeros.
KEPT, DROPPED = (0x0100, 0x3020), (0x0404, 0x4040)


@dataclass(frozen=True)
class Fp8Operands:
    """K and V in e4m3; see `operands.Operands`."""

    config: DecodeConfig

    @property
    def weights(self) -> WeightRange:
        """Note [float16 P]."""
        return WeightRange(7.0, 7.0)

    @property
    def product_dtype(self) -> str:
        """Element type of both products."""
        return "float16"

    def load_query(self, q_address: Int32, row_group: Int32, rQ: cute.Tensor) -> tuple[Float32, Float32] | None:
        """See `Operands`; each lane loads its own elements of rows `group` and `group + 8`."""
        c = self.config
        lane = cute.arch.lane_idx()
        pair = lane % 4
        factors = []
        for h in range(2):
            row = cutlass.min(row_group * MMA_ROWS + lane // 4 + 8 * h, c.rows - 1)
            words: list[Int32] = []
            for part in range(c.head_dim * c.element_bytes // c.q_part_bytes):
                line = (part * c.rows + row) * c.q_part_bytes
                swizzle = (line // 128) % (c.q_part_bytes // 16) * 16
                if c.has_q_scale:  # a chunk of 16 elements has 16 bytes
                    address = q_address + line + swizzle + pair * 4
                    for within in range(0, c.q_part_bytes, 16):
                        words += e4m3_to_float16(ptx.load_shared_i32(address ^ within))
                    continue
                address = q_address + line + ((pair // 2 * 16) ^ swizzle) + pair % 2 * 8
                for within in range(0, c.q_part_bytes, 32):
                    words += ptx.load_shared_i32x2(address ^ within)
            if c.q_dtype == "bfloat16":
                words, factor = scaled_to_float16(words, 4)
                factors.append(factor)
            for chunk in range(c.head_dim // 16):
                for i in range(2):
                    rQ[4 * chunk + 2 * i + h] = words[2 * chunk + i]
        return (factors[0], factors[1]) if factors else None

    def score_products(self, k_box: Int32, rQ: cute.Tensor) -> Iterator[tuple[list[Int32], list[tuple[Int32, Int32]]]]:
        """See `Operands`."""
        c = self.config
        layout = BoxLayout(c.kv_part_bytes(c.head_dim))
        address = k_box + layout.key_matrices(cute.arch.lane_idx())
        for step in range(c.head_dim // 32):
            words = [e4m3_to_float16(word) for word in load_matrices(layout.step_address(address, step), transpose=False)]
            for i in range(2):
                chunk = 2 * step + i
                yield [rQ[4 * chunk + j] for j in range(4)], [words[i], words[2 + i]]

    def keep(self, key: int, is_kept: Boolean) -> Int32:
        """Two nibbles of the selector of a prmt of a word of V and zero."""
        return cutlass.select_(is_kept, Int32(KEPT[key]), Int32(DROPPED[key]))

    def value_products(self, v_box: Int32, keep: Callable[[int], Int32]) -> Iterator[tuple[int, tuple[Int32, Int32]]]:
        """See `Operands`; tile 2 chunk + parity holds the chunk's even or odd elements."""
        c = self.config
        layout = BoxLayout(c.kv_part_bytes(c.head_dim_v))
        address = v_box + layout.value_matrices(cute.arch.lane_idx())
        kept = [keep(0), keep(1)]
        for step in range(c.head_dim_v // 32):
            words = load_matrices(layout.step_address(address, step), transpose=True)
            halves = [e4m3_to_float16(permute_bytes(words[i], kept[i % 2])) for i in range(4)]
            for i in range(2):
                for parity in range(2):
                    yield 4 * step + 2 * i + parity, (halves[2 * i][parity], halves[2 * i + 1][parity])

    def column(self, tile: int, pair: Int32, element: int) -> Int32:
        """See `Operands`: a lane's even and odd tile of a chunk interleave."""
        chunk, parity = divmod(tile, 2)
        return 16 * chunk + 4 * pair + 2 * element + parity
