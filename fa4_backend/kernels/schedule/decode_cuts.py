"""Where decode row groups are cut between CTAs.

Row groups stand in a line, n_block after n_block, and CTA after CTA gets a part of it. A cut strictly inside a row group splits its KV
between CTAs. Where KV heads see the same keys (the tiles of a latent row), each has a line of its own: all are cut alike, and a *team* of
CTAs, one a line, takes its part of all of them side by side, so that those keys come from memory once.

There are two ways to cut a line. By blocks: into equal parts, but a cut goes to a row group's end that is nearer than a part costs. By
rows: each team gets as many whole row groups, or each row group is cut into as many parts. Where parts cost something
(`decode_part_quarters`), both are made, and what ends sooner by `_time` is taken: rows that are about equally long are not cut where whole
ones balance. Where they cost nothing, and beside prefill rows, the line is cut by blocks, for a few CTAs less if all rows are exactly
equally long.

In batch-invariant mode a cut goes to the nearest of the row's fixed pieces (`common/kv_pieces.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from fa4_backend.kernels.common.kv_pieces import PieceRule, piece_begin, piece_of, short_piece
from fa4_backend.kernels.common.search import upper_bound
from fa4_backend.kernels.schedule.block_ops import block_min, block_scan, square_root
from fa4_backend.kernels.schedule.limits import NUM_THREADS
from fa4_backend.kernels.schedule.params import ScheduleParams
from fa4_backend.kernels.schedule.rows import RowTables, StepLengths, decode_range, read_row

# Parts of a row group cost the one CTA that adds them up about 0.05 us for each vector a thread has of a slot, and a KV tile costs a
# CTA 0.5 us (clock stamps in the decode kernel, H100, 32/8 d128): n parts of b tiles take least where n * n * vectors is some ten times b.
# 1 x 1K / 1 x 4K / 1 x 4K with 4 queries / 16/2 heads 1 x 4K on an H100, us: 5: 11.5 / 17.9 / 19.5 / 13.8, 10: 11.9 / 18.8 / 19.2 / 13.5,
# 20: 11.7 / 18.7 / 19.5 / 14.0, no limit: 11.9 / 18.8 / 22.8 / 17.3.
LONE_PARTS_RATIO = 5
# n_blocks of a line up to which ways to cut it are compared, a billion keys and more: no product of what is compared passes 2^31.
MOST_BLOCKS = 1 << 24
MOST_SHARE = 1 << 16  # n_blocks of a part at which it is cut before heads are multiplied: no end is near from so far


class CutTables(NamedTuple):
    """Shared memory: where the lines are cut; (NUM_THREADS,) each, one entry a part of a line and the end, line after line."""

    item: cute.Tensor  # row group the cut is in
    block: cute.Tensor  # n_blocks of it before the cut; 0: the cut is at its start
    inner: cute.Tensor  # distinct cuts inside a row group up to this one
    slot: cute.Tensor  # slots of all row groups whose cuts come before this one


class DecodeLine(NamedTuple):
    """A line of row groups, those like it, and the teams that share them. Row groups are numbered line after line."""

    lines: Int32  # as many as KV heads that see the same keys; else 1
    heads: Int32  # KV heads in a line
    items: Int32  # row groups of a line
    teams: Int32  # of `lines` CTAs each

    def row_and_head(self, item: Int32) -> tuple[Int32, Int32]:
        """Decode row and KV head of a row group; there is one."""
        line = item // self.items
        row = (item - line * self.items) // self.heads
        return row, line + item - line * self.items - row * self.heads

    def cta(self, place: Int32) -> Int32:
        """The CTA that takes a line's part: those of a team stand side by side, those that have no part behind all teams."""
        line = place // self.teams
        return cutlass.select_(line < self.lines, (place - line * self.teams) * self.lines + line, place)


