"""What the products of a box take from shared memory: Q of an entry once, fragments of K and V of 16 keys, a chunk of a head at a time.

Here K and V hold elements of q's dtype, which ldmatrix brings as mma.sync wants them; `operands_fp8.py` converts. Both have the same
methods. See `common/warp_mma.py` for fragments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from fa4_backend.kernels.common.warp_mma import load_matrices
from fa4_backend.kernels.decode.config import MMA_ROWS, DecodeConfig
from fa4_backend.kernels.decode.warp_mma import BoxLayout


class WeightRange(NamedTuple):
    """Exponents of 2 of a row's weights, which refer to `row_max`. Where that stands is exact in the end: row_sum and O refer to it too."""

    largest: float  # of the largest weight when row_max moves
    growth: float  # the largest may grow by so much before row_max moves and O is rescaled


class Operands(Protocol):
    """Fragments of one kernel's products. rQ: (head_dim / 4,) words, A fragments of a warp's 16 packed rows of Q."""

    @property
    def weights(self) -> WeightRange:
        """Where the products' type wants the weights to lie."""
        ...

    @property
    def product_dtype(self) -> str:
        """Element type of both products."""
        ...

    def load_query(self, q_address: Int32, row_group: Int32, rQ: cute.Tensor) -> tuple[Float32, Float32] | None:
        """Fill `rQ` for the 16 packed rows of a row group; idle rows repeat the last one and are masked.

        Returns:
            What the lane's two rows were divided by to fit the products' type; None: nothing.
        """
        ...

    def score_products(self, k_box: Int32, rQ: cute.Tensor) -> Iterator[tuple[list[Int32], list[tuple[Int32, Int32]]]]:
        """For each chunk of 16 elements of a head: A words of `rQ`, and B words of K of keys 0-7 and of keys 8-15."""
        ...

    def keep(self, key: int, is_kept: Boolean) -> Int32:
        """The part for key 0 or 1 of a word that tells `value_products` which of two neighbouring keys' V become 0."""
        ...

    def value_products(self, v_box: Int32, keep: Callable[[int], Int32]) -> Iterator[tuple[int, tuple[Int32, Int32]]]:
        """For each tile of 8 columns of O: its index, and B words of V, whose k are the 16 keys.

        Args:
            keep: the word that `keep` made for the lane's keys 2 pair and 2 pair + 1 (0), and for the keys 8 behind them (1).
        """
        ...

    def column(self, tile: int, pair: Int32, element: int) -> Int32:
        """Element of a head that a lane's accumulator `element` (0 or 1) of a tile of O belongs to."""
        ...


@dataclass(frozen=True)
class PlainOperands:
    """K and V in q's dtype."""

    config: DecodeConfig

    @property
    def weights(self) -> WeightRange:
        """At most 1 when row_max moves, 2^8 later."""
        return WeightRange(0.0, 8.0)

    @property
    def product_dtype(self) -> str:
        """Element type of both products."""
        return self.config.dtype

    def load_query(self, q_address: Int32, row_group: Int32, rQ: cute.Tensor) -> None:
        """See `Operands`; by ldmatrix."""
        c = self.config
        lane = cute.arch.lane_idx()
        row = cutlass.min(row_group * MMA_ROWS + lane % 16, c.rows - 1)
        for step in range(c.head_dim // 16):
            part, within = divmod(32 * step, c.q_part_bytes)
            line = (part * c.rows + row) * c.q_part_bytes
            chunk = within + lane // 16 * 16
            words = load_matrices(q_address + line + (chunk ^ ((line // 128) % (c.q_part_bytes // 16) * 16)), transpose=False)
            for i in range(4):
                rQ[4 * step + i] = words[i]

    def score_products(self, k_box: Int32, rQ: cute.Tensor) -> Iterator[tuple[list[Int32], list[tuple[Int32, Int32]]]]:
        """See `Operands`."""
        c = self.config
        layout = BoxLayout(c.kv_part_bytes(c.head_dim))
        address = k_box + layout.key_matrices(cute.arch.lane_idx())
        for step in range(c.head_dim // 16):
            words = load_matrices(layout.step_address(address, step), transpose=False)
            yield [rQ[4 * step + i] for i in range(4)], [(words[0], words[1]), (words[2], words[3])]

    def keep(self, key: int, is_kept: Boolean) -> Int32:
        """Bits to keep of a word that holds V of the two keys."""
        return cutlass.select_(is_kept, Int32((0xFFFF, -65536)[key]), Int32(0))

    def value_products(self, v_box: Int32, keep: Callable[[int], Int32]) -> Iterator[tuple[int, tuple[Int32, Int32]]]:
        """See `Operands`."""
        c = self.config
        layout = BoxLayout(c.kv_part_bytes(c.head_dim_v))
        address = v_box + layout.value_matrices(cute.arch.lane_idx())
        kept = [keep(0), keep(1)]
        for step in range(c.head_dim_v // 16):
            words = load_matrices(layout.step_address(address, step), transpose=True)
            words = [words[i] & kept[i % 2] for i in range(4)]
            for i in range(2):
                yield 2 * step + i, (words[2 * i], words[2 * i + 1])

    def column(self, tile: int, pair: Int32, element: int) -> Int32:
        """See `Operands`: columns in order."""
        return 8 * tile + 2 * pair + element
