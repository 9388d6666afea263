"""The load warp: walks the CTA's entries and keeps the ring of KV tiles filled, a box of 16 keys a TMA, four lanes issuing.

What it needs of global memory before a TMA is asked for early: the first entry and its pages while the CTA still sets up its
barriers, later pages eight tiles ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.decode_entry import Entry, StepTensors, entry_of
from fa4_backend.kernels.common.mask import Columns, MaskValues
from fa4_backend.kernels.decode.config import BOX_KEYS, BOXES, ENTRY_STAGE, TILE_N, DecodeConfig
from fa4_backend.kernels.decode.storage import DecodeStorage, SharedTensors
from fa4_backend.kernels.decode.work import VisibleTiles
from fa4_backend.kernels.schedule.work_list import DECODE_INTS, NEXT_ENTRY, NUM_ENTRIES

TILES_A_LOOKUP = 32 // BOXES  # KV tiles whose pages one read of the page table finds, a box a lane


class TensorMaps(NamedTuple):
    """TMA atoms: all packed rows of an entry's Q at once, and boxes of 16 keys of K and of V."""

    q: cute.CopyAtom
    k: cute.CopyAtom
    v: cute.CopyAtom


class BoxPlaces(NamedTuple):
    """A lane's box of `TILES_A_LOOKUP` KV tiles: where it lies in the pool."""

    page: Int32
    row: Int32  # in the page


class QueryMode(Enum):
    """What a dimension of Q's tensor map counts, beside the elements of a part."""

    HEAD = auto()
    TOKEN = auto()
    PART = auto()


def query_modes(config: DecodeConfig) -> list[QueryMode]:
    """Dimensions 1, 2, ... of Q's tensor map. The compiler moves those that a box has one of behind the others, so they are put
    there; a constant extent of one would vanish, so a single part is none."""
    counts = {QueryMode.HEAD: config.q_per_kv, QueryMode.TOKEN: config.query_len}
    parts = config.head_dim * config.element_bytes // config.q_part_bytes
    if parts > 1:
        counts[QueryMode.PART] = parts
    return sorted(counts, key=lambda mode: counts[mode] == 1)


