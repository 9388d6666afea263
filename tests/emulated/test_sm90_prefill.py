"""The Hopper prefill kernel, compiled by the real compiler and executed on the emulator, against the float32 oracle.

The same kernel is proven on an H200 (tests/device); here are its edges, the schedules a GPU would not show, and the race detector. Sizes
sit at 128 keys a KV block, 128 packed rows a tile, 16-row TMA boxes, pages; interior sizes run the same code.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend.error_budget import LSE_RELATIVE
from fa4_backend.kernels.sm90.config import Sm90Config
from fa4_backend.reference import attention_oracle
from tests.support.emulated_prefill import run_built, run_prefill
from tests.support.large_logits import Channel, crossing, fill
from tests.support.paged_case import PagedCase, repage
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

BASE = PagedCase((5, 40, 90), (133, 300, 90), num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, arch="emulated-sm_90a")


def case(query_lens: tuple[int, ...], kv_lens: tuple[int, ...], **changes: object) -> PagedCase:
    return replace(BASE, query_lens=query_lens, kv_lens=kv_lens, **changes)  # type: ignore[arg-type]


SHAPES = {
    # Around one KV block and one query tile (32 tokens of 4 heads).
    "kv 127, 128, 129": case((31, 32, 33), (127, 128, 129)),
    "no query, no key, one of each": case((0, 4, 1, 1), (40, 0, 1, 17)),
    "more queries than keys": case((100, 9), (20, 3)),  # the first rows see no key
}


@pytest.mark.parametrize("name", SHAPES)
def test_tile_and_page_edges(name: str) -> None:
    run_prefill(SHAPES[name]).check()


FEATURES = {
    "window left and right": case((70, 33), (300, 64), window_left=90, window_right=20, is_causal=False, page_size=48),
    "all score features": case((60, 33, 1), (260, 20, 1), sinks=True, alibi=True, softcap=20.0, window_left=60, layout="hnd"),
    "soft cap, d256": case((40, 3), (130, 65), head_dim=256, num_q_heads=2, num_kv_heads=1, softcap=3.0, window_left=50),
    "soft cap, saturated": case(
        (40, 1), (150, 20), softcap=0.1, sinks=True, alibi=True, window_left=1000
    ),  # tanh is 1 long before the largest score
}


@pytest.mark.parametrize("name", FEATURES)
def test_mask_and_score_features(name: str) -> None:
    run_prefill(FEATURES[name]).check()


HEADS = {
    "d64, 3 to 1": case((70, 3), (200, 65), head_dim=64, num_q_heads=6, num_kv_heads=2, dtype="float16"),  # three consumers
    "128 to 1": case((3, 2), (140, 20), num_q_heads=128, num_kv_heads=1),  # one token fills a tile
    "d256, 2 to 1": case((40, 3), (130, 65), head_dim=256, num_q_heads=2, num_kv_heads=1),  # a tile of 64 keys
}


# d256 has its tiles of 80 keys under a soft cap as well, above and in `test_prefill_parts.py`.
@pytest.mark.parametrize("name", with_slow(HEADS, ["128 to 1", "d256, 2 to 1"]))
def test_heads_and_dtypes(name: str) -> None:
    run_prefill(HEADS[name]).check()


def test_tokens_that_fill_a_tile_of_other_height() -> None:
    """Two tokens of 48 heads leave a quarter of 128 rows idle, four fill 192 (`fa4_backend/prompt_tiles.py`)."""
    drawn = case((6, 9, 1), (170, 85, 20), num_q_heads=48, num_kv_heads=1)
    assert [key.kernel.tile.tile_m for key in drawn.plan().keys if isinstance(key, Sm90Config)] == [192, 64]
    run_prefill(drawn).check()


def jumping(keys: torch.Tensor) -> torch.Tensor:
    """From one end of a cap to the other between two blocks of 80 keys that all rows see whole."""
    return torch.where(keys < 160, 1.0, -1.0)


CAPS = {
    "end to end": (50.0, 1.0, crossing),  # each block moves the reference
    "end to end at once": (55.0, 1.0, jumping),  # by 159 log2 units, more than float32's exponents below 1
    "other end": (55.0, -1.0, crossing),  # weights of 2^-159 beside the first
    "a running maximum": (56.0, 1.0, jumping),
}


@pytest.mark.parametrize("name", CAPS)
def test_the_largest_values_under_a_soft_cap(name: str) -> None:
    """V of all but the largest finite bfloat16: sums of weighted values must not leave float32, wherever a row's reference begins.

    What rounding to bfloat16 moves a result by: 2^-8 of the largest value in the weights, and as much in `out`. The largest number
    itself may so end beyond itself.
    """
    softcap, sign, factor = CAPS[name]
    shape = case((3, 40), (300, 170), head_dim=256, num_q_heads=2, num_kv_heads=1, softcap=softcap, window_left=1000)
    built = fill(shape.build(), Channel(448, sign * 544, factor, is_random=True))
    a, largest = built.arguments, torch.finfo(torch.bfloat16).max - 2.0**120
    is_drawn = a.v_cache.isfinite()
    a.v_cache[is_drawn] = (a.v_cache[is_drawn].float().sign() * largest).bfloat16()
    a.v_cache[..., :2][is_drawn[..., :2]] = largest  # all of one sign, so that out is as large
    run = run_built(built)
    want, want_lse = attention_oracle(a, is_causal=True, dtype=torch.float64, accumulate=torch.float64)
    rows = slice(0, built.total_q)
    assert run.report.races == [] and run.out[rows].isfinite().all()
    assert (run.out[rows].double() - want[rows]).abs().max() <= 2.0**-7 * largest
    assert (run.lse[:, rows].double() - want_lse[:, rows]).abs().max() <= LSE_RELATIVE * want_lse[:, rows].abs().max()


def test_bits_do_not_depend_on_schedule_or_page_size() -> None:
    base = BASE.build()
    outs = []
    for page_size, seed in ((16, None), (16, 7), (64, 8)):
        run = run_built(repage(base, page_size), seed=seed)
        run.check()
        outs.append((run.out[: base.total_q].clone(), run.lse[:, : base.total_q].clone()))
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


def test_a_planted_error_is_seen() -> None:
    """The judgement must fail when two pages change places, one of them on the diagonal (two whole pages may: a sum has no order)."""
    built = replace(BASE, query_lens=(40,), kv_lens=(100,)).build()
    built.arguments.page_table[0, [1, 5]] = built.arguments.page_table[0, [5, 1]]
    run = run_built(built)
    built.arguments.page_table[0, [1, 5]] = built.arguments.page_table[0, [5, 1]]
    with pytest.raises(AssertionError, match="out"):
        run.built.check(run.out, run.lse)
