"""The load warp: walks the CTA's work list and keeps Q and the ring of K and V tiles filled."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from fa4_backend.kernels.common.block_info import BlockInfo
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.paged_kv import PagedKv, TmaOperand
from fa4_backend.kernels.common.tile_scheduler import WorkTile, read_tile, tile_range
from fa4_backend.kernels.sm90.storage import Barriers, RingPosition, advance


class Step(NamedTuple):
    """Tensors of the step that the load warp reads: page table, lengths and work list."""

    mPageTable: cute.Tensor  # (batch, max_pages_per_seq) int32
    mCuSeqlensQ: cute.Tensor  # (batch + 1,) int32
    mSeqUsedK: cute.Tensor  # (batch,) int32
    mTiles: cute.Tensor  # (max_tiles, 8) int32
    mBegin: cute.Tensor  # (num_ctas + 1,) int32
    page_size: Int32  # tokens a page
    num_pages: Int32  # pages of the pool


class MaskValues(NamedTuple):
    """Runtime values of the mask and of the score transforms."""

    softmax_scale: Float32  # multiplies raw logits
    softcap: Float32
    window_left: Int32
    window_right: Int32  # 0 for causal


class QueryOperand(NamedTuple):
    """TMA copy of Q, its coordinate tensor and its place in shared memory."""

    atom: cute.CopyAtom
    mQ: cute.Tensor
    sQ_ptr: cute.Pointer


@dataclass(frozen=True)
class LoadWarp:
    """Role of one warp of warpgroup 0."""

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
        k: TmaOperand,
        v: TmaOperand,
        barriers: Barriers,
        sWork: cute.Tensor,  # (WORK_INTS,) int32 in shared memory
    ):
        """Load every tile of this CTA. Waits for a slot's consumers, then issues the slot's boxes on one barrier."""
        stages = self.k_pages.stages
        k_bytes = self.k_pages.tile_n * self.k_pages.part_elems * self.k_pages.num_parts * self.element_bytes
        v_bytes = self.v_pages.tile_n * self.v_pages.part_elems * self.v_pages.num_parts * self.element_bytes
        position = RingPosition(Int32(0), Int32(0))
        q_phase = Int32(0)
        tile_begin, tile_end = tile_range(step.mBegin)
        for tile_idx in cutlass.range(tile_begin, tile_end, unroll=1):
            work = read_tile(step.mTiles, step.mCuSeqlensQ, step.mSeqUsedK, tile_idx)
            seqlen_k = work.seqlen.seqlen_k
            blocks = self.blocks.blocks(
                work.m_block, work.seqlen, values.window_left, values.window_right, work.n_block_begin, work.n_block_end
            )
            n_block = blocks.end - 1
            k_boxes = self.k_pages.find_boxes(step.mPageTable, work.seq_idx, n_block, seqlen_k, step.page_size, step.num_pages)
            cute.arch.mbarrier_wait(barriers.q_empty, q_phase ^ 1)
            self._load_query(query, work, barriers, sWork)
            q_phase ^= 1
            self._fill(k, self.k_pages, k_boxes, work.kv_head_idx, position, barriers, k_bytes)
            position = advance(position, stages)
            v_boxes = k_boxes
            for _ in cutlass.range(blocks.end - blocks.begin - 1, unroll=1):
                n_block -= 1
                k_boxes = self.k_pages.find_boxes(step.mPageTable, work.seq_idx, n_block, seqlen_k, step.page_size, step.num_pages)
                self._fill(k, self.k_pages, k_boxes, work.kv_head_idx, position, barriers, k_bytes)
                position = advance(position, stages)
                self._fill(v, self.v_pages, v_boxes, work.kv_head_idx, position, barriers, v_bytes)
                position = advance(position, stages)
                v_boxes = k_boxes
            self._fill(v, self.v_pages, v_boxes, work.kv_head_idx, position, barriers, v_bytes)
            position = advance(position, stages)

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
        num_bytes: cutlass.Constexpr[int],
    ):
        """Fill the slot at `position` once its consumers have left it."""
        full = barriers.kv_full + position.slot
        cute.arch.mbarrier_wait(barriers.kv_empty + position.slot, position.phase ^ 1)
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
        cute.arch.sync_warp()
        pages.load(operand, boxes, kv_head_idx, position.slot, full)
