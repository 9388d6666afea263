"""The device-made schedule and the decode kernel on the emulator: both from their compiled PTX, chosen schedule seed, race detection."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from fa4_backend import emulator
from fa4_backend.emulator.kernels import load_function
from fa4_backend.kernels.launch_abi import decode_arguments, schedule_arguments
from fa4_backend.kernels.schedule.work_list import (
    FIRST_SLOT,
    N_BLOCK_BEGIN,
    N_BLOCK_END,
    NO_WINDOW,
    NOTHING,
    NUM_ENTRIES,
    NUM_PIECES,
    PART_COUNTERS,
    PARTIAL_SLOT,
    QUEUE_INTS,
    TILE_INTS,
    TOTAL_Q,
    WHOLE,
    WorkLists,
    WorkShape,
)
from tests.support.host_schedule import HostLists, make_lists, piece_ends, pieces_between
from tests.support.paged_case import BuiltCase, Errors, PagedCase

UNWRITTEN = -7  # what every int of a list holds before the schedule


@dataclass(frozen=True)
class DecodeRun:
    """What came out of one schedule and one decode launch."""

    built: BuiltCase
    work: WorkLists
    reports: tuple[emulator.Report, ...]

    @property
    def num_parts(self) -> int:
        """Parts of row groups that are cut."""
        return count_parts(self.work)

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of the tokens."""
        a, n = self.built.arguments, self.built.total_q
        assert a.lse is not None
        return a.out[:n], a.lse[:, :n]

    def check(self) -> Errors:
        """Within the error budget, nothing written that is not ours, no race, counters back at 0."""
        for report in self.reports:
            assert report.races == [], "\n".join(str(race) for race in report.races[:3])
        entries = self.work.decode_tiles[: self.work.decode_first[:, NUM_ENTRIES].sum()]
        first_slots = entries[entries[:, PARTIAL_SLOT] >= 0, FIRST_SLOT]
        assert not self.work.arrivals[first_slots].any(), "arrival counters in use: expected 0 after the launch"
        assert self.built.arguments.lse is not None
        return self.built.check(self.built.arguments.out, self.built.arguments.lse)


def run_decode(
    case: PagedCase,
    *,
    num_ctas: int = 3,
    seed: int | None = None,
    contraction: str | int = "never",
    built: BuiltCase | None = None,
    **tuning: int,
) -> DecodeRun:
    """Schedule and attend `case` (arch "emulated-...", every query within decode_query_len). Work lists and workspaces hold garbage before.

    Args:
        num_ctas: SMs of the pretended GPU.
        seed: of the emulator's schedule; None: deterministic.
        contraction: which products and sums run as one FMA, see `emulator.session`.
        built: the case's tensors, where a test has changed them.
        tuning: fields of the compile key.
    """
    built = built or case.build()
    built.is_decoded = True
    plan, a = case.plan(num_sms=num_ctas), built.arguments
    assert plan.kernels is not None and plan.kernels.decode is not None, case
    key = replace(plan.kernels.decode, **tuning)
    work = WorkLists.allocate(with_free_parts(plan.kernels.work), plan.limits, "cpu")
    fill_with_garbage(work)
    for poisoned in (a.out, a.lse):
        poisoned.fill_(math.nan)
    built.oracle = None
    arch = plan.problem.target_arch
    right = 0 if case.is_causal else NO_WINDOW
    lengths = a.cu_seqlens_q.diff().tolist(), a.seqused_k.tolist()
    scheduled = run_schedule(arch, plan.kernels.schedule, work, *lengths, window_right=right, seed=seed)
    # All CTAs run at once, as on a GPU of `num_ctas` SMs.
    with emulator.session(arch=arch, num_sms=num_ctas * key.ctas_per_sm, seed=seed, detect_races=True, contraction=contraction) as emu:
        emu.run(load_function(key), *decode_arguments(a, work))
    return DecodeRun(built, work, (scheduled, emu.report))


def with_free_parts(shape: WorkShape) -> WorkShape:
    """`shape` with parts that cost nothing: weighed, a case's short rows would stay whole, and nothing of what parts need would run."""
    return replace(shape, decode_part_quarters=0)


