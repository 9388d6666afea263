"""Items that are cut along KV, and the queue they come from, on Blackwell: parts go through memory, and the correction warps that come last
add them up.

Blocks hold 128 keys, items 64 tokens of 4 heads at d128 (a pair's of d256: 64). CTAs or pairs are few, so that one has several parts,
of one item and of several. Slots hold NaN before, counters and the queue must be 0 behind.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend.kernels.schedule.work_list import FIRST_SLOT, N_BLOCK_END, NUM_PIECES, PARTIAL_SLOT, QUEUE_TOTAL
from fa4_backend.plan import plan_attention
from fa4_backend.problem import FP8
from tests.support import large_logits
from tests.support.emulated_mixed import run_mixed
from tests.support.emulated_prefill import Cuts, run_built, run_prefill
from tests.support.paged_case import PagedCase

pytestmark = pytest.mark.emulated

BASE = PagedCase((16,), (520,), num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, arch="emulated-sm_100a")
WIDE = {"head_dim": 256, "num_q_heads": 4, "num_kv_heads": 1}


def case(query_lens: tuple[int, ...], kv_lens: tuple[int, ...], **changes: object) -> PagedCase:
    return replace(BASE, query_lens=query_lens, kv_lens=kv_lens, **changes)  # type: ignore[arg-type]


CASES = {
    # 16 tokens are one query tile of the item's two.
    "5 blocks in 5 parts": (BASE, (5,)),
    # Rows of which some are cut, some not, one has no key and one no query; parts behind a sequence's end.
    "ragged": (case((17, 0, 3, 70), (700, 30, 0, 190)), (2, 1, 3, 2)),
    "rows without a key in parts": (case((40, 3), (20, 0)), (2, 3)),
    # The prompt's first items see one block, which two parts cannot share.
    "parts without a block": (case((140,), (140,)), (2,)),
    "all score features": (case((20,), (500,), sinks=True, alibi=True, softcap=20.0, window_left=350, layout="hnd"), (3,)),
    "pairs, d256": (case((70, 3), (200, 300), **WIDE), (2, 3)),
    "pairs, K and V in FP8": (case((70,), (300,), kv_dtype=FP8), (3,)),
}


@pytest.mark.parametrize("name", CASES)
def test_parts(name: str) -> None:
    drawn, parts = CASES[name]
    run = run_prefill(drawn, cuts=Cuts(parts), num_ctas=3, seed=len(name))
    run.check()
    assert (run.work.prefill_tiles[:, PARTIAL_SLOT] >= 0).any()


@pytest.mark.parametrize("changes", [{}, WIDE], ids=["d128", "pairs, d256"])
def test_bits_do_not_depend_on_who_comes_last(changes: dict[str, int]) -> None:
    built = case((70,), (400,), **changes).build()
    outs = []
    for num_ctas, seed, is_reversed in ((2, None, False), (8, 2, False), (3, 3, True)):
        run = run_built(built, cuts=Cuts((4,), is_reversed=is_reversed), num_ctas=num_ctas, seed=seed)
        run.check()
        outs.append((run.out[: built.total_q].clone(), run.lse[:, : built.total_q].clone()))
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


@pytest.mark.parametrize("name", ["growing", "-3e37"])
def test_large_logits(name: str) -> None:
    """Parts whose maxima are far apart or equal."""
    built = large_logits.build(name, query_lens=(33,), kv_lens=(500,), num_q_heads=4, num_kv_heads=1, arch=BASE.arch)
    run = run_built(built, cuts=Cuts((4,)))
    assert run.report.races == []
    large_logits.check(built, run.out, run.lse)


def test_a_layer_whose_window_is_narrower_than_the_lists() -> None:
    """The list is made for layers without a window: parts left of the window see nothing, and must not count a block of another part.

    One token, whose window begins with a block: no row of that block is masked by the window itself.
    """
    drawn = case((1, 20), (640, 600), window_left=255)
    run = run_prefill(drawn, cuts=Cuts((5, 5), window_left=None))
    assert (run.work.prefill_tiles[:, N_BLOCK_END] <= (600 - 20 - 255) // 128).any()
    run.check()


def test_whole_items_keep_their_bits_in_a_kernel_that_takes_parts() -> None:
    built = case((5, 40), (133, 300)).build()
    run = run_built(built)
    run.check()
    with_parts = run.out[: built.total_q].clone(), run.lse[:, : built.total_q].clone()
    plan = built.case.plan(num_sms=2)
    assert plan.kernels is not None and plan.kernels.prefill.kernel.has_parts
    key = plan.kernels.prefill
    whole = run_built(built, key=replace(key, kernel=replace(key.kernel, has_parts=False)))  # type: ignore[type-var]
    assert torch.equal(whole.out[: built.total_q], with_parts[0]) and torch.equal(whole.lse[:, : built.total_q], with_parts[1])


@pytest.mark.parametrize("exact", [False, True])
def test_rows_that_must_not_be_cut_are_not(exact: bool) -> None:
    plan = plan_attention(replace(BASE.problem(), batch_invariant=True, exact=exact), BASE.plan().limits)
    assert plan.kernels is not None and plan.kernels.work.max_part_slots() == 0 and not plan.kernels.prefill.kernel.has_parts


def test_beside_decode() -> None:
    """Schedule, decode and prefill as the operator launches them; counters and the queue hold garbage before the schedule."""
    run = run_mixed(case((1, 30, 1, 9), (500, 1000, 64, 700)), num_sms=8, seed=0, min_part_blocks=1)
    run.check()
    tiles = run.work.prefill_tiles[: run.work.prefill_queue[0, QUEUE_TOTAL]]
    assert (tiles[:, NUM_PIECES] > 1).any() and run.decode_ctas > 0
    first_slots = tiles[tiles[:, PARTIAL_SLOT] >= 0, FIRST_SLOT]
    assert not run.work.part_arrivals[first_slots].any()
