"""Greedy tokens of a model with MLA through vLLM on our decode of latents, against vLLM's own CPU_MLA, in float32; FP8 latents too.

Prefill is ours where decode is (`test_mla_prefill.py`), else vLLM's. On a CPU vLLM serves MLA without chunks of a prompt and without
cached prefixes, so these are off here whatever the machine: one with AMX would have them, by kernels of its own. A scale that is 5 % off
must change tokens: the control.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fa4_backend import mla_decode
from fa4_backend.problem import FP8
from fa4_integration.vllm_backend.kv_cache import quantise, write_latents
from tests.engines.engine import Answer, OperatorCalls, generate, tokens, watch_operator
from tests.engines.prompts import make_prompts
from tests.engines.tiny_mla_models import write_deepseek

pytestmark = pytest.mark.engine

# 5 to 511 tokens, and a pattern that drafts hit.
PROMPTS = [make_prompts()[index] for index in (0, 1, 3, 5, 7)]
ARGUMENTS = {
    "max_tokens": 16,
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 1024,
    # vLLM 0.32's rotary operator for CPUs is wrong on DeepSeek's views of q and of the latents: rows but the first get others' values, so
    # that an answer depends on the batch. Its form in torch is right.
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SCALE = 2.0**-8  # of FP8 latents: values above 1.75 are saturated


@contextmanager
def watch_latents(scale_error: float = 1.0, latent_scale_error: float = 1.0, fp8_scale: float | None = None) -> Iterator[OperatorCalls]:
    """Record the calls of the adapter of MLA layers.

    Args:
        scale_error, latent_scale_error: what the softmax scale and the scale of FP8 latents are multiplied by: planted faults.
        fp8_scale: what stands in for a checkpoint's scale of latents, in the layer, at each write and read.
    """
    calls = OperatorCalls()

    def watched(*args: Any, plan: Any, metadata: Any, softmax_scale: float, latent_scale: Any, **kwargs: Any) -> Any:
        calls.count += 1
        calls.query_lens.add(metadata.bounds.max_seqlen_q)
        calls.kernels.add(plan.describe().removeprefix("FA4: ").partition(" on ")[0])
        calls.page_sizes.add(plan.problem.page_size)
        calls.kv_dtypes.add((plan.problem.kv_dtype, 0 if latent_scale is None else latent_scale.numel()))
        if latent_scale is not None:
            latent_scale = torch.tensor((1.0 if fp8_scale is None else fp8_scale) * latent_scale_error)
        return mla_decode(
            *args, plan=plan, metadata=metadata, softmax_scale=softmax_scale * scale_error, latent_scale=latent_scale, **kwargs
        )

    def write(kv_c: Any, k_pe: Any, cache: Any, slots: Any, kv_cache_dtype: str, scale: torch.Tensor) -> None:
        write_latents(kv_c, k_pe, cache, slots, kv_cache_dtype, scale if fp8_scale is None else torch.tensor(fp8_scale))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fa4_integration.vllm_backend.mla_impl.mla_decode", watched)
        patch.setattr("fa4_integration.vllm_backend.mla_impl.write_latents", write)
        yield calls


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek(tmp_path_factory.mktemp("deepseek"), q_lora_rank=64)


@pytest.fixture(scope="module")
def stock(deepseek: Path) -> list[Answer]:
    """vLLM's own answers, which must vary to be worth comparing with, and must not come from our operator."""
    return stock_answers(deepseek)


def stock_answers(model: Path) -> list[Answer]:
    with watch_latents() as calls:
        answers = generate(model, "CPU_MLA", PROMPTS, **ARGUMENTS)
    assert calls.count == 0
    assert all(len(set(ids)) >= 8 for ids in tokens(answers)), tokens(answers)
    assert len(set(tokens(answers))) == len(PROMPTS)
    return answers


def test_tokens_equal_stock(deepseek: Path, stock: list[Answer]) -> None:
    with watch_operator() as of_heads, watch_latents() as calls:
        answers = generate(deepseek, "FA4", PROMPTS, **ARGUMENTS)
    assert tokens(answers) == tokens(stock)
    assert calls.kernels == {"torch reference"} and calls.count >= 2 * 15 and calls.query_lens == {1}
    assert of_heads.count == 0


def test_queries_that_are_projected_in_one_step(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite's form."""
    model = write_deepseek(tmp_path, num_heads=8)
    want = stock_answers(model)
    with watch_latents() as calls:
        assert tokens(generate(model, "FA4_MLA", PROMPTS, **ARGUMENTS)) == tokens(want)
    assert calls.count > 0


def test_tokens_equal_stock_with_ngram_speculation(deepseek: Path, stock: list[Answer]) -> None:
    with watch_latents() as calls:
        answers = generate(deepseek, "FA4", PROMPTS, speculative_config=DRAFTS, **ARGUMENTS)
    assert tokens(answers) == tokens(stock)
    assert 4 in calls.query_lens, calls.query_lens


def test_a_wrong_scale_changes_tokens(deepseek: Path, stock: list[Answer]) -> None:
    """The control: what these comparisons would not see, they would not prove."""
    with watch_latents(scale_error=1.05) as calls:
        answers = generate(deepseek, "FA4", PROMPTS, **ARGUMENTS)
    assert calls.count > 0
    assert tokens(answers) != tokens(stock)


@pytest.fixture(scope="module")
def rounded(deepseek: Path) -> list[Answer]:
    """An engine whose float32 cache gets e4m3 values times their scale, a power of two: the arithmetic of FP8 latents, bit for bit."""

    def write_rounded(kv_c: Any, k_pe: Any, cache: Any, slots: Any, kv_cache_dtype: str, scale: torch.Tensor) -> None:
        kv_c, k_pe = (quantise(new.flatten(1), torch.tensor(SCALE)).float().mul(SCALE).view(new.shape) for new in (kv_c, k_pe))
        write_latents(kv_c, k_pe, cache, slots, kv_cache_dtype, scale)

    with watch_latents() as calls, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fa4_integration.vllm_backend.mla_impl.write_latents", write_rounded)
        answers = generate(deepseek, "FA4", PROMPTS, **ARGUMENTS)
    assert calls.kv_dtypes == {("float32", 0)}
    return answers


@pytest.mark.parametrize("error", [1.0, 1.05])
def test_fp8_latents(error: float, deepseek: Path, rounded: list[Answer], stock: list[Answer]) -> None:
    """Equal to the rounded values of a wide cache; other tokens than without rounding, and than with a scale that is off."""
    with watch_latents(fp8_scale=SCALE, latent_scale_error=error) as calls:
        answers = generate(deepseek, "FA4", PROMPTS, kv_cache_dtype="fp8", **ARGUMENTS)
    assert calls.kv_dtypes == {(FP8, 1)} and calls.count > 0
    assert (tokens(answers) == tokens(rounded)) == (error == 1.0)
    assert tokens(rounded) != tokens(stock)