def count_parts(work: WorkLists) -> int:
    """Parts of row groups in the decode list of a launch."""
    num_entries = int(work.decode_first[:, NUM_ENTRIES].sum())
    return int((work.decode_tiles[:num_entries, PARTIAL_SLOT] >= 0).sum())


def fill_with_garbage(work: WorkLists) -> None:
    """What memory holds that an engine has discarded and mapped again: any ints, NaN."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (
        work.prefill_tiles,
        work.prefill_queue,
        work.decode_tiles,
        work.decode_first,
        work.arrivals,
        work.part_arrivals,
    ):
        tensor.random_(-(2**31), 2**31, generator=generator)
    work.slots.fill_(math.nan)
    if work.part_slots is not None:
        work.part_slots.fill_(math.nan)


def run_decode_built(built: BuiltCase, *, num_ctas: int = 3, seed: int | None = None) -> DecodeRun:
    """`run_decode` on tensors that the caller may have changed."""
    return run_decode(built.case, num_ctas=num_ctas, seed=seed, built=built)


def run_schedule(
    arch: str,
    key: object,
    work: WorkLists,
    query_lens: list[int],
    kv_lens: list[int],
    *,
    window_left: int = NO_WINDOW,
    window_right: int = 0,
    seed: int | None = None,
) -> emulator.Report:
    """Make `work`'s lists with the compiled schedule."""
    cu_seqlens_q = torch.tensor([0, *query_lens]).cumsum(0).int()
    with emulator.session(arch=arch, num_sms=work.shape.prefill_groups, seed=seed, detect_races=True) as emu:
        lengths = cu_seqlens_q, torch.tensor(kv_lens, dtype=torch.int32)
        emu.run(load_function(key), *schedule_arguments(work, *lengths, window_left=window_left, window_right=window_right))
    return emu.report


def empty_lists(shape: WorkShape, num_seqs: int) -> WorkLists:
    """Lists without a plan, every int UNWRITTEN; no slots."""

    def ints(*size: int) -> torch.Tensor:
        return torch.full(size, UNWRITTEN, dtype=torch.int32)

    return WorkLists(
        shape, ints(max(shape.max_prefill_tiles(num_seqs), 1), TILE_INTS), ints(1, QUEUE_INTS),
        ints(shape.max_decode_tiles(num_seqs), 16), ints(shape.decode_num_ctas, 16), torch.empty(0), ints(shape.max_slots()),
        None, ints(max(1, shape.max_part_slots()), PART_COUNTERS), ints(num_seqs + 1),
    )  # fmt: skip


def assert_same_lists(work: WorkLists, want: HostLists) -> None:
    """The device's lists are the host's, entry by entry."""
    assert work.prefill_queue[0].tolist() == [0, len(want.prefill_tiles), 0, want.own_entries]
    assert np.array_equal(work.prefill_tiles[: len(want.prefill_tiles)].numpy(), want.prefill_tiles)
    counts, want_counts = work.decode_first[:, 11].numpy(), want.decode_first[:, 11]
    assert np.array_equal(counts, want_counts)
    # A CTA without entries has a count and the step's tokens, and nothing else; unused ints are nobody's.
    assert np.array_equal(work.decode_first[:, TOTAL_Q].numpy(), want.decode_first[:, TOTAL_Q])
    assert np.array_equal(work.decode_first.numpy()[counts > 0, :13], want.decode_first[counts > 0, :13])
    assert np.array_equal(work.decode_tiles[: len(want.decode_tiles), :11].numpy(), want.decode_tiles[:, :11])


