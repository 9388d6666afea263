"""The consumer warpgroups: each keeps half of O's columns, 64 rows x 256 in registers, and makes every other block's weights for both.

Blocks come in pairs. Of a pair with blocks a and b, S their scores, P their weights, and V halves L and R:

    first warpgroup    S(a) = Q K(a)^T | softmax, P(a) -> | O += P(a) V(a) L       | -> P(b), O += P(b) V(b) L
    second warpgroup   S(b) = Q K(b)^T, -> P(a), O += P(a) V(a) R | softmax, P(b) -> | O += P(b) V(b) R

so one's softmax runs under the other's products. A warpgroup takes its own weights from registers, the other one's from shared memory,
where they lie in the place of the block's rotary part. With them comes the reference maximum of their rows, which both share:
block b begins with that of block a, the next a with that of this b. O is rescaled only where a reference moved (`RESCALE_THRESHOLD`).

Who releases what of a tile: each warpgroup its half of V, after the product that read it; the rotary part's place who took the weights
from it. The block's scores have come before, since no product with V is without the weights made of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.cluster_ops import arrive_at
from fa4_backend.kernels.common.decode_entry import Entry, StepTensors, entry_of
from fa4_backend.kernels.common.mask import Columns, MaskValues
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.common.wgmma_fragment import FP8_LIFT, RowFragment, RowStats, ScoreScale, flat, log2_scale, row_of_thread
from fa4_backend.kernels.mla_decode.config import (
    KV_STAGE,
    LATENT_DIM,
    PART_DIM,
    RESCALE_THRESHOLD,
    TILE_M,
    TILE_N,
    MlaDecodeConfig,
)
from fa4_backend.kernels.mla_decode.fragments import WideFragment
from fa4_backend.kernels.mla_decode.merge import Merge, ResultTensors, Scales
from fa4_backend.kernels.mla_decode.shared_rows import SharedRows
from fa4_backend.kernels.mla_decode.storage import GROUPS, LEFT, RIGHT, ROPE, SIDE_THREADS, SIDES, MlaStorage, SharedTensors
from fa4_backend.kernels.mla_decode.work import Blocks, MlaWork
from fa4_backend.kernels.schedule.work_list import NUM_ENTRIES

SIDE_BARRIER = 1  # first of SIDES named barriers: the threads of a warpgroup
K_STEPS = PART_DIM // 16  # products of 16 elements a part
FIRST, SECOND = 0, 1  # the warpgroups, and the blocks of a pair that they make the weights of


class Mmas(NamedTuple):
    """Products of a warpgroup."""

    qk: cute.TiledMma  # 64 rows x 64 keys
    pv: cute.TiledMma  # 64 rows x 256 columns, weights in registers
    pv_shared: cute.TiledMma  # the same, weights in shared memory


class Products(NamedTuple):
    """Operands of this warpgroup's products."""

    mmas: Mmas
    tSrQ: cute.Tensor
    tSrK: cute.Tensor  # last mode: stage
    tOrP: cute.Tensor  # weights in shared memory; last mode: stage
    tOrVt: cute.Tensor  # this side's half; last mode: stage
    rP: cute.Tensor  # 16-bit weights, A operand
    rO: cute.Tensor  # float32, relative to the rows' reference


class Rows(NamedTuple):
    """This thread's two rows of an entry."""

    columns: tuple[Columns, Columns]
    seqlen_k: Int32
    full_end: Int32  # blocks before it need no mask
    scales: tuple[ScoreScale, ScoreScale]  # of raw scores of each row


class Pair(NamedTuple):
    """Where a pair of blocks lies."""

    n_block: Int32  # of the first
    first: RingPosition
    second: RingPosition
    is_last: Boolean  # this side makes no more scores of the entry


class WeightPhases(NamedTuple):
    """Parity of the next weights of a pair's first and of its second block."""

    first: Int32
    second: Int32


