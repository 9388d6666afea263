"""The kernel that makes a step's work lists on the device: one launch, from the lengths alone.

Every CTA scans all rows of the batch redundantly (a few microseconds even for a thousand rows, and no CTA waits for
another); then each warp writes the decode entries of one consumer CTA, and the threads share the prefill entries.

Decode: the row groups stand in a line, KV tile after KV tile; CTA c gets the c-th of equal parts of that line. A cut
strictly inside a row group splits its KV between CTAs (`work_list`). Where a cut may fall follows from the row group's
own length in batch-invariant mode, from balance alone otherwise.

Prefill (`prefill_list`): longest sequences first and late query blocks first (they see most keys), heads in groups whose KV
fits L2. CTAs take tiles from this list as from a queue. Tiles that are few and see many keys are cut along KV (`prefill_parts`).

Steps with both: decode waits for memory and prefill for the tensor cores, so they run side by side. `share_chip` gives some SMs
to decode for a while; the prefill kernel's last CTAs, which start when those SMs are free again, get fewer tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from fa4_backend.kernels.common.kv_pieces import PieceRule, piece_begin, piece_of, short_piece
from fa4_backend.kernels.common.search import upper_bound
from fa4_backend.kernels.launch_abi import schedule_fakes
from fa4_backend.kernels.schedule.block_ops import block_min, block_scan, square_root, store_tile
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

# Parts of a row group cost the one CTA that adds them up about 0.05 us for each vector a thread has of a slot, and a KV tile costs a
# CTA 0.5 us (clock stamps in the decode kernel, H100, 32/8 d128): n parts of b tiles take least where n * n * vectors is some ten times b.
# 1 x 1K / 1 x 4K / 1 x 4K with 4 queries / 16/2 heads 1 x 4K on an H100, us: 5: 11.5 / 17.9 / 19.5 / 13.8, 10: 11.9 / 18.8 / 19.2 / 13.5,
# 20: 11.7 / 18.7 / 19.5 / 14.0, no limit: 11.9 / 18.8 / 22.8 / 17.3.
LONE_PARTS_RATIO = 5


class CutTables(NamedTuple):
    """Shared memory: where the line of decode row groups is cut; (NUM_THREADS,) each, one entry a consumer CTA and the end."""

    item: cute.Tensor  # row group the cut is in
    block: cute.Tensor  # n_blocks of it before the cut; 0: the cut is at its start
    inner: cute.Tensor  # distinct cuts inside a row group up to this one
    slot: cute.Tensor  # slots of all row groups whose cuts come before this one


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
        num_cuts = decode_sms
        if decode_sms == 0:
            num_cuts = self.usable_ctas(rows, sums, decode_first.shape[0], params)
        self.cut_decode(lengths, rows, cuts, sums, arrivals, num_cuts, params)
        self.write_decode(lengths, rows, cuts, decode_tiles, decode_first, num_cuts, params)
        write_prefill(lengths, rows, parts, prefill, tiles, last, params)
        if params.convert_keys > 0 and cute.arch.block_idx()[0] == 0:
            write_key_starts(lengths, key_starts, sums, params)

    @cute.jit
    def usable_ctas(self, rows: RowTables, sums: cute.Tensor, num_ctas: Int32, params: ScheduleParams) -> Int32:
        """CTAs to cut the line for. Where all rows are equally long, a few CTAs less may give every one the same whole
        share of row groups (or row groups the same number of parts), which saves the splits, and few row groups are not cut
        into more parts than it pays to add up; ends with a barrier."""
        tidx, _, _ = cute.arch.thread_idx()
        equal = Int32(1)
        for row in range(tidx, rows.num_decode, NUM_THREADS):
            if rows.decode_cost[row + 1] - rows.decode_cost[row] != rows.decode_cost[1]:
                equal = Int32(0)
        equal = block_min(equal, sums)
        items = rows.num_decode * params.num_kv_heads
        usable = num_ctas
        if equal == 1 and items > 0:
            if items <= num_ctas:
                usable = num_ctas - num_ctas % items
            else:
                share = (items + num_ctas - 1) // num_ctas
                if items % share == 0:
                    usable = items // share
        if usable * 8 < num_ctas * 7:
            usable = num_ctas
        if equal == 1 and items > 0 and params.split_blocks == 0:
            parts = square_root(LONE_PARTS_RATIO * rows.decode_cost[1] // params.slot_vectors)
            if params.decode_part_blocks > 0 and parts * params.slot_vectors >= params.decode_share_vectors:
                parts = rows.decode_cost[1] // params.decode_part_blocks
                if params.decode_parts_ratio > 0:
                    parts = cutlass.min(parts, square_root(params.decode_parts_ratio * rows.decode_cost[1]))
            usable = cutlass.min(usable, items * cutlass.max(parts, 1))
        return usable

    @cute.jit
    def cut_decode(
        self,
        lengths: StepLengths,
        rows: RowTables,
        cuts: CutTables,
        sums: cute.Tensor,
        arrivals: cute.Tensor,
        num_ctas: Int32,
        params: ScheduleParams,
    ):
        """Thread c places the cut before consumer CTA c, and clears the counters of the row group that it is the first to cut; ends with
        a barrier."""
        cta, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        heads = params.num_kv_heads
        end = rows.num_decode * heads
        item, block, pieces = end, Int32(0), Int32(0)
        if cta < num_ctas:
            # The line is as long as `heads` times the rows' sum, which may pass 2^31. So its cta * length / num_ctas is found in units of
            # `heads` first, and what is left of such a unit then.
            total = rows.decode_cost[rows.num_decode]
            left = cta * (total % num_ctas)
            unit = cta * (total // num_ctas) + left // num_ctas
            if unit < total:
                row = upper_bound(rows.decode_cost, rows.num_decode + 1, unit) - 1
                # A row's heads stand one behind the other, so the row is found by its first head's start.
                offset = (unit - rows.decode_cost[row]) * heads + left % num_ctas * heads // num_ctas
                cost = rows.decode_cost[row + 1] - rows.decode_cost[row]
                head = offset // cost
                item = row * heads + head
                block = offset - head * cost
                if params.split_blocks > 0 and block > 0:
                    begin, _ = decode_range(read_row(lengths, rows.decode_seq[row], params), params)
                    block = nearest_piece(begin + block, params) - begin
                if block <= 0:
                    block = Int32(0)
                elif block >= cost:
                    item += 1
                    block = Int32(0)
        cuts.item[cta] = item
        cuts.block[cta] = block
        cute.arch.sync_threads()
        if params.split_blocks > 0:
            # Cuts that were moved to one place leave CTAs without work. Those go behind the others, so that no two CTAs with work
            # share an SM while another SM has none.
            has_work = Int32(0)
            if cta < num_ctas:
                if cuts.item[cta + 1] != item or cuts.block[cta + 1] != block:
                    has_work = Int32(1)
            place, count = block_scan(has_work, sums)
            if has_work == 1:
                cuts.item[place] = item
                cuts.block[place] = block
            if cta >= count:
                cuts.item[cta] = end
                cuts.block[cta] = Int32(0)
            cute.arch.sync_threads()
            item, block = cuts.item[cta], cuts.block[cta]
            # What a first cut tells of its row group follows from the row group.
            pieces = Int32(0)
            if block > 0:
                begin, blocks = decode_range(read_row(lengths, rows.decode_seq[item // heads], params), params)
                pieces = piece_idx(begin + cutlass.max(blocks, 1) - 1, params) + 1 - piece_idx(begin, params)

        is_inner, is_first = Int32(0), Int32(0)
        if block > 0:
            is_inner, is_first = Int32(1), Int32(1)
            if cta > 0:
                if cuts.item[cta - 1] == item and cuts.block[cta - 1] > 0:
                    is_first = Int32(0)
                    if cuts.block[cta - 1] == block:
                        is_inner = Int32(0)
        inner_before, _ = block_scan(is_inner, sums)
        slots = is_inner + is_first
        if params.split_blocks > 0:
            slots = is_first * pieces
        slots_before, _ = block_scan(slots, sums)
        if is_first == 1 and bidx == 0:
            # A second counter in the place of the second slot's, which a row group that is cut always has.
            arrivals[slots_before] = Int32(0)
            arrivals[slots_before + 1] = Int32(0)
        cuts.inner[cta] = inner_before + is_inner
        cuts.slot[cta] = slots_before
        cute.arch.sync_threads()

    @cute.jit
    def write_decode(
        self,
        lengths: StepLengths,
        rows: RowTables,
        cuts: CutTables,
        decode_tiles: cute.Tensor,
        decode_first: cute.Tensor,
        num_cuts: Int32,
        params: ScheduleParams,
    ):
        """Each warp writes the entries of one consumer CTA, a lane an entry."""
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        lane = tidx % 32
        cta = bidx * NUM_WARPS + tidx // 32
        if cta < decode_first.shape[0]:
            first_item, first_block = cuts.item[cta], cuts.block[cta]
            last_item, last_block = cuts.item[cta + 1], cuts.block[cta + 1]
            begin = first_item + cuts.inner[cta]
            count = last_item + cuts.inner[cta + 1] - begin
            total_q = lengths.cu_seqlens_q[cute.size(lengths.seqused_k)]
            if count == 0 and lane == 0:
                decode_first[cta, NUM_ENTRIES] = Int32(0)
                decode_first[cta, TOTAL_Q] = cutlass.select_(rows.has_prefill_alone, Int32(ALL_ROWS), total_q)
            for entry in range(lane, count, 32):
                item = first_item + entry
                row = item // params.num_kv_heads
                head = item - row * params.num_kv_heads
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
                        piece = cuts.inner[cta] - cuts.inner[first_cut] + 1
                    slot = first_slot + piece
                tile = (seq_idx, head, Int32(0), begin_block + block, begin_block + stop, slot, first_slot, pieces)
                values = (*tile, *row_lengths, count, begin + 1, total_q, Int32(0), Int32(0))
                store_tile(decode_tiles, begin + entry, values)
                if entry == 0:
                    store_tile(decode_first, cta, values)


def piece_idx(tile: Int32, params: ScheduleParams) -> Int32:
    """Piece of a row's KV that holds `tile` (batch-invariant mode)."""
    return piece_of(tile, piece_rule(params), cutlass.min, cutlass.max)


