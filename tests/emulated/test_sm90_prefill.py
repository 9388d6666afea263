"""The Hopper prefill kernel, compiled by the real compiler and executed on the emulator, against the float32 oracle.

The same kernel is proven on an H200 (tests/device); here are its edges, the schedules a GPU would not show, and the race detector. Sizes
sit at 128 keys a KV block, 128 packed rows a tile, 16-row TMA boxes, pages; interior sizes run the same code.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.emulated_prefill import run_built, run_prefill
from tests.support.paged_case import PagedCase, repage

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
    "soft cap, saturated": case((40, 1), (150, 20), softcap=0.1),  # tanh is 1 long before the largest score
}


@pytest.mark.parametrize("name", FEATURES)
def test_mask_and_score_features(name: str) -> None:
    run_prefill(FEATURES[name]).check()


HEADS = {
    "d64, 3 to 1": case((70, 3), (200, 65), head_dim=64, num_q_heads=6, num_kv_heads=2),  # three consumers
    "128 to 1": case((3, 2), (140, 20), num_q_heads=128, num_kv_heads=1),  # one token fills a tile
    "d256, 2 to 1": case((40, 3), (130, 65), head_dim=256, num_q_heads=2, num_kv_heads=1),  # a tile of 64 keys
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_dtypes(name: str) -> None:
    run_prefill(HEADS[name]).check()


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
