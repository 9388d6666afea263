"""Every wrong call is refused before anything runs, with what was expected and what it got."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fa4_backend import paged_attention
from fa4_backend.plan import AttentionPlan
from fa4_backend.problem import FP8
from fa4_backend.validation import check_tensors
from tests.support.calls import CASE, EVERYTHING, WRONG_LENGTHS, assert_untouched, call, call_with_everything, metadata_of, tensors_of


def on_meta(name: str) -> tuple[Callable, tuple[str, ...]]:
    """A tensor of another device."""
    return (lambda a: {name: getattr(a, name).to("meta")}), (f"{name}: expected a ", "cpu", "got meta")


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
    **{f"{name} is on another device": on_meta(name) for name in ("q", "k_cache", "v_cache", "out", "lse")},
    "k_cache has no page": (lambda a: {"k_cache": a.k_cache[:0], "v_cache": a.v_cache[:0]}, ("k_cache: expected at least one page",)),
    "k_cache is of another dtype than q": (lambda a: {"k_cache": a.k_cache.half()}, ("k_cache: expected dtype bfloat16", "got float16")),
    "q is an array": (lambda a: {"q": np.zeros((9, 4, 64))}, ("q: expected a tensor, got ndarray",)),
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


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_wrong_tensor(what: str) -> None:
    change, words = BAD_TENSORS[what]
    built = CASE.build()
    with pytest.raises(ValueError) as caught:
        call(built, CASE.plan(), **change(built.arguments))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_untouched(built)


@pytest.mark.parametrize("name", ["page_table", "cu_seqlens_q", "seqused_k"])
@pytest.mark.parametrize("what", WRONG_LENGTHS)
def test_wrong_lengths(what: str, name: str) -> None:
    change, words = WRONG_LENGTHS[what]
    built = CASE.build()
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        call(built, CASE.plan(), **{name: change(getattr(built.arguments, name))})
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