def piece_rule(params: ScheduleParams) -> PieceRule:
    """The plan's rule, which the decode kernel follows too (`Merge.rule`)."""
    return PieceRule(short_piece(params.slot_vectors, cutlass.min), params.split_blocks)


@cute.jit
def nearest_piece(tile: Int32, params: ScheduleParams) -> Int32:
    """The beginning of a piece that is nearest to `tile`."""
    piece = piece_idx(tile, params)
    begin, end = (piece_begin(piece + i, piece_rule(params), cutlass.min, cutlass.max) for i in (0, 1))
    if 2 * tile >= begin + end:
        begin = end
    return begin


@cute.jit
def lower_bound_cut(cuts: CutTables, length: Int32, item: Int32, block: Int32) -> Int32:
    """First cut at or behind (item, block)."""
    low, high = Int32(0), length
    while low < high:
        middle = (low + high) // 2
        is_before = Boolean(cuts.item[middle] < item)
        if cuts.item[middle] == item and cuts.block[middle] < block:
            is_before = Boolean(True)
        if is_before:
            low = middle + 1
        else:
            high = middle
    return low


def build(config: ScheduleConfig) -> tuple[ScheduleKernel, tuple[Any, ...]]:
    """The host function of `config` and fake arguments to trace it with (see `fa4_backend.compile`)."""
    return ScheduleKernel(config.max_num_seqs), schedule_fakes()
