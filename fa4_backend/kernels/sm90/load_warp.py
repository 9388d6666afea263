"""The load warps: they walk the CTA's work list and keep Q and the ring of 16-bit K and V tiles filled."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.block_info import BlockInfo
from fa4_backend.kernels.common.fp8 import result_factor
from fa4_backend.kernels.common.hardware import SWIZZLE_ALIGN
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.paged_kv import PageBoxes, PagedKv, TmaOperand
from fa4_backend.kernels.common.ragged_kv import RaggedBox, RaggedKv, RaggedOperand
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.common.seqlen_info import SeqlenInfo
from fa4_backend.kernels.common.tile_scheduler import (
    Queue,
    TilePart,
    WorkTile,
    leave_queue,
    part_of_entry,
    read_entry,
    read_queue,
    take_tile,
    tile_of_entry,
    wait_alone,
)
from fa4_backend.kernels.schedule.work_list import WHOLE
from fa4_backend.kernels.sm90.arguments import Step
from fa4_backend.kernels.sm90.storage import Barriers, Storage
from fa4_backend.kernels.sm90.tile_numbers import IS_TILE, K_SCALE, LINK, O_FACTOR, TAKEN_TILE, tile_numbers
from fa4_backend.kernels.sm90.tile_pieces import Piece, TilePieces
from fa4_backend.kernels.sm90.warp_roles import WORK_STAGE, has_own_slots


class QueryOperand(NamedTuple):
    """TMA copy of Q, its coordinate tensor and its place in shared memory."""

    atom: cute.CopyAtom
    mQ: cute.Tensor  # (num_q_heads, total_q, head_dim)
    sQ_ptr: cute.Pointer  # q_stage buffers


class LoadState(NamedTuple):
    """Where a load warp is."""

    position: RingPosition  # of the next tile of K or V
    q_position: RingPosition
    is_first: Boolean  # no tile of K or V was loaded


@dataclass(frozen=True)
class LoadWarp:
    """Role of warps 0 and 1 of warpgroup 0: Q and K, and V. sWork: (WORK_INTS, WORK_STAGE) int32 in shared memory (`tile_numbers.py`)."""

    storage: Storage
    blocks: BlockInfo
    pack: PackGqa
    k_boxes: PagedKv | RaggedKv
    v_boxes: PagedKv | RaggedKv
    pieces: TilePieces

    @cute.jit
    def run(
        self,
        step: Step,
        values: MaskValues,
        query: QueryOperand,
        operands: tuple[TmaOperand | RaggedOperand, ...],  # K, V
        barriers: Barriers,
        sWork: cute.Tensor,
        loads_v: cutlass.Constexpr[int],  # 0: Q, the tile's numbers and K; 1: V
    ):
        """Load one operand of every tile of this CTA. Waits for a slot's consumers, then issues the slot's boxes on one barrier.

        Both load warps count every slot of the ring and fill their own. The one that loads K takes tiles from the queue, each when
        all of the one before is asked for, and tells the other. Behind the last tile stands an empty one: consumers begin a tile's scores
        while they end the one before, and its numbers tell them that there are none to make.

        Most CTAs of a small step have one short tile, whose first loads come as soon as memory allows: its entry is read beside the queue,
        by its place, and pages are looked up a block ahead.
        """
        c = self.storage.config
        tiles = self.v_boxes if const_expr(loads_v) else self.k_boxes
        position = RingPosition(Int32(0), Int32(0))
        own_slots = const_expr(has_own_slots(c))
        if const_expr(loads_v):  # the ring is K0 K1 V0 K2 V1 ..., or K0 - K1 V0 K2 V1 ...
            position = advance(position, tiles.stages)
            if const_expr(own_slots):
                if cute.arch.lane_idx() == 0:
                    cute.arch.mbarrier_arrive(barriers.kv_full + position.slot)
                position = advance(position, tiles.stages)
            position = advance(position, tiles.stages)
        is_first = Boolean(True)
        q_position = RingPosition(Int32(0), Int32(0))
        feed = RingPosition(Int32(0), Int32(0))
        tile_idx, _, _ = cute.arch.block_idx()
        word = read_entry(step.mTiles, tile_idx)
        queue = read_queue(step.mQueue)
        wait_alone(queue, c.is_dependent)
        if queue.own == 0:
            tile_idx = self._next_tile(step, queue, feed, barriers, sWork, loads_v)
            feed = advance(feed, WORK_STAGE)
            word = read_entry(step.mTiles, tile_idx)
        while tile_idx < queue.total:
            work = tile_of_entry(word, step.bounds)
            state = LoadState(position, q_position, is_first)
            if const_expr(c.has_pieces):
                part = part_of_entry(word)
                seen = self.blocks.blocks(work.m_block, work.seqlen, values, work.n_block_begin, work.n_block_end)
                walk = self.pieces.walk(work, part, seen)
                while walk.end > walk.begin:
                    piece, walk = self.pieces.next(work, part, walk)
                    state = self._load_tile(step, values, query, operands, barriers, sWork, piece, word, state, loads_v)
            else:
                whole = Piece(work, None, Int32(0))
                state = self._load_tile(step, values, query, operands, barriers, sWork, whole, word, state, loads_v)
            position, q_position, is_first = state
            tile_idx = queue.total
            if queue.is_taken:
                tile_idx = self._next_tile(step, queue, feed, barriers, sWork, loads_v)
                feed = advance(feed, WORK_STAGE)
                word = read_entry(step.mTiles, tile_idx)
        if const_expr(not loads_v):
            self.hand_over_empty(q_position, barriers, sWork)
            if queue.is_taken:
                leave_queue(step.mQueue)

    @cute.jit
    def _load_tile(
        self,
        step: Step,
        values: MaskValues,
        query: QueryOperand,
        operands: tuple[TmaOperand | RaggedOperand, ...],
        barriers: Barriers,
        sWork: cute.Tensor,
        tile: Piece,  # or an entry's tile, whose part is read behind the look-up of its first boxes
        word: Int32,  # of the entry, this lane's
        state: LoadState,
        loads_v: cutlass.Constexpr[int],
    ) -> LoadState:
        """Q and K, or V, of a tile."""
        c = self.storage.config
        work, part, link = tile
        position, q_position, is_first = state
        tiles = self.v_boxes if const_expr(loads_v) else self.k_boxes
        blocks = self.blocks.blocks(work.m_block, work.seqlen, values, work.n_block_begin, work.n_block_end)
        first_key = None
        if const_expr(self.blocks.mask.has_left):
            first_key = self.blocks.first_key(work.m_block, work.seqlen, values)
        boxes = tiles.find_boxes(step.pages, step.bounds, work.seq_idx, blocks.end - 1, first_key, work.seqlen.seqlen_k)
        if const_expr(not loads_v):
            if const_expr(c.has_parts and part is None):
                part = part_of_entry(word)
            self.load_query(step, query, work, part, link, q_position, barriers, sWork)
            q_position = advance(q_position, c.tile.q_stage)
        num_blocks = blocks.end - blocks.begin
        for i in cutlass.range(num_blocks, unroll=1):
            ahead = tiles.find_boxes(
                step.pages, step.bounds, work.seq_idx, cutlass.max(blocks.end - 2 - i, blocks.begin), first_key, work.seqlen.seqlen_k
            )
            self._fill(operands[loads_v], tiles, boxes, work.kv_head_idx, position, barriers)
            position = self._after(position, tiles.stages, loads_v, is_first)
            is_first = Boolean(False)
            boxes = ahead
        return LoadState(position, q_position, is_first)

    def _next_tile(
        self, step: Step, queue: Queue, feed: RingPosition, barriers: Barriers, sWork: cute.Tensor, loads_v: cutlass.Constexpr[int]
    ) -> Int32:
        """Take the next tile, or hear which one is taken."""
        if loads_v:
            return self._hear_tile(feed, barriers, sWork)
        tile_idx = queue.own + take_tile(step.mQueue)
        self._pass_tile(tile_idx, feed, barriers, sWork)
        return tile_idx

    @cute.jit
    def _pass_tile(self, tile_idx: Int32, feed: RingPosition, barriers: Barriers, sWork: cute.Tensor):
        """Tell the other load warp which tile is taken."""
        cute.arch.mbarrier_wait(barriers.tile_empty + feed.slot, feed.phase ^ 1)
        if cute.arch.lane_idx() == 0:
            sWork[TAKEN_TILE, feed.slot] = tile_idx
            cute.arch.mbarrier_arrive(barriers.tile_full + feed.slot)
        cute.arch.sync_warp()

    @cute.jit
    def _hear_tile(self, feed: RingPosition, barriers: Barriers, sWork: cute.Tensor) -> Int32:
        """The tile that `_pass_tile` told."""
        cute.arch.mbarrier_wait(barriers.tile_full + feed.slot, feed.phase)
        tile_idx = sWork[TAKEN_TILE, feed.slot]
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(barriers.tile_empty + feed.slot)
        return tile_idx

    def _after(self, position: RingPosition, stages: int, loads_v: int, is_first: Boolean) -> RingPosition:
        """The next slot of the same operand: two slots on, but one after K0 unless a slot stays empty behind it."""
        one, two = advance(position, stages), advance(advance(position, stages), stages)
        if loads_v or has_own_slots(self.storage.config):
            return two
        return RingPosition(*(cutlass.select_(is_first, a, b) for a, b in zip(one, two, strict=True)))

    @cute.jit
    def load_query(
        self,
        step: Step,
        query: QueryOperand,
        work: WorkTile,
        part: TilePart | None,  # None: tiles are whole
        link: Int32,  # where tiles have pieces
        position: RingPosition,
        barriers: Barriers,
        sWork: cute.Tensor,
    ):
        """Hand over a tile, or a piece of one, and load its Q."""
        scales = None
        factor = result_factor(step.mVScale, step.mOutScale, work.kv_head_idx)
        if const_expr(factor is not None):
            scales = (Float32(1.0) if const_expr(step.mKScale is None) else step.mKScale[work.kv_head_idx], factor)
        q_bytes = const_expr(self.pack.box_elems * self.storage.config.element_bytes)
        self._hand_over(work, part, link, scales, position, barriers, sWork, q_bytes)
        first_token = work.seqlen.q_begin + work.m_block * self.pack.tokens_per_tile
        sQ_ptr = (query.sQ_ptr + position.slot * self.storage.q_elems).align(SWIZZLE_ALIGN)
        self.pack.load(query.atom, query.mQ, sQ_ptr, work.kv_head_idx, first_token, barriers.q_full + position.slot)

    @cute.jit
    def hand_over_empty(self, position: RingPosition, barriers: Barriers, sWork: cute.Tensor):
        """Hand over the tile behind the last one."""
        nothing = Int32(0)
        empty = WorkTile(nothing, nothing, nothing, nothing, nothing, SeqlenInfo(nothing, nothing, nothing))
        whole = TilePart(Int32(WHOLE), nothing, Int32(1)) if const_expr(self.storage.config.has_parts) else None
        scales = (Float32(1.0), Float32(1.0)) if const_expr(self.storage.has_factors) else None
        self._hand_over(empty, whole, nothing, scales, position, barriers, sWork, 0, is_tile=False)

    @cute.jit
    def _hand_over(
        self,
        work: WorkTile,
        part: TilePart | None,
        link: Int32,
        scales: tuple[Float32, Float32] | None,  # of K, and what O is multiplied by; None: there are none
        position: RingPosition,
        barriers: Barriers,
        sWork: cute.Tensor,
        q_bytes: cutlass.Constexpr[int],
        is_tile: cutlass.Constexpr[bool] = True,
    ):
        """Hand a tile's numbers to the consumers once its Q buffer is free, and announce `q_bytes` of Q."""
        cute.arch.mbarrier_wait(barriers.q_empty + position.slot, position.phase ^ 1)
        if cute.arch.lane_idx() == 0:
            numbers = tile_numbers(work, part)
            work_slot = self.storage.work_slot(position)
            for i in cutlass.range_constexpr(len(numbers)):
                sWork[i, work_slot] = numbers[i]
            if const_expr(scales is not None):
                sWork[K_SCALE, work_slot] = ptx.float_to_bits(scales[0])
                sWork[O_FACTOR, work_slot] = ptx.float_to_bits(scales[1])
            if const_expr(self.storage.config.has_pieces):
                sWork[LINK, work_slot] = link
            sWork[IS_TILE, work_slot] = Int32(int(is_tile))
            cute.arch.mbarrier_arrive_and_expect_tx(barriers.q_full + position.slot, q_bytes)
        cute.arch.sync_warp()

    @cute.jit
    def _fill(
        self,
        operand: TmaOperand | RaggedOperand,
        tiles: cutlass.Constexpr,
        boxes: PageBoxes | RaggedBox,
        kv_head_idx: Int32,
        position: RingPosition,
        barriers: Barriers,
    ):
        """Fill the slot at `position` once its consumers have left it."""
        full = barriers.kv_full + position.slot
        cute.arch.mbarrier_wait(barriers.kv_empty + position.slot, position.phase ^ 1)
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, tiles.tile_elems * self.storage.config.element_bytes)
        cute.arch.sync_warp()
        tiles.load(operand, boxes, kv_head_idx, position.slot, full)
