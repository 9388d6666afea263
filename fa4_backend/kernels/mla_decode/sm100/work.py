"""What every role knows of an entry of the work list: its blocks of 128 keys. Each warp reads the list for itself, an int a lane."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from fa4_backend.kernels.common.decode_entry import Entry, StepTensors, entry_of
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.mla_decode.sm100.config import BLOCK_KEYS, MlaSm100Config
from fa4_backend.kernels.mla_decode.work import Blocks, MlaWork
from fa4_backend.kernels.schedule.work_list import DECODE_INTS, NEXT_ENTRY, NUM_ENTRIES


@dataclass(frozen=True)
class PairWork(MlaWork):
    """Entry arithmetic of one kernel."""

    config: MlaSm100Config

    def first_entry(self, step: StepTensors) -> tuple[Int32, Int32, Int32]:
        """Of this pair: a lane's int of its first entry, how many entries it has, and where the second one stands."""
        word = step.mFirst[self.list_idx(), cute.arch.lane_idx() % DECODE_INTS]
        count, second = (cute.arch.make_warp_uniform(cute.arch.shuffle_sync(word, field)) for field in (NUM_ENTRIES, NEXT_ENTRY))
        return word, count, second

    def entry(self, step: StepTensors, word: Int32) -> Entry:
        """The entry whose ints the lanes hold."""
        return entry_of(lambda field: cute.arch.make_warp_uniform(cute.arch.shuffle_sync(word, field)), step.bounds)

    def entry_word(self, step: StepTensors, at: Int32) -> Int32:
        """A lane's int of an entry of the list."""
        return step.mTiles[at, cute.arch.lane_idx() % DECODE_INTS]

    def blocks(self, entry: Entry, values: MaskValues) -> Blocks:
        """Blocks of an entry that any row sees; none where the row group has no row."""
        first = self.mask.columns(Int32(0), entry.seqlen, values)
        last = self.mask.columns(entry.seqlen.seqlen_q - 1, entry.seqlen, values)
        end = cutlass.min((cutlass.max(last.end, 0) + BLOCK_KEYS - 1) // BLOCK_KEYS, entry.n_block_end)
        end = cutlass.select_(self.has_rows(entry), cutlass.max(end, entry.n_block_begin), entry.n_block_begin)
        return Blocks(entry.n_block_begin, end, cutlass.max(first.end, 0) // BLOCK_KEYS)

    def has_v_tail(self, entry: Entry, blocks: Blocks) -> Boolean:
        """Whether the entry's last block ends within a box: the box's last rows hold none of the sequence's tokens, but anything."""
        seqlen_k = entry.seqlen.seqlen_k
        return (blocks.end > blocks.begin) & (blocks.end * BLOCK_KEYS > seqlen_k) & (seqlen_k % self.config.box_rows != 0)
