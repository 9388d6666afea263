"""Parts of an item that was cut along KV: the correction warps lay down O of a query tile, and those that come last add up all parts.

A query tile is the business of its CTA's correction warps: it has its own place in each slot and its own arrival counter.

    slot:    [query tile of the item][vector][row] of 16 bytes: O of a row, then a vector with its row_max and row_sum. A thread has a row,
             so accesses are coalesced, and whoever reads has the row of whoever wrote.
    counter: part_arrivals[first_slot of the item, query tile]

All parts are read from memory in part order, the own one too: the result does not depend on who came last.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import tcgen05_ops
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.hardware import VEC
from fa4_backend.kernels.common.part_arrivals import ALL, arrive
from fa4_backend.kernels.common.tile_scheduler import PartTensors, TilePart
from fa4_backend.kernels.schedule.work_list import PART_COUNTERS
from fa4_backend.kernels.sm100.config import Sm100Config
from fa4_backend.kernels.sm100.warp_roles import WARPGROUP_THREADS

BARRIER = 1  # named barrier of the correction warps


class RowSums(NamedTuple):
    """A row over all parts."""

    row_max: Float32
    row_sum: Float32  # of weights relative to row_max


@dataclass(frozen=True)
class TileParts:
    """Split KV of one kernel."""

    config: Sm100Config

    @property
    def vectors(self) -> int:
        """Vectors of a row in a slot."""
        return self.config.kernel.head_dim_v // VEC + 1

    def at(self, tensors: PartTensors, slot: Int32, tile: Int32, row: Int32, vector: Int32 | int) -> cute.Pointer:
        """A vector of a row of query tile `tile` of an item."""
        within = (tile * self.vectors + vector) * (WARPGROUP_THREADS * VEC) + row * VEC
        return tensors.mSlots.iterator + (Int64(slot) * self.config.part_floats + within)

    @cute.jit
    def lay_down(
        self,
        tensors: PartTensors,
        slot: Int32,
        tile: Int32,
        row: Int32,
        o_tmem: Int32,  # TMEM address of the row's O
        sums: RowSums,
        columns: cutlass.Constexpr[int],  # of O that a thread holds at once
    ):
        """This thread's row to a slot."""
        for base in cutlass.range(0, self.config.kernel.head_dim_v, columns, unroll=1):
            (o,) = tcgen05_ops.wait_load([tcgen05_ops.load(o_tmem + base, columns)])
            for v in cutlass.range_constexpr(columns // VEC):
                ptx.store_global_f32x4(self.at(tensors, slot, tile, row, base // VEC + v), vectors.elements(o)[VEC * v : VEC * v + VEC])
        numbers = [Float32(x).ir_value() for x in (sums.row_max, sums.row_sum, 0.0, 0.0)]
        ptx.store_global_f32x4(self.at(tensors, slot, tile, row, self.vectors - 1), numbers)

    @cute.jit
    def arrive(self, tensors: PartTensors, part: TilePart, tile: Int32, row: Int32, flag: Int32) -> Int32:
        """1 in the warps that come last, which then see all parts. flag: shared address of an int32 that nobody else writes.

        One thread's atomic, between barriers that carry its release and its acquire to the warps (`decode/merge.py`, `arrive`). Nobody
        waits: the next item's products need this role.
        """
        cute.arch.barrier(barrier_id=BARRIER, number_of_threads=WARPGROUP_THREADS)
        if row == 0:
            counter = tensors.mArrivals.iterator + (part.first_slot * PART_COUNTERS + tile)
            share, _ = arrive(counter, Int32(1), part.num_parts, Int32(0))
            ptx.store_shared_i32(flag, cutlass.select_(share == ALL, Int32(1), Int32(0)))
        cute.arch.barrier(barrier_id=BARRIER, number_of_threads=WARPGROUP_THREADS)
        return cute.arch.make_warp_uniform(ptx.load_shared_i32(flag))

    @cute.jit
    def sum_rows(self, tensors: PartTensors, part: TilePart, tile: Int32, row: Int32) -> RowSums:
        """This thread's row over all parts, but for O."""
        row_max, row_sum = -Float32.inf, Float32(0.0)
        for p in cutlass.range(part.num_parts, unroll=1):
            row_max = cute.arch.fmax(row_max, self._numbers(tensors, part.first_slot + p, tile, row)[0])
        for p in cutlass.range(part.num_parts, unroll=1):
            numbers = self._numbers(tensors, part.first_slot + p, tile, row)
            row_sum = cute.math.fma(numbers[1], _weight(numbers[0], row_max), row_sum)
        return RowSums(row_max, row_sum)

    @cute.jit
    def add_up(
        self, tensors: PartTensors, part: TilePart, tile: Int32, row: Int32, row_max: Float32, first: Int32, columns: cutlass.Constexpr[int]
    ):
        """Columns `first .. first + columns` of this thread's row over all parts, relative to `row_max`."""
        o = cute.make_rmem_tensor(columns, Float32)
        o.fill(0.0)
        for p in cutlass.range(part.num_parts, unroll=1):
            slot = part.first_slot + p
            weight = _weight(self._numbers(tensors, slot, tile, row)[0], row_max)
            for v in cutlass.range_constexpr(columns // VEC):
                values = ptx.load_global_f32x4(self.at(tensors, slot, tile, row, first // VEC + v))
                for e in cutlass.range_constexpr(VEC):
                    o[VEC * v + e] = cute.math.fma(values[e], weight, o[VEC * v + e])
        return vectors.from_elements([Float32(o[j]).ir_value() for j in range(columns)])

    def _numbers(self, tensors: PartTensors, slot: Int32, tile: Int32, row: Int32) -> list[Float32]:
        return ptx.load_global_f32x4(self.at(tensors, slot, tile, row, self.vectors - 1))


def _weight(part_max: Float32, row_max: Float32) -> Float32:
    """Exactly 1 of a part that has the row's maximum; 0 of one that saw no key, also where none did."""
    reference = cutlass.select_(row_max == -Float32.inf, Float32(0.0), row_max)
    return cute.math.exp2(part_max - reference, fastmath=True)
