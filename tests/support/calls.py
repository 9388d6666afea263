"""Calls of the operator that tests spoil: a small case, the same with every feature, and what is called of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fa4_backend import AttentionMetadata, paged_attention
from fa4_backend.arguments import CallTensors
from tests.support.paged_case import BuiltCase, PagedCase

TENSORS = ("q", "k_cache", "v_cache", "page_table", "cu_seqlens_q", "seqused_k", "out", "lse")
CASE = PagedCase((1, 5), (20, 33))
EVERYTHING = dataclasses.replace(CASE, is_causal=False, window_left=40, window_right=40, softcap=30.0, sinks=True, alibi=True)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of the last dimension."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


# A tensor of lengths that is wrong in a way of every tensor's: what it becomes, and the refusal behind its name.
WRONG_LENGTHS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "int64": (torch.Tensor.long, "expected dtype int32, got int64"),
    "float32": (torch.Tensor.float, "expected dtype int32, got float32"),
    "strided": (strided, "expected last stride 1, got 2"),
    "on another device": (lambda lengths: lengths.to("meta"), "expected a tensor on cpu as .*, got meta"),
    "a list": (torch.Tensor.tolist, "expected a tensor, got list"),
}


def metadata_of(built: BuiltCase, plan: Any) -> AttentionMetadata:
    """Refreshed for the case."""
    a, case = built.arguments, built.case
    metadata = AttentionMetadata.allocate(plan, "cpu")
    bounds = {"max_seqlen_q": max(*case.query_lens, 1), "max_seqlen_k": max(*case.kv_lens, 1)}
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, **bounds)
    return metadata


def call(built: BuiltCase, plan: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The case's call with some arguments replaced."""
    given = {**dict(zip(TENSORS, built.arguments, strict=False)), **changes}
    return paged_attention(plan=plan, metadata=metadata_of(built, plan), **given)


def call_with_everything(built: BuiltCase, plan: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The call of a case with every feature, some arguments replaced."""
    a = built.arguments
    given = {name: getattr(a, name) for name in ("window_left", "window_right", "softcap", "sinks", "alibi_slopes")}
    return call(built, plan, **{**given, **changes})


def tensors_of(built: BuiltCase) -> CallTensors:
    """What a call of the operator gives."""
    return CallTensors(**{name: getattr(built.arguments, name) for name in CallTensors._fields})


def assert_untouched(built: BuiltCase) -> None:
    """Nothing ran before the refusal."""
    assert built.arguments.lse is not None
    assert built.arguments.out.isnan().all() and built.arguments.lse.isnan().all(), "something ran before the refusal"
