"""Split KV for prefill rows: into how many parts each tile is cut, so that few tiles over long KV fill the chip.

All tiles of a row are cut into the same number of parts, each tile into about equal ones. So the places of a row's entries still follow
from its query blocks alone, and tiles of one head walk the same keys side by side, which then come from L2.

In batch-invariant mode parts end where pieces do, into which KV is cut at fixed blocks (`kv_pieces.tile_rule`). Parts are numbered from
the last one down: the first, whose CTA adds up its pieces as it goes, has one slot, the others one for each piece; slots are added up in
order.

Where that is not worth it, tiles may be a few more than whole rounds of CTAs: 672 equal tiles take 132 CTAs as long as 792. Then the tiles
of the last round alone are cut (`last_round`); not in batch-invariant mode.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common.kv_pieces import piece_begin, piece_of, tile_rule
from fa4_backend.kernels.schedule.block_ops import block_min, block_scan, warp_scan
from fa4_backend.kernels.schedule.limits import NUM_THREADS, NUM_WARPS
from fa4_backend.kernels.schedule.params import ScheduleParams
from fa4_backend.kernels.schedule.rates import ENTRY_QUARTERS, PART_QUARTERS
from fa4_backend.kernels.schedule.work_list import MAX_PARTS, NO_WINDOW, NOTHING, WHOLE

CANDIDATES = MAX_PARTS // NUM_WARPS  # lengths that each warp tries
MAX_SUM = 2**31 - 1
EQUAL_SHARE = 8  # tiles count as equally long where they differ by this share of the shortest
# Numbers are cut here before they are multiplied: above what a cut row may have, and no product or sum passes 2^31.
MOST_M_BLOCKS, MOST_ROUNDS, MOST_QUARTERS, MOST_BLOCKS = 1 << 14, 1 << 12, 1 << 16, 1 << 28


class PartTables(NamedTuple):
    """Shared memory, (NUM_THREADS,) each: the first prefill rows. Later ones, which are no longer, are not cut."""

    m_blocks: cute.Tensor  # query blocks
    longest: cute.Tensor  # n_blocks that the longest of them sees
    slot: cute.Tensor  # slots of the cut rows before this one


class PrefillSum(NamedTuple):
    """All prefill rows of a step."""

    tiles: Int32  # entries of the list of one head
    blocks: Int32  # about how many n_blocks they see
    longest: Int32  # n_blocks of the longest


class LastRound(NamedTuple):
    """The tiles that stand last in the list, where they are cut into parts. Without: `first` is the list's end."""

    first: Int32  # place of the first of them
    tiles: Int32  # at least 1
    parts: Int32  # of each


