"""The end of a piece and of a CTA: `mla_decode/merge.py` over the lane halves of tensor memory in place of two warpgroups."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from fa4_backend.kernels.common.decode_entry import Entry
from fa4_backend.kernels.common.fragment_store import store_fragment
from fa4_backend.kernels.common.pack_gqa import PackedRow
from fa4_backend.kernels.common.wgmma_fragment import RowFragment, RowStats, flat
from fa4_backend.kernels.mla_decode.config import LATENT_DIM, VEC, WARP_ROWS, WARP_VECTORS
from fa4_backend.kernels.mla_decode.fragments import GROUP_FLOATS, Fragment
from fa4_backend.kernels.mla_decode.merge import Merge, ResultTensors, consumer_thread
from fa4_backend.kernels.mla_decode.sm100.storage import SIDES

ROW_BARRIER = 4  # first of four named barriers: the two warps that have the same rows; 3 is `Merge`'s
ROW_THREADS = 64
LANE_SHIFT = 16  # lane field of a tensor memory address


@dataclass(frozen=True)
class LaneFragment:
    """O of a softmax thread (`mla_decode.fragments.Fragment`): 16 rows a warp, the columns of its lane half.

    A warp reaches 32 lanes, by its number modulo 4 (PTX ISA, "tcgen05.ld: access restrictions"): 16 of them are its own, the other 16 those
    of the warp four further on. Lane halves hold the same rows.
    """

    def _warp(self) -> Int32:
        return consumer_thread() // 32

    @property
    def num_values(self) -> int:
        """See `Fragment`."""
        return WARP_ROWS * LATENT_DIM // SIDES // 32

    @property
    def num_sums(self) -> int:
        """See `Fragment`."""
        return SIDES

    def sum_index(self) -> Int32:
        """See `Fragment`; the lane half: keys 64 .. of a block, columns 256 .. of O."""
        return self._warp() % 4 // 2

    def row_block(self) -> Int32:
        """Which 16 rows of the tile."""
        return self._warp() % 2 * 2 + self._warp() // 4

    def lanes(self) -> Int32:
        """Of tensor memory, as an address; the whole warp calls."""
        return cute.arch.make_warp_uniform((self._warp() % 4 * 32 + self._warp() // 4 * WARP_ROWS) << LANE_SHIFT)

    def row(self, half: int) -> Int32:
        """See `Fragment`."""
        return self.row_block() * WARP_ROWS + cute.arch.lane_idx() // 4 + 8 * half

    def writes_statistics(self) -> Boolean:
        """See `Fragment`."""
        return (self.sum_index() == 0) & (cute.arch.lane_idx() % 4 == 0)

    def place(self, vector: int) -> Int32:
        """See `Fragment`; a vector is a group."""
        return self.row_block() * (WARP_VECTORS * VEC) + (self.sum_index() * 32 + cute.arch.lane_idx()) * VEC + vector * GROUP_FLOATS

    def values(self, vector: int) -> tuple[int, ...]:
        """See `Fragment`."""
        return tuple(range(VEC * vector, VEC * vector + VEC))

    def store(self, mO: cute.Tensor, rOut: cute.Tensor, rows: tuple[PackedRow, PackedRow], q_begin: Int32) -> None:
        """See `Fragment`."""
        half = cute.make_tensor((mO.iterator + self.sum_index() * (LATENT_DIM // SIDES)).align(16), mO.layout)
        store_fragment(half, rOut, rows, Int32(0), q_begin)


@dataclass(frozen=True)
class PairMerge(Merge):
    """What follows the main loop."""

    def meet_rows(self, fragment: LaneFragment) -> None:
        """The two warps of 16 rows."""
        cute.arch.barrier(barrier_id=ROW_BARRIER + fragment.row_block(), number_of_threads=ROW_THREADS)

    def _store_vectors(self, *_: object) -> None:
        """Nothing yet: O follows with its rows' statistics (`_complete_slot`)."""

    @cute.jit
    def _complete_slot(
        self,
        fragment: cutlass.Constexpr[Fragment],
        entry: Entry,
        slot: Int32,
        rO: cute.Tensor,
        stats: RowStats,
        results: ResultTensors,
    ):
        """A piece's rows to its slot."""
        if self._has_row(fragment, entry):
            base, o = self._tile_slot(results, slot), flat(rO)
            for k in cutlass.range_constexpr(fragment.num_values // VEC):
                vector = cute.make_rmem_tensor(VEC, Float32)
                for e, value in enumerate(fragment.values(k)):
                    vector[e] = o[value]
                cute.autovec_copy(vector, self._at(base, fragment, k))
            self._store_statistics(fragment, base, stats)

    def _rounded(self, rO: cute.Tensor, dtype: type[cutlass.Numeric]) -> cute.Tensor:
        """Pair by pair: of a whole vector LLVM makes halves of 64-bit registers for sm_100a, whose other halves nobody has written."""
        rOut = cute.make_rmem_tensor_like(rO, dtype)
        RowFragment(2 * cute.size(rO), 0.0).to_operand(rO, rOut)
        return rOut
