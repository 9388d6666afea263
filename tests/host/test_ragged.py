"""Attention over K and V without pages on the host: the CPU kernel, what is refused, and a step's lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits, paged_attention, plan_attention, ragged_attention
from fa4_backend.problem import FP8, RAGGED, UnsupportedProblem
from tests.support.paged_case import BuiltCase, PagedCase

BASE = PagedCase((5, 40, 0, 33, 9, 3), (133, 300, 77, 20, 0, 64), kv_source=RAGGED)
CASES = {
    "causal": BASE,
    "full, K and V in one tensor": replace(BASE, is_causal=False, layout="nhd"),
    "left window, head-major": replace(BASE, window_left=30, layout="hnd"),
    "d192 and 128, all rows of the tensors": replace(BASE, head_dim=192, head_dim_v=128, padding_rows=0),
    "sinks, soft cap": replace(BASE, sinks=True, softcap=20.0),
    "FP8": replace(BASE, kv_dtype=FP8),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cpu_kernel_is_right_and_has_the_bits_of_pages(name: str) -> None:
    built = CASES[name].build()
    out, lse = built.run()
    built.check(out, lse)
    paged_out, paged_lse = replace(CASES[name], kv_source="paged").build().run()
    assert torch.equal(out, paged_out) and torch.equal(lse, paged_lse)


def test_a_key_of_another_sequence_is_noticed() -> None:
    """What the judgement is worth: one row of cu_seqlens_k off by one."""
    built = BASE.build()
    assert built.arguments.cu_seqlens_k is not None
    right = built.arguments
    wrong = right.cu_seqlens_k.clone()
    wrong[1] += 1
    built.arguments = right._replace(cu_seqlens_k=wrong)
    out, lse = built.run()
    built.arguments = right
    with pytest.raises(AssertionError, match=r"^(out|lse): "):
        built.check(out, lse)


def call(built: BuiltCase, **changes: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    a, plan = built.arguments, built.case.plan()
    metadata = AttentionMetadata.allocate(plan, "cpu")
    longest = max(built.case.query_lens)
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, cu_seqlens_k=a.cu_seqlens_k, max_seqlen_q=longest, max_seqlen_k=1)
    tensors = {
        "q": a.q,
        "k": a.k_cache,
        "v": a.v_cache,
        "cu_seqlens_q": a.cu_seqlens_q,
        "cu_seqlens_k": a.cu_seqlens_k,
        "out": a.out,
        "lse": a.lse,
    }
    return ragged_attention(**(tensors | changes), plan=plan, metadata=metadata)


def test_no_keys_at_all() -> None:
    """A tensor map cannot describe zero rows: every row is empty, on any arch, without a launch."""
    built = replace(BASE, query_lens=(5, 3), kv_lens=(0, 0), padding_rows=0).build()
    assert built.arguments.k_cache.shape[0] == 0
    out, lse = call(built)
    assert lse is not None and (out == 0).all() and lse.isneginf().all()


REFUSED = {
    "k: expected shape": lambda a: {"k": a.k_cache[:, :1]},
    "v: expected shape": lambda a: {"v": a.v_cache[:-1]},
    "v: expected last stride 1": lambda a: {"v": torch.empty(*a.v_cache.shape[:2], 2 * a.v_cache.shape[2], dtype=a.q.dtype)[..., ::2]},
    "k: expected dtype": lambda a: {"k": a.k_cache.half()},
    "cu_seqlens_q: expected shape": lambda a: {"cu_seqlens_q": a.cu_seqlens_q[:-1]},
    "cu_seqlens_k: expected 1 to 7 numbers": lambda a: {"cu_seqlens_k": torch.zeros(8, dtype=torch.int32)},
    "cu_seqlens_k: expected dtype": lambda a: {"cu_seqlens_k": a.cu_seqlens_k.long()},
    "out: expected memory of its own": lambda a: {"out": a.q},
    "k_scale: expected none": lambda a: {"k_scale": torch.ones(1)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    built = BASE.build()
    with pytest.raises(ValueError, match=message):
        call(built, **REFUSED[message](built.arguments))


def test_a_plan_is_for_one_operator() -> None:
    ragged, paged = BASE.build(), replace(BASE, kv_source="paged").build()
    r, p = ragged.arguments, paged.arguments
    metadata = AttentionMetadata.allocate(paged.case.plan(), "cpu")
    metadata.refresh(cu_seqlens_q=p.cu_seqlens_q, seqused_k=p.seqused_k, max_seqlen_q=40, max_seqlen_k=300)
    with pytest.raises(ValueError, match="plan: expected kv_source ragged for ragged_attention, got paged"):
        ragged_attention(r.q, r.k_cache, r.v_cache, r.cu_seqlens_q, r.cu_seqlens_k, plan=metadata.plan, metadata=metadata)
    metadata = AttentionMetadata.allocate(ragged.case.plan(), "cpu")
    metadata.refresh(cu_seqlens_q=r.cu_seqlens_q, cu_seqlens_k=r.cu_seqlens_k, max_seqlen_q=40, max_seqlen_k=300)
    with pytest.raises(ValueError, match="plan: expected kv_source paged for paged_attention, got ragged"):
        paged_attention(*p[:6], plan=metadata.plan, metadata=metadata)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seqused_k": torch.zeros(6, dtype=torch.int32)}, "cu_seqlens_k, seqused_k: expected the first alone.*the second alone"),
        ({}, "got neither"),
        ({"cu_seqlens_k": torch.zeros(7, dtype=torch.int32), "seqused_k": torch.zeros(6, dtype=torch.int32)}, "got both"),
        ({"cu_seqlens_k": torch.zeros(6, dtype=torch.int32)}, "cu_seqlens_q: expected shape"),
        ({"cu_seqlens_k": torch.zeros(9, dtype=torch.int32)}, "cu_seqlens_k: expected at most max_num_seqs=6"),
    ],
)
def test_lengths_that_do_not_fit_a_step(given: dict[str, torch.Tensor], message: str) -> None:
    metadata = AttentionMetadata.allocate(BASE.plan(), "cpu")
    with pytest.raises(ValueError, match=message):
        metadata.refresh(cu_seqlens_q=torch.zeros(7, dtype=torch.int32), max_seqlen_q=1, max_seqlen_k=1, **given)


def test_a_step_keeps_its_addresses() -> None:
    """Lengths go to the buffer that a captured graph reads."""
    metadata = AttentionMetadata.allocate(BASE.plan(), "cpu")
    assert metadata.kv_lens is not None
    address = metadata.kv_lens.data_ptr()
    for lens in ((3, 4, 5), (7, 0, 1)):
        cu_seqlens_k = torch.tensor([0, *lens]).cumsum(0).int()
        metadata.refresh(cu_seqlens_q=torch.zeros(4, dtype=torch.int32), cu_seqlens_k=cu_seqlens_k, max_seqlen_q=1, max_seqlen_k=7)
        assert metadata.kv_lens.data_ptr() == address and metadata.kv_lens[:3].tolist() == list(lens)


def test_no_pages_no_decode_kernel() -> None:
    problem = AttentionProblem(32, 8, 128, 128, "bfloat16", 1, "sm_90a", kv_source=RAGGED)
    plan = plan_attention(problem, BatchLimits(8, 64, 4096))
    assert plan.kernels is not None and plan.kernels.decode is None
    assert plan.kernels.prefill.name.endswith("-ragged") and plan.kernels.prefill.kernel.box_rows == plan.kernels.prefill.kernel.tile.tile_n
    with pytest.raises(UnsupportedProblem, match="page_size: expected 1"):
        replace(problem, page_size=16)
