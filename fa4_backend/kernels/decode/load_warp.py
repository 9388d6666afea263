"""The load warp: walks the CTA's entries and keeps the ring of KV tiles filled, a box of 16 keys a TMA, four lanes issuing."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.decode.config import BOX_KEYS, BOXES, TILE_N
from fa4_backend.kernels.decode.storage import DecodeStorage, SharedTensors
from fa4_backend.kernels.decode.work import CallValues, StepTensors, VisibleTiles, read_entry

TILES_A_LOOKUP = 32 // BOXES  # KV tiles whose pages one read of the page table finds, a box a lane


@dataclass(frozen=True)
class LoadWarp:
    """Role of the last warp."""

    storage: DecodeStorage
    visible: VisibleTiles

    @cute.jit
    def run(self, step: StepTensors, values: CallValues, k_atom: cute.CopyAtom, v_atom: cute.CopyAtom, shared: SharedTensors):
        """Load every visible tile of this CTA's entries; boxes past the sequence's last token are left out."""
        c = self.storage.config
        box_bytes = cutlass.const_expr(sum(self.storage.box_bytes))
        k_map, v_map = ptx.tma_descriptor(k_atom), ptx.tma_descriptor(v_atom)
        lane = cute.arch.lane_idx()
        cta, _, _ = cute.arch.block_idx()
        slot, phase = Int32(0), Int32(0)
        for index in cutlass.range(step.mBegin[cta], step.mBegin[cta + 1], unroll=1):
            entry = read_entry(step, index)
            begin, end = self.visible.clip(entry, values)
            page, row = Int32(0), Int32(0)
            for n_block in cutlass.range(begin, end, unroll=1):
                since = (n_block - begin) % TILES_A_LOOKUP
                if since == 0:
                    token = n_block * TILE_N + lane * BOX_KEYS
                    logical = token // step.page_size
                    row = token - logical * step.page_size
                    # Entries past the sequence's pages are not ours to read.
                    if token < entry.seqlen.seqlen_k:
                        page = step.mPageTable[entry.seq_idx, logical]
                source = since * BOXES + lane % BOXES
                box_page = cute.arch.shuffle_sync(page, source)
                box_row = cute.arch.shuffle_sync(row, source)
                tokens = entry.seqlen.seqlen_k - n_block * TILE_N
                num_boxes = cutlass.min((tokens + BOX_KEYS - 1) // BOX_KEYS, BOXES)
                cute.arch.mbarrier_wait(shared.kv_empty + slot, phase ^ 1)
                full = (shared.kv_full + slot).toint()
                if lane == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(shared.kv_full + slot, num_boxes * box_bytes)
                cute.arch.sync_warp()
                if lane < num_boxes:
                    where = (box_row, entry.kv_head_idx, box_page)
                    ptx.tma_load(k_map, self.storage.k_box(shared, slot, lane), full, self._box_coords(c.head_dim, where))
                    ptx.tma_load(v_map, self.storage.v_box(shared, slot, lane), full, self._box_coords(c.head_dim_v, where))
                slot += 1
                if slot == c.kv_stage:
                    slot = Int32(0)
                    phase ^= 1

    def _box_coords(self, head_dim: int, where: tuple[Int32, Int32, Int32]) -> tuple[Int32 | int, ...]:
        """Coordinates of a box in the tensor map: element, row in page, part of the head where there are several, KV head, page."""
        row, kv_head_idx, page = where
        has_parts = self.storage.config.part_elems(head_dim) < head_dim
        return (0, row, 0, kv_head_idx, page) if has_parts else (0, row, kv_head_idx, page)