@cute.jit
def num_parts(longest: Int32, length: Int32, params: ScheduleParams) -> Int32:
    """Parts of each tile of a row whose longest sees `longest` n_blocks, where parts are to have `length` at most, or a piece."""
    parts = cutlass.max((longest + length - 1) // length, 1)
    if params.part_piece_blocks > 0:
        parts = cutlass.min(parts, _piece_at(cutlass.max(longest - 1, 0), params) + 1)
    return parts


@cute.jit
def longest_part(longest: Int32, length: Int32, params: ScheduleParams) -> Int32:
    """n_blocks that a part of such a tile has at most, or about."""
    if params.part_piece_blocks > 0:
        # In whole pieces of the size of the last, as if the tile began with its sequence.
        last = _piece_at(longest - 1, params)
        begin, end = (_begin_of(last + i, params) for i in (0, 1))
        length = cutlass.min((length + end - begin - 1) // (end - begin) * (end - begin), longest)
    return length


@cute.jit
def num_slots(longest: Int32, parts: Int32, params: ScheduleParams) -> Int32:
    """Slots that a tile of such a row wants for `parts` parts, at most."""
    slots = parts
    if (params.part_piece_blocks > 0) & (parts > 1):
        cut = longest - longest // parts  # where the first part begins, or at a piece's beginning that is near
        slots = 1 + cutlass.min(_piece_at(cut, params) + 1, _piece_at(cutlass.max(longest - 1, 0), params))
        # A tile that does not begin with its sequence may touch a piece more, and one between a row's ends, by which `longest` goes, see
        # as many blocks more as a tile has of them.
        slots += cutlass.select_(params.window_left < NO_WINDOW, params.tokens_per_item // params.prefill_tile_n + 2, 0)
    return cutlass.select_(parts > 1, slots, Int32(0))


class Part(NamedTuple):
    """A part of a tile, or all of it."""

    begin: Int32  # its n_blocks, half-open
    end: Int32
    slot: Int32  # the first that it fills; WHOLE or NOTHING
    slots: Int32  # of the tile


@cute.jit
def part_of_tile(begin: Int32, end: Int32, part: Int32, parts: Int32, first_slot: Int32, params: ScheduleParams) -> Part:
    """Part `part` of a tile that sees n_blocks `begin .. end` and is cut into `parts`, 2 or more."""
    slot, slots = first_slot + part, parts
    length, longer = (end - begin) // parts, (end - begin) % parts
    part_begin = begin + part * length + cutlass.min(part, longer)
    part_end = part_begin + length + cutlass.select_(part < longer, Int32(1), Int32(0))
    if params.part_piece_blocks > 0:
        part_begin, part_end = (_cut(begin, end, parts - part - i, parts, params) for i in (1, 0))
        head = _piece_at(_cut(begin, end, parts - 1, parts, params), params)
        slots = head - _piece_at(begin, params) + 1
        slot = first_slot
        if part > 0:
            slot += head - _piece_at(cutlass.max(part_end - 1, 0), params)
            if part_begin >= part_end:
                slot, part_begin, part_end = Int32(NOTHING), begin, begin
        elif slots == 1:
            slot = Int32(WHOLE)
    return Part(part_begin, part_end, slot, slots)


@cute.jit
def _cut(begin: Int32, end: Int32, index: Int32, parts: Int32, params: ScheduleParams) -> Int32:
    """Cut `index` of `0 .. parts` of a tile: the beginning of a piece that is near, or an end of the tile."""
    cut = begin
    if index == parts:
        cut = end
    elif index > 0:
        length = end - begin
        at = begin + index * (length // parts) + index * (length % parts) // parts
        last, piece = _piece_at(cutlass.max(end - 1, 0), params), _piece_at(at, params)
        before, behind = (_begin_of(piece + i, params) for i in (0, 1))
        if 2 * at >= before + behind:
            before = behind
        cut = cutlass.max(cutlass.min(before, _begin_of(last, params)), begin)
    return cut


def _piece_at(n_block: Int32, params: ScheduleParams) -> Int32:
    return piece_of(n_block, tile_rule(params.part_piece_blocks), cutlass.min, cutlass.max)


def _begin_of(piece: Int32, params: ScheduleParams) -> Int32:
    return piece_begin(piece, tile_rule(params.part_piece_blocks), cutlass.min, cutlass.max)


@cute.jit
def part_length(tables: PartTables, prefill: PrefillSum, sums: cute.Tensor, params: ScheduleParams) -> Int32:
    """n_blocks that a part has at most; `longest` where nothing is cut. Every thread of the CTA must call.

    The longest tile is cut into 1 to MAX_PARTS parts, the others of the first rows into parts of that length; a warp a candidate, a lane
    a row. What ends soonest is taken: whole rounds of entries, or the longest entry, and what it costs to add up parts.
    """
    tidx, _, _ = cute.arch.thread_idx()
    lane, warp = tidx % 32, tidx // 32
    heads, longest, num_groups = params.num_kv_heads, prefill.longest, params.prefill_groups
    # No row sees more than an equal share of all: then all CTAs have work until the end.
    share = cutlass.min(prefill.blocks // num_groups, MAX_SUM // heads - 1) * heads + prefill.blocks % num_groups * heads // num_groups
    best, best_parts = Int32(MAX_SUM), Int32(MAX_PARTS)
    if longest > share and longest >= 2 * params.min_part_blocks and params.part_slots > 0:
        for i in cutlass.range(CANDIDATES, unroll=1):
            parts = i * NUM_WARPS + warp + 1
            length = (longest + parts - 1) // parts
            added, slots = Int32(0), Int32(0)
            for row in range(lane, NUM_THREADS, 32):
                m_blocks = cutlass.min(tables.m_blocks[row], MOST_M_BLOCKS)
                row_parts = num_parts(tables.longest[row], length, params)
                added += m_blocks * (row_parts - 1)
                slots += cutlass.min(m_blocks * num_slots(tables.longest[row], row_parts, params), params.part_slots + 1)
            added, slots = warp_sum(added), warp_sum(slots)
            entries = prefill.tiles + added
            rounds = cutlass.min((entries * heads + num_groups - 1) // num_groups, MOST_ROUNDS)
            average = cutlass.min(4 * cutlass.min(prefill.blocks, MOST_BLOCKS) // entries, MOST_QUARTERS) + ENTRY_QUARTERS
            time = cutlass.max(rounds * average, 4 * longest_part(longest, length, params) + ENTRY_QUARTERS)
            if parts > 1:
                time += cutlass.min(PART_QUARTERS * parts, params.most_part_quarters)
            fits = (slots <= params.part_slots // heads) & (length >= params.min_part_blocks)
            if (fits | (parts == 1)) & (time < best):
                best, best_parts = time, parts
        least = block_min(best, sums)
        best_parts = block_min(cutlass.select_(best == least, best_parts, Int32(MAX_PARTS)), sums)
    else:
        best_parts = Int32(1)
    return (longest + best_parts - 1) // best_parts


@cute.jit
def cut_rows(tables: PartTables, tile_sum: cute.Tensor, num_rows: Int32, length: Int32, sums: cute.Tensor, params: ScheduleParams) -> Int32:
    """Count the parts of the rows' tiles in `tile_sum` (num_rows + 1,), which counted tiles, and give them slots; ends with a barrier.

    Returns the entries of one head that come in addition.
    """
    tidx, _, _ = cute.arch.thread_idx()
    m_blocks, parts = tables.m_blocks[tidx], num_parts(tables.longest[tidx], length, params)
    before, added = block_scan(m_blocks * (parts - 1), sums)
    slot, _ = block_scan(m_blocks * num_slots(tables.longest[tidx], parts, params) * params.num_kv_heads, sums)
    tables.slot[tidx] = slot
    for at in range(tidx, num_rows + 1, NUM_THREADS):
        tile_sum[at] += cutlass.select_(at < NUM_THREADS, before, added)
    cute.arch.sync_threads()
    return added


def last_round(entries: Int32, shortest: Int32, longest: Int32, room: Int32, params: ScheduleParams) -> LastRound:
    """How the last round's tiles are cut; `entries` are all whole.

    They are dealt to all CTAs, once or twice. Tiles must be about equally long: of tiles that get shorter towards the list's end CTAs end
    at many times, and the last ones fill what is left.

    Args:
        entries: of all heads.
        shortest: n_blocks of the last tile.
        longest: of the longest.
        room: entries that the list has room for.
    """
    num_groups = params.prefill_groups
    tiles = entries % num_groups
    some = cutlass.max(tiles, 1)
    most = cutlass.min(cutlass.min(shortest, MOST_QUARTERS) // params.min_part_blocks, MAX_PARTS)
    best, parts = 4 * shortest + ENTRY_QUARTERS, Int32(1)
    for rounds in (1, 2):
        each = cutlass.min(rounds * num_groups // some, most)
        time = rounds * (4 * ((shortest + cutlass.max(each, 1) - 1) // cutlass.max(each, 1)) + ENTRY_QUARTERS)
        time += cutlass.min(PART_QUARTERS * each, params.most_part_quarters)
        is_better = (each > 1) & (time < best)
        best, parts = cutlass.select_(is_better, time, best), cutlass.select_(is_better, each, parts)
    is_equal = longest - shortest <= shortest // EQUAL_SHARE
    fits = (tiles * parts <= params.part_slots) & (entries + tiles * (parts - 1) <= room)
    parts = cutlass.select_((entries > num_groups) & (tiles > 0) & is_equal & fits, parts, Int32(1))
    return LastRound(entries - cutlass.select_(parts > 1, tiles, Int32(0)), some, parts)


def warp_sum(value: Int32) -> Int32:
    """Sum of `value` over the warp."""
    return cute.arch.shuffle_sync(warp_scan(value, 32), 31)