def host_lists(
    shape: WorkShape, query_lens: list[int], kv_lens: list[int], *, window_left: int = NO_WINDOW, window_right: int = 0
) -> HostLists:
    """The oracle's lists, after checking that they hold every KV tile of every row group once and every slot once, of both kinds."""
    lists = make_lists(shape, query_lens, kv_lens, window_left=window_left, window_right=window_right)
    _check_parts(shape, lists)
    covered: dict[tuple[int, int], list[tuple[int, int]]] = {}
    slots: list[int] = []
    for seq_idx, head, _, begin, end, slot, first_slot, num_pieces, *_ in lists.decode_tiles.tolist():
        covered.setdefault((seq_idx, head), []).append((begin, end))
        if slot >= 0:
            here = len(pieces_between(shape, begin, end)) if shape.split_blocks else 1
            slots += range(slot, slot + here)
            assert first_slot <= slot and slot + here <= first_slot + num_pieces
    assert slots == list(range(len(slots))) and len(slots) <= shape.max_slots()
    for seq_idx, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
        kv_len = min(kv_len, shape.max_seqlen_k)
        for head in range(shape.num_kv_heads):
            ranges = covered.get((seq_idx, head), [])
            if not 0 < query_len <= shape.decode_query_len:
                assert ranges == []
                continue
            first = max(kv_len - query_len - window_left, 0) // shape.decode_tile_n
            assert ranges[0][0] == first and ranges[-1][1] == -(-kv_len // shape.decode_tile_n)
            assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    return lists


def _check_parts(shape: WorkShape, lists: HostLists) -> None:
    """Parts of a prefill tile follow each other, differ by a block at most or are cut where pieces end, the last piece first, and have
    slots of their own, one behind the other."""
    tiles: dict[tuple[int, ...], list[list[int]]] = {}
    for entry in lists.prefill_tiles.tolist():
        tiles.setdefault(tuple(entry[:3]), []).append(entry)
    slots: list[int] = []
    for entries in tiles.values():
        if shape.part_piece_blocks and len(entries) > 1:
            _check_pieces(shape, entries)
            slots += range(entries[0][FIRST_SLOT], entries[0][FIRST_SLOT] + entries[0][NUM_PIECES])
            continue
        entries.sort(key=lambda entry: entry[PARTIAL_SLOT])
        first = entries[0]
        assert all(entry[FIRST_SLOT] == first[FIRST_SLOT] and entry[NUM_PIECES] == len(entries) for entry in entries)
        if len(entries) == 1:
            assert first[PARTIAL_SLOT] == -1
            continue
        assert [entry[PARTIAL_SLOT] - first[FIRST_SLOT] for entry in entries] == list(range(len(entries)))
        slots += [entry[PARTIAL_SLOT] for entry in entries]
        assert all(left[N_BLOCK_END] == right[N_BLOCK_BEGIN] for left, right in itertools.pairwise(entries))
        lengths = [entry[N_BLOCK_END] - entry[N_BLOCK_BEGIN] for entry in entries]
        assert max(lengths) - min(lengths) <= 1
    assert len(set(slots)) == len(slots) and max(slots, default=0) < max(1, shape.max_part_slots())
    assert shape.part_piece_blocks or sorted(slots) == list(range(len(slots)))


def _check_pieces(shape: WorkShape, entries: list[list[int]]) -> None:
    """Entries of a tile that was cut: whole pieces from the last one down. The last ones have the first slot, each other one its own."""
    ends, slots = piece_ends(shape, 1 << 14), entries[0][NUM_PIECES]
    filled = [entry for entry in entries if entry[PARTIAL_SLOT] != NOTHING]
    assert all(entry[N_BLOCK_BEGIN] == entry[N_BLOCK_END] for entry in entries if entry[PARTIAL_SLOT] == NOTHING)
    ranges = [(entry[N_BLOCK_BEGIN], entry[N_BLOCK_END]) for entry in filled]
    assert all(later[0] == earlier[1] for later, earlier in itertools.pairwise(ranges)), ranges
    assert {begin for begin, _ in ranges[:-1]} <= set(ends), ranges
    if slots == 1:
        assert [entry[PARTIAL_SLOT] for entry in filled] == [WHOLE], filled
        return
    at = [entry[PARTIAL_SLOT] - entry[FIRST_SLOT] for entry in filled]
    pieces = [1 + sum(begin < cut < end for cut in ends) for begin, end in ranges]
    assert at == [0, *(1 + sum(pieces[1:i]) for i in range(1, len(pieces)))] and slots == 1 + sum(pieces[1:]), (ranges, at, slots)
