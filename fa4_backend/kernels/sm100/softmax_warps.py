"""Softmax warps: a group of four for each query tile, a row a thread. S from TMEM, P back over it, O kept at the reference's scale."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass._mlir import ir
from cutlass._mlir.dialects import arith, vector
from cutlass._mlir.dialects import math as math_ir

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import tcgen05_ops
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.branches import when_scalars
from fa4_backend.kernels.common.fp8 import result_factor
from fa4_backend.kernels.common.hardware import LANES
from fa4_backend.kernels.common.mask import Columns, MaskValues
from fa4_backend.kernels.common.online_softmax import LOG2_E, finalize_row
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.common.seqlen_info import MAX_INT32
from fa4_backend.kernels.sm100.block_weights import CHUNK, BlockWeights, Scores
from fa4_backend.kernels.sm100.storage import STATS_BYTES
from fa4_backend.kernels.sm100.tile_bytes import o_pitch
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE, WARPGROUP
from fa4_backend.kernels.sm100.work import Geometry, HeadTensors, Place, WorkItem, WorkTensors


class Alibi(NamedTuple):
    """A row's linear bias."""

    diagonal: Int32  # KV column of the row's own token
    slope: Float32  # in units of a score


@dataclass(frozen=True)
class SoftmaxWarps:
    """One body for all groups; the group is a runtime value."""

    geometry: Geometry

    @cute.jit
    def run(self, place: Place, work: WorkTensors, heads: HeadTensors):
        """Walk the entries; owns the consumer side of S and the producer sides of P and of the rows' statistics."""
        g, config = self.geometry, self.geometry.config.kernel
        q_idx = place.warp_idx // WARPGROUP
        warp = place.warp_idx % WARPGROUP
        row = warp * LANES + place.lane_idx
        lanes = warp * LANES << tcgen05_ops.LANE_SHIFT
        stats = place.smem_base + g.storage.stats + row * o_pitch(g.config) + q_idx * STATS_BYTES
        values, scale_log2 = work.values, self.scale_log2(work.values)
        # A group's buffer of S: its tile's own, or of a lone tile both in turns.
        buffer, s_phase, pv_phase, stats_phase = q_idx, Int32(0), Int32(0), Int32(0)
        block = BlockWeights(g.config)
        s_tmem = g.tmem.s_at(place.tmem_base, buffer) + lanes
        feed = RingPosition(Int32(0), Int32(0))
        has_tile = g.has_tile(place, feed)
        while has_tile:
            item = g.read_item(place, work, feed)
            if const_expr(config.has_kv_scales):
                values = self.values_of(work, heads, item)
                scale_log2 = self.scale_log2(values)
            packed = g.pack.row(ptx.keep_here(row), g.q_tile(place, item.tile, q_idx), item.tile.seqlen)
            head = item.tile.kv_head_idx * config.q_per_kv + packed.head
            alibi = self.alibi_of(heads, item, packed.token, head, packed.is_valid, scale_log2)
            # A row without a query token must not ask for a second pass, whatever its scores are.
            row_max, row_sum = -Float32.inf, Float32(0.0)
            if not packed.is_valid:
                row_max = Float32(0.0)
            for i in range(item.num_blocks, unroll=1):
                n_block = item.blocks.end - 1 - i
                if const_expr(g.config.q_tiles == 1):
                    s_tmem = g.tmem.s_at(place.tmem_base, buffer) + lanes
                p_tmem = s_tmem + (g.tmem.p - g.tmem.s)
                barrier = g.full(place, "s_mma_to_softmax", buffer)
                ptx.mbarrier_wait(barrier, s_phase)
                tcgen05_ops.fence_after_sync()
                columns = functools.partial(self.columns, place, work, item, row, q_idx)
                load = functools.partial(self.load_scores, s_tmem, values, alibi, columns, item, n_block, barrier, s_phase)
                wait_again = functools.partial(ptx.mbarrier_wait, barrier, s_phase)
                weights = block.decide(load, wait_again, i == 0, row_max, row_sum, scale_log2)
                if i > 0 and cute.arch.vote_any_sync(weights.factor != 1.0):
                    # S of this block has arrived, so PV of the block before it is done. A lone tile has its next S before that.
                    if const_expr(g.config.q_tiles == 1):
                        ptx.mbarrier_wait(g.full(place, "pv_mma_to_softmax"), pv_phase ^ 1)
                        tcgen05_ops.fence_after_sync()
                    self.rescale(g.tmem.o_at(place.tmem_base, buffer) + lanes, weights.factor)
                self.store_weights(place, buffer, p_tmem, weights.first, 0, "p_softmax_to_mma")
                rest, rest_sum = block.weigh(weights.rest, block.first_chunks, scale_log2, block.offset(weights.row_max))
                self.store_weights(place, buffer, p_tmem, rest, block.first_chunks, "p_rest_softmax_to_mma")
                row_max, row_sum = weights.row_max, weights.row_sum + rest_sum
                if const_expr(g.config.q_tiles == 1):
                    pv_phase ^= 1
                    s_phase ^= buffer  # a buffer comes again two blocks later
                    buffer ^= 1
                else:
                    s_phase ^= 1
            # Read and worked out again instead of kept through the loop, whose registers are all taken.
            here = feed._replace(slot=ptx.keep_here(feed.slot))
            item = g.read_item(place, work, here)
            packed = g.pack.row(ptx.keep_here(row), g.q_tile(place, item.tile, q_idx), item.tile.seqlen)
            head = item.tile.kv_head_idx * config.q_per_kv + packed.head
            sink = sink_of(config, heads, head, packed.is_valid)
            result = finalize_row(row_max, row_sum, sink)
            warp_edge = q_idx * WARPGROUP + warp
            ptx.mbarrier_wait(g.empty(place, "stats_softmax_to_correction", warp_edge), stats_phase ^ 1)
            o_scale = result.o_scale
            factor = result_factor(heads.mVScale, heads.mOutScale, item.tile.kv_head_idx)
            if const_expr(factor is not None):
                o_scale = o_scale * factor
            writes_lse = packed.is_valid
            if const_expr(config.has_parts):
                # Of a part the row's numbers go to the correction warps, which close the row when they have all parts.
                is_part = g.read_part(place, here).slot >= 0
                o_scale = cutlass.select_(is_part, row_max, o_scale)
                writes_lse = writes_lse & (is_part == False)  # noqa: E712
                ptx.store_shared_f32(stats + 4, row_sum)
            ptx.store_shared_f32(stats, o_scale)
            ptx.warp_arrive(g.full(place, "stats_softmax_to_correction", warp_edge), place.lane_idx)
            stats_phase ^= 1
            if const_expr(config.has_lse):
                if writes_lse:
                    heads.mLse[head, item.tile.seqlen.q_begin + packed.token] = result.lse
            g.release_tile(place, feed)
            feed = advance(feed, FEED_STAGE)
            has_tile = g.has_tile(place, feed)

    def scale_log2(self, values: MaskValues) -> Float32:
        """What a score, capped where there is a cap, is multiplied by to be an exponent of 2."""
        return (values.softcap if self.geometry.config.kernel.mask.has_softcap else values.softmax_scale) * LOG2_E

    def values_of(self, work: WorkTensors, heads: HeadTensors, item: WorkItem) -> MaskValues:
        """The call's values for an item with K in FP8, whose scores are products with K as it is stored, and of Q as it is given."""
        scale = work.values.softmax_scale * heads.mKScale[item.tile.kv_head_idx]
        if const_expr(heads.mQScale is not None):
            scale = scale * heads.mQScale[item.tile.kv_head_idx]
        return work.values._replace(softmax_scale=scale)

    @cute.jit
    def alibi_of(self, heads: HeadTensors, item: WorkItem, token: Int32, head: Int32, is_valid: Boolean, scale_log2: Float32):
        """The row's bias; None without ALiBi."""
        alibi = None
        if const_expr(self.geometry.config.kernel.mask.has_alibi):
            slope = Float32(0.0)
            if is_valid:
                slope = heads.mSlopes[head] * LOG2_E / scale_log2
            alibi = Alibi(item.tile.seqlen.diagonal + token, slope)
        return alibi

    def columns(self, place: Place, work: WorkTensors, item: WorkItem, row: Int32, q_idx: Int32) -> Columns:
        """Columns that a row sees, worked out where it stands; idle rows are treated as their token would be."""
        g, seqlen = self.geometry, item.tile.seqlen
        packed = g.pack.row(ptx.keep_here(row), g.q_tile(place, item.tile, q_idx), seqlen)
        seen = g.block_info.mask.columns(packed.token, seqlen, work.values)
        if const_expr(g.config.kernel.has_parts):
            # See `Geometry.read_item`.
            tile_n = const_expr(g.config.kernel.tile.tile_n)
            seen = seen._replace(end=cutlass.min(seen.end, cutlass.min(item.tile.n_block_end, MAX_INT32 // tile_n) * tile_n))
        return seen

    def load_scores(
        self,
        s_tmem: Int32,
        values: MaskValues,
        alibi: Alibi | None,
        columns: Callable[[], Columns],  # of this thread's row
        item: WorkItem,
        n_block: Int32,
        barrier: Int32,  # that was waited for, in phase s_phase
        s_phase: Int32,
    ) -> Scores:
        """The row's 128 scores of a block, capped, biased and masked (-inf)."""
        config = self.geometry.config.kernel
        tile_n = config.tile.tile_n
        loads_maximum = self.geometry.config.tuning.loads_maximum and not (config.mask.has_softcap or config.mask.has_alibi)
        if loads_maximum:
            loads = [tcgen05_ops.load_max(s_tmem + base, CHUNK) for base in range(0, tile_n, CHUNK)]
            s = tcgen05_ops.wait_load([chunk for chunk, _ in loads])
            largest = vectors.max_of([vectors.from_elements([Float32(part).ir_value() for _, part in loads])], -Float32.inf)
        else:
            s = tcgen05_ops.wait_load([tcgen05_ops.load(s_tmem + base, CHUNK) for base in range(0, tile_n, CHUNK)])
        if config.mask.has_softcap:
            s = [soft_cap(v, values.softmax_scale * (2 * LOG2_E) / values.softcap) for v in s]
        first_col = n_block * tile_n
        if config.mask.has_alibi:
            # Kept inside the pass: hoisted, the 128 distances would take the registers of the scores.
            to_diagonal = ptx.keep_in_loop(alibi.diagonal - first_col)
            s = [add_alibi(v, to_diagonal - base, alibi.slope) for v, base in zip(s, range(0, tile_n, CHUNK), strict=True)]

        def masked(chunks: list[ir.Value]) -> list[ir.Value]:
            # This wait is over at once. It keeps the branch a branch: ptxas predicates even hundreds of instructions, which then cost
            # their issue slots in every block, but it cannot predicate a loop.
            ptx.mbarrier_wait(barrier, s_phase)
            first, seen = ptx.keep_here(first_col), columns()
            out = []
            for base, v in zip(range(0, tile_n, CHUNK), chunks, strict=True):
                bits = interval_bits(seen.begin - first - base, seen.end - first - base)
                out.append(vectors.select_by_bits(bits, v, float("-inf")))
            return out

        # Only blocks that some row does not see whole take the branch.
        needs_mask = (n_block < item.blocks.full_begin) | (n_block >= item.blocks.full_end)
        if not loads_maximum:
            return Scores(when_scalars(needs_mask, s, masked), None)

        def masked_with_largest(chunks: list[ir.Value]) -> list[ir.Value]:
            out = masked(chunks[:-1])
            return [*out, vectors.broadcast(vectors.max_of(out, -Float32.inf), 1)]

        *s, joined = when_scalars(needs_mask, [*s, vectors.broadcast(largest, 1)], masked_with_largest)
        return Scores(s, Float32(vectors.element(joined, 0)))

    def store_weights(self, place: Place, buffer: Int32, p_tmem: Int32, packed: list[ir.Value], first_chunk: int, edge: str) -> None:
        """Write some chunks of P and signal `edge`."""
        g = self.geometry
        for chunk, v in enumerate(packed, first_chunk):
            tcgen05_ops.store(p_tmem + chunk * g.tmem.p_columns(CHUNK), v)
        tcgen05_ops.wait_store()
        tcgen05_ops.fence_before_sync()
        g.group.warp_arrive(g.full_at_leader(place, edge, buffer), place.lane_idx)

    def rescale(self, o_tmem: Int32, factor: Float32) -> None:
        """O *= factor, this thread's row."""
        factors = vectors.broadcast(factor, 2)
        for base in range(0, self.geometry.config.kernel.head_dim_v, CHUNK):
            (o,) = tcgen05_ops.wait_load([tcgen05_ops.load(o_tmem + base, CHUNK)])
            scaled = vectors.from_pairs([vectors.mul2(vectors.pair(o, j), factors) for j in range(0, CHUNK, 2)])
            tcgen05_ops.store(o_tmem + base, vectors.as_words(scaled))
        tcgen05_ops.wait_store()


@cute.jit
def sink_of(config: cutlass.Constexpr, heads: HeadTensors, head: Int32, is_valid: Boolean):
    """A row's sink logit; None without sinks."""
    sink = None
    if const_expr(config.mask.has_sinks):
        sink = Float32(0.0)
        if is_valid:
            sink = Float32(heads.mSinks[head])
    return sink


def interval_bits(begin: Int32, end: Int32) -> Int32:
    """Word whose bits begin .. end (within 0 .. 32) are set."""
    low = cutlass.max(begin, 0)
    high = 32 - cutlass.min(cutlass.max(end, 0), 32)
    return ptx.shift_left(Int32(-1), low) & ptx.shift_right(Int32(-1), high)


def soft_cap(v: ir.Value, factor: Float32) -> ir.Value:
    """tanh of scores: 1 - 2 / (1 + exp2(s * factor)), factor = 2 log2(e) softmax_scale / softcap. tanh.approx would leave 11 bits."""
    factors, one, minus_two = (vectors.broadcast(x, 2) for x in (factor, Float32(1.0), Float32(-2.0)))
    pairs = []
    for j in range(0, CHUNK, 2):
        denominator = vectors.add2(vectors.exp2_approx(vectors.mul2(vectors.pair(v, j), factors)), one)
        inverse = [cute.arch.rcp_approx(Float32(vectors.element(denominator, i))).ir_value() for i in (0, 1)]
        pairs.append(vectors.fma2(vector.from_elements(vectors.float32s(2), inverse), minus_two, one))
    return vectors.from_pairs(pairs)


def add_alibi(v: ir.Value, distance: Int32, slope: Float32) -> ir.Value:
    """Scores minus slope * |distance - column| for the columns of a chunk; distance: of the chunk's first column to the diagonal."""
    base, slope = Float32(distance).ir_value(), (-slope).ir_value()
    # Element by element: the columns are then immediates, where pairs of them would take 32 registers.
    apart = [math_ir.absf(arith.subf(base, Float32(float(j)).ir_value())) for j in range(CHUNK)]
    return vector.from_elements(vectors.float32s(CHUNK), [math_ir.fma(apart[j], slope, vectors.element(v, j)) for j in range(CHUNK)])
