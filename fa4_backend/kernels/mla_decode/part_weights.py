"""Adding up parts whose order no other sum has to follow: a part's weight is found once a row, then a vector is an FMA a value and part.

In batch-invariant mode pieces are added up as a single CTA does it, one after the other (`merge.fold`).
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.decode_entry import Entry
from fa4_backend.kernels.common.online_softmax import RowResult, finalize_row
from fa4_backend.kernels.common.pack_gqa import PackedRow
from fa4_backend.kernels.mla_decode.config import (
    CONSUMER_THREADS,
    VEC,
    WARP_ROWS,
    WARP_VECTORS,
    MlaDecodeConfig,
    tile_stats_bytes,
)
from fa4_backend.kernels.mla_decode.fragments import SlotVector
from fa4_backend.kernels.mla_decode.work import MlaWork

LANES = CONSUMER_THREADS // WARP_ROWS  # that share a row's parts
LSE_BYTES = 4  # behind a row's weight of the first slot


@dataclass(frozen=True)
class PartWeights:
    """Sums of one kernel's parts. In shared memory: reference and row_sum of each row of every slot, then a chunk of vectors of each."""

    config: MlaDecodeConfig
    work: MlaWork

    @cute.jit
    def weigh(
        self,
        pieces: Int32,
        first: Int32,  # vectors of the tile that are here, half-open
        end: Int32,
        memory: Int32,
        thread: Int32,
        true_max: cutlass.Constexpr,  # `Scales.true_max`
        of_value: cutlass.Constexpr,  # `Scales.of_value`
    ):
        """Put what O of a slot is multiplied by in place of each reference, and the rows' lse beside the first slot's. 16 threads a row."""
        step = const_expr(tile_stats_bytes(self.config))
        lane = thread % LANES
        for rows in cutlass.range(first // WARP_VECTORS, (end + WARP_VECTORS - 1) // WARP_VECTORS, unroll=1):
            at = memory + 8 * (rows * WARP_ROWS + thread // LANES)
            largest = -Float32.inf
            for slot in cutlass.range(lane, pieces, LANES, unroll=1):
                largest = cute.arch.fmax(largest, ptx.load_shared_f32(at + slot * step))
            for i in cutlass.range_constexpr(LANES.bit_length() - 1):
                largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, 1 << i))
            zero = cutlass.select_(largest == -Float32.inf, Float32(0.0), largest)
            total = Float32(0.0)
            for slot in cutlass.range(lane, pieces, LANES, unroll=1):
                row_max, row_sum = ptx.load_shared_f32x2(at + slot * step)
                total = cute.math.fma(row_sum, cute.math.exp2(row_max - zero, fastmath=True), total)
            for i in cutlass.range_constexpr(LANES.bit_length() - 1):
                total = total + cute.arch.shuffle_sync_bfly(total, 1 << i)
            result: RowResult = finalize_row(true_max(largest), total, None)
            factor = of_value(result.o_scale)
            for slot in cutlass.range(lane, pieces, LANES, unroll=1):
                row_max = ptx.load_shared_f32(at + slot * step)
                ptx.store_shared_f32(at + slot * step, cute.math.exp2(row_max - zero, fastmath=True) * factor)
            if lane == 0:
                ptx.store_shared_f32(at + LSE_BYTES, result.lse)

    @cute.jit
    def sum_vector(
        self,
        entry: Entry,
        tile_row: Int32,  # first packed row of the tile
        first: Int32,  # of the tile's vectors that are here
        i: Int32,
        count: Int32,
        memory: Int32,
        mO: cute.Tensor,
        mLse: cute.Tensor | None,
    ):
        """Add up the i-th of `count` vectors over all slots, and write it: two columns of two rows."""
        where, step = SlotVector.at(first + i), const_expr(tile_stats_bytes(self.config))
        row = where.row
        values, weights = memory + entry.num_pieces * step + i * (4 * VEC), memory + 8 * row
        sums = cute.make_rmem_tensor(VEC, Float32)
        sums.fill(0.0)
        for slot in cutlass.range(entry.num_pieces, unroll=4):
            vector = ptx.load_shared_f32x4(values + 4 * VEC * count * slot)
            for r in cutlass.range_constexpr(2):
                weight = ptx.load_shared_f32(weights + slot * step + 64 * r)
                for e in cutlass.range_constexpr(2):
                    sums[2 * r + e] = cute.math.fma(vector[2 * r + e], weight, sums[2 * r + e])
        column = where.column
        for r in cutlass.range_constexpr(2):
            packed = self.work.row(tile_row + row + 8 * r, entry.seqlen)
            if packed.is_valid:
                store_columns(mO, entry, packed, column, [sums[2 * r + e] for e in range(2)])
                if const_expr(mLse is not None):
                    if column == 0:
                        mLse[packed.head, entry.seqlen.q_begin + packed.token] = ptx.load_shared_f32(weights + 64 * r + LSE_BYTES)


def store_columns(mO: cute.Tensor, entry: Entry, packed: PackedRow, column: Int32, values: list[Float32]) -> None:
    """Two columns of a finished row to `out`, from `column` on."""
    pair = cute.make_rmem_tensor(2, mO.element_type)
    for e in range(2):
        pair[e] = mO.element_type(values[e])
    target = mO[entry.seqlen.q_begin + packed.token, packed.head, None].iterator + column
    cute.autovec_copy(pair, cute.make_tensor(target.align(4), cute.make_layout(2)))
