"""Prefill tiles that are cut along KV, on Hopper: parts go through memory, and the warpgroup that comes last adds them up.

Blocks hold 128 keys and tiles 32 tokens of 4 heads at d128. CTAs are few, so that one has several parts, of one tile and of
several. Slots hold NaN before, counters must be 0 behind.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend.kernels.schedule.work_list import FIRST_SLOT, N_BLOCK_END, NUM_PIECES, PARTIAL_SLOT, QUEUE_TOTAL
from tests.support import large_logits
from tests.support.emulated_mixed import run_mixed
from tests.support.emulated_prefill import Cuts, run_built, run_prefill
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

BASE = PagedCase((16,), (520,), num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, arch="emulated-sm_90a")


def case(query_lens: tuple[int, ...], kv_lens: tuple[int, ...], **changes: object) -> PagedCase:
    return replace(BASE, query_lens=query_lens, kv_lens=kv_lens, **changes)  # type: ignore[arg-type]


CASES = {
    # One row: 16 tokens are 64 packed rows, so the second warpgroup has none; then both have some.
    "5 blocks in 5 parts": (BASE, (5,)),
    "both warpgroups, page 48": (case((33,), (400,), page_size=48), (3,)),
    "8 parts": (case((5,), (1100,), num_q_heads=4, num_kv_heads=1), (8,)),
    # Rows of which some are cut, some not, one has no key and one no query.
    "ragged": (case((17, 0, 3, 40), (700, 30, 0, 90)), (2, 1, 1, 1)),
    "rows without a key in parts": (case((40, 3), (20, 0)), (2, 3)),
    # The prompt's first tiles see one block, which two parts cannot share.
    "parts without a block": (case((140,), (140,), num_q_heads=4, num_kv_heads=1), (2,)),
    "windows": (case((40,), (600,), window_left=300, window_right=10, is_causal=False), (3,)),
    "all score features": (case((20,), (500,), sinks=True, alibi=True, softcap=20.0, window_left=350, layout="hnd"), (3,)),
    "d64, three warpgroups": (case((70,), (300,), head_dim=64, num_q_heads=6, num_kv_heads=2, dtype="float16"), (3,)),
    "d256, soft cap": (case((70,), (200,), head_dim=256, num_q_heads=2, num_kv_heads=1, softcap=3.0, window_left=190), (4,)),
    "(192, 128) in fp16": (case((10,), (230,), head_dim=192, head_dim_v=128, num_q_heads=2, num_kv_heads=2, dtype="float16"), (3,)),
}


@pytest.mark.parametrize("name", with_slow(CASES, ["(192, 128) in fp16"]))
def test_parts(name: str) -> None:
    drawn, parts = CASES[name]
    run = run_prefill(drawn, cuts=Cuts(parts), num_ctas=3, seed=len(name))
    run.check()
    assert (run.work.prefill_tiles[:, PARTIAL_SLOT] >= 0).any()


def test_bits_do_not_depend_on_who_comes_last() -> None:
    built = case((33,), (400,)).build()
    outs = []
    for num_ctas, seed, is_reversed in ((2, None, False), (3, 1, True), (8, 2, False), (1, 3, True)):
        run = run_built(built, cuts=Cuts((4,), is_reversed=is_reversed), num_ctas=num_ctas, seed=seed)
        run.check()
        outs.append((run.out[: built.total_q].clone(), run.lse[:, : built.total_q].clone()))
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


@pytest.mark.parametrize(("kv_len", "parts"), [(390, 4), (2560, 20)], ids=["one round of slots", "three rounds of slots"])
def test_all_add_up_with_the_bits_of_the_last(kv_len: int, parts: int) -> None:
    """The last tile's parts are added up by vectors from memory, others' in registers. Here one CTA has two tiles or more, so nobody waits
    for a share: whoever comes last adds up all, by the code that adds up shares."""
    built = case((5,), (kv_len,), num_q_heads=4, num_kv_heads=1, sinks=True).build()
    outs = []
    for num_ctas, seed in ((parts, None), (parts, 1), (3, 2), (1, None)):
        run = run_built(built, cuts=Cuts((parts,)), num_ctas=num_ctas, seed=seed)
        run.check()
        outs.append((run.out[: built.total_q].clone(), run.lse[:, : built.total_q].clone()))
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


def test_shares_of_all() -> None:
    """Parts long enough that each CTA has one: under one of the seeds all four stay and write a share each.

    Whoever stays leaves by an atomic more, beside the one of its arrival: that is how it is told.
    """
    built = case((5,), (4096,), num_q_heads=4, num_kv_heads=1, sinks=True).build()
    atomics, outs = [], []
    for seed in (1, 2, 3):
        run = run_built(built, cuts=Cuts((4,)), num_ctas=4, seed=seed)
        run.check()
        atomics.append(sum(n for name, n in run.report.opcodes().items() if name.startswith("atom.global.acq_rel.add")))
        outs.append(run.out[: built.total_q].clone())
    assert max(atomics) == 2 * 4
    assert all(torch.equal(out, outs[0]) for out in outs[1:])


@pytest.mark.parametrize("name", with_slow(["random", "growing", "sink", "fp16, largest", "-3e37"], ["fp16, largest"]))
def test_large_logits(name: str) -> None:
    """Parts whose maxima are far apart or equal, made with either scale of scores."""
    built = large_logits.build(name, query_lens=(33,), kv_lens=(500,), num_q_heads=4, num_kv_heads=1, arch=BASE.arch)
    run = run_built(built, cuts=Cuts((4,)))
    assert run.report.races == []
    large_logits.check(built, run.out, run.lse)


def test_a_layer_whose_window_is_narrower_than_the_lists() -> None:
    """The list is made for layers without a window: parts left of the window see nothing, and must not count a block of another part."""
    drawn = case((20,), (600,), window_left=150, window_right=0, is_causal=False)
    run = run_prefill(drawn, cuts=Cuts((5,), window_left=None))
    assert (run.work.prefill_tiles[:, N_BLOCK_END] <= (600 - 20 - 150) // 128).any()
    run.check()


@pytest.mark.parametrize("head_dim", with_slow([64, 128], [64]))
def test_whole_tiles_keep_their_bits_in_a_kernel_that_takes_parts(head_dim: int) -> None:
    built = case((5, 40), (133, 300), head_dim=head_dim).build()
    run = run_built(built)
    run.check()
    assert (run.work.prefill_tiles[:, PARTIAL_SLOT] == -1).all()
    with_parts = run.out[: built.total_q].clone(), run.lse[:, : built.total_q].clone()
    plan = built.case.plan(num_sms=2)
    assert plan.kernels is not None and plan.kernels.prefill.kernel.has_parts
    key = plan.kernels.prefill
    whole = run_built(built, key=replace(key, kernel=replace(key.kernel, has_parts=False, share_parts=0)))  # type: ignore[type-var]
    assert torch.equal(whole.out[: built.total_q], with_parts[0]) and torch.equal(whole.lse[:, : built.total_q], with_parts[1])


def test_batch_invariant_rows_are_cut_where_pieces_end() -> None:
    """`test_prefill_pieces.py` has what that does; on Blackwell they are not cut."""
    plan = replace(BASE, batch_invariant=True).plan()
    assert plan.kernels is not None and plan.kernels.work.part_piece_blocks == plan.kernels.prefill.kernel.piece_blocks == 32
    other = replace(BASE, batch_invariant=True, arch="emulated-sm_100a").plan()
    assert other.kernels is not None and other.kernels.work.max_part_slots() == 0 and not other.kernels.prefill.kernel.has_parts


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_beside_decode(seed: int | None) -> None:
    """Schedule, decode and prefill as the operator launches them; counters hold garbage before the schedule."""
    drawn = case((1, 30, 1, 9), (500, 1000, 64, 700))
    run = run_mixed(drawn, num_sms=8, seed=seed, min_part_blocks=1)
    run.check()
    tiles = run.work.prefill_tiles[: run.work.prefill_queue[0, QUEUE_TOTAL]]
    assert (tiles[:, NUM_PIECES] > 1).any() and run.decode_ctas > 0
    first_slots = tiles[tiles[:, PARTIAL_SLOT] >= 0, FIRST_SLOT]
    assert not run.work.part_arrivals[first_slots].any()
