"""The load warp: walks the entries of its CTA, or of its cluster, and keeps Q and the two KV tiles filled, a TMA box a lane.

In a cluster of two each CTA loads some groups of a tile for both: the left half of V CTA 0, the right half CTA 1, the rotary part whoever
has the stage's number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass._mlir import ir

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.cluster_ops import tma_load, wait_for_cluster
from fa4_backend.kernels.common.decode_entry import Entry, StepTensors, entry_of
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.mla_decode.config import LATENT_PARTS, PART_DIM, PART_ELEMS, PARTS, TILE_ELEMS, TILE_M, TILE_N
from fa4_backend.kernels.mla_decode.storage import GROUPS, LEFT, RIGHT, ROPE, MlaStorage, SharedTensors
from fa4_backend.kernels.mla_decode.tensor_maps import TensorMaps, query_modes
from fa4_backend.kernels.mla_decode.work import MlaWork
from fa4_backend.kernels.schedule.work_list import DECODE_INTS, NEXT_ENTRY, NUM_ENTRIES


class FirstEntry(NamedTuple):
    """What the load warp asks global memory for while the CTA still sets up its barriers."""

    word: Int32  # a lane's int of the first entry
    page: Int32  # place of a lane's box of its first block, as in `BoxPlace`
    row: Int32


class BoxPlace(NamedTuple):
    """Where the box of a block's keys that a lane knows lies in the pool."""

    page: Int32  # one past the last for a box without keys: TMA then reads nothing and writes zeros
    row: Int32  # in the page


