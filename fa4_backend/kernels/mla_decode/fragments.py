"""What a consumer thread holds of a tile's O: two rows, row half 0 and 1, of some columns, and where that goes in a split-KV slot.

A slot holds a tile's rows 16 by 16. Of those it has, for each group of 8 columns, 32 vectors of four float32: vector `4 * row + pair` is
columns 2 pair and 2 pair + 1 of a row, then of the row 8 below it. Groups of the two halves of the 512 columns take turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from fa4_backend.kernels.common.fragment_store import store_fragment
from fa4_backend.kernels.common.pack_gqa import PackedRow
from fa4_backend.kernels.common.wgmma_fragment import row_of_thread
from fa4_backend.kernels.mla_decode.config import LATENT_DIM, PART_DIM, VEC, WARP_ROWS, WARP_VECTORS
from fa4_backend.kernels.mla_decode.storage import SIDE_THREADS, SIDE_WARPS, SIDES

GROUP_COLUMNS = 8
SIDE_GROUPS = LATENT_DIM // SIDES // GROUP_COLUMNS  # groups of columns of a half of O
GROUP_FLOATS = SIDES * 32 * VEC  # of a slot, from a group of columns to the next of the same half


class SlotVector(NamedTuple):
    """A vector of a tile's slot: two columns of a row of the tile, then of the row 8 below it."""

    index: Int32
    lane: Int32
    side: Int32
    group: Int32

    @classmethod
    def at(cls, index: Int32) -> SlotVector:
        """The vector of this index."""
        return cls(index, index % 32, index // 32 % SIDES, index // (32 * SIDES) % SIDE_GROUPS)

    @property
    def row(self) -> Int32:
        """The first of its rows."""
        return self.index // WARP_VECTORS * WARP_ROWS + self.lane // 4

    @property
    def column(self) -> Int32:
        """The first of its columns."""
        return self.side * (LATENT_DIM // SIDES) + self.group * GROUP_COLUMNS + 2 * (self.lane % 4)


class Fragment(Protocol):
    """O of one thread."""

    @property
    def num_values(self) -> int:
        """float32 of O a thread."""
        ...

    @property
    def num_sums(self) -> int:
        """Warps, or warpgroups, that have a share of a row's row_sum each."""
        ...

    def row(self, half: int) -> Int32:
        """Row of the tile."""
        ...

    def sum_index(self) -> Int32 | int:
        """Whose share of row_sum this thread has."""
        ...

    def writes_statistics(self) -> Boolean | bool:
        """Whether this thread writes reference and row_sum, or the lse, of its rows."""
        ...

    def place(self, vector: int) -> Int32:
        """Where a vector lies in a tile's slot, float32."""
        ...

    def values(self, vector: int) -> tuple[int, ...]:
        """Which of the thread's values a vector is."""
        ...

    def store(self, mO: cute.Tensor, rOut: cute.Tensor, rows: tuple[PackedRow, PackedRow], q_begin: Int32) -> None:
        """Write finished rows, 16-bit, that are valid. All lanes of a warp call."""
        ...


@dataclass(frozen=True)
class WideFragment:
    """Of wgmma's 64 x 256 (`common/wgmma_fragment.py`); `side` is the warpgroup's half of the columns."""

    side: int

    @property
    def num_values(self) -> int:
        """See `Fragment`."""
        return 2 * LATENT_DIM // SIDES // 4

    @property
    def num_sums(self) -> int:
        """See `Fragment`."""
        return SIDES

    def _thread(self) -> Int32:
        return cute.arch.thread_idx()[0] % SIDE_THREADS

    def row(self, half: int) -> Int32:
        """See `Fragment`."""
        return row_of_thread(self._thread(), half)

    def sum_index(self) -> int:
        """See `Fragment`."""
        return self.side

    def writes_statistics(self) -> Boolean | bool:
        """See `Fragment`."""
        return self._thread() % 4 == 0 if self.side == 0 else Boolean(False)

    def place(self, vector: int) -> Int32:
        """See `Fragment`; a vector is a group."""
        thread = self._thread()
        return thread // 32 * (WARP_VECTORS * VEC) + (self.side * 32 + thread % 32) * VEC + vector * GROUP_FLOATS

    def values(self, vector: int) -> tuple[int, ...]:
        """See `Fragment`."""
        return tuple(range(VEC * vector, VEC * vector + VEC))

    def store(self, mO: cute.Tensor, rOut: cute.Tensor, rows: tuple[PackedRow, PackedRow], q_begin: Int32) -> None:
        """See `Fragment`."""
        half = cute.make_tensor((mO.iterator + self.side * (LATENT_DIM // SIDES)).align(16), mO.layout)
        store_fragment(half, rOut, rows, Int32(0), q_begin)


@dataclass(frozen=True)
class NarrowFragment:
    """Of mma.sync's 16 x 64: warp w has the columns of part w. Value `4 * tile + 2 * half + e` is element e of tile `tile`, in column
    16 (tile // 2) + 4 pair + 2 e + tile % 2: what conversion of pairs of e4m3 numbers makes of them (`narrow_warps.py`)."""

    @property
    def num_values(self) -> int:
        """See `Fragment`."""
        return PART_DIM // 2

    @property
    def num_sums(self) -> int:
        """See `Fragment`."""
        return LATENT_DIM // PART_DIM

    def _warp(self) -> Int32:
        return narrow_warp()

    def row(self, half: int) -> Int32:
        """See `Fragment`."""
        return cute.arch.lane_idx() // 4 + 8 * half

    def sum_index(self) -> Int32:
        """See `Fragment`."""
        return self._warp()

    def writes_statistics(self) -> Boolean:
        """See `Fragment`."""
        return (self._warp() == 0) & (cute.arch.lane_idx() % 4 == 0)

    def place(self, vector: int) -> Int32:
        """See `Fragment`; a pair of vectors is 4 columns of a chunk of 16."""
        chunk, second = divmod(vector, 2)
        lane, warp, side_warps = cute.arch.lane_idx(), self._warp(), LATENT_DIM // SIDES // PART_DIM
        pair = lane % 4
        group = warp % side_warps * (PART_DIM // GROUP_COLUMNS) + 2 * chunk + pair // 2
        in_group = warp // side_warps * 32 + lane // 4 * 4 + pair % 2 * 2 + second
        return group * GROUP_FLOATS + in_group * VEC

    def values(self, vector: int) -> tuple[int, ...]:
        """See `Fragment`."""
        chunk, second = divmod(vector, 2)
        return tuple(4 * (2 * chunk + parity) + 2 * half + second for half in range(2) for parity in range(2))

    @cute.jit
    def store(self, mO: cute.Tensor, rOut: cute.Tensor, rows: cutlass.Constexpr[tuple[PackedRow, PackedRow]], q_begin: Int32):
        """See `Fragment`: 4 columns a lane, 16 a quad."""
        first = self._warp() * PART_DIM + cute.arch.lane_idx() % 4 * 4
        for half in cutlass.range_constexpr(2):
            if rows[half].is_valid:
                row = mO[q_begin + rows[half].token, rows[half].head, None].iterator
                for chunk in cutlass.range_constexpr(PART_DIM // 16):
                    four = cute.make_rmem_tensor(4, mO.element_type)
                    for second in cutlass.range_constexpr(2):
                        for parity in cutlass.range_constexpr(2):
                            four[2 * second + parity] = rOut[4 * (2 * chunk + parity) + 2 * half + second]
                    cute.autovec_copy(four, cute.make_tensor((row + (first + 16 * chunk)).align(8), cute.make_layout(4)))


def narrow_warp() -> Int32:
    """Number of a consumer warp, 0 .. NARROW_WARPS; the first warpgroup loads."""
    return cute.arch.make_warp_uniform(cute.arch.warp_idx()) - SIDE_WARPS


assert LATENT_DIM // PART_DIM * WARP_ROWS == SIDES * 64, "both fragments' shares of row_sum take the same memory"
