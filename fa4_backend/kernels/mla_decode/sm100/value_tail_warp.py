"""Value tail warp: zeroes the rows of V between a sequence's last token and the end of its box, where a page may hold anything.

A weight of 0 times NaN would be NaN. Boxes behind are zeros that TMA wrote. Such a block of V is loaded on barriers of its own, and this
warp takes the load warp's place as the one that fills the stages of V.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.decode_entry import StepTensors
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.mla_decode.sm100.config import BLOCK_KEYS, V_PARTS, V_STAGE
from fa4_backend.kernels.mla_decode.sm100.storage import PairStorage, Place
from fa4_backend.kernels.mla_decode.sm100.work import PairWork

STORE_BYTES = 16


@dataclass(frozen=True)
class ValueTailWarp:
    """One warp of each CTA; works on an entry's last block where that has a tail."""

    storage: PairStorage
    work: PairWork

    @cute.jit
    def run(self, place: Place, step: StepTensors, values: MaskValues):
        """Walk the entries; owns the consumer side of `v_tail_load_to_value_tail`, and hands each stage on in `v_load_to_mma`."""
        s, work, edge = self.storage, self.work, "v_tail_load_to_value_tail"
        word, num_entries, second = work.first_entry(step)
        num_blocks = self.storage.config.num_blocks
        slot, phases = Int32(0), Int32(0)  # of the entry's first block; parity of the next block with a tail in each slot, a bit each
        for index in cutlass.range(num_entries, unroll=1):
            entry = work.entry(step, word)
            blocks = work.blocks(entry, values)
            if index + 1 < num_entries:
                word = work.entry_word(step, second + index)
            if work.has_v_tail(entry, blocks):
                rows = entry.seqlen.seqlen_k - (blocks.end - 1) * BLOCK_KEYS
                box = self.storage.config.box_rows
                end = (rows + box - 1) // box * box
                last = (slot + blocks.end - blocks.begin - 1) % num_blocks
                for stage in cutlass.range_constexpr(V_STAGE):
                    buffer = last * V_STAGE + stage
                    ptx.mbarrier_wait(s.full(place, edge, buffer), (phases >> last) & 1)
                    self.zero_rows(place, place.v + buffer * s.v_stage_bytes, rows, end)
                    ptx.fence_proxy_async_shared()
                    s.group.warp_arrive(s.full_at_leader(place, "v_load_to_mma", buffer), place.lane)
                phases ^= Int32(1) << last
            slot = (slot + blocks.end - blocks.begin) % num_blocks

    @cute.jit
    def zero_rows(self, place: Place, base: Int32, first: Int32, end: Int32):
        """Rows `first .. end` of every part of a stage."""
        zero, row_bytes, part_bytes = Int32(0).ir_value(), self.storage.row_bytes, self.storage.v_part_bytes
        for offset in cutlass.range(first * row_bytes + place.lane * STORE_BYTES, end * row_bytes, 32 * STORE_BYTES, unroll=1):
            for part in cutlass.range_constexpr(V_PARTS):
                ptx.store_shared_v4(base + part * part_bytes + offset, [zero] * 4)
