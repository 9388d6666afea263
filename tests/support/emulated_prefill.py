"""A prefill kernel alone on the emulator: host-made work list, chosen schedule seed, race detection, any compile key."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fa4_backend import emulator
from fa4_backend.emulator.kernels import load_function
from fa4_backend.emulator.recording import Recording
from fa4_backend.kernels.families import PrefillKey
from fa4_backend.kernels.launch_abi import prefill_arguments
from fa4_backend.kernels.schedule.work_list import (
    FIRST_SLOT,
    NO_WINDOW,
    NUM_PIECES,
    PART_COUNTERS,
    PARTIAL_SLOT,
    QUEUE_LEFT,
    QUEUE_NEXT,
    QUEUE_OWN,
    WorkLists,
    WorkShape,
)
from tests.support import host_schedule
from tests.support.paged_case import BuiltCase, Errors, PagedCase

ALL_PREFILL = 0  # decode_query_len that sends every row to the prefill list


@dataclass(frozen=True)
class Cuts:
    """How tiles are cut along KV."""

    parts: tuple[int, ...]  # of each tile of every sequence
    window_left: int | None = -1  # that the lists are made for; -1: the case's
    is_reversed: bool = False  # the list's last entry is taken first, so that the first part of a tile comes last
    is_all_taken: bool = False  # every entry is taken from the queue, as in a step with decode rows


@dataclass(frozen=True)
class EmulatedRun:
    """What came out of one launch."""

    built: BuiltCase
    report: emulator.Report
    work: WorkLists
    zeroes_padding: bool  # rows past the last query: no decode kernel did it before

    @property
    def out(self) -> torch.Tensor:
        """(total_q + padding, num_q_heads, head_dim_v)."""
        return self.built.arguments.out

    @property
    def lse(self) -> torch.Tensor:
        """(num_q_heads, total_q + padding)."""
        assert self.built.arguments.lse is not None
        return self.built.arguments.lse

    def check(self) -> Errors:
        """Within the error budget, nothing written that is not ours, no race."""
        assert self.report.races == [], "\n".join(str(race) for race in self.report.races[:3])
        assert not self.work.prefill_queue[0, [QUEUE_NEXT, QUEUE_LEFT]].any(), "the queue: expected to be ready for the next launch"
        assert not self.work.part_arrivals.any(), "arrival counters of parts: expected 0 after the launch"
        return self.built.check(self.out, self.lse, padding_is_zero=self.zeroes_padding)


def run_prefill(case: PagedCase, **options: Any) -> EmulatedRun:
    """Run the prefill kernel of `case` (arch "emulated-..."), rows of one token included; options of `run_built`."""
    return run_built(case.build(), **options)


def run_built(
    built: BuiltCase,
    *,
    num_ctas: int = 2,
    seed: int | None = None,
    detect_races: bool = True,
    key: PrefillKey | None = None,
    trace: Recording | None = None,
    contraction: str | int = "never",
    cuts: Cuts | None = None,
    before: Callable[[emulator.Session], None] | None = None,
) -> EmulatedRun:
    """Run the prefill kernel of a case on tensors that the caller may have changed; `out` and `lse` are poisoned first.

    Args:
        num_ctas: that the work list is for; CTA pairs where the key is of a kernel of pairs.
        seed: of the emulator's schedule; None: deterministic.
        key: another compile key than the plan's, for ablations.
        trace: filled with what the warps did.
        contraction: which products and sums run as one FMA, see `emulator.session`.
        cuts: how tiles are cut along KV, where the kernel takes parts; None: as the plan has it.
        before: launches what runs before the kernel in its stream.
    """
    case, a = built.case, built.arguments
    plan = case.plan(num_sms=num_ctas)
    problem = plan.problem
    assert plan.kernels is not None
    chosen = key or plan.kernels.prefill
    work = _work_lists(built, num_ctas, chosen, plan.kernels.work.min_part_blocks, cuts)
    for result in (a.out, a.lse):
        result.fill_(math.nan)
    built.oracle = None
    with (
        emulator.session(
            arch=problem.target_arch,
            num_sms=num_ctas * chosen.ctas_per_item,
            seed=seed,
            detect_races=detect_races,
            trace=trace,
            contraction=contraction,
        ) as emu,
        emu.stream(),
    ):
        if before is not None:
            before(emu)
        emu.run(load_function(chosen), *prefill_arguments(a, work))
    is_alone = not chosen.kernel.is_dependent or int(work.prefill_queue[0, QUEUE_OWN]) > 0
    return EmulatedRun(built, emu.report, work, zeroes_padding=is_alone)


def _work_lists(built: BuiltCase, num_ctas: int, key: PrefillKey, min_blocks: int, cuts: Cuts | None) -> WorkLists:
    case, lengths, tile_n = built.case, built.arguments, key.kernel.tile.tile_n
    shape = WorkShape(
        num_kv_heads=case.num_kv_heads, prefill_groups=num_ctas, decode_num_ctas=num_ctas, tokens_per_item=key.tokens_per_item,
        prefill_tile_n=tile_n, decode_query_len=ALL_PREFILL, decode_tile_n=tile_n, slot_floats=260, split_blocks=0, slot_vectors=1,
        l2_tokens=1 << 16, num_sms=num_ctas, decode_tile_ticks=20, decode_full_sms=num_ctas,
        max_seqlen_k=NO_WINDOW, max_num_tokens=2**31 - 1, part_floats=key.part_floats, min_part_blocks=min_blocks,
        part_piece_blocks=key.kernel.piece_blocks,
    )  # fmt: skip
    window = case.window_left if cuts is None or cuts.window_left == -1 else cuts.window_left
    left = NO_WINDOW if window is None else window
    right = 0 if case.is_causal else NO_WINDOW if case.window_right is None else case.window_right
    lists = host_schedule.make_lists(
        shape,
        lengths.cu_seqlens_q.diff().tolist(),
        lengths.seqused_k.tolist(),
        window_left=left,
        window_right=right,
        parts=None if cuts is None else cuts.parts,
    )
    tiles = lists.prefill_tiles[:: -1 if cuts is not None and cuts.is_reversed else 1]
    cut = lists.prefill_tiles[lists.prefill_tiles[:, PARTIAL_SLOT] >= 0]
    slots = int((cut[:, FIRST_SLOT] + cut[:, NUM_PIECES]).max(initial=0)) if key.part_floats else 0
    own = lists.own_entries if cuts is None or not cuts.is_all_taken else 0
    return WorkLists(
        shape,
        prefill_tiles=torch.from_numpy(tiles.copy()),
        prefill_queue=torch.tensor([[0, len(lists.prefill_tiles), 0, own]], dtype=torch.int32),
        decode_tiles=torch.empty(0), decode_first=torch.empty(0), slots=torch.empty(0), arrivals=torch.empty(0),
        part_slots=torch.full((max(1, slots) + shape.own_part_slots(), key.part_floats), math.nan) if key.part_floats else None,
        part_arrivals=torch.zeros(max(1, slots), PART_COUNTERS, dtype=torch.int32),
    )  # fmt: skip
