"""The kernel that makes a step's work lists on the device: one launch, from the lengths alone.

Every CTA scans all rows of the batch redundantly (a few microseconds even for a thousand rows, and no CTA waits for
another); then each warp writes the decode entries of one consumer CTA, and the threads share the prefill entries.

Decode (`decode_cuts`): the row groups stand in a line, KV tile after KV tile, and each CTA gets a part of it. A cut strictly inside a
row group splits its KV between CTAs (`work_list`). Where a cut may fall follows from the row group's own length in batch-invariant mode,
otherwise from balance and from what parts cost.

Prefill (`prefill_list`): longest sequences first and late query blocks first (they see most keys), heads in groups whose KV
fits L2. CTAs take tiles from this list as from a queue. Tiles that are few and see many keys are cut along KV (`prefill_parts`).

Steps with both: decode waits for memory and prefill for the tensor cores, so they run side by side. `share_chip` gives some SMs
to decode for a while; the prefill kernel's last CTAs, which start when those SMs are free again, get fewer tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.launch_abi import schedule_fakes
from fa4_backend.kernels.schedule.block_ops import store_tile
from fa4_backend.kernels.schedule.decode_cuts import (
    CutTables,
    DecodeLine,
    cut_decode,
    decode_line,
    lower_bound_cut,
    piece_idx,
    usable_teams,
)
from fa4_backend.kernels.schedule.key_starts import write_key_starts
from fa4_backend.kernels.schedule.limits import NUM_THREADS, NUM_WARPS
from fa4_backend.kernels.schedule.params import ScheduleParams
from fa4_backend.kernels.schedule.prefill_list import PrefillList, sum_prefill, write_prefill
from fa4_backend.kernels.schedule.prefill_parts import LastRound, PartTables
from fa4_backend.kernels.schedule.rows import RowTables, StepLengths, decode_range, order_by_length, read_row, scan_rows
from fa4_backend.kernels.schedule.share import share_chip
from fa4_backend.kernels.schedule.work_list import ALL_ROWS, NUM_ENTRIES, TOTAL_Q

if TYPE_CHECKING:
    from fa4_backend.kernels.schedule.config import ScheduleConfig


class ScheduleKernel:
    """One compiled schedule serves every problem of an arch with at most `max_num_seqs` sequences."""

    def __init__(self, max_num_seqs: int):
        self.max_num_seqs = max_num_seqs

    @cute.jit
    def __call__(
        self,
        cu_seqlens_q: cute.Tensor,  # (batch + 1,) int32
        seqused_k: cute.Tensor,  # (batch,) int32
        prefill_tiles: cute.Tensor,  # (max_prefill_tiles, TILE_INTS) int32
        prefill_queue: cute.Tensor,  # (1, QUEUE_INTS) int32
        decode_tiles: cute.Tensor,  # (max_decode_tiles, DECODE_INTS) int32
        decode_first: cute.Tensor,  # (decode_num_ctas, DECODE_INTS) int32
        arrivals: cute.Tensor,  # (max_slots,) int32
        part_arrivals: cute.Tensor,  # (max(1, max_part_slots), PART_COUNTERS) int32
        key_starts: cute.Tensor,  # (max_num_seqs + 1,) int32, written where `params.convert_keys` is not 0
        params: ScheduleParams,
        stream,
    ):
        """Launch."""
        num_ctas = cute.ceil_div(decode_first.shape[0], NUM_WARPS)
        lengths = StepLengths(cu_seqlens_q, seqused_k)
        prefill = PrefillList(prefill_tiles, prefill_queue, part_arrivals)
        self.kernel(lengths, prefill, decode_tiles, decode_first, arrivals, key_starts, params).launch(
            grid=(num_ctas, 1, 1), block=(NUM_THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        lengths: StepLengths,
        prefill: PrefillList,
        decode_tiles: cute.Tensor,
        decode_first: cute.Tensor,
        arrivals: cute.Tensor,
        key_starts: cute.Tensor,
        params: ScheduleParams,
    ):
        smem = cutlass.utils.SmemAllocator()

        def ints(n: int) -> cute.Tensor:
            return smem.allocate_tensor(Int32, cute.make_layout(n), byte_alignment=16)

        seqs, table, sums = ints(self.max_num_seqs), ints(self.max_num_seqs + 2), ints(NUM_WARPS)
        cuts = CutTables(ints(NUM_THREADS), ints(NUM_THREADS), ints(NUM_THREADS), ints(NUM_THREADS))
        # Nobody needs those before the cuts are made.
        parts = PartTables(cuts.item, cuts.block, ints(NUM_THREADS))

        rows = scan_rows(lengths, seqs, table, sums, params)
        decode_sms = Int32(0)
        tiles, last = Int32(0), LastRound(Int32(0), Int32(1), Int32(1))
        if rows.num_prefill > 0:
            order_by_length(rows)
            tiles, blocks, last = sum_prefill(lengths, rows, parts, sums, Int32(prefill.tiles.shape[0]), params)
            if rows.num_decode > 0:
                decode_sms = share_chip(rows.decode_cost[rows.num_decode], tiles, blocks, sums, params)
        line = decode_line(rows, cutlass.select_(decode_sms > 0, decode_sms, decode_first.shape[0]), params)
        # Beside prefill rows the SMs were chosen for equal parts.
        weighed = params._replace(decode_part_quarters=cutlass.select_(decode_sms > 0, Int32(0), params.decode_part_quarters))
        teams = line.teams
        if decode_sms == 0:
            teams = usable_teams(rows, line, sums, weighed)
        cut_decode(lengths, rows, line, teams, cuts, sums, arrivals, weighed)
        self.write_decode(lengths, rows, line, cuts, decode_tiles, decode_first, params)
        write_prefill(lengths, rows, parts, prefill, tiles, last, params)
        if params.convert_keys > 0 and cute.arch.block_idx()[0] == 0:
            write_key_starts(lengths, key_starts, sums, params)

    @cute.jit
    def write_decode(
        self,
        lengths: StepLengths,
        rows: RowTables,
        line: DecodeLine,
        cuts: CutTables,
        decode_tiles: cute.Tensor,
        decode_first: cute.Tensor,
        params: ScheduleParams,
    ):
        """Each warp writes the entries of one consumer CTA, a lane an entry."""
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        lane = tidx % 32
        place, num_cuts = bidx * NUM_WARPS + tidx // 32, line.lines * line.teams
        if place < decode_first.shape[0]:
            cta = line.cta(place)
            first_item, first_block = cuts.item[place], cuts.block[place]
            last_item, last_block = cuts.item[place + 1], cuts.block[place + 1]
            begin = first_item + cuts.inner[place]
            count = last_item + cuts.inner[place + 1] - begin
            total_q = lengths.cu_seqlens_q[cute.size(lengths.seqused_k)]
            if count == 0 and lane == 0:
                decode_first[cta, NUM_ENTRIES] = Int32(0)
                decode_first[cta, TOTAL_Q] = cutlass.select_(rows.has_prefill_alone, Int32(ALL_ROWS), total_q)
            for entry in range(lane, count, 32):
                item = first_item + entry
                row, head = line.row_and_head(item)
                seq_idx = rows.decode_seq[row]
                row_lengths = read_row(lengths, seq_idx, params)
                begin_block, stop = decode_range(row_lengths, params)
                block = Int32(0)
                if entry == 0:
                    block = first_block
                if item == last_item:
                    stop = last_block
                slot, first_slot, pieces = Int32(-1), Int32(0), Int32(1)
                if block > 0 or item == last_item:
                    first_cut = lower_bound_cut(cuts, num_cuts + 1, item, Int32(1))
                    next_cut = lower_bound_cut(cuts, num_cuts + 1, item + 1, Int32(0))
                    first_slot = cuts.slot[first_cut]
                    pieces = cuts.slot[next_cut] - first_slot
                    piece = Int32(0)
                    if params.split_blocks > 0:
                        piece = piece_idx(begin_block + block, params) - piece_idx(begin_block, params)
                    elif block > 0:
                        piece = cuts.inner[place] - cuts.inner[first_cut] + 1
                    slot = first_slot + piece
                tile = (seq_idx, head, Int32(0), begin_block + block, begin_block + stop, slot, first_slot, pieces)
                values = (*tile, *row_lengths, count, begin + 1, total_q, Int32(0), Int32(0))
                store_tile(decode_tiles, begin + entry, values)
                if entry == 0:
                    store_tile(decode_first, cta, values)


def build(config: ScheduleConfig) -> tuple[ScheduleKernel, tuple[Any, ...]]:
    """The host function of `config` and fake arguments to trace it with (see `fa4_backend.compile`)."""
    return ScheduleKernel(config.max_num_seqs), schedule_fakes()
