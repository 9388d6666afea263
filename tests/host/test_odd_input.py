"""Right calls that look odd are served: strides, empty tensors, scales of every shape; and whose memory tensors share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fa4_backend import memory_spans
from fa4_backend.plan import AttentionPlan
from fa4_backend.problem import FP8
from fa4_backend.validation import check_tensors
from tests.support.calls import CASE, EVERYTHING, call_with_everything, metadata_of, tensors_of
from tests.support.paged_case import BuiltCase

ODD: dict[str, Callable[[BuiltCase], dict[str, Any]]] = {
    "whole numbers as scale and cap": lambda b: {"softmax_scale": 1, "softcap": 30},
    "a window of numpy's": lambda b: {"window_left": np.int32(40)},
    "windows of 2^31 and more": lambda b: {"window_left": 2**31, "window_right": 2**63},
    "a gap behind each row of out": lambda b: {"out": torch.empty(9, 5, 64, dtype=b.arguments.q.dtype)[:, :4]},
    "out beside q in one buffer": lambda b: beside(b),
    "rows of lse in a longer buffer": lambda b: {"lse": torch.empty(4, 32)[:, 3:12]},
    "a table that all sequences share": lambda b: {"page_table": torch.arange(3, dtype=torch.int32).expand(2, 3)},
    "KV heads that are one": lambda b: {"k_cache": b.arguments.k_cache[:, :, :1].expand(-1, -1, 2, -1)},
}


def beside(built: BuiltCase) -> dict[str, Any]:
    """q and out as columns of the rows of one buffer: their memory interleaves and shares nothing."""
    both = torch.empty(9, 8, 64, dtype=built.arguments.q.dtype)
    both[:, :4] = built.arguments.q
    return {"q": both[:, :4], "out": both[:, 4:]}


@pytest.mark.parametrize("what", ODD)
def test_right_calls_that_look_odd(what: str) -> None:
    """Not refused, and the result is that of plain tensors of the same values."""
    built, plan = EVERYTHING.build(), EVERYTHING.plan()
    # One layout for all: values that no row may see are 0 here, since a change may make them seen.
    for cache in (built.arguments.k_cache, built.arguments.v_cache):
        cache.nan_to_num_(0.0, 0.0, 0.0)
    changes = ODD[what](built)
    out, lse = call_with_everything(built, plan, **changes)
    plain = {
        name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value
        for name, value in changes.items()
        if name not in ("out", "lse")
    }
    if "windows" in what:
        plain = {"window_left": 4096, "window_right": 4096}
    want, want_lse = call_with_everything(built, plan, **{"out": None, "lse": None, **plain})
    assert lse is not None and want_lse is not None
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


EMPTY = {
    "no row": lambda a: {"q": a.q[:0], "out": a.out[:0], "lse": a.lse[:, :0]},
    "no sequence": lambda a: {"page_table": a.page_table[:0], "seqused_k": a.seqused_k[:0], "cu_seqlens_q": a.cu_seqlens_q[:1]},
    "no page in the table": lambda a: {"page_table": a.page_table[:, :0]},
    "fewer rows than the lengths say": lambda a: {"q": a.q[:3], "out": a.out[:3], "lse": a.lse[:, :3]},
}


@pytest.mark.parametrize("what", EMPTY)
def test_empty_tensors_are_served(what: str) -> None:
    built = CASE.build()
    a = built.arguments._replace(**EMPTY[what](built.arguments))
    out, lse = BuiltCase(CASE, a, built.total_q).run(CASE.plan())
    assert out.isfinite().all() and not lse.isnan().any()
    if what != "fewer rows than the lengths say":
        assert (out == 0).all() and lse.isneginf().all()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_memory_of_strided_tensors(data: st.DataObject) -> None:
    """Sharing, and overlap of a tensor with itself, against the sets of its elements."""
    buffer = torch.zeros(200)

    def draw() -> torch.Tensor:
        shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        strides = data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
        return buffer.as_strided(shape, strides, data.draw(st.integers(0, 60)))

    def elements(tensor: torch.Tensor) -> list[int]:
        return torch.arange(200).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().tolist()

    a, b = draw(), draw()
    assert memory_spans.share_memory(a, b) == bool(set(elements(a)) & set(elements(b)))
    assert memory_spans.num_bytes(a) == 4 * (max(elements(a)) - min(elements(a)) + 1)
    if not memory_spans.overlaps_itself(a.shape, a.stride()):
        assert len(set(elements(a))) == a.numel()


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_scales_of_every_shape(shape: tuple[int, ...]) -> None:
    case = dataclasses.replace(CASE, kv_dtype=FP8)
    built = case.build()
    plan = AttentionPlan(case.problem(), CASE.plan().limits, 1, None)
    check_tensors(plan, metadata_of(built, plan), tensors_of(built)._replace(k_scale=torch.ones(shape), v_scale=torch.ones(shape)))
