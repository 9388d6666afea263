"""The schedule, executed from its PTX, against lists made step by step on the host; the host's lists against what a list must be.

Lengths sit at the edges of a KV tile (64) and of a query tile; CTAs are fewer and more than the row groups. Both archs run
the same source, so one of them is enough here; tests/emulated/test_decode.py runs it on both.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from fa4_backend.kernels.schedule.config import ScheduleConfig
from fa4_backend.kernels.schedule.limits import table_size
from fa4_backend.kernels.schedule.rows import COUNTED_ROWS
from fa4_backend.kernels.schedule.work_list import (
    FIRST_SLOT,
    KV_HEAD_IDX,
    KV_LEN,
    N_BLOCK_BEGIN,
    N_BLOCK_END,
    NEXT_ENTRY,
    NO_WINDOW,
    NUM_ENTRIES,
    NUM_PIECES,
    PARTIAL_SLOT,
    QUEUE_TOTAL,
    SEQ_IDX,
    WorkShape,
)
from tests.support.emulated_decode import assert_same_lists, empty_lists, host_lists, run_schedule
from tests.support.emulated_mla import MlaCase
from tests.support.host_schedule import cut_time, line_cuts, make_lists

pytestmark = pytest.mark.emulated

KV_EDGES = (0, 1, 63, 64, 65, 500, 3000)
BASE = WorkShape(
    num_kv_heads=2, prefill_groups=33, decode_num_ctas=33, tokens_per_item=32, prefill_tile_n=128, decode_query_len=1, decode_tile_n=64,
    slot_floats=520, split_blocks=0, slot_vectors=1, l2_tokens=1000, num_sms=33, decode_tile_ticks=20, decode_full_sms=20,
    max_seqlen_k=1 << 13, max_num_tokens=1 << 14,
)  # fmt: skip


def draw_step(seed: int) -> tuple[WorkShape, list[int], list[int], int, int]:
    """Shape, query lengths, KV lengths and window of a random step."""
    draw = random.Random(seed)
    num_ctas, sms_a_group = draw.choice((1, 7, 33)), draw.choice((1, 2))
    shape = WorkShape(
        num_kv_heads=draw.choice((1, 2, 3, 8)), prefill_groups=num_ctas,
        decode_num_ctas=max(draw.choice((1, 7, 33)), num_ctas * sms_a_group),
        tokens_per_item=draw.choice((16, 32, 42)), prefill_tile_n=128, decode_query_len=draw.choice((0, 1, 4)), decode_tile_n=64,
        slot_floats=520, split_blocks=draw.choice((0, 0, 3, 8)), slot_vectors=draw.choice((1, 4)),
        l2_tokens=1000, num_sms=num_ctas * sms_a_group, decode_tile_ticks=draw.choice((1, 20, 200)),
        decode_full_sms=draw.choice((1, 3, 20)), max_seqlen_k=draw.choice((4096, 400)), max_num_tokens=16384,
        part_floats=draw.choice((0, 8)), min_part_blocks=draw.choice((1, 2, 8)),
        decode_part_blocks=draw.choice((0, 1, 3)), decode_parts_ratio=draw.choice((0, 1, 16)),
        most_part_quarters=draw.choice((1 << 16, 6)), decode_share_vectors=draw.choice((0, 20)),
    )  # fmt: skip
    rows = draw.choice((1, 2, 5, 40))
    query_lens = [draw.choice((0, 1, 1, 4, 5, draw.randint(1, 300))) for _ in range(rows)]
    kv_lens = [draw.choice(KV_EDGES)] * rows if draw.random() < 0.3 else [draw.choice(KV_EDGES) for _ in range(rows)]
    windows = draw.choice((NO_WINDOW, 0, 100)), draw.choice((0, 5, NO_WINDOW))
    shape = replace(
        shape, decode_lines=draw.choice((1, shape.num_kv_heads if shape.num_kv_heads <= shape.decode_num_ctas else 1)),
        decode_part_quarters=0 if shape.split_blocks else draw.choice((0, 5, 12)), lone_block_eighths=draw.choice((8, 5)),
        part_piece_blocks=draw.choice((0, 1, 2, 4)),
    )  # fmt: skip
    return shape, query_lens, kv_lens, *windows


def test_host_lists_hold_every_tile_once() -> None:
    for seed in range(500):
        shape, query_lens, kv_lens, left, right = draw_step(seed)
        host_lists(shape, query_lens, kv_lens, window_left=left, window_right=right)


def test_device_lists_are_the_hosts() -> None:
    for seed in range(12):
        shape, query_lens, kv_lens, left, right = draw_step(seed)
        want = host_lists(shape, query_lens, kv_lens, window_left=left, window_right=right)
        work = empty_lists(shape, len(kv_lens))
        key = ScheduleConfig("sm_90a", 256)
        report = run_schedule("sm_90a", key, work, query_lens, kv_lens, window_left=left, window_right=right, seed=seed)
        assert report.races == []
        assert_same_lists(work, want)


# (CTAs, query lengths, KV lengths, parts of the last round's tiles; 1: not cut). Tiles are 32 tokens, blocks 128 keys, heads two.
LAST_ROUNDS = {
    "4 tiles of 28 on 12 CTAs": (12, [200, 200], [5000, 5000], 3),
    "8 tiles of 20 on 12 CTAs, parts in two rounds": (12, [320], [5000], 3),
    "tiles that end early": (12, [416], [416], 1),
    "whole rounds": (14, [200, 200], [5000, 5000], 1),
    "decode rows beside": (12, [200, 200, 1], [5000, 5000, 40], 1),
    "tiles too short for parts": (12, [200, 200], [300, 300], 1),
}


@pytest.mark.parametrize("name", LAST_ROUNDS)
def test_the_last_round_is_cut(name: str) -> None:
    num_ctas, query_lens, kv_lens, parts = LAST_ROUNDS[name]
    shape = replace(
        BASE, prefill_groups=num_ctas, decode_num_ctas=num_ctas, num_sms=num_ctas, part_floats=8, min_part_blocks=2, most_part_quarters=10
    )
    want = host_lists(shape, query_lens, kv_lens)
    assert set(want.prefill_tiles[:, NUM_PIECES]) == {1, parts}
    work = empty_lists(shape, len(kv_lens))
    report = run_schedule("sm_90a", ScheduleConfig("sm_90a", 256), work, query_lens, kv_lens, seed=num_ctas)
    assert report.races == []
    assert_same_lists(work, want)


def test_more_rows_than_threads() -> None:
    """600 rows: a thread has more than one, and cuts fall in the second round of the scan."""
    shape = draw_step(3)[0]
    draw = random.Random(0)
    query_lens, kv_lens = [draw.choice((0, 1, 2, 9)) for _ in range(600)], [draw.choice(KV_EDGES) for _ in range(600)]
    work = empty_lists(shape, 600)
    run_schedule("sm_90a", ScheduleConfig("sm_90a", 1024), work, query_lens, kv_lens)
    assert_same_lists(work, host_lists(shape, query_lens, kv_lens))


def test_rows_of_unequal_length_race_for_nothing() -> None:
    """40 decode rows, of which many threads find that they are not all equally long."""
    shape, draw = draw_step(3)[0], random.Random(1)
    kv_lens = [draw.randint(1, 3000) for _ in range(40)]
    for seed in range(4):
        work = empty_lists(shape, 40)
        assert run_schedule("sm_90a", ScheduleConfig("sm_90a", 256), work, [1] * 40, kv_lens, seed=seed).races == []


@pytest.mark.parametrize("decode_query_len", [1, 0])
def test_sixteen_thousand_sequences(decode_query_len: int) -> None:
    """As many as a server may be asked for, of both kinds or all in the prefill list, many equally long."""
    rows, draw = 16384, random.Random(2)
    shape = replace(BASE, decode_query_len=decode_query_len, max_num_tokens=1 << 16)
    query_lens = [draw.choice((0, 1, 1, 2, 9)) for _ in range(rows)]
    kv_lens = [draw.choice((*KV_EDGES, draw.randint(1, 5000))) for _ in range(rows)]
    work = empty_lists(shape, rows)
    key = ScheduleConfig("sm_90a", table_size("sm_90a", rows))
    assert key.max_num_seqs == rows
    run_schedule("sm_90a", key, work, query_lens, kv_lens)
    assert_same_lists(work, make_lists(shape, query_lens, kv_lens))


def test_sorted_rows_at_the_edges_of_the_network() -> None:
    """One row more than are counted, powers of two and neighbours, all equal: the network stays within the rows and keeps their order."""
    shape, draw = replace(BASE, decode_query_len=0), random.Random(3)
    for rows in (COUNTED_ROWS, COUNTED_ROWS + 1, 511, 512, 513, 1000):
        for kv_lens in ([70] * rows, [draw.choice(KV_EDGES) for _ in range(rows)], list(range(rows))):
            work = empty_lists(shape, rows)
            report = run_schedule("sm_90a", ScheduleConfig("sm_90a", 1024), work, [1] * rows, kv_lens, seed=rows)
            assert report.races == []
            assert_same_lists(work, make_lists(shape, [1] * rows, kv_lens))


def test_sums_of_a_million_keys_a_row_do_not_wrap() -> None:
    """4,096 rows of a million keys on 64 KV heads are 2^32 tiles. The host's ints have no end."""
    shape = replace(BASE, num_kv_heads=64, max_seqlen_k=1 << 20, max_num_tokens=1 << 16)
    query_lens, kv_lens = [1] * 4096, [(1 << 20) - i for i in range(4096)]
    weighed = replace(shape, decode_part_quarters=8)
    work = empty_lists(weighed, 4096)
    run_schedule("sm_90a", ScheduleConfig("sm_90a", 4096), work, query_lens, kv_lens)
    assert_same_lists(work, make_lists(weighed, query_lens, kv_lens))
    # Beside prompts: times are cut at their largest values, so another share than the host's may be chosen, but nothing is lost.
    query_lens[-6:] = [300] * 6
    work = empty_lists(shape, 4096)
    run_schedule("sm_90a", ScheduleConfig("sm_90a", 4096), work, query_lens, kv_lens)
    entries = work.decode_tiles[: work.decode_first[:, NUM_ENTRIES].sum()].long()
    assert (entries[:, N_BLOCK_END] - entries[:, N_BLOCK_BEGIN]).sum() == 64 * sum(-(-n // 64) for n in kv_lens[:-6])
    assert work.prefill_queue[0, QUEUE_TOTAL] == 64 * 6 * 10


def test_counters_of_rows_that_are_cut_are_cleared() -> None:
    """Whatever memory held that an engine had discarded; both modes."""
    for split_blocks in (0, 8):
        shape = replace(BASE, split_blocks=split_blocks, max_seqlen_k=1 << 15)
        work = empty_lists(shape, 3)
        run_schedule("sm_90a", ScheduleConfig("sm_90a", 256), work, [1] * 3, [20000, 9000, 777])
        entries = work.decode_tiles[: work.decode_first[:, NUM_ENTRIES].sum()]
        first_slots = entries[entries[:, PARTIAL_SLOT] >= 0, FIRST_SLOT].unique()
        assert len(first_slots) > 2 and not work.arrivals[first_slots].any()


def test_decode_is_balanced() -> None:
    """No CTA has more KV tiles than its equal share and one, whatever the lengths of several rows."""
    for seed in range(50):
        shape = WorkShape(8, 132, 264, 32, 128, 1, 64, 4, 0, 1, 1000, 132, 20, 46, 1 << 17, 8192)
        draw = random.Random(seed)
        kv_lens = [int(2 ** draw.uniform(6, 15)) for _ in range(draw.choice((2, 8, 64)))]
        lists = host_lists(shape, [1] * len(kv_lens), kv_lens)
        load, at = [], 0
        for count in lists.decode_first[:, 11]:
            load.append(int((lists.decode_tiles[at : at + count, 4] - lists.decode_tiles[at : at + count, 3]).sum()))
            at += count
        assert max(load) <= -(-sum(load) // 264) * 8 // 7 + 1


@pytest.mark.parametrize("slot_vectors", [1, 4])
def test_equal_rows_are_cut_into_as_many_parts_as_pay(slot_vectors: int) -> None:
    """n parts of a row of b tiles where n * n * slot_vectors <= 5 * b, or as many as there are CTAs for."""
    shape = WorkShape(8, 132, 264, 32, 128, 1, 64, 4, 0, slot_vectors, 1000, 132, 20, 46, 1 << 17, 8192)
    for tiles in (1, 2, 16, 64, 500):
        lists = host_lists(shape, [1], [64 * tiles])
        parts = len(lists.decode_tiles) // 8
        most = max(n for n in range(1, 34) if n == 1 or n * n * slot_vectors <= 5 * tiles)
        assert parts == min(most, tiles), (tiles, parts, most)


def test_a_step_of_both_kinds_shares_the_sms() -> None:
    """Some SMs decode, a CTA each; alone, each kind has the whole chip."""
    shape = WorkShape(8, 132, 264, 32, 128, 1, 64, 520, 0, 1, 49152, 132, 20, 53, 1 << 17, 8192)
    lists = host_lists(shape, [1] * 32 + [2048], [4096] * 32 + [6144])
    decoding = int((lists.decode_first[:, 11] > 0).sum())
    assert 20 <= decoding <= 46 and len(lists.prefill_tiles) == 512
    assert (host_lists(shape, [1] * 32, [4096] * 32).decode_first[:, 11] > 0).sum() == 256
    alone = host_lists(shape, [2048], [6144])
    assert len(alone.prefill_tiles) == 512 and not alone.decode_first[:, 11].any()


def latent_shape(num_heads: int, num_sms: int = 132) -> WorkShape:
    """What latent decode asks of its lists on Hopper."""
    return replace(MlaCase((1,), (1 << 17,), num_heads=num_heads).kernels(num_sms).work, max_num_tokens=1 << 14)


def uneven_rows(rows: int, keys: int, spread: int, seed: int = 0) -> list[int]:
    """KV lengths that differ by up to `spread` keys either way."""
    draw = random.Random(seed)
    return [keys + draw.randint(-spread, spread) for _ in range(rows)]


# (heads, rows, keys, parts of each row group): what fills 132 CTAs, or 66 teams of two, but for a few.
APART = {
    "a tile a CTA": (128, 64, 4160, 1),
    "two tiles a CTA": (128, 128, 2112, 1),
    "a row a CTA": (16, 128, 2112, 1),
    "two parts a row": (16, 64, 4160, 2),
    "four parts a row": (16, 32, 2112, 4),
}


@pytest.mark.parametrize("name", APART)
def test_rows_a_block_apart_are_cut_as_equal_ones(name: str) -> None:
    """As few parts as rows of one length have; where parts are not weighed, nearly every CTA begins and ends with one."""
    num_heads, rows, keys, parts = APART[name]
    shape = latent_shape(num_heads)
    for seed in range(5):
        kv_lens = uneven_rows(rows, keys, 32, seed)
        assert len({-(-kv_len // 64) for kv_len in kv_lens}) > 1
        lists = host_lists(shape, [1] * rows, kv_lens)
        assert set(lists.decode_tiles[:, NUM_PIECES]) == {parts}
        assert len(lists.decode_tiles) == rows * shape.num_kv_heads * parts
        unweighed = host_lists(replace(shape, decode_part_quarters=0), [1] * rows, kv_lens)
        assert (unweighed.decode_tiles[:, PARTIAL_SLOT] >= 0).sum() > 150


def test_cuts_balance_what_whole_rows_do_not() -> None:
    """One row longer than all others together is shared by many CTAs; ends that are near are taken, and no cut ends later by the model."""
    for num_heads in (16, 128):
        shape = latent_shape(num_heads)
        teams = 132 // shape.decode_lines
        lists = host_lists(shape, [1] * 64, [65536, *uneven_rows(63, 500, 32)])
        assert lists.decode_tiles[lists.decode_tiles[:, 0] == 0, NUM_PIECES].min() > teams // 2
        for seed in range(20):
            cost = [-(-kv_len // 64) for kv_len in uneven_rows(40 + seed, 4096, 3000, seed)]
            line = [(row, 0, 0, blocks) for row, blocks in enumerate(cost)]
            unweighed = line_cuts(replace(shape, decode_part_quarters=0), line, teams, is_alone=True)
            cuts = line_cuts(shape, line, teams, is_alone=True)
            assert sum(block > 0 for _, block in cuts) < sum(block > 0 for _, block in unweighed)
            assert cut_time(shape, cost, cuts) <= cut_time(shape, cost, unweighed)


@pytest.mark.parametrize(("num_heads", "rows", "is_cut"), [(128, 50, False), (128, 100, True), (16, 100, False)])
def test_whole_rows_on_fewer_ctas_where_they_were_faster(num_heads: int, rows: int, is_cut: bool) -> None:
    """On an H200 rows of 4,160 keys on 100 CTAs instead of 132, us: 115.7 (cut 120.7), 220.4 (206.7), 127.2 (130.7)."""
    shape, kv_lens = latent_shape(num_heads), uneven_rows(rows, 4160, 32)
    work, want = empty_lists(shape, rows), host_lists(shape, [1] * rows, kv_lens)
    assert (want.decode_tiles[:, PARTIAL_SLOT] >= 0).any() == is_cut
    assert run_schedule("sm_90a", ScheduleConfig("sm_90a", 256), work, [1] * rows, kv_lens, seed=rows).races == []
    assert_same_lists(work, want)


def test_tiles_of_a_row_run_side_by_side() -> None:
    """CTAs of a team have the same blocks of the same rows, each of its own tile; row groups are cut alike."""
    shape = latent_shape(128)
    lists = host_lists(shape, [1] * 50, uneven_rows(50, 4096, 3000))
    entries = []
    for first in lists.decode_first:
        begin, count = first[NEXT_ENTRY] - 1, first[NUM_ENTRIES]
        entries.append(lists.decode_tiles[begin : begin + count])
        assert (entries[-1][0, :KV_LEN] == first[:KV_LEN]).all()
    for left, right in zip(entries[::2], entries[1::2], strict=True):
        columns = [SEQ_IDX, N_BLOCK_BEGIN, N_BLOCK_END, NUM_PIECES]
        assert (left[:, columns] == right[:, columns]).all()
        assert not left[:, KV_HEAD_IDX].any() and (right[:, KV_HEAD_IDX] == 1).all()


def test_the_devices_cuts_of_uneven_rows_are_the_hosts() -> None:
    """Lines of one head and of several, teams, steps of both kinds, sums that pass what is compared; both ways to cut are taken."""
    key, ways = ScheduleConfig("sm_90a", 256), Counter[str]()
    for seed in range(14):
        draw = random.Random(seed)
        heads, num_ctas = draw.choice((1, 2, 3)), draw.choice((7, 33, 70))
        shape = replace(
            BASE, num_kv_heads=heads, decode_num_ctas=num_ctas, num_sms=num_ctas, prefill_groups=num_ctas,
            decode_lines=draw.choice((1, heads)), decode_part_quarters=draw.choice((4, 10)), lone_block_eighths=draw.choice((5, 8)),
            decode_part_blocks=1, decode_parts_ratio=16, decode_full_sms=draw.choice((3, 20)), max_seqlen_k=1 << 29,
        )  # fmt: skip
        rows, keys = draw.choice((3, 20, 70, 141)), draw.choice((100, 2000))
        kv_lens = uneven_rows(rows, keys, draw.choice((40, keys)), seed)
        query_lens = [1] * rows
        if seed % 7 == 3:
            query_lens[-1] = 200
        if seed % 7 == 4:
            kv_lens[0] = 1 << 29
        want = host_lists(shape, query_lens, kv_lens)
        work = empty_lists(shape, rows)
        assert run_schedule("sm_90a", key, work, query_lens, kv_lens, seed=seed).races == []
        assert_same_lists(work, want)
        ways["whole" if (want.decode_tiles[:, PARTIAL_SLOT] < 0).all() else "cut"] += 1
    assert min(ways["whole"], ways["cut"]) >= 3, ways


H100 = WorkShape(8, 132, 264, 32, 128, 1, 64, 520, 0, 1, 49152, 132, 20, 53, 1 << 17, 8192, part_floats=17408, min_part_blocks=2)
PARTS = {
    # A new message over a long prefix: one round of CTAs where the tiles can fill it.
    "16 of 64K": ([16], [65536], 16),
    "64 of 32K": ([64], [32768], 8),
    "256 of 64K": ([256], [65536], 2),
    # As many tiles as CTAs, or two rounds of them, or many: nothing to gain.
    "512 of 128K": ([512], [131072], 1),
    "8 x 128 of 16K": ([128] * 8, [16384] * 8, 1),
    "4 x 512 of 8K": ([512] * 4, [8192] * 4, 1),
    "a prompt of 4K": ([4096], [4096], 1),
    "16 of 1,900": ([16], [1900], 5),
    # Shorter than two parts.
    "16 of 380": ([16], [380], 1),
    # Beside many short rows the long one alone is cut, into parts that take no longer than the others.
    "64 of 64K beside 32 x 300": ([64] + [300] * 32, [65536] + [300] * 32, 5),
}
# The same in batch-invariant mode: entries of a tile, and its slots.
PIECES = {
    "16 of 64K": (16, 16), "64 of 32K": (8, 8), "256 of 64K": (2, 9), "64 of 64K beside 32 x 300": (7, 15), "64 of 128K": (8, 23),
    "16 of 1,900": (1, 1), "512 of 128K": (1, 1), "8 x 128 of 16K": (1, 1), "a prompt of 4K": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_few_tiles_over_long_kv_are_cut(name: str) -> None:
    query_lens, kv_lens, parts = PARTS[name]
    lists = host_lists(H100, query_lens, kv_lens)
    assert lists.prefill_tiles[:, NUM_PIECES].max() == parts
    if parts > 1:
        assert (lists.prefill_tiles[lists.prefill_tiles[:, NUM_PIECES] > 1, 0] == 0).all()
    uncut = host_lists(replace(H100, part_floats=0), query_lens, kv_lens)
    assert (uncut.prefill_tiles[:, PARTIAL_SLOT] == -1).all()
    if parts == 1:
        assert (uncut.prefill_tiles == lists.prefill_tiles).all()


@pytest.mark.parametrize("name", PIECES)
def test_few_tiles_are_cut_where_pieces_end(name: str) -> None:
    query_lens, kv_lens, _ = {**PARTS, "64 of 128K": ([64], [1 << 17], 0)}[name]
    lists = host_lists(replace(H100, part_piece_blocks=32), query_lens, kv_lens)
    of_tile = Counter(tuple(entry[:3]) for entry in lists.prefill_tiles.tolist())
    assert (max(of_tile.values()), lists.prefill_tiles[:, NUM_PIECES].max()) == PIECES[name]


@pytest.mark.parametrize("piece_blocks", [0, 8])
def test_the_devices_cuts_are_the_hosts(piece_blocks: int) -> None:
    """Few rows over long KV, with windows and decode rows beside them; and a row among more rows than have a place in the table."""
    key, cut = ScheduleConfig("sm_90a", 256), 0
    for seed in (0, 2, 4, 5, 8, 9, 11, 13, 14):  # tiles of six of them are cut
        draw = random.Random(seed)
        shape = replace(
            H100, num_kv_heads=draw.choice((1, 2, 8)), prefill_groups=draw.choice((7, 33, 132)), max_seqlen_k=1 << 16,
            min_part_blocks=draw.choice((1, 8)), decode_query_len=draw.choice((0, 1)), l2_tokens=draw.choice((1000, 49152)),
            part_piece_blocks=piece_blocks,
        )  # fmt: skip
        rows = draw.choice((1, 2, 3, 12))
        query_lens = [draw.choice((1, 16, 33, draw.randint(2, 300))) for _ in range(rows)]
        kv_lens = [draw.choice((0, 100, draw.randint(1, 1 << 16), draw.randint(1, 1 << 16))) for _ in range(rows)]
        window = draw.choice((NO_WINDOW, NO_WINDOW, 3000))
        want = host_lists(shape, query_lens, kv_lens, window_left=window)
        work = empty_lists(shape, rows)
        assert run_schedule("sm_90a", key, work, query_lens, kv_lens, window_left=window, seed=seed).races == []
        assert_same_lists(work, want)
        tiles = want.prefill_tiles[want.prefill_tiles[:, PARTIAL_SLOT] >= 0]
        assert not work.part_arrivals[tiles[:, FIRST_SLOT]].any()
        cut += len(tiles) > 0
    assert cut >= 6, cut
    shape = replace(H100, num_kv_heads=1, decode_query_len=0, part_piece_blocks=piece_blocks)
    query_lens, kv_lens = [1] * 600 + [20], [5] * 600 + [50000]
    work, want = empty_lists(shape, 601), host_lists(shape, query_lens, kv_lens)
    assert want.prefill_tiles[:, NUM_PIECES].max() > 1
    run_schedule("sm_90a", ScheduleConfig("sm_90a", 1024), work, query_lens, kv_lens)
    assert_same_lists(work, want)