@dataclass(frozen=True)
class LoadWarp:
    """Role of warp 0."""

    storage: MlaStorage
    work: MlaWork

    @property
    def row_boxes(self) -> int:
        """Boxes along the keys of a block."""
        return TILE_N // self.storage.config.box_rows

    @cute.jit
    def look_up(self, step: StepTensors, num_pages: Int32, values: MaskValues) -> FirstEntry:
        """The CTA's first entry and its first page; the warp calls before the CTA's first barrier."""
        word = step.mFirst[self.work.list_idx(), cute.arch.lane_idx() % DECODE_INTS]
        page, row = num_pages, Int32(0)
        if cute.arch.shuffle_sync(word, NUM_ENTRIES) > 0:
            entry = entry_of(lambda field: cute.arch.shuffle_sync(word, field), step.bounds)
            place = self._find(step, num_pages, entry, self.work.blocks(entry, values).begin)
            page, row = place.page, place.row
        return FirstEntry(word, page, row)

    @cute.jit
    def run(self, step: StepTensors, num_pages: Int32, values: MaskValues, maps: TensorMaps, shared: SharedTensors, first: FirstEntry):
        """Publish every entry with its Q, then load its blocks."""
        descriptors = tuple(ptx.tma_descriptor(atom) for atom in maps)
        lane = cute.arch.lane_idx()
        kv, q_phase = RingPosition(Int32(0), Int32(0)), Int32(0)
        # A lane holds one int of the entry at hand; the next one's is on its way while this one's tiles are loaded.
        word, place = first.word, BoxPlace(first.page, first.row)
        num_entries = cute.arch.shuffle_sync(word, NUM_ENTRIES)
        next_entry = cute.arch.shuffle_sync(word, NEXT_ENTRY)
        for index in cutlass.range(num_entries, unroll=1):
            entry = entry_of(lambda field: cute.arch.shuffle_sync(word, field), step.bounds)  # noqa: B023 (called at once)
            blocks = self.work.blocks(entry, values)
            if index > 0:
                place = self._find(step, num_pages, entry, blocks.begin)
            cute.arch.mbarrier_wait(shared.barriers.q_empty, q_phase ^ 1)
            q_phase ^= 1
            if lane < DECODE_INTS:
                shared.sEntry[lane] = word
            cute.arch.sync_warp()
            self._load_query(descriptors, entry, shared)
            if index + 1 < num_entries:
                word = step.mTiles[next_entry + index, lane % DECODE_INTS]
            for n_block in cutlass.range(blocks.begin, blocks.end, unroll=1):
                ahead = self._find(step, num_pages, entry, n_block + 1)
                if const_expr(self.storage.config.prefetch_blocks > 0):
                    if n_block + self.storage.config.prefetch_blocks < blocks.end:
                        self._prefetch(descriptors[2], self._find(step, num_pages, entry, n_block + self.storage.config.prefetch_blocks))
                if const_expr(self.storage.config.is_narrow):
                    self._load_tile(descriptors[2], place, kv, shared)
                elif const_expr(self.storage.config.is_converted):
                    self._load_raw(descriptors[2], place, kv, shared)
                else:
                    self._load_block(descriptors[2], place, kv, shared)
                place = ahead
                kv = advance(kv, self.storage.config.kv_stage)

    @cute.jit
    def _find(self, step: StepTensors, num_pages: Int32, entry: Entry, n_block: Int32) -> BoxPlace:
        """This lane's box of a block; the page table's other entries are not ours to read."""
        token = n_block * TILE_N + cute.arch.lane_idx() % self.row_boxes * self.storage.config.box_rows
        logical = token // step.page_size
        page, row = num_pages, Int32(0)
        if token < entry.seqlen.seqlen_k:
            page = step.mPageTable[entry.seq_idx, logical]
            row = token - logical * step.page_size
        return BoxPlace(page, row)

    @cute.jit
    def _prefetch(self, descriptor: ir.Value, place: BoxPlace):
        """Ask L2 for a block; in a cluster each CTA for every other part."""
        for box in cutlass.range(cute.arch.lane_idx(), PARTS * self.row_boxes, 32, unroll=1):
            part = box // self.row_boxes
            if part % self.storage.config.cluster_size == self.work.rank():
                ptx.tma_prefetch(descriptor, (0, place.row, part, place.page))

    @cute.jit
    def _load_query(self, descriptors: tuple[ir.Value, ir.Value, ir.Value], entry: Entry, shared: SharedTensors):
        """Announce an entry's ints and its Q, and issue the boxes: lanes take turns, boxes of one part side by side."""
        c = self.storage.config
        lane = cute.arch.lane_idx()
        full = shared.barriers.q_full
        if lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, self.storage.q_bytes)
        cute.arch.sync_warp()
        first_row = self.work.first_row(entry)
        box_bytes = const_expr(c.box_heads * c.box_tokens * PART_DIM * c.element_bytes)
        for part in cutlass.range_constexpr(PARTS):
            for box in cutlass.range(lane, c.q_boxes, 32, unroll=1):
                packed = first_row + box * (c.box_heads * c.box_tokens)
                token = packed // c.num_heads
                where = shared.q.toint() + part * c.q_part_bytes + box * box_bytes
                at = {"head": packed - token * c.num_heads, "token": entry.seqlen.q_begin + token, "part": part}
                if const_expr(part < LATENT_PARTS):
                    ptx.tma_load(descriptors[0], where, full.toint(), self._query_coords(at, True))
                else:
                    ptx.tma_load(descriptors[1], where, full.toint(), self._query_coords(at, False))

    def _query_coords(self, at: dict[str, Int32 | int], has_parts: bool) -> tuple[Int32 | int, ...]:
        return (0, *(at[name] for name in query_modes(self.storage.config, has_parts)))

    @cute.jit
    def _load_block(self, descriptor: ir.Value, place: BoxPlace, kv: RingPosition, shared: SharedTensors):
        """A block's groups, each as soon as its place is free."""
        c = self.storage.config
        rank = self.work.rank()
        self._load_group(LEFT, descriptor, place, kv, shared, rank == 0)
        self._load_group(RIGHT, descriptor, place, kv, shared, rank == c.cluster_size - 1)
        self._load_group(ROPE, descriptor, place, kv, shared, kv.slot % c.cluster_size == rank)

    @cute.jit
    def _load_tile(self, descriptor: ir.Value, place: BoxPlace, kv: RingPosition, shared: SharedTensors):
        """A block's e4m3 numbers, once all consumers have left the stage."""
        c = self.storage.config
        lane = cute.arch.lane_idx()
        full = shared.barriers.kv_full[0] + kv.slot
        cute.arch.mbarrier_wait(shared.barriers.kv_empty[0] + kv.slot, kv.phase ^ 1)
        if lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, c.stage_bytes)
        cute.arch.sync_warp()
        tile = shared.kv.toint() + kv.slot * c.stage_bytes
        for box in cutlass.range(lane, PARTS * self.row_boxes, 32, unroll=1):
            where = tile + box // self.row_boxes * PART_ELEMS + box % self.row_boxes * (c.box_rows * PART_DIM)
            ptx.tma_load(descriptor, where, full.toint(), (0, place.row, box // self.row_boxes, place.page))

    @cute.jit
    def _load_raw(self, descriptor: ir.Value, place: BoxPlace, kv: RingPosition, shared: SharedTensors):
        """A block's e4m3 numbers to the upper half of its tile's place, which both CTAs of a cluster must have left; each loads every other
        part for both."""
        c = self.storage.config
        lane = cute.arch.lane_idx()
        full = shared.barriers.raw_full + kv.slot
        for group in cutlass.range_constexpr(RIGHT, ROPE + 1):
            wait_for_cluster(shared.barriers.kv_empty[group] + kv.slot, kv.phase ^ 1, c.cluster_size)
        if lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, TILE_ELEMS)
        cute.arch.sync_warp()
        raw = shared.kv.toint() + kv.slot * (TILE_ELEMS * c.element_bytes) + TILE_ELEMS
        for box in cutlass.range(lane, PARTS * self.row_boxes, 32, unroll=1):
            part = box // self.row_boxes
            if part % c.cluster_size == self.work.rank():
                where = raw + part * PART_ELEMS + box % self.row_boxes * (c.box_rows * PART_DIM)
                tma_load(descriptor, where, full.toint(), (0, place.row, part, place.page), c.cluster_size)

    @cute.jit
    def _load_group(
        self,
        group: cutlass.Constexpr[int],
        descriptor: ir.Value,
        place: BoxPlace,
        kv: RingPosition,
        shared: SharedTensors,
        is_mine: bool,  # this CTA loads the group, for itself or for the cluster
    ):
        """Announce a group's bytes at this CTA's barrier; issue its boxes where it is ours to load."""
        c = self.storage.config
        lane = cute.arch.lane_idx()
        first, end = const_expr(GROUPS[group])
        part_bytes = const_expr(PART_ELEMS * c.element_bytes)
        full, empty = shared.barriers.kv_full[group] + kv.slot, shared.barriers.kv_empty[group] + kv.slot
        if const_expr(c.cluster_size > 1):
            # What the other CTA loads: announced when the stage's bytes before have come, which the other one's wait implies.
            cute.arch.mbarrier_wait(full, kv.phase ^ 1)
        if is_mine:
            wait_for_cluster(empty, kv.phase ^ 1, c.cluster_size)
        if lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, (end - first) * part_bytes)
        cute.arch.sync_warp()
        page, row = place.page, place.row
        if is_mine and lane < (end - first) * self.row_boxes:
            part = first + lane // self.row_boxes
            tile = shared.kv.toint() + kv.slot * (TILE_ELEMS * c.element_bytes)
            where = tile + part * part_bytes + lane % self.row_boxes * (c.box_rows * PART_DIM * c.element_bytes)
            tma_load(descriptor, where, full.toint(), (0, row, part, page), c.cluster_size)


assert TILE_M == TILE_N, "parts of Q and of KV are of one size"
