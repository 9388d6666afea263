"""Greedy tokens of engines with K and V in FP8, against the same engine whose 16- or 32-bit cache gets the rounded values.

Scales are powers of two, so that what is stored times its scale is exact in every dtype: both engines do the same arithmetic, bit for bit,
in steps of the same tokens. A scale that is off must change tokens: the control.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fa4_backend.problem import FP8
from fa4_integration.vllm_backend.impl import FA4Impl
from fa4_integration.vllm_backend.kv_cache import quantise, write_kv
from tests.engines.engine import MAX_BATCHED_TOKENS, Answer, OperatorCalls, generate, tokens, watch_operator
from tests.engines.prompts import SHARED_PREFIX, make_prompts
from tests.engines.tiny_models import write_gemma2, write_llama
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.engine

# 17 to 300 tokens, a pattern that drafts hit, a prefix shared with another.
PROMPTS = [make_prompts()[index] for index in (1, 3, 4, 7, 8)]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# K's largest values are about 4: the scales of layer 0 saturate none, those of layer 1 some.
SCALES = {"of_a_tensor": [(2.0**-5,), (2.0**-8,)], "of_heads": [(2.0**-5, 2.0**-3), (2.0**-8, 2.0**-6)]}


def serve(model: Path, kv_scale_error: float = 1.0, **engine_args: Any) -> tuple[list[Answer], OperatorCalls]:
    """Answers that vary, and the calls of our operator that made them."""
    with watch_operator(kv_scale_error=kv_scale_error) as calls:
        answers = generate(model, "FA4", PROMPTS, max_tokens=16, **engine_args)
    assert all(len(set(ids)) >= 6 for ids in tokens(answers)), tokens(answers)
    assert calls.count > 0 and calls.kernels == {"torch reference"}
    return answers, calls


def serve_rounded(monkeypatch: pytest.MonkeyPatch, model: Path, is_rounded: Callable[[Any], bool], **engine_args: Any) -> list[Answer]:
    """With a cache of the model's dtype, into which the layers that `is_rounded` picks write e4m3 values times their scale."""

    def write_rounded(layer: Any, key: torch.Tensor, value: torch.Tensor, *arguments: Any) -> None:
        if is_rounded(layer):
            key, value = (
                quantise(new, scale).to(new.dtype) * scale.to(new.dtype).view(-1, 1)
                for new, scale in ((key, layer._k_scale), (value, layer._v_scale))
            )
        write_kv(layer, key, value, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("fa4_integration.vllm_backend.impl.write_kv", write_rounded)
        answers, calls = serve(model, **engine_args)
    assert {num_scales for _, num_scales in calls.kv_dtypes} == {0}
    return answers


def any_layer(layer: Any) -> bool:
    return True


def test_chunks_cached_prefixes_and_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--kv-cache-dtype fp8` for a checkpoint without scales."""
    model, arguments = write_llama(tmp_path), {"block_size": 16, "speculative_config": DRAFTS}
    answers, calls = serve(model, kv_cache_dtype="fp8", **arguments)
    assert calls.kv_dtypes == {(FP8, 1)}
    assert 4 in calls.query_lens, "no draft was verified"
    assert max(calls.query_lens) <= MAX_BATCHED_TOKENS < max(map(len, PROMPTS)), "no prefill came in chunks"
    assert answers[-1].num_cached_tokens == SHARED_PREFIX
    assert tokens(answers) == tokens(serve_rounded(monkeypatch, model, any_layer, **arguments))
    assert tokens(answers) != tokens(serve(model, **arguments)[0]), "rounding changes nothing: this test would not see it"


def test_queries_that_vllm_quantises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`FA4_BACKEND_FP8_QUERY=1`: decode rows, chunks and drafts, against the same engine whose layers round the queries they are given."""
    model, arguments = write_llama(tmp_path), {"block_size": 16, "speculative_config": DRAFTS, "kv_cache_dtype": "fp8"}

    moved = []

    def forward_rounded(impl: FA4Impl, layer: Any, query: torch.Tensor, *tensors: Any, **values: Any) -> torch.Tensor:
        rounded = quantise(query, layer._q_scale).to(query.dtype)
        moved.append(not torch.equal(rounded, query))
        return forward(impl, layer, rounded, *tensors, **values)

    forward = FA4Impl.forward
    with monkeypatch.context() as patch:
        patch.setattr(FA4Impl, "forward", forward_rounded)
        rounded, calls = serve(model, **arguments)
    assert calls.q_dtypes == {"float32"}
    monkeypatch.setenv("FA4_BACKEND_FP8_QUERY", "1")
    answers, calls = serve(model, **arguments)
    assert calls.q_dtypes == {FP8} and {1, 4} <= calls.query_lens
    assert all(moved) and tokens(answers) == tokens(rounded)


# Scales of a tensor are those of `test_skipped_layers_of_one_kind` too.
@pytest.mark.parametrize("scales", with_slow(SCALES, ["of_a_tensor"]))
def test_a_checkpoint_that_declares_fp8(scales: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes it, with the checkpoint's scales; a dtype that the user names is another choice."""
    model = write_llama(tmp_path, SCALES[scales])
    answers, calls = serve(model, dtype="bfloat16")
    assert calls.kv_dtypes == {(FP8, len(SCALES[scales][0]))}
    assert tokens(answers) == tokens(serve_rounded(monkeypatch, model, any_layer, dtype="bfloat16", kv_cache_dtype="bfloat16"))
    if scales != "of_heads":  # where scales are read is one place; that they count has to be seen once
        return
    others, _ = serve(model, kv_scale_error=1.05, dtype="bfloat16")
    assert sum(a == b for a, b in zip(tokens(others), tokens(answers), strict=True)) <= len(PROMPTS) // 2, "5% went unnoticed"


def test_skipped_layers_of_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 stays as it is, layer 1 is FP8: pages of one group that differ in bytes."""
    model = write_llama(tmp_path, SCALES["of_a_tensor"])
    arguments = {"dtype": "bfloat16", "enable_prefix_caching": False}
    answers, calls = serve(model, block_size=16, kv_cache_dtype_skip_layers=["0"], **arguments)
    assert calls.kv_dtypes == {(FP8, 1), ("bfloat16", 0)}
    want = serve_rounded(monkeypatch, model, lambda layer: ".1." in layer.layer_name, kv_cache_dtype="bfloat16", **arguments)
    assert tokens(answers) == tokens(want)


def test_skipped_layers_with_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma-2: layers with windows keep the model's dtype, in a group of their own with pages of another length."""
    model, arguments = write_gemma2(tmp_path), {"enable_prefix_caching": False}
    answers, calls = serve(model, block_size=16, kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=["sliding_window"], **arguments)
    assert calls.kv_dtypes == {(FP8, 1), ("float32", 0)} and len(calls.page_sizes) == 2
    assert tokens(answers) == tokens(serve_rounded(monkeypatch, model, lambda layer: layer.sliding_window is None, **arguments))
