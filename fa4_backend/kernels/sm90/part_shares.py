"""A share of a tile whose parts are many: a warpgroup adds up some of its vectors over all slots, from memory, and writes them.

One warpgroup that adds up n slots reads n times 32 KiB at d128. All that made them (`tile_parts.py`) have n-th parts of the vectors. A
warp adds up the vectors of 32 threads at once, a lane a vector. Where slots are so many that not every warp would have some, it adds up
those of 8: four lanes share a vector's slots, and hand the running sum on. All that a lane reads is under way at once.

The arithmetic is that of `TileParts._add_up`: weights relative to the largest maximum, parts one after the other. So the bits are the
same whoever adds up.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from fa4_backend.kernels.common.fp8 import float32_to_e4m3
from fa4_backend.kernels.common.online_softmax import finalize_row
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.part_arrivals import MINE
from fa4_backend.kernels.common.part_sums import Part, only_if
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.tile_scheduler import TilePart, WorkTile
from fa4_backend.kernels.common.wgmma_fragment import ScoreScale, row_of_thread
from fa4_backend.kernels.schedule.work_list import MAX_PARTS
from fa4_backend.kernels.sm90.arguments import Outputs
from fa4_backend.kernels.sm90.config import VEC, part_floats, part_vectors
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WGMMA_ROWS

MOST_LANES = 4  # that share a vector's slots
LANE_SLOTS = MAX_PARTS // MOST_LANES  # of a lane at most
ROW_ELEMS = VEC // 2  # of a vector, of each of its two rows


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
        lanes = cutlass.select_(part.num_parts > LANE_SLOTS, Int32(MOST_LANES), Int32(1))
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
            count = (part.num_parts + lanes - 1) // lanes  # slots of a lane
            loaded = [self._load(outputs, part, own * count + k, k < count, group, v, thread) for k in range(LANE_SLOTS)]
            total = self._sum([[rows[r] for rows in loaded] for r in range(2)], own, lanes)
            if own == lanes - 1:
                self._write(outputs, work, ends, total, v, thread, group)

    @cute.jit
    def _sum(self, parts: cutlass.Constexpr[list[list[Part]]], own: Int32, lanes: Int32) -> cute.Tensor:
        """Both rows of a vector over all slots, in the last of the lanes that share it: O of each, then row_max, then row_sum."""
        sums = cute.make_rmem_tensor(2 * ROW_ELEMS + 4, Float32)
        sums.fill(0.0)
        weights = []
        for r in cutlass.range_constexpr(2):
            row_max = parts[r][0].row_max
            for part in parts[r][1:]:
                row_max = cute.arch.fmax(row_max, part.row_max)
            # Lanes that have a vector of their own are handed their own.
            for offset in (16, 8):
                other = cute.arch.shuffle_sync_bfly(row_max, offset)
                row_max = cutlass.select_(lanes > 1, cute.arch.fmax(row_max, other), row_max)
            finite = cutlass.select_(row_max == -Float32.inf, Float32(0.0), row_max)
            weights.append([cute.math.exp2(part.row_max - finite, fastmath=True) for part in parts[r]])
            sums[2 * ROW_ELEMS + r] = row_max
        self._chain(parts, weights, sums)
        for turn in cutlass.range(1, lanes, unroll=1):
            before = cute.make_rmem_tensor_like(sums)
            for i in cutlass.range_constexpr(2 * ROW_ELEMS + 4):
                before[i] = cute.arch.shuffle_sync_up(sums[i], 32 // MOST_LANES, mask_and_clamp=0)
            self._chain(parts, weights, before)
            if own == turn:
                sums.store(before.load())
        return sums

    def _chain(self, parts: list[list[Part]], weights: list[list[Float32]], sums: cute.Tensor) -> None:
        """Add this lane's slots to running sums, one after the other."""
        for r in range(2):
            for part, weight in zip(parts[r], weights[r], strict=True):
                for e in range(ROW_ELEMS):
                    sums[ROW_ELEMS * r + e] = cute.math.fma(part.o[e], weight, sums[ROW_ELEMS * r + e])
                at = 2 * ROW_ELEMS + 2 + r
                sums[at] = cute.math.fma(part.row_sum, weight, sums[at])

    def _load(self, outputs: Outputs, part: TilePart, index: Int32, is_own: Boolean, group: Int32, v: Int32, thread: Int32) -> list[Part]:
        """A vector of the `index`-th slot, a part of each row; of a slot that is not this lane's, or none, nothing without weight."""
        c = self.config
        slot = part.first_slot + cutlass.min(index, part.num_parts - 1)
        base = outputs.parts.mSlots.iterator + (Int64(slot) * part_floats(c) + group * (part_vectors(c) * WARPGROUP_THREADS * VEC))
        values, stats = cute.make_rmem_tensor(VEC, Float32), cute.make_rmem_tensor(VEC, Float32)
        # The first lane of a row has the sum of all.
        places = (v * WARPGROUP_THREADS + thread, self.o_vectors * WARPGROUP_THREADS + thread // 4 * 4)
        for place, target in zip(places, (values, stats), strict=True):
            cute.autovec_copy(cute.make_tensor((base + place * VEC).align(4 * VEC), cute.make_layout(VEC)), target)
        is_part = is_own & (index < part.num_parts)
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
                o, row_max = [sums[ROW_ELEMS * r + e] for e in range(ROW_ELEMS)], sums[2 * ROW_ELEMS + r]
                row_max = row_max if ends.scale is None else ends.scale.true_max(row_max)
                result = finalize_row(row_max, sums[2 * ROW_ELEMS + 2 + r], sink)
                o_scale = result.o_scale if ends.factor is None else result.o_scale * ends.factor
                token = work.seqlen.q_begin + packed.token
                target = outputs.mO[token, head, None].iterator + column
                if const_expr(c.has_out_scale):
                    pair = cutlass.Int16(float32_to_e4m3([x * o_scale for x in o]))
                    cute.recast_tensor(cute.make_tensor(target.align(2), cute.make_layout(2)), cutlass.Int16)[0] = pair
                else:
                    pair = cute.make_rmem_tensor(2, outputs.mO.element_type)
                    for e in cutlass.range_constexpr(2):
                        pair[e] = outputs.mO.element_type(o[e] * o_scale)
                    cute.autovec_copy(pair, cute.make_tensor(target.align(4), cute.make_layout(2)))
                if const_expr(c.has_lse):
                    if column == 0:
                        outputs.mLse[head, token] = result.lse

    @property
    def o_vectors(self) -> int:
        """Vectors of O of a thread."""
        return part_vectors(self.config) - 1
