"""A share of a tile whose parts are many: a warpgroup adds up some of its rows over all slots, from memory, and writes them.

One warpgroup that adds up n slots reads n times 32 KiB at d128. All that made them (`tile_parts.py`) have n-th parts of the rows. A warp
adds up 8 vectors of each of the four threads that hold a pair of rows, a lane a vector: 64 columns of both rows. A lane knows one slot's
maxima and sums, or two slots', and hands their weights to the others as it comes to that slot.

Note [Short code]. This runs once a CTA, right after an L2 that a layer's weights have passed through, so its instructions come from
memory, and each is fetched once: with all slots unrolled, 32 vectors a lane under way, adding up 16 slots took 7.3 us of 20 (71/1 d64
8 x 4K, H200). Hence a loop over `SLOTS_AT_ONCE`, and the weights of a slot computed by one lane.

The arithmetic is that of `TileParts._add_up`: weights relative to the largest maximum or, where tiles have pieces, to the total so far,
parts one after the other. So the bits are the same whoever adds up.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.fp8 import float32_to_e4m3
from fa4_backend.kernels.common.hardware import LANES, QUAD, VEC
from fa4_backend.kernels.common.online_softmax import finalize_row
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.part_arrivals import MINE
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.tile_scheduler import TilePart, WorkTile
from fa4_backend.kernels.common.wgmma_fragment import ScoreScale, row_of_thread
from fa4_backend.kernels.schedule.work_list import MAX_PARTS
from fa4_backend.kernels.sm90.arguments import Outputs
from fa4_backend.kernels.sm90.config import part_floats, part_vectors
from fa4_backend.kernels.sm90.tile_parts import SCALE_LANE, RowScales, TileParts, running_weights
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WGMMA_ROWS

SLOTS_AT_ONCE = 8  # vectors that a lane has under way, while as many are added up
UNIT_VECTORS = 8  # of a thread, in the unit of a warp
PAIRS = WARPGROUP_THREADS // QUAD
ROW_ELEMS = VEC // 2  # of a vector, of each of its two rows
assert MAX_PARTS <= 2 * LANES and LANES % SLOTS_AT_ONCE == 0


class SlotStats(NamedTuple):
    """Of the slots with this lane's number, and with 32 more: row_max or weight, and row_sum, of both rows each."""

    rows: tuple[tuple[Float32, Float32], tuple[Float32, Float32]]
    sums: tuple[tuple[Float32, Float32], tuple[Float32, Float32]]
    before: tuple[tuple[Float32, Float32], tuple[Float32, Float32]] | None = None  # weights of the total, where tiles have pieces


class VectorSums(NamedTuple):
    """A lane's vector over all slots, of both rows."""

    rO: cute.Tensor  # (2, ROW_ELEMS) float32, relative to row_max
    row_max: cute.Tensor  # (2,) float32: the largest
    row_sum: cute.Tensor  # (2,) float32


class RowEnds(NamedTuple):
    """What finished rows need."""

    scale: ScoreScale | None  # of raw scores; None: they were in log2 units, or their scales lie in slots
    factor: Float32 | None  # multiplies O beside its denominator; None: nothing


