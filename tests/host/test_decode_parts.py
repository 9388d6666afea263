"""Into how many parts a plan's lists cut lone decode rows."""

from __future__ import annotations

from typing import Any

import pytest

from fa4_backend import BatchLimits, plan_attention
from fa4_backend.decode_parts import CUT_FOR_ALL_VECTORS
from fa4_backend.kernels.families import resolve_kernels
from fa4_backend.kernels.schedule.work_list import NUM_ENTRIES, WorkShape
from fa4_backend.problem import FP8
from tests.support.host_schedule import make_lists
from tests.support.problems import make_problem

LIMITS = BatchLimits(256, 8192, 131072, 1, 32768)


def kernels_of(q_heads: int, kv_heads: int, head_dim: int, **facts: Any) -> tuple[Any, Any]:
    """A plan's kernels, and those that are resolved without this choice."""
    facts = {"dtype": "bfloat16", "arch": "sm_90a", **facts}
    problem = make_problem(q_heads, kv_heads, head_dim, head_dim, page_size=16, **facts)
    return plan_attention(problem, LIMITS, num_sms=132).kernels, resolve_kernels(problem, LIMITS, 132)


def parts(work: WorkShape, seqlen_k: int) -> int:
    """CTAs that have a part of one row's one KV head."""
    return int((make_lists(work, [1], [seqlen_k]).decode_first[:, NUM_ENTRIES] > 0).sum())


@pytest.mark.parametrize(("seqlen_k", "before", "now"), [(1024, 4, 4), (2048, 6, 16), (4096, 8, 32), (8192, 12, 45), (16384, 64, 64)])
def test_parts_of_a_long_row(seqlen_k: int, before: int, now: int) -> None:
    """16 packed rows of 128 are four vectors a thread: six parts are 24 of them, and from there on all CTAs add up."""
    kernels, resolved = kernels_of(16, 1, 128)
    assert (parts(resolved.work, seqlen_k), parts(kernels.work, seqlen_k)) == (before, now)
    assert kernels.keys == resolved.keys, "a choice of the lists alone"


@pytest.mark.parametrize("facts", [{}, {"kv_dtype": FP8}], ids=str)
def test_whose_slots_are_several_vectors(facts: dict[str, Any]) -> None:
    kernels, _ = kernels_of(16, 2, 128, **facts)
    works = [kernels.work, *([kernels.converted.work] if kernels.converted else [])]
    assert len(works) == 1 + (facts.get("kv_dtype") == FP8)
    assert {work.decode_share_vectors for work in works} == {CUT_FOR_ALL_VECTORS["sm_90a"]}


@pytest.mark.parametrize(
    ("heads", "facts"),
    [((32, 8, 128), {}), ((64, 8, 64), {}), ((16, 2, 128), {"batch_invariant": True}), ((16, 2, 128), {"arch": "sm_100a"})],
    ids=str,
)
def test_others_keep_theirs(heads: tuple[int, int, int], facts: dict[str, Any]) -> None:
    kernels, resolved = kernels_of(*heads, **facts)
    assert kernels == resolved
