"""A share of a row group whose parts are many: a CTA adds up some of its vectors over all slots, from memory.

One CTA that adds up n slots of 16 rows of d128 takes n times 0.2 us. All CTAs that made them (`common/part_arrivals.py`) have n-th parts
of the vectors, which are few then, so that the lanes of a warp share a vector's slots: lane pairs have two vectors, 32 bytes and so a
sector of L2, and each pair every sixteenth slot. Who adds up what is no part of the sum: first the slots of a lane pair in slot order, then
the pairs in a tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from fa4_backend.kernels.common.decode_entry import Entry
from fa4_backend.kernels.common.fp8 import result_factor
from fa4_backend.kernels.common.hardware import LANES, VEC
from fa4_backend.kernels.common.part_arrivals import MINE
from fa4_backend.kernels.common.part_sums import Part, fold, fold_lanes, only_if
from fa4_backend.kernels.decode.config import slot_floats
from fa4_backend.kernels.decode.merge import Merge, ResultTensors

UNIT = 2  # vectors that a warp adds up at once
VECTOR_LANES = LANES // UNIT  # that share a vector's slots
SLOTS_AT_ONCE = 8  # of a lane, whose loads are under way together


@dataclass(frozen=True)
class Shares:
    """Adding up by all, for one kernel."""

    merge: Merge

    @cute.jit
    def add_up(self, entry: Entry, share: Int32, results: ResultTensors):
        """Add up this CTA's share of a row group, or all of it, and write it. All consumer warps call; nobody waits for anybody."""
        c = self.merge.config
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        row_units = c.head_dim_v // VEC // UNIT
        units = cutlass.min(entry.seqlen.seqlen_q * c.q_per_kv, c.rows) * row_units
        begin, end = Int32(0), units
        if share == MINE:
            place = entry.partial_slot - entry.first_slot
            begin, end = (units * x // entry.num_pieces for x in (place, place + 1))
        factor = result_factor(results.mVScale, results.mOutScale, entry.kv_head_idx)
        for unit in cutlass.range(begin + warp, end, c.num_consumer_warps, unroll=1):
            row = unit // row_units
            at = (unit - row * row_units) * UNIT + lane % UNIT
            total = self._sum_lane(entry, row, at, results)
            for i in cutlass.range_constexpr(VECTOR_LANES.bit_length() - 1):
                total = fold_lanes(total, UNIT << i)
            if lane < UNIT:
                self.merge.write(results, entry, row, at, total, factor)

    @cute.jit
    def _sum_lane(self, entry: Entry, row: Int32, at: Int32, results: ResultTensors) -> Part:
        """A vector summed over this lane's slots."""
        sums = cute.make_rmem_tensor(VEC + 2, Float32)
        sums.fill(0.0)
        sums[VEC] = -Float32.inf
        own = cute.arch.lane_idx() // UNIT
        for first in cutlass.range(own, entry.num_pieces, VECTOR_LANES * SLOTS_AT_ONCE, unroll=1):
            parts = [self._load(entry, first + k * VECTOR_LANES, row, at, results) for k in range(SLOTS_AT_ONCE)]
            total = fold(Part([sums[e] for e in range(VEC)], sums[VEC], sums[VEC + 1]), parts)
            for e in cutlass.range_constexpr(VEC):
                sums[e] = total.o[e]
            sums[VEC], sums[VEC + 1] = total.row_max, total.row_sum
        return Part([sums[e] for e in range(VEC)], sums[VEC], sums[VEC + 1])

    def _load(self, entry: Entry, index: Int32, row: Int32, at: Int32, results: ResultTensors) -> Part:
        """A vector of the `index`-th slot; past the last slot nothing, without weight."""
        c = self.merge.config
        slot = entry.first_slot + cutlass.min(index, entry.num_pieces - 1)
        base = results.mSlots.iterator + Int64(slot) * slot_floats(c)
        values, stats = cute.make_rmem_tensor(VEC, Float32), cute.make_rmem_tensor(2, Float32)
        cute.autovec_copy(cute.make_tensor((base + (row * c.head_dim_v + at * VEC)).align(4 * VEC), cute.make_layout(VEC)), values)
        cute.autovec_copy(cute.make_tensor((base + (c.rows * c.head_dim_v + 2 * row)).align(8), cute.make_layout(2)), stats)
        return only_if(index < entry.num_pieces, Part([values[e] for e in range(VEC)], stats[0], stats[1]))
