"""The prefill list: how many entries the ordered rows have, and what stands where."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common.search import upper_bound
from fa4_backend.kernels.schedule.block_ops import block_min, block_scan, store_tile
from fa4_backend.kernels.schedule.limits import NUM_THREADS
from fa4_backend.kernels.schedule.params import ScheduleParams
from fa4_backend.kernels.schedule.prefill_parts import (
    MAX_SUM,
    LastRound,
    PartTables,
    PrefillSum,
    cut_rows,
    last_round,
    num_slots,
    part_length,
    part_of_tile,
)
from fa4_backend.kernels.schedule.rows import Row, RowTables, StepLengths, read_row
from fa4_backend.kernels.schedule.work_list import WHOLE


class PrefillList(NamedTuple):
    """What the schedule writes for the prefill kernel."""

    tiles: cute.Tensor  # (max_prefill_tiles, TILE_INTS) int32
    queue: cute.Tensor  # (1, QUEUE_INTS) int32
    part_arrivals: cute.Tensor  # (max(1, max_part_slots), PART_COUNTERS) int32


@cute.jit
def sum_prefill(
    lengths: StepLengths,
    rows: RowTables,
    parts: PartTables,
    sums: cute.Tensor,
    room: Int32,
    params: ScheduleParams,
) -> tuple[Int32, Int32, LastRound]:
    """Sum up the entries of the ordered prefill rows, whose tiles may be cut; ends with a barrier.

    Returns the entries of one head before the last round is cut, about how many n_blocks they see, and the cut of the last round, which
    only steps without decode rows have. The list has room for every step whose `cu_seqlens_q` ascends; of one that does not, as many
    entries as there is room for are written.

    Args:
        room: entries that the list has room for.
    """
    tidx, _, _ = cute.arch.thread_idx()
    # No more n_blocks of two query blocks than let the sum over all query blocks stay below 2^31.
    most = MAX_SUM // (params.max_num_tokens // params.tokens_per_item + cute.size(lengths.seqused_k))
    done, seen, longest = Int32(0), Int32(0), Int32(0)
    for base in range(0, rows.num_prefill, NUM_THREADS):
        at = base + tidx
        m_blocks, n_blocks, row_longest = Int32(0), Int32(0), Int32(0)
        if at < rows.num_prefill:
            row = read_row(lengths, rows.prefill_seq[at], params)
            m_blocks = query_blocks(row, params)
            first, last = seen_by_ends(m_blocks, row, params)
            n_blocks = m_blocks * cutlass.min(first + last, most) // 2
            row_longest = cutlass.max(first, last)
        before, all_blocks = block_scan(m_blocks, sums)
        _, all_seen = block_scan(n_blocks, sums)
        if at < rows.num_prefill:
            rows.prefill_sum[at] = done + before
        if base == 0:
            parts.m_blocks[tidx] = m_blocks
            parts.longest[tidx] = row_longest
            longest = row_longest
        done += all_blocks
        seen += all_seen
    if tidx == 0:
        rows.prefill_sum[rows.num_prefill] = done
    longest = -block_min(-longest, sums)
    length = part_length(parts, PrefillSum(done, seen, longest), sums, params)
    if length < longest:
        done += cut_rows(parts, rows.prefill_sum, rows.num_prefill, length, sums, params)
    done = cutlass.min(cutlass.max(done, 0), room // params.num_kv_heads)
    entries = done * params.num_kv_heads
    last = LastRound(entries, Int32(1), Int32(1))
    if length == longest and rows.num_decode == 0 and params.part_piece_blocks == 0:
        begin, end = visible_blocks(Int32(0), read_row(lengths, rows.prefill_seq[rows.num_prefill - 1], params), params)
        last = last_round(entries, end - begin, longest, room, params)
    return done, seen, last


@cute.jit
def write_prefill(
    lengths: StepLengths,
    rows: RowTables,
    parts: PartTables,
    out: PrefillList,
    tiles: Int32,
    last: LastRound,
    params: ScheduleParams,
) -> None:
    """Write the prefill list, a thread an entry; what stands at a place follows from the place alone.

    Whoever writes a tile's first two parts clears the tile's arrival counters.

    Args:
        tiles: entries of one head, the last round's not cut.
    """
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    thread = bidx * NUM_THREADS + tidx
    heads = params.num_kv_heads
    total = tiles * heads + last.tiles * (last.parts - 1)
    if thread == 0:
        own = cutlass.select_(rows.has_prefill_alone, params.prefill_groups, Int32(0))
        store_tile(out.queue, 0, (Int32(0), total, Int32(0), own))
    for rank in range(thread, total, grid * NUM_THREADS):
        # Parts of the last round: the first ones of all tiles, then the second ones.
        in_last = rank - last.first
        uncut = cutlass.select_(in_last >= 0, last.first + in_last % last.tiles, rank)
        row = upper_bound(rows.prefill_sum, rows.num_prefill + 1, uncut // heads) - 1
        seq_idx = rows.prefill_seq[row]
        row_lengths = read_row(lengths, seq_idx, params)
        m_blocks = query_blocks(row_lengths, params)
        num_parts = (rows.prefill_sum[row + 1] - rows.prefill_sum[row]) // m_blocks
        within = uncut - rows.prefill_sum[row] * heads
        group = cutlass.min(cutlass.max(params.l2_tokens // cutlass.max(row_lengths.kv_len, 1), 1), heads)
        head_begin = within // (group * m_blocks * num_parts) * group
        group = cutlass.min(group, heads - head_begin)
        within -= head_begin * m_blocks * num_parts
        m_block = m_blocks - 1 - within // (group * num_parts)
        part = within % (group * num_parts) // group
        head = head_begin + within % group
        begin, end = visible_blocks(m_block, row_lengths, params)
        slot, first_slot = Int32(WHOLE), Int32(0)
        if in_last >= 0:
            part, num_parts = in_last // last.tiles, last.parts
            first_slot = in_last % last.tiles * num_parts
        elif num_parts > 1:
            of_tile = num_slots(cutlass.max(*seen_by_ends(m_blocks, row_lengths, params)), num_parts, params)
            first_slot = parts.slot[row] + (head * m_blocks + m_block) * of_tile
        if num_parts > 1:
            if part < 2:
                # A tile has two rows of counters: its first two slots'.
                store_tile(out.part_arrivals, first_slot + part, (Int32(0), Int32(0), Int32(0), Int32(0)))
            begin, end, slot, num_parts = part_of_tile(begin, end, part, num_parts, first_slot, params)
        tile = (seq_idx, head, m_block, begin, end, slot, first_slot, num_parts)
        store_tile(out.tiles, rank, (*tile, row_lengths.kv_len, row_lengths.q_begin, row_lengths.query_len, Int32(0)))


def seen_by_ends(m_blocks: Int32, row: Row, params: ScheduleParams) -> tuple[Int32, Int32]:
    """How many n_blocks a row's first tile sees, and its last."""
    ranges = [visible_blocks(m_block, row, params) for m_block in (Int32(0), m_blocks - 1)]
    first, last = (end - begin for begin, end in ranges)
    return first, last


def query_blocks(row: Row, params: ScheduleParams) -> Int32:
    """Query blocks of a prefill row."""
    return (row.query_len + params.tokens_per_item - 1) // params.tokens_per_item


@cute.jit
def visible_blocks(m_block: Int32, row: Row, params: ScheduleParams) -> tuple[Int32, Int32]:
    """The n_blocks that a prefill tile sees, half-open."""
    first = row.kv_len - row.query_len + m_block * params.tokens_per_item  # diagonal key of the tile's first token
    begin = cutlass.max(first - params.window_left, 0) // params.prefill_tile_n
    end = cutlass.max(cutlass.min(row.kv_len, first + params.tokens_per_item + params.window_right), 0)
    end = cutlass.max((end + params.prefill_tile_n - 1) // params.prefill_tile_n, begin)
    return begin, end
