"""Every wrong call is refused before anything runs, with what was expected and what it got."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fa4_backend import AttentionMetadata, BatchLimits, UnsupportedProblem, paged_attention, plan_attention
from tests.support.paged_case import PagedCase
from tests.support.problems import make_problem

CASE = PagedCase((1, 5), (20, 33))

# What is wrong -> (arguments it replaces, words the message must hold).
BAD_TENSORS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "q has the wrong head count": (lambda a: {"q": a.q[:, :3]}, ("q: expected shape (any, 4, 64)", "got (9, 3, 64)")),
    "q is two-dimensional": (lambda a: {"q": a.q[0]}, ("q: expected shape", "got (4, 64)")),
    "q has the wrong dtype": (lambda a: {"q": a.q.half()}, ("q: expected dtype bfloat16", "got float16")),
    "q is strided in its last dimension": (
        lambda a: {"q": a.q.transpose(0, 2).contiguous().transpose(0, 2)},
        ("q: expected last stride 1", "got"),
    ),
    "k_cache has another page size": (lambda a: {"k_cache": a.k_cache[:, :8]}, ("k_cache: expected shape (any, 16, 2, 64)", "got")),
    "v_cache has fewer pages": (lambda a: {"v_cache": a.v_cache[1:]}, ("v_cache: expected shape", "got")),
    "page_table is int64": (lambda a: {"page_table": a.page_table.long()}, ("page_table: expected dtype int32", "got int64")),
    "page_table is flat": (lambda a: {"page_table": a.page_table.flatten()}, ("page_table: expected shape (any, any)", "got")),
    "seqused_k is short": (lambda a: {"seqused_k": a.seqused_k[:1]}, ("seqused_k: expected shape (2)", "got (1,)")),
    "cu_seqlens_q lacks its end": (lambda a: {"cu_seqlens_q": a.cu_seqlens_q[:2]}, ("cu_seqlens_q: expected shape (3)", "got (2,)")),
    "out has the wrong shape": (lambda a: {"out": a.out[:2]}, ("out: expected shape (9, 4, 64)", "got (2, 4, 64)")),
    "out is float32": (lambda a: {"out": a.out.float()}, ("out: expected dtype bfloat16", "got float32")),
    "lse is short": (lambda a: {"lse": a.lse[:, 1:]}, ("lse: expected shape (4, 9)", "got (4, 8)")),
    "lse is bfloat16": (lambda a: {"lse": a.lse.bfloat16()}, ("lse: expected dtype float32", "got bfloat16")),
    "a window that was not planned": (lambda a: {"window_left": 3}, ("window_left: expected none", "got 3")),
    "a soft cap that was not planned": (lambda a: {"softcap": 3.0}, ("softcap: expected none", "got 3.0")),
    "sinks that were not planned": (lambda a: {"sinks": torch.zeros(4)}, ("sinks: expected none", "got a tensor")),
    "a softmax scale of zero": (lambda a: {"softmax_scale": 0.0}, ("softmax_scale: expected a number above 0", "got 0.0")),
    "a negative softmax scale": (lambda a: {"softmax_scale": -0.1}, ("softmax_scale: expected a number above 0", "got -0.1")),
    "slopes that were not planned": (lambda a: {"alibi_slopes": torch.zeros(4)}, ("alibi_slopes: expected none", "got a tensor")),
}


def call(built, plan, **changes):
    a = built.arguments
    metadata = AttentionMetadata.allocate(plan, "cpu")
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=5, max_seqlen_k=33)
    positional = dict(zip(("q", "k_cache", "v_cache", "page_table", "cu_seqlens_q", "seqused_k"), a[:6], strict=True))
    tensors = {**positional, "out": a.out, "lse": a.lse, **changes}
    return paged_attention(plan=plan, metadata=metadata, **tensors)


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_wrong_tensor(what: str) -> None:
    change, words = BAD_TENSORS[what]
    built = CASE.build()
    with pytest.raises(ValueError) as caught:
        call(built, CASE.plan(), **change(built.arguments))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert built.arguments.out.isnan().all(), "something ran before the refusal"


PLANNED = {
    "window_left": (dataclasses.replace(CASE, window_left=4), "window_left: expected a value"),
    "softcap": (dataclasses.replace(CASE, softcap=4.0), "softcap: expected a value"),
    "sinks": (dataclasses.replace(CASE, sinks=True), "sinks: expected a value"),
    "alibi_slopes": (dataclasses.replace(CASE, alibi=True), "alibi_slopes: expected a value"),
}


@pytest.mark.parametrize("name", PLANNED)
def test_planned_value_is_missing(name: str) -> None:
    case, words = PLANNED[name]
    with pytest.raises(ValueError, match=words):
        call(case.build(), case.plan())


def test_window_of_minus_one_is_not_a_sentinel() -> None:
    """-1 for 'all' is another library's habit; taken as a number it would hide every key."""
    case = dataclasses.replace(CASE, window_left=4)
    with pytest.raises(ValueError, match=r"window_left: expected 0 or more visible tokens .None for all., got -1"):
        call(case.build(), case.plan(), window_left=-1)


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


def test_limits() -> None:
    with pytest.raises(ValueError, match="max_num_seqs: expected a positive number, got 0"):
        BatchLimits(0, 1, 1)
    with pytest.raises(ValueError, match="decode_query_len: expected at most max_num_tokens=2, got 3"):
        BatchLimits(1, 2, 1, decode_query_len=3)
