"""Prompts' tiles of another height: which problems have them, and what their lists are then."""

from __future__ import annotations

from typing import Any

import pytest

from fa4_backend import AttentionPlan, BatchLimits, plan_attention
from fa4_backend.kernels.families import resolve_kernels
from fa4_backend.problem import FP8, RAGGED
from tests.support.problems import make_problem

LIMITS = BatchLimits(64, 8192, 65536, 1)


def plan_of(q_heads: int, kv_heads: int, head_dim: int, **facts: Any) -> AttentionPlan:
    facts = {"dtype": "bfloat16", "arch": "sm_90a", "page_size": 16, **facts}
    return plan_attention(make_problem(q_heads, kv_heads, head_dim, head_dim, **facts), LIMITS, num_sms=132)


@pytest.mark.parametrize(
    ("q_heads", "rows", "tokens"),
    # Of 128 rows 126, 125, 104, 126, 86, 96, 98, 112, 128, 65, 96 and 97 would be in use.
    [
        (7, 128, 18),
        (42, 128, 3),
        (43, 192, 4),
        (48, 192, 4),
        (49, 128, 2),
        (56, 128, 2),
        (64, 128, 2),
        (65, 192, 2),
        (96, 192, 2),
        (97, 128, 1),
    ],
)  # fmt: skip
def test_tiles_have_the_rows_that_tokens_fill(q_heads: int, rows: int, tokens: int) -> None:
    kernels = plan_of(q_heads, 1, 128).kernels
    assert kernels is not None and kernels.prefill is not None
    assert (kernels.prefill.kernel.tile.tile_m, kernels.prefill.tokens_per_item, kernels.work.tokens_per_item) == (rows, tokens, tokens)
    assert kernels.work.part_floats == kernels.prefill.part_floats
    assert kernels.work.prefill_tile_n == kernels.prefill.kernel.tile.tile_n


def test_lists_know_the_tile() -> None:
    """All that lists of a problem with this tile in the table would have."""
    kernels, usual = plan_of(48, 1, 128).kernels, plan_of(64, 1, 128).kernels
    assert kernels is not None and usual is not None
    assert (kernels.work.min_part_blocks, usual.work.min_part_blocks) == (4, 2), "256 keys"
    assert kernels.decode is None and not kernels.prefill.kernel.is_dependent  # type: ignore[union-attr]


@pytest.mark.parametrize("facts", [{"kv_dtype": FP8}, {"arch": "sm_100a"}, {"batch_invariant": True}], ids=str)
def test_others_keep_theirs(facts: dict[str, Any]) -> None:
    plan = plan_of(48, 1, 128, **facts)
    assert plan.kernels == resolve_kernels(plan.problem, LIMITS, 132)


def test_prompts_without_pages_have_them_too() -> None:
    kernels = plan_of(48, 1, 128, kv_source=RAGGED, page_size=1).kernels
    assert kernels is not None and kernels.prefill is not None and kernels.prefill.kernel.tile.tile_m == 192
