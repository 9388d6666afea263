"""Wrong problems, limits and steps are refused, with what was expected and what they got."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fa4_backend import AttentionMetadata, BatchLimits, UnsupportedProblem, paged_attention, plan_attention
from fa4_backend.kernels.schedule.work_list import NO_WINDOW
from fa4_backend.support import MAX_TOKENS
from tests.support.calls import CASE, WRONG_LENGTHS, metadata_of
from tests.support.problems import make_problem


def test_metadata_that_was_never_refreshed() -> None:
    built, plan = CASE.build(), CASE.plan()
    with pytest.raises(ValueError, match="expected refresh"):
        paged_attention(*built.arguments[:6], plan=plan, metadata=AttentionMetadata.allocate(plan, "cpu"))


def test_metadata_of_another_plan() -> None:
    built, plan, other = CASE.build(), CASE.plan(), dataclasses.replace(CASE, num_kv_heads=1).plan()
    metadata = AttentionMetadata.allocate(other, "cpu")
    with pytest.raises(ValueError, match="metadata: expected one allocated for this plan"):
        paged_attention(*built.arguments[:6], plan=plan, metadata=metadata)


def test_batch_above_the_plans_limits() -> None:
    metadata = AttentionMetadata.allocate(CASE.plan(), "cpu")
    lengths = torch.tensor([1, 1, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="seqused_k: expected at most max_num_seqs=2 sequences, got 3"):
        metadata.refresh(cu_seqlens_q=torch.arange(4, dtype=torch.int32), seqused_k=lengths, max_seqlen_q=1, max_seqlen_k=1)
    with pytest.raises(ValueError, match=r"max_seqlen_k: expected 0 to 33, .*max_model_len"):
        metadata.refresh(cu_seqlens_q=torch.arange(3, dtype=torch.int32), seqused_k=lengths[:2], max_seqlen_q=1, max_seqlen_k=34)


GOOD = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "head_dim_v": 64, "dtype": "bfloat16", "page_size": 16, "arch": "cpu"}
BAD_PROBLEMS = {
    "heads do not divide": ({"num_q_heads": 9}, "num_q_heads: expected a positive multiple of num_kv_heads"),
    "no heads": ({"num_q_heads": 0}, "num_q_heads: expected"),
    "head_dim 0": ({"head_dim": 0}, "head_dim: expected a positive number, got 0"),
    "unknown dtype": ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
    "unknown arch": ({"arch": "sm_80"}, "arch: expected cpu, sm_90a, sm_100a, sm_103a"),
    "window_right beside causal": ({"has_window_right": True}, "has_window_right: expected False for causal"),
    "page 24": ({"page_size": 24}, "page_size: expected a multiple of 16, got 24"),
    "head_dim 68": ({"head_dim": 68, "head_dim_v": 68}, "head_dim on cpu: expected a multiple of 8, got 68/68"),
}


@pytest.mark.parametrize("what", BAD_PROBLEMS)
def test_unsupported_problem(what: str) -> None:
    change, words = BAD_PROBLEMS[what]
    with pytest.raises(UnsupportedProblem, match=words):
        plan_attention(make_problem(**{**GOOD, **change}), BatchLimits(1, 1, 1))  # type: ignore[arg-type]


# What is wrong with a step -> (arguments of refresh that it replaces, words of the refusal).
BAD_STEPS: dict[str, tuple[Callable, str]] = {
    "cu_seqlens_q lacks its end": (lambda a: {"cu_seqlens_q": a.cu_seqlens_q[:2]}, r"cu_seqlens_q: expected shape \(3\), got \(2,\)"),
    "seqused_k is two-dimensional": (lambda a: {"seqused_k": a.seqused_k[None]}, r"seqused_k: expected shape \(any\), got \(1, 2\)"),
    "a length on the device": (lambda a: {"max_seqlen_k": a.seqused_k.max()}, "max_seqlen_k: expected a whole number .* got a Tensor"),
    "half a token": (lambda a: {"max_seqlen_q": 4.5}, "max_seqlen_q: expected a whole number as a Python int, got 4.5"),
    "a shortest query of none": (lambda a: {"min_seqlen_q": 0}, "min_seqlen_q: expected 1 to max_seqlen_q=5, got 0"),
    "a shortest query above one": (lambda a: {"min_seqlen_q": 5}, "min_seqlen_q: expected at most the shortest query, 1, got 5"),
    "a longest query below one": (lambda a: {"max_seqlen_q": 4}, "max_seqlen_q: expected at least the longest query, 5, got 4"),
    "fewer keys than long rows have": (
        lambda a: {"prefill_keys": 32},
        "prefill_keys: expected at least the keys of all long rows, 33, got 32",
    ),
    "a negative length": (lambda a: {"max_seqlen_q": -1}, "max_seqlen_q: expected 0 to 9, .*max_num_tokens, got -1"),
}


def test_a_step_whose_lengths_are_numpys() -> None:
    """Engines keep lengths in numpy arrays."""
    built, plan = CASE.build(), CASE.plan()
    metadata, a = metadata_of(built, plan), built.arguments
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=np.int32(5), max_seqlen_k=np.int64(33))
    assert metadata.bounds is not None and metadata.bounds[:4] == (2, 5, 33, 1)


@pytest.mark.parametrize("what", BAD_STEPS)
def test_wrong_step(what: str) -> None:
    change, words = BAD_STEPS[what]
    refused_step(change, words)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "seqused_k"])
@pytest.mark.parametrize("what", WRONG_LENGTHS)
def test_a_step_of_wrong_lengths(what: str, name: str) -> None:
    change, words = WRONG_LENGTHS[what]
    refused_step(lambda a: {name: change(getattr(a, name))}, f"{name}: {words}")


def refused_step(change: Callable, words: str) -> None:
    """Refused, and the metadata is as the step before left it."""
    built, plan = CASE.build(), CASE.plan()
    metadata, a = metadata_of(built, plan), built.arguments
    before = metadata.bounds
    given = {"cu_seqlens_q": a.cu_seqlens_q, "seqused_k": a.seqused_k, "max_seqlen_q": 5, "max_seqlen_k": 33}
    with pytest.raises(ValueError, match=words):
        metadata.refresh(**{**given, **change(a)})
    assert metadata.bounds == before


def test_no_position_and_window_reach_past_int32() -> None:
    """The last position of the longest sequence, the widest window and a tile are counted in 32 bits."""
    assert MAX_TOKENS + NO_WINDOW + 1024 < 2**31
    problem = make_problem(**{**GOOD, "arch": "sm_100a"})  # type: ignore[arg-type]
    assert plan_attention(problem, BatchLimits(1, MAX_TOKENS, MAX_TOKENS)).kernels is not None
    for limits, words in (((1, 1, MAX_TOKENS + 1), "max_seqlen_k on sm_100a"), ((1, 2**31, 1), "max_num_tokens on sm_100a")):
        with pytest.raises(UnsupportedProblem, match=f"{words}: expected at most {MAX_TOKENS}, got"):
            plan_attention(problem, BatchLimits(*limits))


def test_limits() -> None:
    with pytest.raises(ValueError, match="max_num_seqs: expected a positive number, got 0"):
        BatchLimits(0, 1, 1)
    with pytest.raises(ValueError, match="decode_query_len: expected at most max_num_tokens=2, got 3"):
        BatchLimits(1, 2, 1, decode_query_len=3)