def decode_line(rows: RowTables, num_ctas: Int32, params: ScheduleParams) -> DecodeLine:
    """The lines of a step's decode rows, shared by `num_ctas` CTAs, or by a team if there are not as many."""
    heads = params.num_kv_heads // params.decode_lines
    return DecodeLine(params.decode_lines, heads, rows.num_decode * heads, cutlass.max(num_ctas // params.decode_lines, 1))


@cute.jit
def usable_teams(rows: RowTables, line: DecodeLine, sums: cute.Tensor, params: ScheduleParams) -> Int32:
    """Teams to cut a line by blocks for. Where parts cost nothing and all rows are equally long, a few less may give every one the same
    whole share of row groups (or row groups the same number of parts), which saves the splits; and few row groups are not cut into more
    parts than it pays to add up. Ends with a barrier."""
    tidx, _, _ = cute.arch.thread_idx()
    equal = Int32(1)
    for row in range(tidx, rows.num_decode, NUM_THREADS):
        if rows.decode_cost[row + 1] - rows.decode_cost[row] != rows.decode_cost[1]:
            equal = Int32(0)
    equal = block_min(equal, sums)
    usable = line.teams
    if equal == 1 and line.items > 0 and params.decode_part_quarters == 0:
        if line.items <= line.teams:
            usable = line.teams - line.teams % line.items
        else:
            share = (line.items + line.teams - 1) // line.teams
            if line.items % share == 0:
                usable = line.items // share
    if usable * 8 < line.teams * 7:
        usable = line.teams
    if equal == 1 or params.decode_part_quarters > 0:
        if line.items > 0 and line.items < usable and params.split_blocks == 0:
            usable = cutlass.min(usable, line.items * paying_parts(rows, params))
    return usable


@cute.jit
def paying_parts(rows: RowTables, params: ScheduleParams) -> Int32:
    """Parts of an average decode row that it pays to add up."""
    blocks = rows.decode_cost[rows.num_decode] // rows.num_decode
    parts = square_root(LONE_PARTS_RATIO * blocks // params.slot_vectors)
    if params.decode_part_blocks > 0 and parts * params.slot_vectors >= params.decode_share_vectors:
        parts = blocks // params.decode_part_blocks
        if params.decode_parts_ratio > 0:
            parts = cutlass.min(parts, square_root(params.decode_parts_ratio * blocks))
    return cutlass.max(parts, 1)


@cute.jit
def cut_decode(
    lengths: StepLengths,
    rows: RowTables,
    line: DecodeLine,
    teams: Int32,  # to cut by blocks for
    cuts: CutTables,
    sums: cute.Tensor,
    arrivals: cute.Tensor,
    params: ScheduleParams,
) -> None:
    """Thread c places the cut before the c-th part of the lines, and clears the counters of the row group that it is the first to cut;
    ends with a barrier."""
    thread, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    end, length = line.lines * line.items, rows.decode_cost[rows.num_decode] * line.heads
    item, block, place, pieces = end, Int32(0), line.lines * length, Int32(0)
    of = thread // line.teams
    if of < line.lines:
        item, block, place = _by_blocks(lengths, rows, line, thread - of * line.teams, teams, params)
        item, place = item + of * line.items, place + of * length
    if params.decode_part_quarters > 0 and line.items > 0 and rows.decode_cost[rows.num_decode] <= MOST_BLOCKS // line.heads:
        row_item, row_block, row_place = end, Int32(0), line.lines * length
        if of < line.lines:
            row_item, row_block, row_place = _by_rows(rows, line, thread - of * line.teams, params)
            row_item, row_place = row_item + of * line.items, row_place + of * length
        # What the next thread must know of a cut: its row group and whether it is inside that, and n_blocks before it.
        cuts.item[thread] = 2 * item + cutlass.min(block, 1)
        cuts.block[thread] = place
        cuts.inner[thread] = 2 * row_item + cutlass.min(row_block, 1)
        cuts.slot[thread] = row_place
        cute.arch.sync_threads()
        if _rows_end_sooner(line, length, cuts, sums, params):
            item, block = row_item, row_block
    cuts.item[thread] = item
    cuts.block[thread] = block
    cute.arch.sync_threads()
    if params.split_blocks > 0:
        # Cuts that were moved to one place leave CTAs without work. Those go behind the others, so that no two CTAs with work
        # share an SM while another SM has none.
        has_work = Int32(0)
        if thread < line.lines * line.teams:
            if cuts.item[thread + 1] != item or cuts.block[thread + 1] != block:
                has_work = Int32(1)
        place, count = block_scan(has_work, sums)
        if has_work == 1:
            cuts.item[place] = item
            cuts.block[place] = block
        if thread >= count:
            cuts.item[thread] = end
            cuts.block[thread] = Int32(0)
        cute.arch.sync_threads()
        item, block = cuts.item[thread], cuts.block[thread]
        # What a first cut tells of its row group follows from the row group.
        pieces = Int32(0)
        if block > 0:
            row, _ = line.row_and_head(item)
            begin, blocks = decode_range(read_row(lengths, rows.decode_seq[row], params), params)
            pieces = piece_idx(begin + cutlass.max(blocks, 1) - 1, params) + 1 - piece_idx(begin, params)

    is_inner, is_first = Int32(0), Int32(0)
    if block > 0:
        is_inner, is_first = Int32(1), Int32(1)
        if thread > 0:
            if cuts.item[thread - 1] == item and cuts.block[thread - 1] > 0:
                is_first = Int32(0)
                if cuts.block[thread - 1] == block:
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
    cuts.inner[thread] = inner_before + is_inner
    cuts.slot[thread] = slots_before
    cute.arch.sync_threads()


@cute.jit
def _by_blocks(
    lengths: StepLengths, rows: RowTables, line: DecodeLine, part: Int32, num_parts: Int32, params: ScheduleParams
) -> tuple[Int32, Int32, Int32]:
    """Row group and block where the `part`-th of equal parts of a line begins, and n_blocks before; parts past the last are empty."""
    total = rows.decode_cost[rows.num_decode]
    item, block, place = line.items, Int32(0), total * line.heads
    if part < num_parts:
        # The line is as long as `heads` times the rows' sum, which may pass 2^31. So its part * length / num_parts is found in units of
        # `heads` first, and what is left of such a unit then.
        left = part * (total % num_parts)
        unit = part * (total // num_parts) + left // num_parts
        if unit < total:
            row = upper_bound(rows.decode_cost, rows.num_decode + 1, unit) - 1
            begin = rows.decode_cost[row]
            # A row's heads stand one behind the other, so the row is found by its first head's start.
            offset = (unit - begin) * line.heads + left % num_parts * line.heads // num_parts
            cost = rows.decode_cost[row + 1] - begin
            head = offset // cost
            item = row * line.heads + head
            block = offset - head * cost
            if params.split_blocks > 0 and block > 0:
                first, _ = decode_range(read_row(lengths, rows.decode_seq[row], params), params)
                block = nearest_piece(first + block, params) - first
            # A cut goes to an end that is near: half of what takes the neighbour as long as a part, and half of a team's share at most,
            # so that every team keeps some.
            share = cutlass.min(total // num_parts, MOST_SHARE) * line.heads
            near = cutlass.min(params.decode_part_quarters // params.lone_block_eighths, share // 2)
            if block <= cutlass.min(near, cost - block):
                block = Int32(0)
            elif block >= cost - near:
                block = cost
            place = begin * line.heads + head * cost + block
            if block == cost:
                item += 1
                block = Int32(0)
    return item, block, place


@cute.jit
def _by_rows(rows: RowTables, line: DecodeLine, team: Int32, params: ScheduleParams) -> tuple[Int32, Int32, Int32]:
    """Row group and block where a team's part of a line begins, and n_blocks before, if it gets row groups of the same number, or a row
    group's part of as many; teams past the last have none."""
    parts, share = Int32(1), Int32(1)
    if line.items <= line.teams:
        parts = cutlass.min(line.teams // line.items, paying_parts(rows, params))
    else:
        share = (line.items + line.teams - 1) // line.teams
    item, block, place = line.items, Int32(0), rows.decode_cost[rows.num_decode] * line.heads
    at = team * share // parts
    if at < line.items:
        item = at
        row = item // line.heads
        begin = rows.decode_cost[row]
        cost = rows.decode_cost[row + 1] - begin
        part = team * share - item * parts
        block = part * (cost // parts) + part * (cost % parts) // parts
        place = begin * line.heads + (item - row * line.heads) * cost + block
    return item, block, place


@cute.jit
def _rows_end_sooner(line: DecodeLine, length: Int32, cuts: CutTables, sums: cute.Tensor, params: ScheduleParams) -> Boolean:
    """Whether the cuts by rows let the teams of a line end no later than those by blocks. Every thread of the CTA must call.

    Args:
        length: n_blocks of a line.
        cuts: `item` and `block` have the cuts by blocks, `inner` and `slot` those by rows: twice the row group, and 1 more inside it; and
            n_blocks before the cut.
    """
    team, _, _ = cute.arch.thread_idx()
    work, row_work, parts, row_parts = Int32(0), Int32(0), Int32(0), Int32(0)
    if team < line.teams:
        work, parts = _work(cuts.item, cuts.block, team, params)
        row_work, row_parts = _work(cuts.inner, cuts.slot, team, params)
    most, row_most = -block_min(-work, sums), -block_min(-row_work, sums)
    _, both = block_scan(parts + (row_parts << 16), sums)
    return _time(row_most, both >> 16, line, length, params) <= _time(most, both & 0xFFFF, line, length, params)


def _work(cut: cute.Tensor, before: cute.Tensor, team: Int32, params: ScheduleParams) -> tuple[Int32, Int32]:
    """Quarters of an n_block that a team has to do, and parts of row groups among it."""
    blocks = before[team + 1] - before[team]
    is_begun, is_left = cut[team] & 1, cut[team + 1] & 1
    is_one = cutlass.select_(cut[team] // 2 == cut[team + 1] // 2, is_begun & is_left, Int32(0))
    parts = cutlass.select_(blocks > 0, is_begun + is_left - is_one, Int32(0))
    return 4 * blocks + parts * params.decode_part_quarters, parts


def _time(most: Int32, parts: Int32, line: DecodeLine, length: Int32, params: ScheduleParams) -> Int32:
    """When a line's teams end, in eighths of quarters of an n_block: the time of the work of all, which the memory sets, or that of the
    team that has most, which is faster when others are done.

    Args:
        most: quarters of an n_block that a team has to do at most.
        parts: of row groups.
        length: n_blocks of the line.
    """
    total = 4 * length + parts * params.decode_part_quarters
    return cutlass.max(8 * total // line.teams, params.lone_block_eighths * most)


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