@dataclass(frozen=True)
class LoadWarp:
    """Role of the last warp."""

    storage: DecodeStorage
    visible: VisibleTiles

    @cute.jit
    def run(self, step: StepTensors, values: MaskValues, maps: TensorMaps, shared: SharedTensors):
        """Publish every entry of this CTA with its Q, then load its visible tiles; boxes without a key that any row
        may see are left out.

        Meets the CTA's other warps once, at the barrier after which mbarriers may be used.
        """
        c = self.storage.config
        box_bytes = cutlass.const_expr(sum(self.storage.box_bytes))
        q_map, k_map, v_map = (ptx.tma_descriptor(atom) for atom in maps)
        lane = cute.arch.lane_idx()
        cta, _, _ = cute.arch.block_idx()
        slot, phase = Int32(0), Int32(0)
        stage, entry_phase = Int32(0), Int32(0)
        # A lane holds one int of the entry at hand; the next entry's is on its way while this one's tiles are loaded.
        word = step.mFirst[cta, lane % DECODE_INTS]
        num_entries = cute.arch.shuffle_sync(word, NUM_ENTRIES)
        next_entry = cute.arch.shuffle_sync(word, NEXT_ENTRY)
        here = BoxPlaces(Int32(0), Int32(0))
        if num_entries > 0:
            first = entry_of(lambda field: cute.arch.shuffle_sync(word, field), step.bounds)
            here = self._find_boxes(step, first, self.visible.keys(first, values), self.visible.clip(first, values)[0])
        cute.arch.sync_threads()
        for index in cutlass.range(num_entries, unroll=1):
            entry = entry_of(lambda field: cute.arch.shuffle_sync(word, field), step.bounds)  # noqa: B023 (called at once)
            cute.arch.mbarrier_wait(shared.entry_empty + stage, entry_phase ^ 1)
            if lane < DECODE_INTS:
                shared.sEntry[stage, lane] = word
                if lane > 0:  # each lane releases what it wrote
                    cute.arch.mbarrier_arrive(shared.entry_full + stage)
            if lane == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(shared.entry_full + stage, c.rows * c.head_dim * c.element_bytes)
                ptx.tma_load(q_map, self.storage.q_tile(shared, stage), (shared.entry_full + stage).toint(), self._query_coords(entry))
            stage += 1
            if stage == ENTRY_STAGE:
                stage = Int32(0)
                entry_phase ^= 1
            if index + 1 < num_entries:
                word = step.mTiles[next_entry + index, lane % DECODE_INTS]

            begin, end = self.visible.clip(entry, values)
            keys = self.visible.keys(entry, values)
            if index > 0:
                here = self._find_boxes(step, entry, keys, begin)
            ahead = self._find_boxes(step, entry, keys, begin + TILES_A_LOOKUP)
            for n_block in cutlass.range(begin, end, unroll=1):
                since = (n_block - begin) % TILES_A_LOOKUP
                if since == 0 and n_block > begin:
                    here = ahead
                    ahead = self._find_boxes(step, entry, keys, n_block + TILES_A_LOOKUP)
                source = since * BOXES + lane % BOXES
                box_page = cute.arch.shuffle_sync(here.page, source)
                box_row = cute.arch.shuffle_sync(here.row, source)
                tokens = entry.seqlen.seqlen_k - n_block * TILE_N
                num_boxes = cutlass.min((tokens + BOX_KEYS - 1) // BOX_KEYS, BOXES)
                is_mine = lane < num_boxes
                if const_expr(self.visible.mask.has_left):
                    first_box = cutlass.max(keys.begin - n_block * TILE_N, 0) // BOX_KEYS
                    is_mine = is_mine & (lane >= first_box)
                    num_boxes = num_boxes - first_box
                cute.arch.mbarrier_wait(shared.kv_empty + slot, phase ^ 1)
                full = (shared.kv_full + slot).toint()
                if lane == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(shared.kv_full + slot, num_boxes * box_bytes)
                cute.arch.sync_warp()
                if is_mine:
                    where = (box_row, entry.kv_head_idx, box_page)
                    ptx.tma_load(k_map, self.storage.k_box(shared, slot, lane), full, self._box_coords(c.head_dim, where))
                    ptx.tma_load(v_map, self.storage.v_box(shared, slot, lane), full, self._box_coords(c.head_dim_v, where))
                slot += 1
                if slot == c.kv_stage:
                    slot = Int32(0)
                    phase ^= 1

    @cute.jit
    def _find_boxes(self, step: StepTensors, entry: Entry, keys: Columns, n_block: Int32) -> BoxPlaces:
        """Places of the boxes of `TILES_A_LOOKUP` KV tiles from `n_block` on, a box a lane."""
        token = n_block * TILE_N + cute.arch.lane_idx() * BOX_KEYS
        logical = token // step.page_size
        page = Int32(0)
        # The page table's other entries are not ours to read.
        if self.visible.has_any(keys, token, BOX_KEYS):
            page = step.mPageTable[entry.seq_idx, logical]
        return BoxPlaces(page, token - logical * step.page_size)

    def _query_coords(self, entry: Entry) -> tuple[Int32 | int, ...]:
        """Coordinates of an entry's Q in its tensor map."""
        head = entry.kv_head_idx * self.storage.config.q_per_kv
        at = {QueryMode.HEAD: head, QueryMode.TOKEN: entry.seqlen.q_begin, QueryMode.PART: 0}
        return (0, *(at[mode] for mode in query_modes(self.storage.config)))

    def _box_coords(self, head_dim: int, where: tuple[Int32, Int32, Int32]) -> tuple[Int32 | int, ...]:
        """Coordinates of a box in the tensor map: element, row in page, part of the head where there are several, KV head, page."""
        row, kv_head_idx, page = where
        c = self.storage.config
        has_parts = c.kv_part_bytes(head_dim) < head_dim * c.kv_element_bytes
        return (0, row, 0, kv_head_idx, page) if has_parts else (0, row, kv_head_idx, page)
