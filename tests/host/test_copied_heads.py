"""One KV head that the kernels get as several: which problems, what the plan and the launches then hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fa4_backend import AttentionMetadata, BatchLimits, paged_attention, plan_attention
from fa4_backend.kernels import loading
from fa4_backend.problem import FP8
from tests.support.paged_case import PagedCase
from tests.support.problems import make_problem

LIMITS = BatchLimits(4, 64, 4096)


def copies(heads: tuple[int, int], head_dim: int = 64, query_len: int = 1, **facts: Any) -> int:
    problem = make_problem(*heads, head_dim, head_dim, page_size=16, **{"dtype": "bfloat16", "arch": "sm_90a", **facts})
    return plan_attention(problem, BatchLimits(4, 64, 4096, query_len)).kv_head_copies


@pytest.mark.parametrize(
    ("heads", "query_len", "expected"),
    [
        ((64, 1), 1, 4), ((32, 1), 1, 2), ((16, 1), 4, 4), ((8, 1), 4, 2),
        ((48, 1), 1, 1), ((16, 1), 1, 1), ((17, 1), 1, 1), ((24, 1), 1, 1), ((96, 1), 1, 1), ((64, 2), 1, 1), ((1, 1), 32, 1),
    ],
)  # fmt: skip
def test_heads_of_16_rows_where_several_were_no_slower(heads: tuple[int, int], query_len: int, expected: int) -> None:
    assert copies(heads, query_len=query_len) == expected


@pytest.mark.parametrize(
    "facts",
    [{"head_dim": 128}, {"head_dim": 96}, {"kv_dtype": FP8}, {"batch_invariant": True}, {"arch": "sm_100a"}],
    ids=str,
)  # fmt: skip
def test_what_stays_one_head(facts: dict[str, Any]) -> None:
    assert copies((64, 1)) == 4
    assert copies((64, 1), **facts) == 1


def test_kernels_are_those_of_the_heads_that_they_get() -> None:
    problem = make_problem(64, 1, 64, 64, "bfloat16", 16, "sm_90a")
    plan, of_four = plan_attention(problem, LIMITS), plan_attention(make_problem(64, 4, 64, 64, "bfloat16", 16, "sm_90a"), LIMITS)
    assert plan.kernels == of_four.kernels
    assert plan.problem == problem, "calls are checked against what the user has"


def test_launches_read_one_head_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query heads keep their order; K and V are the caller's memory."""
    launches: list[tuple[str, Any]] = []
    monkeypatch.setattr(loading, "load", lambda key, *, emulated: lambda *arguments: launches.append((key.name, arguments)))
    built = PagedCase((1, 9), (70, 20), num_q_heads=64, num_kv_heads=1, head_dim=64, arch="emulated-sm_90a").build()
    a, plan = built.arguments, built.case.plan()
    metadata = AttentionMetadata.allocate(plan, "cpu")
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=9, max_seqlen_k=70)
    launches.clear()
    paged_attention(*a[:6], plan=plan, metadata=metadata, out=a.out, lse=a.lse)
    assert [name.split("-")[0] for name, _ in launches] == ["decode", "prefill"]
    for name, arguments in launches:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        for own in (a.k_cache, a.v_cache):
            given = next(x for x in tensors if x.data_ptr() == own.data_ptr() and x.dim() == 4)
            assert given.shape[2] == 4 and given.stride(2) == 0 and given.stride(1) == own.stride(1), name
        assert any(x.data_ptr() == a.q.data_ptr() and x.shape == a.q.shape for x in tensors), name