@dataclass(frozen=True)
class PartShares:
    """Adding up by all, for one kernel."""

    config: PrefillConfig
    pack: PackGqa
    parts: TileParts  # which laid them down

    @cute.jit
    def add_up(
        self, outputs: Outputs, part: TilePart, here: Int32, share: Int32, work: WorkTile, ends: RowEnds, group: Int32, in_group: Int32
    ):
        """Add up this warpgroup's share of its rows, or all of them, and write them; nobody waits.

        Args:
            part: the last of the `here` parts that this entry of the list has filled.
            in_group: thread of the warpgroup.
        """
        warp, in_warp = in_group // LANES, in_group % LANES
        begin, end = Int32(0), Int32(PAIRS * self.row_units)
        if share == MINE:
            rank = part.slot - part.first_slot
            begin, end = (PAIRS * self.row_units * x // part.num_parts for x in (rank + 1 - here, rank + 1))
        for unit in cutlass.range(begin + warp, end, WARPGROUP_THREADS // LANES, unroll=1):
            pair = unit // self.row_units
            v = unit % self.row_units * UNIT_VECTORS + in_warp // QUAD
            thread = pair * QUAD + in_warp % QUAD
            place = self._slots(outputs, part, group)
            # Where a row's vectors are no whole units (head dimension 96), the last lanes read a vector that is not theirs.
            vector = place + (cutlass.min(v, self.o_vectors - 1) * WARPGROUP_THREADS + thread) * VEC
            loaded = self._load(vector, part, Int32(0))
            stats = self._stats(place + (self.o_vectors * WARPGROUP_THREADS + pair * QUAD) * VEC, part, in_warp)
            total = self._no_sums()
            for r in cutlass.range_constexpr(2):
                total.row_max[r] = self._largest(cute.arch.fmax(stats.rows[0][r], stats.rows[1][r]))
            weights = self._weights(stats, total.row_max)
            for first in cutlass.range(0, part.num_parts, SLOTS_AT_ONCE, unroll=1):
                ahead = self._load(vector, part, first + SLOTS_AT_ONCE)
                self._add(total, loaded, weights, part, first)
                loaded.store(ahead.load())
            if v < self.o_vectors:
                scales = (ends.scale, ends.scale)
                if const_expr(self.parts.has_row_scales):
                    numbers = cute.make_rmem_tensor(VEC, Float32)
                    source = place + (self.o_vectors * WARPGROUP_THREADS + pair * QUAD + SCALE_LANE) * VEC
                    cute.autovec_copy(cute.make_tensor(source.align(4 * VEC), cute.make_layout(VEC)), numbers)
                    scales = tuple(ScoreScale.of_row(numbers[2 + r]) for r in range(2))
                self._write(outputs, work, ends, scales, total, v, thread, group)

    def _no_sums(self) -> VectorSums:
        """Sums before the first slot: views of one tensor of registers."""
        numbers = cute.make_rmem_tensor(2 * ROW_ELEMS + 4, Float32)
        numbers.fill(0.0)
        rO = cute.make_tensor(numbers.iterator, cute.make_layout((2, ROW_ELEMS), stride=(ROW_ELEMS, 1)))
        row_max, row_sum = (cute.make_tensor(numbers.iterator + 2 * ROW_ELEMS + 2 * i, cute.make_layout(2)) for i in (0, 1))
        return VectorSums(rO, row_max, row_sum)

    def _slots(self, outputs: Outputs, part: TilePart, group: Int32) -> cute.Pointer:
        """Where this warpgroup's vectors begin in the tile's first slot."""
        c = self.config
        offset = Int64(part.first_slot) * part_floats(c) + group * (part_vectors(c) * WARPGROUP_THREADS * VEC)
        return outputs.parts.mSlots.iterator + offset

    def _load(self, vector: cute.Pointer, part: TilePart, first: Int32) -> cute.Tensor:
        """A vector of `SLOTS_AT_ONCE` slots from `first` on; past the last slot that one's again."""
        loaded = cute.make_rmem_tensor(SLOTS_AT_ONCE * VEC, Float32)
        for i in range(SLOTS_AT_ONCE):
            slot = cutlass.min(first + i, part.num_parts - 1)
            source = cute.make_tensor((vector + slot * part_floats(self.config)).align(4 * VEC), cute.make_layout(VEC))
            cute.autovec_copy(source, cute.make_tensor(loaded.iterator + i * VEC, cute.make_layout(VEC)))
        return loaded

    def _stats(self, place: cute.Pointer, part: TilePart, in_warp: Int32) -> SlotStats:
        """Maxima and sums of a pair of rows, this lane's slots; of slots that there are not, those of no key.

        The first thread of a row has the sum of all.
        """
        rows, sums = [], []
        for slot in (in_warp, in_warp + LANES):
            values = cute.make_rmem_tensor(VEC, Float32)
            source = place + cutlass.min(slot, part.num_parts - 1) * part_floats(self.config)
            cute.autovec_copy(cute.make_tensor(source.align(4 * VEC), cute.make_layout(VEC)), values)
            is_slot = slot < part.num_parts
            rows.append(tuple(cutlass.select_(is_slot, values[r], -Float32.inf) for r in range(2)))
            sums.append(tuple(cutlass.select_(is_slot, values[2 + r], Float32(0.0)) for r in range(2)))
        return SlotStats(tuple(rows), tuple(sums))

    def _largest(self, value: Float32) -> Float32:
        """The largest of the warp's values."""
        for offset in (16, 8, 4, 2, 1):
            value = cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset))
        return value

    def _weights(
        self,
        stats: SlotStats,
        row_max: cute.Tensor,  # (2,) float32
    ) -> SlotStats:
        """Weights in place of maxima."""
        if self.config.has_pieces:
            return self._weights_of_pieces(stats)
        finite = [cutlass.select_(x == -Float32.inf, Float32(0.0), x) for x in (row_max[0], row_max[1])]
        rows = [tuple(cute.math.exp2(row[r] - finite[r], fastmath=True) for r in range(2)) for row in stats.rows]
        return SlotStats(tuple(rows), stats.sums)

    def _weights_of_pieces(self, stats: SlotStats) -> SlotStats:
        """The same of pieces, each added to the total of those in slots before it."""
        old, new = [], []
        so_far = [-Float32.inf, -Float32.inf]  # over the slots before these
        for row in stats.rows:
            of_rows = []
            for r in range(2):
                totals = cute.arch.fmax(self._largest_up_to(row[r]), so_far[r])
                total = cute.arch.shuffle_sync_up(totals, 1, mask_and_clamp=0)
                total = cutlass.select_(cute.arch.lane_idx() == 0, so_far[r], total)
                of_rows.append(running_weights(total, row[r]))
                so_far[r] = cute.arch.shuffle_sync(totals, LANES - 1)
            old.append(tuple(weights.old for weights in of_rows))
            new.append(tuple(weights.new for weights in of_rows))
        return SlotStats(tuple(new), stats.sums, tuple(old))

    def _largest_up_to(self, value: Float32) -> Float32:
        """The largest of this lane's value and those of the lanes before it."""
        for step in (1, 2, 4, 8, 16):
            below = cute.arch.shuffle_sync_up(value, step, mask_and_clamp=0)
            value = cutlass.select_(cute.arch.lane_idx() >= step, cute.arch.fmax(value, below), value)
        return value

    def _add(
        self,
        total: VectorSums,
        loaded: cute.Tensor,  # (SLOTS_AT_ONCE * VEC,) float32, from `_load`
        weights: SlotStats,
        part: TilePart,
        first: Int32,
    ) -> None:
        """Add slots from `first` on, one after the other."""
        for r in range(2):
            of_slots = [cutlass.select_(first < LANES, own[0][r], own[1][r]) for own in weights if own is not None]
            for i in range(SLOTS_AT_ONCE):
                slot = first + i
                w, s, *old = (cute.arch.shuffle_sync(x, slot % LANES) for x in of_slots)

                def scaled(number: Float32, old: list[Float32] = old) -> Float32:
                    return ptx.mul_rn(number, old[0]) if old else number

                for e in range(ROW_ELEMS):
                    o = cutlass.select_(slot < part.num_parts, loaded[i * VEC + ROW_ELEMS * r + e], Float32(0.0))
                    total.rO[r, e] = cute.math.fma(o, w, scaled(total.rO[r, e]))
                total.row_sum[r] = cute.math.fma(s, w, scaled(total.row_sum[r]))

    @cute.jit
    def _write(
        self,
        outputs: Outputs,
        work: WorkTile,
        ends: RowEnds,
        scales: RowScales | tuple[None, None],
        total: VectorSums,
        v: Int32,
        thread: Int32,
        group: Int32,
    ):
        """Two columns of two rows."""
        c = self.config
        column = 8 * v + 2 * (thread % QUAD)
        for r in cutlass.range_constexpr(2):
            packed = self.pack.row(group * WGMMA_ROWS + row_of_thread(thread, r), work.m_block, work.seqlen)
            if packed.is_valid:
                head = work.kv_head_idx * self.pack.q_per_kv + packed.head
                sink = None
                if const_expr(c.mask.has_sinks):
                    sink = Float32(outputs.mSinks[head])
                o, row_max = [total.rO[r, e] for e in range(ROW_ELEMS)], total.row_max[r]
                row_max = row_max if scales[r] is None else scales[r].true_max(row_max)
                result = finalize_row(row_max, total.row_sum[r], sink)
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
    def row_units(self) -> int:
        """Units of a pair of rows."""
        return -(-self.o_vectors // UNIT_VECTORS)

    @property
    def o_vectors(self) -> int:
        """Vectors of O of a thread."""
        return part_vectors(self.config) - 1
