"""The load warp where K and V are FP8: Q to its buffer, tiles in the ring's order to the slots of staging, a note beside each."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.common.paged_kv import PageBoxes, TmaOperand
from fa4_backend.kernels.common.ragged_kv import RaggedBox, RaggedOperand
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.common.tile_scheduler import (
    Queue,
    leave_queue,
    part_of_entry,
    read_entry,
    read_queue,
    take_tile,
    tile_of_entry,
    wait_alone,
)
from fa4_backend.kernels.sm90.arguments import Step
from fa4_backend.kernels.sm90.load_warp import LoadWarp, QueryOperand
from fa4_backend.kernels.sm90.staging import Note, Staged
from fa4_backend.kernels.sm90.storage import Barriers
from fa4_backend.kernels.sm90.tile_pieces import Piece


class KvBlock(NamedTuple):
    """A block of keys: where its K and V lie, and which of them a row sees."""

    boxes: PageBoxes | RaggedBox
    kv_head_idx: Int32
    first_row: Int32
    end_row: Int32


class StagingState(NamedTuple):
    """Where the warp is."""

    position: RingPosition  # of the next tile of K or V
    q_position: RingPosition
    before: KvBlock  # whose V follows the next K
    is_first: Boolean  # no tile of K was loaded
    next_idx: Int32  # entry of the work list behind this one, once it is taken
    word: Int32  # of that entry, this lane's


@dataclass(frozen=True)
class StagingWarp:
    """Role of warp 0. It alone loads: rows of a byte an element are half the boxes of K, and pages are looked up once for K and V.

    In shared memory, sWork: (WORK_INTS, WORK_STAGE) int32 (`tile_numbers.py`); sNotes: (STAGE_INTS, slots of staging) int32.
    """

    load: LoadWarp

    @cute.jit
    def run(
        self,
        step: Step,
        values: MaskValues,
        query: QueryOperand,
        operands: tuple[TmaOperand | RaggedOperand, ...],  # K, V
        barriers: Barriers,
        sWork: cute.Tensor,
        sNotes: cute.Tensor,
    ):
        """Load Q, K and V of every tile of this CTA; K runs one block ahead of V, and behind the last tile stands an empty one."""
        load = self.load
        c, blocks_of = load.storage.config, load.blocks
        position, q_position = RingPosition(Int32(0), Int32(0)), RingPosition(Int32(0), Int32(0))
        before = KvBlock(load.k_boxes.nowhere, Int32(0), Int32(0), Int32(0))
        is_first = Boolean(True)
        tile_idx, _, _ = cute.arch.block_idx()
        word = read_entry(step.mTiles, tile_idx)
        queue = read_queue(step.mQueue)
        wait_alone(queue, c.is_dependent)
        if queue.own == 0:
            tile_idx = take_tile(step.mQueue)
            word = read_entry(step.mTiles, tile_idx)
        has_tile = tile_idx < queue.total
        next_idx = tile_idx
        state = StagingState(position, q_position, before, is_first, next_idx, word)
        while tile_idx < queue.total:
            work = tile_of_entry(word, step.bounds)
            part = part_of_entry(word) if const_expr(c.has_parts) else None
            if const_expr(c.has_pieces):
                seen = blocks_of.blocks(work.m_block, work.seqlen, values, work.n_block_begin, work.n_block_end)
                walk = load.pieces.walk(work, part, seen)
                while walk.end > walk.begin:
                    piece, walk = load.pieces.next(work, part, walk)
                    state = self._stage_tile(
                        step, values, query, operands, barriers, sWork, sNotes, queue, piece, walk.end == walk.begin, state
                    )
            else:
                whole = Piece(work, part, Int32(0))
                state = self._stage_tile(step, values, query, operands, barriers, sWork, sNotes, queue, whole, Boolean(True), state)
            tile_idx, word = state.next_idx, state.word
        position, q_position, before = state.position, state.q_position, state.before
        if queue.is_taken:
            leave_queue(step.mQueue)
        load.hand_over_empty(q_position, barriers, sWork)
        if has_tile:
            self._note(Staged.NOTHING, before, position, barriers, sNotes, 0)
            position = advance(position, load.k_boxes.stages)
            self._fill(load.v_boxes, operands[1], before, Staged.VALUES, position, barriers, sNotes)
            position = advance(position, load.k_boxes.stages)
        self._note(Staged.END, before, position, barriers, sNotes, 0)

    @cute.jit
    def _stage_tile(
        self,
        step: Step,
        values: MaskValues,
        query: QueryOperand,
        operands: tuple[TmaOperand | RaggedOperand, ...],
        barriers: Barriers,
        sWork: cute.Tensor,
        sNotes: cute.Tensor,
        queue: Queue,
        tile: Piece,  # or a whole tile
        ends_entry: Boolean,  # nothing of its entry follows
        state: StagingState,
    ) -> StagingState:
        """Q, K and V of a tile, but for the V of its last block; towards its end the next entry is taken."""
        load, blocks_of = self.load, self.load.blocks
        work, part, link = tile
        position, q_position, before, is_first, next_idx, word = state
        blocks = blocks_of.blocks(work.m_block, work.seqlen, values, work.n_block_begin, work.n_block_end)
        load.load_query(step, query, work, part, link, q_position, barriers, sWork)
        q_position = advance(q_position, load.storage.config.tile.q_stage)
        first_key = None
        if const_expr(blocks_of.mask.has_left):
            first_key = blocks_of.first_key(work.m_block, work.seqlen, values)
        for i in cutlass.range(blocks.end - blocks.begin, unroll=1):
            n_block = blocks.end - 1 - i
            boxes = load.k_boxes.find_boxes(step.pages, step.bounds, work.seq_idx, n_block, first_key, work.seqlen.seqlen_k)
            first_row = Int32(0)
            if const_expr(first_key is not None):
                first_row = first_key - n_block * blocks_of.tile_n
            block = KvBlock(boxes, work.kv_head_idx, first_row, work.seqlen.seqlen_k - n_block * blocks_of.tile_n)
            self._fill(load.k_boxes, operands[0], block, Staged.KEYS, position, barriers, sNotes)
            position = advance(position, load.k_boxes.stages)
            if not is_first:
                self._fill(load.v_boxes, operands[1], before, Staged.VALUES, position, barriers, sNotes)
                position = advance(position, load.k_boxes.stages)
            before = block
            is_first = Boolean(False)
            # A block before the last: the slots of staging are too few to hide the queue's latency, and the work list's behind it.
            if (i == cutlass.max(blocks.end - blocks.begin - 2, 0)) & ends_entry:
                next_idx = queue.total
                if queue.is_taken:
                    next_idx = queue.own + take_tile(step.mQueue)
                    word = read_entry(step.mTiles, next_idx)
        return StagingState(position, q_position, before, is_first, next_idx, word)

    @cute.jit
    def _fill(
        self,
        tiles: cutlass.Constexpr,
        operand: TmaOperand | RaggedOperand,
        block: KvBlock,
        kind: cutlass.Constexpr,
        position: RingPosition,
        barriers: Barriers,
        sNotes: cute.Tensor,
    ):
        """Fill the slot at `position` once it was converted."""
        self._note(kind, block, position, barriers, sNotes, tiles.tile_elems)
        tiles.load(operand, block.boxes, block.kv_head_idx, position.slot, barriers.fp8_full + position.slot)

    @cute.jit
    def _note(
        self,
        kind: cutlass.Constexpr,
        block: KvBlock,
        position: RingPosition,
        barriers: Barriers,
        sNotes: cute.Tensor,
        num_bytes: cutlass.Constexpr[int],
    ):
        """Write a slot's note once it is free, and announce `num_bytes` of its tile."""
        cute.arch.mbarrier_wait(barriers.fp8_empty + position.slot, position.phase ^ 1)
        if cute.arch.lane_idx() == 0:
            sNotes[int(Note.KIND), position.slot] = Int32(int(kind))
            sNotes[int(Note.FIRST_ROW), position.slot] = block.first_row
            sNotes[int(Note.END_ROW), position.slot] = block.end_row
            cute.arch.mbarrier_arrive_and_expect_tx(barriers.fp8_full + position.slot, num_bytes)
        cute.arch.sync_warp()
