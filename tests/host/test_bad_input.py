"""Every wrong call is refused before anything runs, with what was expected and what it got."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fa4_backend import AttentionMetadata, BatchLimits, UnsupportedProblem, memory_spans, paged_attention, plan_attention
from fa4_backend.arguments import CallTensors
from fa4_backend.kernels.schedule.work_list import NO_WINDOW
from fa4_backend.plan import AttentionPlan
from fa4_backend.problem import FP8
from fa4_backend.support import MAX_TOKENS
from fa4_backend.validation import check_tensors
from tests.support.paged_case import BuiltCase, PagedCase
from tests.support.problems import make_problem

CASE = PagedCase((1, 5), (20, 33))
EVERYTHING = dataclasses.replace(CASE, is_causal=False, window_left=40, window_right=40, softcap=30.0, sinks=True, alibi=True)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of the last dimension."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def on_meta(name: str) -> tuple[Callable, tuple[str, ...]]:
    """A tensor of another device."""
    return (lambda a: {name: getattr(a, name).to("meta")}), (f"{name}: expected a ", "cpu", "got meta")


TENSORS = ("q", "k_cache", "v_cache", "page_table", "cu_seqlens_q", "seqused_k", "out", "lse")

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
    "slopes that were not planned": (lambda a: {"alibi_slopes": torch.zeros(4)}, ("alibi_slopes: expected none", "got a tensor")),
    **{f"{name} is on another device": on_meta(name) for name in (*TENSORS[:6], "out", "lse")},
    "k_cache has no page": (lambda a: {"k_cache": a.k_cache[:0], "v_cache": a.v_cache[:0]}, ("k_cache: expected at least one page",)),
    "k_cache is of another dtype than q": (lambda a: {"k_cache": a.k_cache.half()}, ("k_cache: expected dtype bfloat16", "got float16")),
    "page_table is a list": (lambda a: {"page_table": a.page_table.tolist()}, ("page_table: expected a tensor, got list",)),
    "q is an array": (lambda a: {"q": np.zeros((9, 4, 64))}, ("q: expected a tensor, got ndarray",)),
    "page_table is strided": (lambda a: {"page_table": strided(a.page_table)}, ("page_table: expected last stride 1, got 2",)),
    "cu_seqlens_q is strided": (lambda a: {"cu_seqlens_q": strided(a.cu_seqlens_q)}, ("cu_seqlens_q: expected last stride 1, got 2",)),
    "seqused_k is strided": (lambda a: {"seqused_k": strided(a.seqused_k)}, ("seqused_k: expected last stride 1, got 2",)),
    "seqused_k is int64": (lambda a: {"seqused_k": a.seqused_k.long()}, ("seqused_k: expected dtype int32", "got int64")),
    "cu_seqlens_q is float32": (lambda a: {"cu_seqlens_q": a.cu_seqlens_q.float()}, ("cu_seqlens_q: expected dtype int32", "got float32")),
    "lse is token-major": (lambda a: {"lse": torch.empty(9, 4).T}, ("lse: expected last stride 1, got 4",)),
    "lse has one row for all heads": (
        lambda a: {"lse": torch.empty(1, 9).expand(4, 9)},
        ("lse: expected each element at an address of its own, got strides (0, 1)",),
    ),
    "rows of out overlap": (
        lambda a: {"out": torch.empty(4 * 64 + 8 * 128, dtype=a.q.dtype).as_strided(a.out.shape, (128, 64, 1))},
        ("out: expected each element at an address of its own, got strides (128, 64, 1)",),
    ),
    "out is q": (lambda a: {"out": a.q}, ("out: expected memory of its own, got elements shared with q",)),
    "out begins inside q": (
        lambda a: (lambda both: {"q": both[:9], "out": both[8:]})(torch.zeros(17, 4, 64, dtype=a.q.dtype)),
        ("out: expected memory of its own, got elements shared with q",),
    ),
    "out lies in the cache": (
        lambda a: {"out": a.v_cache.view(-1, 4, 64)[:9]},
        ("out: expected memory of its own, got elements shared with v_cache",),
    ),
    "lse lies in out": (
        lambda a: (lambda bits: {"out": bits.view(torch.bfloat16).view(9, 4, 64), "lse": bits[:36].view(4, 9)})(torch.zeros(9 * 4 * 32)),
        ("out: expected memory of its own, got elements shared with lse",),
    ),
    "q wants a gradient": (lambda a: {"q": a.q.clone().requires_grad_()}, ("q: expected a call under torch.no_grad()", "requires_grad")),
    "out wants a gradient": (lambda a: {"out": a.out.clone().requires_grad_()}, ("out: expected a call under torch.no_grad()",)),
}

# Numbers, beside tensors that fit `EVERYTHING`.
BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "a scale of zero": ({"softmax_scale": 0.0}, "softmax_scale: expected a normal float32 above 0 .*, got 0.0"),
    "a negative scale": ({"softmax_scale": -0.1}, "softmax_scale: expected .*, got -0.1"),
    "an infinite scale": ({"softmax_scale": float("inf")}, "softmax_scale: expected .*, got inf"),
    "a scale that is no number": ({"softmax_scale": float("nan")}, "softmax_scale: expected .*, got nan"),
    "a scale that float32 rounds to 0": ({"softmax_scale": 1e-40}, "softmax_scale: expected .*, got 1e-40"),
    "a scale above float32": ({"softmax_scale": 1e39}, "softmax_scale: expected .*, got 1e[+]39"),
    # log2(e) of it is infinite, and infinity times a logit of 0 is NaN.
    "a scale that overflows in base 2": ({"softmax_scale": 3e38}, r"softmax_scale: expected .* at most 2\^126, got 3e[+]38"),
    "a scale on the device": ({"softmax_scale": torch.tensor(0.1)}, "softmax_scale: expected a Python float, got a Tensor"),
    "a scale of numpy's": ({"softmax_scale": np.float32(0.1)}, "softmax_scale: expected a Python float, got a float32"),
    "a scale in words": ({"softmax_scale": "0.1"}, "softmax_scale: expected a Python float, got '0.1' .str."),
    "a scale of True": ({"softmax_scale": True}, "softmax_scale: expected a Python float, got True .bool."),
    "a negative cap": ({"softcap": -3.0}, "softcap: expected 0 .off. or .*, got -3.0"),
    "an infinite cap": ({"softcap": float("inf")}, "softcap: expected .*, got inf"),
    "a cap that is no number": ({"softcap": float("nan")}, "softcap: expected .*, got nan"),
    "a cap that float32 rounds to 0": ({"softcap": 1e-40}, "softcap: expected .*, got 1e-40"),
    "a cap too small for its scale": ({"softcap": 1e-30, "softmax_scale": 1e10}, "softcap: expected .*softmax_scale / softcap"),
    "a cap on the device": ({"softcap": torch.tensor(30.0)}, "softcap: expected a Python float, got a Tensor"),
    "a cap of None": ({"softcap": None}, "softcap: expected a Python float, got None"),
    "no cap where one was planned": ({"softcap": 0.0}, "softcap: expected a value, since the plan has it"),
    "a window of True": ({"window_left": True}, "window_left: expected a whole number as a Python int, got True .bool."),
    "half a token": ({"window_right": 3.5}, "window_right: expected a whole number as a Python int, got 3.5 .float."),
    "a window on the device": ({"window_left": torch.tensor(3)}, "window_left: expected a whole number as a Python int, got a Tensor"),
    # Another library's habit for 'all'; taken as a number it would hide every key.
    "a window of -1": ({"window_left": -1}, "window_left: expected 0 or more visible tokens .None for all., got -1"),
    "sinks of two dimensions": ({"sinks": torch.zeros(4, 1)}, r"sinks: expected shape \(4\), got \(4, 1\)"),
    "sinks of another dtype": ({"sinks": torch.zeros(4).bfloat16()}, "sinks: expected dtype float32, got bfloat16"),
    "strided sinks": ({"sinks": torch.zeros(8)[::2]}, "sinks: expected last stride 1, got 2"),
    "sinks on another device": ({"sinks": torch.zeros(4, device="meta")}, "sinks: expected a tensor on cpu as q, got meta"),
    "sinks that are learned": ({"sinks": torch.nn.Parameter(torch.zeros(4))}, "sinks: expected a call under torch.no_grad()"),
    "sinks in a list": ({"sinks": [0.0] * 4}, "sinks: expected a tensor, got list"),
    "too few slopes": ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes: expected shape \(4\), got \(3,\)"),
    "slopes of another dtype": ({"alibi_slopes": torch.zeros(4).double()}, "alibi_slopes: expected dtype float32, got float64"),
    "slopes that all heads share": ({"alibi_slopes": torch.zeros(1).expand(4)}, "alibi_slopes: expected last stride 1, got 0"),
    "slopes on another device": ({"alibi_slopes": torch.zeros(4, device="meta")}, "alibi_slopes: expected a tensor on cpu as q, got meta"),
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


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_wrong_tensor(what: str) -> None:
    change, words = BAD_TENSORS[what]
    built = CASE.build()
    with pytest.raises(ValueError) as caught:
        call(built, CASE.plan(), **change(built.arguments))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_untouched(built)


@pytest.mark.parametrize("what", BAD_VALUES)
def test_wrong_value(what: str) -> None:
    changes, words = BAD_VALUES[what]
    built = EVERYTHING.build()
    with pytest.raises(ValueError, match=words):
        call_with_everything(built, EVERYTHING.plan(), **changes)
    assert_untouched(built)


SCALES = {
    "a scale for K and V that are not FP8": ({}, lambda a: torch.ones(2), "k_scale: expected none, since the plan's K and V are bfloat16"),
    "scales of another number of heads": ({"kv_dtype": FP8}, lambda a: torch.ones(3), r"k_scale: expected shape \(\), \(1\) or \(2\)"),
    "scales in float64": ({"kv_dtype": FP8}, lambda a: a.k_scale.double(), "k_scale: expected dtype float32, got float64"),
    "a scale on another device": ({"kv_dtype": FP8}, lambda a: a.k_scale.to("meta"), "k_scale: expected a tensor on cpu as q, got meta"),
}


@pytest.mark.parametrize("what", SCALES)
def test_wrong_scale(what: str) -> None:
    facts, scale, words = SCALES[what]
    built = dataclasses.replace(CASE, **facts).build()
    plan = AttentionPlan(dataclasses.replace(CASE, **facts).problem(), CASE.plan().limits, 1, None)
    with pytest.raises(ValueError, match=words):
        check_tensors(plan, metadata_of(built, plan), tensors_of(built)._replace(k_scale=scale(built.arguments)))


OUT_SCALES = {
    "a scale of an out that is not FP8": ("auto", torch.ones(1), "out_scale: expected none, since the plan's out is bfloat16"),
    "none of an out that is": (FP8, None, "out_scale: expected a tensor, since the plan's out is float8_e4m3fn"),
    "a scale a head": (FP8, torch.ones(2), r"out_scale: expected shape \(\) or \(1\)"),
    "in float64": (FP8, torch.ones((), dtype=torch.float64), "out_scale: expected dtype float32, got float64"),
    "on another device": (FP8, torch.ones((), device="meta"), "out_scale: expected a tensor on cpu as q, got meta"),
}


@pytest.mark.parametrize("what", OUT_SCALES)
def test_wrong_scale_of_out(what: str) -> None:
    out_dtype, scale, words = OUT_SCALES[what]
    case = dataclasses.replace(CASE, out_dtype=out_dtype)
    built, plan = case.build(), case.plan()
    with pytest.raises(ValueError, match=words):
        check_tensors(plan, metadata_of(built, plan), tensors_of(built)._replace(out_scale=scale))


def test_out_in_another_dtype_than_the_plans() -> None:
    case = dataclasses.replace(CASE, out_dtype=FP8)
    built, plan = case.build(), case.plan()
    with pytest.raises(ValueError, match="out: expected dtype float8_e4m3fn, got bfloat16"):
        check_tensors(plan, metadata_of(built, plan), tensors_of(built)._replace(out=CASE.build().arguments.out))


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_scales_of_every_shape(shape: tuple[int, ...]) -> None:
    case = dataclasses.replace(CASE, kv_dtype=FP8)
    built = case.build()
    plan = AttentionPlan(case.problem(), CASE.plan().limits, 1, None)
    check_tensors(plan, metadata_of(built, plan), tensors_of(built)._replace(k_scale=torch.ones(shape), v_scale=torch.ones(shape)))


def tensors_of(built: BuiltCase) -> CallTensors:
    """What a call of the operator gives."""
    return CallTensors(**{name: getattr(built.arguments, name) for name in CallTensors._fields})


def assert_untouched(built: BuiltCase) -> None:
    """Nothing ran before the refusal."""
    assert built.arguments.lse is not None
    assert built.arguments.out.isnan().all() and built.arguments.lse.isnan().all(), "something ran before the refusal"


def test_a_wrong_call_is_refused_after_a_right_one() -> None:
    """Facts of calls are remembered: not the addresses, not the numbers, not whether gradients are recorded."""
    built, plan = EVERYTHING.build(), EVERYTHING.plan()
    metadata, a = metadata_of(built, plan), built.arguments
    given = {name: getattr(a, name) for name in ("window_left", "window_right", "softcap", "alibi_slopes", "out", "lse")}
    sinks = torch.nn.Parameter(torch.zeros(4))
    with torch.no_grad():
        paged_attention(*a[:6], plan=plan, metadata=metadata, sinks=sinks, **given)
    for changes, words in (
        ({"sinks": sinks}, "sinks: expected a call under torch.no_grad()"),
        ({"sinks": torch.zeros(4), "softcap": -1.0}, "softcap: expected"),
        ({"sinks": torch.zeros(4), "out": a.q}, "out: expected memory of its own"),
    ):
        with pytest.raises(ValueError, match=words):
            paged_attention(*a[:6], plan=plan, metadata=metadata, **{**given, **changes})


# Right calls that look odd.
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
    "seqused_k on another device": (lambda a: {"seqused_k": a.seqused_k.to("meta")}, "seqused_k: expected a tensor on cpu as the metadata"),
    "cu_seqlens_q on another device": (
        lambda a: {"cu_seqlens_q": a.cu_seqlens_q.to("meta")},
        "cu_seqlens_q: expected a tensor on cpu as the metadata, got meta",
    ),
    "seqused_k is int64": (lambda a: {"seqused_k": a.seqused_k.long()}, "seqused_k: expected dtype int32, got int64"),
    "cu_seqlens_q is int64": (lambda a: {"cu_seqlens_q": a.cu_seqlens_q.long()}, "cu_seqlens_q: expected dtype int32, got int64"),
    "seqused_k is strided": (lambda a: {"seqused_k": strided(a.seqused_k)}, "seqused_k: expected last stride 1, got 2"),
    "cu_seqlens_q is strided": (lambda a: {"cu_seqlens_q": strided(a.cu_seqlens_q)}, "cu_seqlens_q: expected last stride 1, got 2"),
    "cu_seqlens_q lacks its end": (lambda a: {"cu_seqlens_q": a.cu_seqlens_q[:2]}, r"cu_seqlens_q: expected shape \(3\), got \(2,\)"),
    "seqused_k is two-dimensional": (lambda a: {"seqused_k": a.seqused_k[None]}, r"seqused_k: expected shape \(any\), got \(1, 2\)"),
    "seqused_k is a list": (lambda a: {"seqused_k": [20, 33]}, "seqused_k: expected a tensor, got list"),
    "a length on the device": (lambda a: {"max_seqlen_k": a.seqused_k.max()}, "max_seqlen_k: expected a whole number .* got a Tensor"),
    "half a token": (lambda a: {"max_seqlen_q": 4.5}, "max_seqlen_q: expected a whole number as a Python int, got 4.5"),
    "a shortest query of none": (lambda a: {"min_seqlen_q": 0}, "min_seqlen_q: expected 1 to max_seqlen_q=5, got 0"),
    "a shortest query above one": (lambda a: {"min_seqlen_q": 5}, "min_seqlen_q: expected at most the shortest query, 1, got 5"),
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
    """A refused step leaves the metadata as the step before left it."""
    change, words = BAD_STEPS[what]
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
