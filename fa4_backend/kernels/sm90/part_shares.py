"""A share of a tile whose parts are many: a warpgroup adds up some of its vectors over all slots, from memory, and writes them.

One warpgroup that adds up n slots reads n times 32 KiB at d128. All that made them (`tile_parts.py`) have n-th parts of the vectors. A
warp adds up the vectors of 32 threads at once, a lane a vector; where slots are so many that not every warp would have some, those of 8,
and four lanes share a vector's slots. What a warpgroup's share is, is no part of the sum: a lane adds its slots in slot order, and then
lanes are added in a tree.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from fa4_backend.kernels.common.fp8 import float32_to_e4m3
from fa4_backend.kernels.common.online_softmax import finalize_row
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.part_arrivals import MINE
from fa4_backend.kernels.common.part_sums import Part, fold, fold_lanes, only_if
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.tile_scheduler import TilePart, WorkTile
from fa4_backend.kernels.common.wgmma_fragment import ScoreScale, row_of_thread
from fa4_backend.kernels.sm90.arguments import Outputs
from fa4_backend.kernels.sm90.config import VEC, part_floats, part_vectors
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WGMMA_ROWS

SLOTS_AT_ONCE = 8  # of a lane, whose loads are under way together
WIDE_PARTS, WIDE_LANES = 24, 4  # parts from which on that many lanes share a vector's slots
ROW_FLOATS = VEC // 2 + 2  # running sums of a row: its elements of a vector, row_max, row_sum


class RowEnds(NamedTuple):
    """What finished rows need."""

    scale: ScoreScale | None  # of raw scores; None: they were in log2 units
    factor: Float32 | None  # multiplies O beside its denominator; None: nothing


@dataclass(frozen=True)
class PartShares:
    """Adding up by all, for one kernel."""

    config: PrefillConfig
    pack: PackGqa

    @cute.jit
    def add_up(self, outputs: Outputs, part: TilePart, share: Int32, work: WorkTile, ends: RowEnds, group: Int32, lane: Int32):
        """Add up this warpgroup's share of its rows, or all of them, and write them. lane: thread of the warpgroup; nobody waits."""
        warp, in_warp = lane // 32, lane % 32
        lanes = cutlass.select_(part.num_parts >= WIDE_PARTS, Int32(WIDE_LANES), Int32(1))
        width = 32 // lanes  # vectors of a unit
        units = self.o_vectors * (WARPGROUP_THREADS // 32) * lanes
        begin, end = Int32(0), units
        if share == MINE:
            place = part.slot - part.first_slot
            begin, end = (units * x // part.num_parts for x in (place, place + 1))
        own = in_warp // width
        for unit in cutlass.range(begin + warp, end, WARPGROUP_THREADS // 32, unroll=1):
            index = unit * width + in_warp % width
            v = index // WARPGROUP_THREADS
            thread = index - v * WARPGROUP_THREADS
            sums = self._sum_lane(outputs, part, group, v, thread, own, lanes)
            if lanes > 1:
                for i in cutlass.range_constexpr(WIDE_LANES.bit_length() - 1):
                    for r in cutlass.range_constexpr(2):
                        _keep(sums, r, fold_lanes(_row(sums, r), 32 // WIDE_LANES << i))
            if own == 0:
                self._write(outputs, work, ends, sums, v, thread, group)

    @cute.jit
    def _sum_lane(self, outputs: Outputs, part: TilePart, group: Int32, v: Int32, thread: Int32, own: Int32, lanes: Int32) -> cute.Tensor:
        """A thread's vector, elements of two rows, summed over this lane's slots: (2 * ROW_FLOATS,)."""
        sums = cute.make_rmem_tensor(2 * ROW_FLOATS, Float32)
        sums.fill(0.0)
        for r in cutlass.range_constexpr(2):
            sums[ROW_FLOATS * r + VEC // 2] = -Float32.inf
        for first in cutlass.range(own, part.num_parts, lanes * SLOTS_AT_ONCE, unroll=1):
            parts = [self._load(outputs, part, first + k * lanes, group, v, thread) for k in range(SLOTS_AT_ONCE)]
            for r in cutlass.range_constexpr(2):
                _keep(sums, r, fold(_row(sums, r), [rows[r] for rows in parts]))
        return sums

    def _load(self, outputs: Outputs, part: TilePart, index: Int32, group: Int32, v: Int32, thread: Int32) -> list[Part]:
        """A vector of the `index`-th slot, a part of each row; past the last slot nothing, without weight."""
        c = self.config
        slot = part.first_slot + cutlass.min(index, part.num_parts - 1)
        base = outputs.parts.mSlots.iterator + (Int64(slot) * part_floats(c) + group * (part_vectors(c) * WARPGROUP_THREADS * VEC))
        values, stats = cute.make_rmem_tensor(VEC, Float32), cute.make_rmem_tensor(VEC, Float32)
        # The first lane of a row has the sum of all.
        places = (v * WARPGROUP_THREADS + thread, self.o_vectors * WARPGROUP_THREADS + thread // 4 * 4)
        for place, target in zip(places, (values, stats), strict=True):
            cute.autovec_copy(cute.make_tensor((base + place * VEC).align(4 * VEC), cute.make_layout(VEC)), target)
        is_part = index < part.num_parts
        return [only_if(is_part, Part([values[2 * r], values[2 * r + 1]], stats[r], stats[2 + r])) for r in range(2)]

    @cute.jit
    def _write(self, outputs: Outputs, work: WorkTile, ends: RowEnds, sums: cute.Tensor, v: Int32, thread: Int32, group: Int32):
        """Two columns of two rows."""
        c = self.config
        column = 8 * v + 2 * (thread % 4)
        for r in cutlass.range_constexpr(2):
            packed = self.pack.row(group * WGMMA_ROWS + row_of_thread(thread, r), work.m_block, work.seqlen)
            if packed.is_valid:
                head = work.kv_head_idx * self.pack.q_per_kv + packed.head
                sink = None
                if const_expr(c.mask.has_sinks):
                    sink = Float32(outputs.mSinks[head])
                total = _row(sums, r)
                row_max = total.row_max if ends.scale is None else ends.scale.true_max(total.row_max)
                result = finalize_row(row_max, total.row_sum, sink)
                o_scale = result.o_scale if ends.factor is None else result.o_scale * ends.factor
                token = work.seqlen.q_begin + packed.token
                target = outputs.mO[token, head, None].iterator + column
                if const_expr(c.has_out_scale):
                    pair = cutlass.Int16(float32_to_e4m3([x * o_scale for x in total.o]))
                    cute.recast_tensor(cute.make_tensor(target.align(2), cute.make_layout(2)), cutlass.Int16)[0] = pair
                else:
                    pair = cute.make_rmem_tensor(2, outputs.mO.element_type)
                    for e in cutlass.range_constexpr(2):
                        pair[e] = outputs.mO.element_type(total.o[e] * o_scale)
                    cute.autovec_copy(pair, cute.make_tensor(target.align(4), cute.make_layout(2)))
                if const_expr(c.has_lse):
                    if column == 0:
                        outputs.mLse[head, token] = result.lse

    @property
    def o_vectors(self) -> int:
        """Vectors of O of a thread."""
        return part_vectors(self.config) - 1


def _row(sums: cute.Tensor, r: int) -> Part:
    """The running sums of a row of a vector."""
    at = ROW_FLOATS * r
    return Part([sums[at + e] for e in range(VEC // 2)], sums[at + VEC // 2], sums[at + VEC // 2 + 1])


def _keep(sums: cute.Tensor, r: int, total: Part) -> None:
    at = ROW_FLOATS * r
    for e, value in enumerate((*total.o, total.row_max, total.row_sum)):
        sums[at + e] = value
