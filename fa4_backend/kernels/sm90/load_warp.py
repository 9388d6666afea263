"""The load warps: they walk the CTA's work list and keep Q and the ring of K and V tiles filled."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_backend.kernels.common.block_info import BlockInfo
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.paged_kv import PagedKv, TmaOperand
from fa4_backend.kernels.common.tile_scheduler import WorkTile, read_tile, tile_range
from fa4_backend.kernels.sm90.arguments import MaskValues, Step
from fa4_backend.kernels.sm90.storage import Barriers, RingPosition, advance


class QueryOperand(NamedTuple):
    """TMA copy of Q, its coordinate tensor and its place in shared memory."""

    atom: cute.CopyAtom
    mQ: cute.Tensor
    sQ_ptr: cute.Pointer


@dataclass(frozen=True)
class LoadWarp:
    """Role of warps 0 and 1 of warpgroup 0: Q and K, and V."""

    blocks: BlockInfo
    pack: PackGqa
    k_pages: PagedKv
    v_pages: PagedKv
    element_bytes: int

    @cute.jit
    def run(
        self,
        step: Step,
        values: MaskValues,
        query: QueryOperand,
        operands: tuple[TmaOperand, TmaOperand],  # K, V
        barriers: Barriers,
        sWork: cute.Tensor,  # (WORK_INTS,) int32 in shared memory
        loads_v: cutlass.Constexpr[int],  # 0: Q, the tile's numbers and K; 1: V
    ):
        """Load one operand of every tile of this CTA. Waits for a slot's consumers, then issues the slot's boxes on one barrier.

        Both load warps count every slot of the ring and fill their own.
        """
        pages = self.v_pages if const_expr(loads_v) else self.k_pages
        position = RingPosition(Int32(0), Int32(0))
        q_phase = Int32(0)
        tile_begin, tile_end = tile_range(step.mBegin)
        for tile_idx in cutlass.range(tile_begin, tile_end, unroll=1):
            work = read_tile(step.mTiles, step.mCuSeqlensQ, step.mSeqUsedK, tile_idx)
            blocks = self.blocks.blocks(
                work.m_block, work.seqlen, values.window_left, values.window_right, work.n_block_begin, work.n_block_end
            )
            if const_expr(not loads_v):
                cute.arch.mbarrier_wait(barriers.q_empty, q_phase ^ 1)
                self._load_query(query, work, barriers, sWork)
                q_phase ^= 1
            # The ring is K0 K1 V0 K2 V1 ... K(n-1) V(n-2) V(n-1): every slot but K0 and the last V is half of a pair.
            num_blocks = blocks.end - blocks.begin
            for i in cutlass.range(num_blocks, unroll=1):
                boxes = pages.find_boxes(
                    step.mPageTable, work.seq_idx, blocks.end - 1 - i, work.seqlen.seqlen_k, step.page_size, step.num_pages
                )
                if const_expr(loads_v):
                    position = advance(position, pages.stages)
                    if i < num_blocks - 1:
                        position = advance(position, pages.stages)
                self._fill(operands[loads_v], pages, boxes, work.kv_head_idx, position, barriers)
                if const_expr(not loads_v):
                    position = advance(position, pages.stages)
                    if i > 0:
                        position = advance(position, pages.stages)
            # On to the next tile's K0.
            position = advance(position, pages.stages)

    @cute.jit
    def _load_query(self, query: QueryOperand, work: WorkTile, barriers: Barriers, sWork: cute.Tensor):
        """Hand the tile's numbers and its Q to the consumers; the caller has waited for the buffer."""
        if cute.arch.lane_idx() == 0:
            fields = (
                work.kv_head_idx, work.m_block, work.n_block_begin, work.n_block_end,
                work.seqlen.q_begin, work.seqlen.seqlen_q, work.seqlen.seqlen_k,
            )  # fmt: skip
            for i in cutlass.range_constexpr(len(fields)):
                sWork[i] = fields[i]
            cute.arch.mbarrier_arrive_and_expect_tx(barriers.q_full, self.pack.box_elems * self.element_bytes)
        cute.arch.sync_warp()
        first_token = work.seqlen.q_begin + work.m_block * self.pack.tokens_per_tile
        self.pack.load(query.atom, query.mQ, query.sQ_ptr, work.kv_head_idx, first_token, barriers.q_full)

    @cute.jit
    def _fill(
        self,
        operand: TmaOperand,
        pages: cutlass.Constexpr,
        boxes,
        kv_head_idx: Int32,
        position: RingPosition,
        barriers: Barriers,
    ):
        """Fill the slot at `position` once its consumers have left it."""
        full = barriers.kv_full + position.slot
        cute.arch.mbarrier_wait(barriers.kv_empty + position.slot, position.phase ^ 1)
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, pages.tile_elems * self.element_bytes)
        cute.arch.sync_warp()
        pages.load(operand, boxes, kv_head_idx, position.slot, full)
