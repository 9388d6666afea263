"""The work lists made on the host, step by step and readable: the oracle of the device's schedule, and lists for kernels' own tests."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from fa4_backend.kernels.schedule.rates import ALONE_THIRDS
from fa4_backend.kernels.schedule.work_list import ALL_ROWS, DECODE_INTS, NO_WINDOW, NOTHING, TILE_INTS, TOTAL_Q, WHOLE, WorkShape


@dataclass(frozen=True)
class HostLists:
    """Both lists as arrays of int32: prefill tiles (n, TILE_INTS), decode tiles and first (.., DECODE_INTS).

    Unused ints of `decode_tiles` are 0; rows of `decode_first` without an entry hold `total_q` and zeros.
    """

    prefill_tiles: np.ndarray
    decode_tiles: np.ndarray
    decode_first: np.ndarray
    own_entries: int  # entries of the prefill list that are not taken from the queue


def make_lists(
    shape: WorkShape,
    query_lens: list[int],
    kv_lens: list[int],
    *,
    window_left: int = NO_WINDOW,
    window_right: int = 0,
    parts: tuple[int, ...] | None = None,
) -> HostLists:
    """Lists for one step. KV lengths are cut to the limits.

    Args:
        window_right: 0 for causal attention, NO_WINDOW for full attention.
        parts: of each tile of every sequence, where they are not to be what is best.
    """
    cut = [min(max(kv_len, 0), shape.max_seqlen_k) for kv_len in kv_lens]
    rows = list(zip(range(len(kv_lens)), query_lens, cut, strict=True))
    decode = [row for row in rows if 0 < row[1] <= shape.decode_query_len]
    prefill = [row for row in rows if row[1] > shape.decode_query_len]
    q_begins = np.concatenate([[0], np.cumsum(query_lens)]).astype(int)
    order = sorted(prefill, key=lambda row: -row[2])  # stable: longest KV first
    seen = [_seen(shape, row, window_left, window_right) for row in order]
    best = num_parts(shape, [s.m_blocks for s in seen], [s.longest for s in seen], sum(s.blocks for s in seen), window_left)
    cuts = best if parts is None else [parts[row[0]] for row in order]
    tiles = _prefill_tiles(shape, order, q_begins.tolist(), cuts, window_left, window_right)
    if tiles and not decode and set(cuts) == {1}:
        tiles = _cut_last_round(shape, tiles, max(s.longest for s in seen[:512]), parts is not None)
    blocks = sum(s.blocks for s in seen)
    lines = _lines(shape, decode, window_left)
    share = share_chip(shape, sum(sum(_cost(line)) for line in lines), len(tiles), blocks) if tiles and decode else None
    queue = np.array(tiles, dtype=np.int32).reshape(-1, TILE_INTS)
    decode_tiles, decode_first = _decode(shape, decode, lines, q_begins, share)
    own_entries = 0
    if prefill and not decode:  # prefill CTAs all start at once, and zero the rows behind the step's queries
        decode_first[:, TOTAL_Q], own_entries = ALL_ROWS, shape.prefill_groups
    return HostLists(queue, decode_tiles, decode_first, own_entries)


def share_chip(shape: WorkShape, decode_cost: int, tiles: int, blocks: int) -> int | None:
    """The SMs for decode with which a step ends soonest, None where decode on all SMs and prefill behind it does.

    Args:
        decode_cost: KV tiles of all decode row groups.
        tiles: prefill tiles.
        blocks: n_blocks that one head's prefill tiles see, as `_seen` estimates.
    """
    tile_ticks = 64 * (blocks // (tiles // shape.num_kv_heads) + 1)

    def decode_ticks(sms: int) -> int:
        fifths = min(5 * sms, 2 * (shape.decode_full_sms + sms), 5 * shape.decode_full_sms)
        if sms == 0:
            fifths = ALONE_THIRDS * shape.decode_full_sms // 3
        return (5 * decode_cost // fifths + 1) * shape.decode_tile_ticks

    late = decode_ticks(0) + -(-tiles // shape.prefill_groups) * tile_ticks
    best, chosen = late + late // 16, None
    for sms in range(1, min(shape.num_sms - shape.num_sms // 4, 255) + 1):
        early = shape.prefill_groups - -(-sms // (shape.num_sms // shape.prefill_groups))
        for early_rounds in (decode_ticks(sms) // tile_ticks, decode_ticks(sms) // tile_ticks + 1):
            left = tiles - early * early_rounds
            rounds = early_rounds + -(-left // shape.prefill_groups) if left > 0 else -(-tiles // early)
            late = decode_ticks(sms) + max(rounds - early_rounds, 0) * tile_ticks
            ticks = max(rounds * tile_ticks, late) + late // 16
            if ticks < best:
                best, chosen = ticks, sms
    return chosen


@dataclass(frozen=True)
class RowSeen:
    """What the tiles of a prefill row see, of one head."""

    m_blocks: int
    longest: int  # n_blocks of the first or the last tile, whichever sees more
    blocks: int  # about how many n_blocks all see: as if they lay on a line between the first and the last


def _visible(shape: WorkShape, row: tuple, m_block: int, window_left: int, window_right: int) -> tuple[int, int]:
    """The n_blocks that a prefill tile sees, half-open."""
    _, query_len, kv_len = row
    first = kv_len - query_len + m_block * shape.tokens_per_item  # diagonal key of the tile's first token
    end = min(kv_len, first + shape.tokens_per_item + window_right)
    begin = max(first - window_left, 0) // shape.prefill_tile_n
    return begin, max(-(-end // shape.prefill_tile_n), begin)


def _seen(shape: WorkShape, row: tuple, window_left: int, window_right: int) -> RowSeen:
    m_blocks = -(-row[1] // shape.tokens_per_item)
    ends = [_visible(shape, row, m_block, window_left, window_right) for m_block in (0, m_blocks - 1)]
    first, last = (end - begin for begin, end in ends)
    return RowSeen(m_blocks, max(first, last), m_blocks * (first + last) // 2)


def num_parts(shape: WorkShape, m_blocks: list[int], longest: list[int], blocks: int, window_left: int) -> list[int]:
    """Parts of each tile of every row: those of the length that ends soonest, none where all CTAs have work until the end anyway.

    Args:
        m_blocks, longest: tiles of one head of each row, and the n_blocks that the longest sees.
        blocks: n_blocks that all tiles of one head see.
    """
    whole = [1] * len(m_blocks)
    if not m_blocks or not shape.part_floats:
        return whole
    heads, ctas, most = shape.num_kv_heads, shape.prefill_groups, max(longest[:512])
    if most <= blocks * heads // ctas or most < 2 * shape.min_part_blocks:
        return whole
    best, chosen = math.inf, whole
    for count in range(1, 65):
        length = -(-most // count)
        parts = [_parts_of(shape, n, length) if i < 512 else 1 for i, n in enumerate(longest)]
        over = shape.max_part_slots() + 1
        slots = sum(min(m * num_slots(shape, n, k, window_left), over) for m, n, k in zip(m_blocks, longest, parts, strict=True))
        if count > 1 and (slots > shape.max_part_slots() // heads or length < shape.min_part_blocks):
            continue
        entries = sum(m * n for m, n in zip(m_blocks, parts, strict=True))
        # In quarters of an n_block; an entry's beginning and end take one, adding up a part half of one, up to a limit.
        adding = min(2 * count, shape.most_part_quarters) if count > 1 else 0
        time = max(-(-entries * heads // ctas) * (4 * blocks // entries + 4), 4 * _longest_part(shape, most, length) + 4) + adding
        if time < best:
            best, chosen = time, parts
    return chosen


def _parts_of(shape: WorkShape, blocks: int, length: int) -> int:
    """Parts of a tile that sees `blocks` n_blocks, where they are to have `length` at most: no more than it has pieces."""
    parts = max(1, -(-blocks // length))
    return min(parts, len(piece_ends(shape, blocks))) if shape.part_piece_blocks else parts


def _longest_part(shape: WorkShape, blocks: int, length: int) -> int:
    """n_blocks that a part of such a tile has at most, about."""
    if not shape.part_piece_blocks:
        return length
    ends = piece_ends(shape, blocks, is_whole=True)
    size = ends[-1] - (ends[-2] if len(ends) > 1 else 0)
    return min(-(-length // size) * size, blocks)


def num_slots(shape: WorkShape, blocks: int, count: int, window_left: int) -> int:
    """Slots that a tile has room for: one a part, or one for the pieces of the last part and one for each piece before."""
    if count == 1:
        return 0
    if not shape.part_piece_blocks:
        return count
    begin_of_last = sum(end <= blocks - blocks // count for end in piece_ends(shape, blocks, is_whole=True))
    further = shape.tokens_per_item // shape.prefill_tile_n + 2 if window_left < NO_WINDOW else 0
    return 1 + min(begin_of_last + 1, len(piece_ends(shape, blocks)) - 1) + further


def piece_ends(shape: WorkShape, blocks: int, *, is_whole: bool = False) -> list[int]:
    """Ends of the pieces of a sequence's first `blocks` n_blocks, at least one; is_whole: the last one's is its own."""
    short, ends = shape.part_piece_blocks, [0]
    while ends[-1] < max(blocks, 1):
        ends.append(ends[-1] + short * (1 if ends[-1] < 16 * short else 2 if ends[-1] < 64 * short else 8))
    return ends[1:] if is_whole else [*ends[1:-1], max(blocks, 0)]


@dataclass(frozen=True)
class HostPart:
    """A part of a tile."""

    begin: int
    end: int
    slot: int  # behind the tile's first; WHOLE, NOTHING
    slots: int  # of the tile


def _parts(shape: WorkShape, begin: int, end: int, count: int) -> list[HostPart]:
    """The parts of a tile that sees `begin .. end`."""
    if count == 1:
        return [HostPart(begin, end, WHOLE, 1)]
    if not shape.part_piece_blocks:
        cuts = [begin]
        for part in range(count):
            cuts.append(cuts[-1] + (end - begin) // count + (part < (end - begin) % count))
        return [HostPart(*cut, part, count) for part, cut in enumerate(itertools.pairwise(cuts))]
    begins = [0, *piece_ends(shape, end)[:-1]]
    further = [0, *piece_ends(shape, end, is_whole=True)]
    cuts = [begin]
    for index in range(1, count):
        at = begin + index * ((end - begin) // count) + index * ((end - begin) % count) // count
        before = max(b for b in further if b <= at)
        behind = further[further.index(before) + 1]
        near = behind if 2 * at >= before + behind else before
        cuts.append(max(min(near, begins[-1]), begin))
    cuts.append(end)
    # Pieces before the last part, from the last one down, have the slots behind the first.
    inner = [b for b in begins if begin < b <= cuts[-2]]
    slots = 1 + len(inner)
    of_end = {b: 1 + i for i, b in enumerate(reversed(inner))}
    parts = [HostPart(cuts[-2], end, 0 if slots > 1 else WHOLE, slots)]
    for part_begin, part_end in reversed(list(itertools.pairwise(cuts[:-1]))):
        is_empty = part_begin == part_end
        parts.append(HostPart(begin, begin, NOTHING, slots) if is_empty else HostPart(part_begin, part_end, of_end[part_end], slots))
    return parts


def _prefill_tiles(
    shape: WorkShape, order: list, q_begins: list[int], parts: list[int], window_left: int, window_right: int
) -> list[tuple]:
    """The prefill list's entries in the order in which they are taken.

    Args:
        q_begins: first row in q of each sequence.
        parts: of each row's tiles, in order.
    """
    tiles: list[tuple] = []
    row_slot = 0
    for row, count in zip(order, parts, strict=True):
        longest = _seen(shape, row, window_left, window_right).longest
        of_tile = num_slots(shape, longest, count, window_left)
        seq_idx, query_len, kv_len = row
        m_blocks = -(-query_len // shape.tokens_per_item)
        group = min(max(shape.l2_tokens // max(kv_len, 1), 1), shape.num_kv_heads)
        for head_begin in range(0, shape.num_kv_heads, group):
            heads = range(head_begin, min(head_begin + group, shape.num_kv_heads))
            for m_block in reversed(range(m_blocks)):
                begin, end = _visible(shape, row, m_block, window_left, window_right)
                cut = _parts(shape, begin, end, count)
                for part, head in itertools.product(cut, heads):
                    first_slot = row_slot + (head * m_blocks + m_block) * of_tile if count > 1 else 0
                    slot = first_slot + part.slot if part.slot >= 0 else part.slot
                    lengths = kv_len, q_begins[seq_idx], query_len, 0
                    tiles.append((seq_idx, head, m_block, part.begin, part.end, slot, first_slot, part.slots, *lengths))
        row_slot += m_blocks * of_tile * shape.num_kv_heads
    return tiles


def _cut_last_round(shape: WorkShape, tiles: list[tuple], longest: int, is_told: bool) -> list[tuple]:
    """Tiles beyond whole rounds of CTAs are cut, where tiles are about equally long: first parts of all, then second parts."""
    ctas = shape.prefill_groups
    count, (begin, end) = len(tiles) % ctas, tiles[-1][3:5]
    shortest = end - begin
    if is_told or shape.part_piece_blocks or len(tiles) <= ctas or count == 0 or longest - shortest > shortest // 8:
        return tiles
    best, parts = 4 * shortest + 4, 1
    for rounds in (1, 2):
        each = min(rounds * ctas // count, shortest // shape.min_part_blocks, 64)
        if each > 1:
            time = rounds * (4 * -(-shortest // each) + 4) + min(2 * each, shape.most_part_quarters)
            if time < best:
                best, parts = time, each
    if parts == 1 or count * parts > shape.max_part_slots():
        return tiles
    cut = []
    for part, (at, tile) in itertools.product(range(parts), enumerate(tiles[-count:])):
        length, longer = divmod(tile[4] - tile[3], parts)
        first = tile[3] + part * length + min(part, longer)
        cut.append((*tile[:3], first, first + length + (part < longer), at * parts + part, at * parts, parts, *tile[8:]))
    return tiles[:-count] + cut


Group = tuple[int, int, int, int]  # seq_idx, head, first n_block, end n_block
Cut = tuple[int, int]  # row group, and n_blocks of it before the cut


def _lines(shape: WorkShape, rows: list, window_left: int) -> list[list[Group]]:
    """The lines of row groups, one behind the other."""
    lines: list[list[Group]] = []
    for heads in np.split(np.arange(shape.num_kv_heads), shape.decode_lines):
        lines.append([])
        for seq_idx, query_len, kv_len in rows:
            begin = max(kv_len - query_len - window_left, 0) // shape.decode_tile_n
            lines[-1] += [(seq_idx, int(head), begin, -(-kv_len // shape.decode_tile_n)) for head in heads]
    return lines


def _cost(groups: list[Group]) -> list[int]:
    return [max(end - begin, 1) for _, _, begin, end in groups]


def _decode(
    shape: WorkShape, rows: list, lines: list[list[Group]], q_begins: np.ndarray, share: int | None
) -> tuple[np.ndarray, np.ndarray]:
    lengths = {seq_idx: (int(q_begins[seq_idx]), query_len, kv_len) for seq_idx, query_len, kv_len in rows}
    ctas, num_lines, groups = shape.decode_num_ctas, len(lines), [group for line in lines for group in line]
    teams = max((ctas if share is None else share) // num_lines, 1)
    weighed = shape if share is None else replace(shape, decode_part_quarters=0)
    of_line = line_cuts(weighed, lines[0], teams, is_alone=share is None)
    # Place by place: line after line, a team each, and the CTAs that are in no team.
    cuts = [(item + i * len(lines[0]), block) for i in range(num_lines) for item, block in of_line[:teams]]
    cuts += [(len(groups), 0)] * (ctas + 1 - len(cuts))
    cta_of = [team * num_lines + i for i in range(num_lines) for team in range(teams)]
    cta_of += range(len(cta_of), ctas)
    if shape.split_blocks:  # CTAs without work behind the others
        distinct = list(dict.fromkeys(cuts))
        cuts = distinct + [(len(groups), 0)] * (len(cuts) - len(distinct))
    bounds: dict[int, list[int]] = {}  # item -> its blocks where an entry begins or ends
    for item, block in cuts:
        if block:
            known = bounds.setdefault(item, [0])
            if known[-1] != block:
                known.append(block)
    slot, first_slots, pieces = 0, {}, {}
    for item in sorted(bounds):
        _, _, begin, end = groups[item]
        pieces[item] = len(pieces_between(shape, begin, end)) if shape.split_blocks else len(bounds[item])
        first_slots[item] = slot
        slot += pieces[item]
    lists: list[list] = [[] for _ in range(ctas)]
    for c in range(ctas):
        item, block = cuts[c]
        while (item, block) < cuts[c + 1]:
            seq_idx, head, begin, end = groups[item]
            stop = cuts[c + 1][1] if item == cuts[c + 1][0] else end - begin
            where = (-1, 0, 1)
            if item in bounds:
                at_cut = bounds[item].index(block) if block in bounds[item] else 0
                piece = len(pieces_between(shape, begin, begin + block)) if shape.split_blocks else at_cut
                where = (first_slots[item] + piece, first_slots[item], pieces[item])
            lists[c].append((seq_idx, head, 0, begin + block, begin + stop, *where, *lengths[seq_idx]))
            item, block = item + 1, 0
    tiles = np.zeros((sum(map(len, lists)), DECODE_INTS), dtype=np.int32)
    first = np.zeros((ctas, DECODE_INTS), dtype=np.int32)
    at = 0
    for c, entries in zip(cta_of, lists, strict=True):
        for i, entry in enumerate(entries):
            tiles[at + i, : len(entry)] = entry
        if entries:
            first[c, : len(entries[0]) + 2] = (*entries[0], len(entries), at + 1)
        first[c, TOTAL_Q] = q_begins[-1]
        at += len(entries)
    return tiles, first


def line_cuts(shape: WorkShape, line: list[Group], teams: int, *, is_alone: bool) -> list[Cut]:
    """Where a line is cut between teams, and its end.

    Args:
        is_alone: the step has no prefill rows that decode runs beside.
    """
    cost = _cost(line)
    used = _usable_teams(shape, cost, teams) if is_alone else teams
    by_blocks = _cut_by_blocks(shape, line, used) + [(len(line), 0)] * (teams - used)
    if not cost or not shape.decode_part_quarters or sum(cost) > 1 << 24:
        return by_blocks
    by_rows = _cut_by_rows(shape, cost, teams)
    return by_rows if cut_time(shape, cost, by_rows) <= cut_time(shape, cost, by_blocks) else by_blocks


def _cut_by_blocks(shape: WorkShape, line: list[Group], parts: int) -> list[Cut]:
    """Equal parts; a cut goes to a row group's end that is near."""
    cost, cuts = _cost(line), []
    heads = shape.num_kv_heads // shape.decode_lines
    starts = np.concatenate([[0], np.cumsum(cost)]).astype(int)
    total = int(starts[-1])
    near = min(shape.decode_part_quarters // shape.lone_block_eighths, total // heads // parts * heads // 2)
    for c in range(parts + 1):
        position = c * (total // parts) + c * (total % parts) // parts
        item = int(np.searchsorted(starts, position, side="right")) - 1
        if item >= len(line):
            cuts.append((len(line), 0))
            continue
        _, _, begin, end = line[item]
        block = position - int(starts[item])  # blocks of the item before the cut
        if shape.split_blocks and block > 0:
            starts_of = piece_starts(shape, end)
            block = min(starts_of, key=lambda start: (abs(start - begin - block), -start)) - begin
        left = cost[item] - block
        if block <= 0 or (block <= near and block <= left):
            cuts.append((item, 0))
        elif left <= near:
            cuts.append((item + 1, 0))
        else:
            cuts.append((item, block))
    return cuts


def _cut_by_rows(shape: WorkShape, cost: list[int], teams: int) -> list[Cut]:
    """Whole row groups, as many a team, or each in as many parts."""
    items = len(cost)
    if items > teams:
        share = -(-items // teams)
        return [(min(team * share, items), 0) for team in range(teams + 1)]
    parts = min(teams // items, paying_parts(shape, cost))
    cuts = [(item, part * cost[item] // parts) for item in range(items) for part in range(parts)]
    return cuts + [(items, 0)] * (teams + 1 - len(cuts))


def cut_time(shape: WorkShape, cost: list[int], cuts: list[Cut]) -> int:
    """When the cuts let all teams end, in eighths of quarters of an n_block.

    Args:
        cost: n_blocks of a line's row groups.
    """
    starts, work = [0, *itertools.accumulate(cost)], []
    for (item, block), (last, stop) in itertools.pairwise(cuts):
        blocks = starts[last] + stop - starts[item] - block
        cut_items = {at for at, inside in ((item, block), (last, stop)) if inside}
        parts = len(cut_items) if blocks else 0
        work.append(4 * blocks + parts * shape.decode_part_quarters)
    return max(8 * sum(work) // len(work), shape.lone_block_eighths * max(work))


def piece_starts(shape: WorkShape, end: int) -> list[int]:
    """First tiles of a row's pieces (batch-invariant mode), up to the first that is not below `end`."""
    short = 2 if shape.slot_vectors == 1 else 4
    starts = [0]
    while starts[-1] < end:
        starts.append(starts[-1] + (short if starts[-1] < 16 else 2 * short if starts[-1] < 64 else shape.split_blocks))
    return starts


def pieces_between(shape: WorkShape, begin: int, end: int) -> list[tuple[int, int]]:
    """The pieces that tiles `begin` .. `end` lie in."""
    return [(a, b) for a, b in itertools.pairwise(piece_starts(shape, end)) if max(a, begin) < min(b, end)]


def _usable_teams(shape: WorkShape, cost: list[int], teams: int) -> int:
    """Teams to cut a line by blocks for: fewer than all where parts cost nothing and equal row groups then need fewer splits and at most
    an eighth is lost, and no more parts of a row group than pay."""
    items = len(cost)
    if not items:
        return teams
    is_equal, used = len(set(cost)) == 1, teams
    if is_equal and not shape.decode_part_quarters:
        if items <= teams:
            used = teams - teams % items
        else:
            share = -(-items // teams)
            if items % share == 0:
                used = items // share
    used = used if used * 8 >= teams * 7 else teams
    if shape.split_blocks or not (is_equal or shape.decode_part_quarters):
        return used
    return min(used, items * paying_parts(shape, cost))


def paying_parts(shape: WorkShape, cost: list[int]) -> int:
    """Parts of an average row group that it pays to add up."""
    blocks = sum(cost) // len(cost)
    parts = math.isqrt(5 * blocks // shape.slot_vectors)
    if shape.decode_part_blocks and parts * shape.slot_vectors >= shape.decode_share_vectors:
        parts = blocks // shape.decode_part_blocks
        if shape.decode_parts_ratio:
            parts = min(parts, math.isqrt(shape.decode_parts_ratio * blocks))
    return max(1, parts)