@dataclass(frozen=True)
class ConsumerWarpgroup:
    """Role of warpgroups 1 and 2: sides 0 and 1."""

    config: MlaDecodeConfig
    storage: MlaStorage
    work: MlaWork
    merge: Merge
    shared_rows: SharedRows

    @cute.jit
    def run(
        self,
        side: cutlass.Constexpr[int],
        mmas: Mmas,
        step: StepTensors,
        values: MaskValues,
        results: ResultTensors,
        shared: SharedTensors,
    ) -> Int32:
        """Work off the CTA's entries; returns how many of them are parts of row groups, which `join_parts` adds up."""
        thread = cute.arch.thread_idx()[0] % SIDE_THREADS
        products = self._operands(side, mmas, shared, thread)
        stats = RowStats(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
        totals = RowStats(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32))
        scales = self._scales(values, results)
        kv, phases = RingPosition(Int32(0), Int32(0)), WeightPhases(Int32(0), Int32(0))
        q_phase, num_pending, turn = Int32(0), Int32(0), Int32(0)
        num_entries = step.mFirst[self.work.list_idx(), NUM_ENTRIES]
        for _ in cutlass.range(num_entries, unroll=1):
            cute.arch.mbarrier_wait(shared.barriers.q_full, q_phase)
            q_phase ^= 1
            entry = entry_of(lambda field: shared.sEntry[field], step.bounds)
            blocks = self.work.blocks(entry, values)
            if const_expr(self.config.is_scaled):
                self.shared_rows.scale_query(shared)
                self.merge.meet()
            rows = self._rows(entry, blocks, values, scales, thread, shared)
            if const_expr(not self.config.has_pieces):
                if blocks.begin + side >= blocks.end:
                    self._release_query(shared)
            first_piece, last_piece = self.work.pieces(entry, step.split_blocks)
            totals.row_max.fill(-Float32.inf)
            totals.row_sum.fill(0.0)
            for piece in cutlass.range(first_piece, last_piece, unroll=1):
                begin, end = self.work.piece_blocks(piece, blocks, step.split_blocks)
                products.rO.fill(0.0)
                stats.row_max.fill(-Float32.inf)
                stats.row_sum.fill(0.0)
                for n_block in cutlass.range(begin, end, 2, unroll=1):
                    second = advance(kv, KV_STAGE)
                    has_second = n_block + 1 < end
                    pair = Pair(n_block, kv, second, self._is_last(side, n_block, blocks))
                    if const_expr(side == FIRST):
                        self._first(products, stats, rows, pair, has_second, phases, shared)
                    else:
                        self._second(products, stats, rows, pair, has_second, phases, shared)
                    kv = advance(kv, KV_STAGE)
                    phases = WeightPhases(phases.first ^ 1, phases.second)
                    if has_second:
                        kv = advance(kv, KV_STAGE)
                        phases = WeightPhases(phases.first, phases.second ^ 1)
                self.merge.finish_piece(
                    WideFragment(side), entry, piece - first_piece, piece == last_piece - 1, turn, products.rO, stats, totals, scales,
                    shared, results,
                )  # fmt: skip
                turn ^= 1
            if const_expr(self.config.has_pieces):
                self._release_query(shared)
            if entry.partial_slot >= 0:
                self.merge.postpone(entry, last_piece - first_piece, num_pending, shared)
                num_pending += 1
        return num_pending

    @cute.jit
    def join_parts(self, num_pending: Int32, step: StepTensors, values: MaskValues, results: ResultTensors, shared: SharedTensors):
        """Add up this CTA's share of split row groups. One code for both sides: whoever comes to it first has it fetched for both."""
        if num_pending > 0:
            self.merge.join_parts(num_pending, step, self._scales(values, results), shared, results)

    def _scales(self, values: MaskValues, results: ResultTensors) -> Scales:
        if const_expr(results.mScale is None):
            return Scales(ScoreScale.of_call(values.softmax_scale), None)
        latent_scale = Float32(results.mScale[0])
        return Scales(ScoreScale.of_log2(log2_scale(values.softmax_scale, latent_scale)), latent_scale)

    def _operands(self, side: int, mmas: Mmas, shared: SharedTensors, thread: Int32) -> Products:
        s = self.storage
        qk, pv, pv_shared = (mma.get_slice(0) for mma in mmas)
        columns = LATENT_DIM // SIDES
        return Products(
            mmas,
            qk.make_fragment_A(qk.partition_A(s.q_tile(shared))),
            qk.make_fragment_B(qk.partition_B(s.k_tiles(shared))),
            pv_shared.make_fragment_A(pv_shared.partition_A(s.p_tiles(shared))),
            pv.make_fragment_B(pv.partition_B(s.v_tiles(shared, side))),
            pv.make_fragment_A(pv.partition_shape_A((TILE_M, TILE_N))),
            cute.make_rmem_tensor(pv.partition_shape_C((TILE_M, columns)), Float32),
        )

    def _rows(self, entry: Entry, blocks: Blocks, values: MaskValues, scales: Scales, thread: Int32, shared: SharedTensors) -> Rows:
        columns, of_rows = [], [scales.score, scales.score]
        if self.config.is_scaled:
            # Powers of two: exact.
            of_rows = [ScoreScale.of_row(scales.score.log2 * shared.sFactor[row_of_thread(thread, i)]) for i in range(2)]
        for i in range(2):
            packed = self.work.row(self.work.first_row(entry) + row_of_thread(thread, i), entry.seqlen)
            columns.append(self.work.mask.columns(packed.token, entry.seqlen, values))
        return Rows(tuple(columns), entry.seqlen.seqlen_k, blocks.full_end, tuple(of_rows))  # type: ignore[arg-type]

    def _is_last(self, side: int, n_block: Int32, blocks: Blocks) -> Boolean:
        """Whether a pair's block of this side is its last of the entry. Pieces begin pairs anew; then Q is kept until the entry ends."""
        return Boolean(False) if self.config.has_pieces else n_block + side + 2 >= blocks.end

    # -- a pair of blocks, as either side sees it -----------------------------------------------------------------------------------

    @cute.jit
    def _first(
        self,
        products: Products,
        stats: RowStats,
        rows: Rows,
        pair: Pair,
        has_second: Boolean,
        phases: WeightPhases,
        shared: SharedTensors,
    ):
        """Weights of the pair's first block for both; O's left half."""
        rS = self._scores(products, rows, pair.n_block, pair.first, shared, FIRST)
        warpgroup.wait_group(0)
        if pair.is_last:
            self._release_query(shared)
        factors, moved = self._weights(products, stats, rows, rS, pair.n_block)
        self._publish(products, stats, pair.first, shared, FIRST)
        self._rescale(products, factors, moved)
        _issue(products.mmas.pv, products.rO, products.rP, products.tOrVt[None, None, None, pair.first.slot])
        warpgroup.wait_group(0)
        self._release(shared, LEFT, pair.first)
        if has_second:
            self._take(products, stats, phases.second, shared, SECOND)
            _issue(
                products.mmas.pv_shared, products.rO, products.tOrP[None, None, None, pair.second.slot],
                products.tOrVt[None, None, None, pair.second.slot],
            )  # fmt: skip
            warpgroup.wait_group(0)
            self._release(shared, LEFT, pair.second)
            self._release(shared, ROPE, pair.second)

    @cute.jit
    def _second(
        self,
        products: Products,
        stats: RowStats,
        rows: Rows,
        pair: Pair,
        has_second: Boolean,
        phases: WeightPhases,
        shared: SharedTensors,
    ):
        """Weights of the pair's second block for both; O's right half."""
        if has_second:
            rS = self._scores(products, rows, pair.n_block + 1, pair.second, shared, SECOND)
            self._take(products, stats, phases.first, shared, FIRST)
            self._accumulate_first(products, pair)
            warpgroup.wait_group(1)
            if pair.is_last:
                self._release_query(shared)
            factors, moved = self._weights(products, stats, rows, rS, pair.n_block + 1)
            self._publish(products, stats, pair.second, shared, SECOND)
            warpgroup.wait_group(0)
            self._release(shared, RIGHT, pair.first)
            self._release(shared, ROPE, pair.first)
            self._rescale(products, factors, moved)
            _issue(products.mmas.pv, products.rO, products.rP, products.tOrVt[None, None, None, pair.second.slot])
            warpgroup.wait_group(0)
            self._release(shared, RIGHT, pair.second)
        else:
            self._take(products, stats, phases.first, shared, FIRST)
            self._accumulate_first(products, pair)
            warpgroup.wait_group(0)
            self._release(shared, RIGHT, pair.first)
            self._release(shared, ROPE, pair.first)

    def _accumulate_first(self, products: Products, pair: Pair) -> None:
        slot = pair.first.slot
        _issue(products.mmas.pv_shared, products.rO, products.tOrP[None, None, None, slot], products.tOrVt[None, None, None, slot])

    @cute.jit
    def _scores(
        self, products: Products, rows: Rows, n_block: Int32, kv: RingPosition, shared: SharedTensors, side: cutlass.Constexpr[int]
    ) -> cute.Tensor:
        """Start S = Q K^T group by group as the tile comes; a tile that the sequence ends in is cleared behind its end first."""
        first = rows.seqlen_k - n_block * TILE_N
        box_rows = const_expr(self.config.box_rows)
        end = cutlass.min((first + box_rows - 1) // box_rows * box_rows, TILE_N)
        if const_expr(self.config.is_converted):
            end = Int32(0)  # who converts them has cleared them
        if first < end:
            self._clear_tail(first, end, kv, shared, side)
        rS = cute.make_rmem_tensor(products.mmas.qk.get_slice(0).partition_shape_C((TILE_M, TILE_N)), Float32)
        atom = cute.make_mma_atom(products.mmas.qk.op)
        tSrK = products.tSrK[None, None, None, kv.slot]
        for group in cutlass.range_constexpr(len(GROUPS)):
            cute.arch.mbarrier_wait(shared.barriers.kv_full[group] + kv.slot, kv.phase)
            if const_expr(group == 0):
                warpgroup.fence()
            for k in cutlass.range_constexpr(GROUPS[group][0] * K_STEPS, GROUPS[group][1] * K_STEPS):
                atom.set(warpgroup.Field.ACCUMULATE, Boolean(k > 0))
                cute.gemm(atom, rS, products.tSrQ[None, None, k], tSrK[None, None, k], rS)
        warpgroup.commit_group()
        return rS

    @cute.jit
    def _clear_tail(self, first: Int32, end: Int32, kv: RingPosition, shared: SharedTensors, side: cutlass.Constexpr[int]):
        """Zero V's rows behind the sequence's last key, `first .. end` of a box: a weight of 0 times NaN would be NaN. Other rows behind it
        are zeros that TMA wrote. The other side knows of it by the weights."""
        for group in cutlass.range_constexpr(len(GROUPS)):
            cute.arch.mbarrier_wait(shared.barriers.kv_full[group] + kv.slot, kv.phase)
        self.shared_rows.clear_values(shared, kv.slot, first, end)
        self._meet(side)

    def _weights(self, products: Products, stats: RowStats, rows: Rows, rS: cute.Tensor, n_block: Int32) -> tuple[cute.Tensor, Boolean]:
        """Scores to 16-bit weights in `products.rP`; the factors for O of earlier blocks, and whether any row of the warp has one."""
        fragment = RowFragment(TILE_N, RESCALE_THRESHOLD, FP8_LIFT if self.config.is_converted else 0.0)
        self._mask(fragment, rS, n_block, rows)
        before = [stats.row_max[i] for i in range(2)]
        factors = fragment.softmax(rS, stats, rows.scales, may_be_empty=True, is_first=False)
        fragment.to_operand(rS, products.rP)
        # LLVM would convert anew where products take them, behind the fence that they need before.
        words = cute.recast_tensor(flat(products.rP), Int32)
        for i in range(cute.size(words)):
            words[i] = ptx.keep_here(words[i])
        # Rows of no token may be NaN, which compares false.
        return factors, (stats.row_max[0] > before[0]) | (stats.row_max[1] > before[1])

    @cute.jit
    def _mask(self, fragment: cutlass.Constexpr, rS: cute.Tensor, n_block: Int32, rows: Rows):
        if n_block >= rows.full_end:
            fragment.mask(rS, n_block * TILE_N, rows.columns)

    @cute.jit
    def _publish(self, products: Products, stats: RowStats, kv: RingPosition, shared: SharedTensors, side: cutlass.Constexpr[int]):
        """Weights and reference to shared memory, for the other side."""
        thread = cute.arch.thread_idx()[0] % SIDE_THREADS
        copy = cute.make_tiled_copy_C(
            cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), self.storage.dtype), products.mmas.qk
        )
        thread_copy = copy.get_slice(thread)
        rP = cute.make_tensor(products.rP.iterator, cute.make_layout(products.mmas.qk.get_slice(0).partition_shape_C((TILE_M, TILE_N))))
        # All warps have read the rotary part.
        self._meet(side)
        cute.copy(thread_copy, thread_copy.retile(rP), thread_copy.partition_D(self.storage.p_tiles(shared)[None, None, kv.slot]))
        if thread % 4 == 0:
            for i in cutlass.range_constexpr(2):
                shared.sReference[side, row_of_thread(thread, i)] = stats.row_max[i]
        cute.arch.fence_proxy("async.shared", space="cta")
        self._arrive(shared.barriers.p_full + side, 0, 1)

    @cute.jit
    def _take(self, products: Products, stats: RowStats, phase: Int32, shared: SharedTensors, other: cutlass.Constexpr[int]):
        """Wait for the other side's weights; O and row_sum to the reference that comes with them."""
        thread = cute.arch.thread_idx()[0] % SIDE_THREADS
        cute.arch.mbarrier_wait(shared.barriers.p_full + other, phase)
        factors = cute.make_rmem_tensor(2, Float32)
        moved = Boolean(False)
        for i in cutlass.range_constexpr(2):
            reference = shared.sReference[other, row_of_thread(thread, i)]
            finite = cutlass.select_(reference == -Float32.inf, Float32(0.0), reference)
            moved = moved | (reference > stats.row_max[i])
            factors[i] = cute.math.exp2(stats.row_max[i] - finite, fastmath=True)
            stats.row_sum[i] = stats.row_sum[i] * factors[i]
            stats.row_max[i] = reference
        self._rescale(products, factors, moved)

    @cute.jit
    def _rescale(self, products: Products, factors: cute.Tensor, moved: Boolean):
        """O of earlier blocks times its rows' factors, where any row of the warp has one. No product with O is under way."""
        if cute.arch.vote_any_sync(moved):
            RowFragment(LATENT_DIM // SIDES, 0.0).rescale(products.rO, factors)

    # -- signals --------------------------------------------------------------------------------------------------------------------

    def _meet(self, side: int) -> None:
        """The threads of this warpgroup."""
        cute.arch.barrier(barrier_id=SIDE_BARRIER + side, number_of_threads=SIDE_THREADS)

    @cute.jit
    def _arrive(self, barrier: cute.Pointer, rank: Int32, cluster_size: cutlass.Constexpr[int]):
        """One arrival of the warp, behind what all its lanes did."""
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            arrive_at(barrier, rank, cluster_size)

    @cute.jit
    def _release(self, shared: SharedTensors, group: cutlass.Constexpr[int], kv: RingPosition):
        """This warpgroup has read a group: tell whoever loads it."""
        c = self.config
        if const_expr(c.is_converted):
            self._release_converted(shared, group, kv)
        else:
            rank = Int32(0)
            if const_expr(group == RIGHT):
                rank = Int32(c.cluster_size - 1)
            elif const_expr(group == ROPE):
                rank = kv.slot % c.cluster_size
            self._arrive(shared.barriers.kv_empty[group] + kv.slot, rank, c.cluster_size)

    @cute.jit
    def _release_converted(self, shared: SharedTensors, group: cutlass.Constexpr[int], kv: RingPosition):
        """The same of a tile that this CTA has converted: the left half's place is its own, to the others' come numbers from both CTAs."""
        ctas = const_expr(1 if group == LEFT else self.config.cluster_size)
        cute.arch.sync_warp()
        if cute.arch.lane_idx() < ctas:
            arrive_at(shared.barriers.kv_empty[group] + kv.slot, cute.arch.lane_idx(), ctas)

    def _release_query(self, shared: SharedTensors) -> None:
        """All lanes have the entry's ints in registers, and its scores are done."""
        self._arrive(shared.barriers.q_empty, Int32(0), 1)


def _issue(mma: cute.TiledMma, rO: cute.Tensor, a: cute.Tensor, b: cute.Tensor) -> None:
    """Start O += A B as a group of its own."""
    atom = cute.make_mma_atom(mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, Boolean(True))
    warpgroup.fence()
    for k in range(cute.size(a, mode=[2])):
        cute.gemm(atom, rO, a[None, None, k], b[None, None, k], rO)
    warpgroup.commit_group()
