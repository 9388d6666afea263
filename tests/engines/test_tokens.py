"""Greedy tokens through vLLM with our backend against vLLM's own CPU attention, in float32, where equal mathematics gives equal tokens.

Float32 logits of the two differ by about 1e-5; the models are random and their top logits seldom that close. A scale that is 5% off must
change tokens, or the comparison could not see a wrong kernel: that control is a test of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.engine import MAX_BATCHED_TOKENS, Answer, generate, tokens, watch_operator
from tests.engines.prompts import SHARED_PREFIX, make_prompts
from tests.engines.tiny_models import write_gemma2, write_llama
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.engine

PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma2(tmp_path_factory.mktemp("gemma2"))


@pytest.fixture(scope="module")
def stock_llama(llama: Path) -> list[Answer]:
    return stock(llama)


@pytest.fixture(scope="module")
def stock_gemma2(gemma2: Path) -> list[Answer]:
    return stock(gemma2)


def stock(model: Path) -> list[Answer]:
    """vLLM's own answers, which must vary to be worth comparing with, and must not come from our operator."""
    with watch_operator() as calls:
        answers = generate(model, "CPU_ATTN", PROMPTS)
    assert calls.count == 0
    assert all(len(set(ids)) >= 10 for ids in tokens(answers)), tokens(answers)
    assert len(set(tokens(answers))) >= len(PROMPTS) - 1
    return answers


def test_llama_tokens_equal_stock_with_chunks_and_cached_prefixes(llama: Path, stock_llama: list[Answer]) -> None:
    with watch_operator() as calls:
        answers = generate(llama, "FA4", PROMPTS)
    assert tokens(answers) == tokens(stock_llama)
    assert calls.kernels == {"torch reference"} and calls.count > 0
    assert max(calls.query_lens) <= MAX_BATCHED_TOKENS < max(map(len, PROMPTS)), "no prefill came in chunks"
    assert answers[-2].num_cached_tokens == SHARED_PREFIX, "the shared prefix was computed again"
    assert answers[-1].num_cached_tokens == 128, "the repeated prompt of 130 tokens was computed again"


@pytest.mark.slow  # engines of `test_fp8_tokens.py` and `test_emulated_engine.py` have them too
def test_llama_tokens_equal_stock_with_pages_of_16(llama: Path, stock_llama: list[Answer]) -> None:
    with watch_operator() as calls:
        answers = generate(llama, "FA4", PROMPTS, block_size=16)
    assert tokens(answers) == tokens(stock_llama)
    assert calls.count > 0 and calls.page_sizes == {16}


def test_llama_tokens_equal_stock_with_ngram_speculation(llama: Path, stock_llama: list[Answer]) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with watch_operator() as calls:
        answers = generate(llama, "FA4", PROMPTS, speculative_config=drafts)
    assert tokens(answers) == tokens(stock_llama)
    # Rows of 1 + 3 drafted tokens were verified in steps without any prefill.
    assert 4 in calls.query_lens, calls.query_lens


@pytest.mark.slow
def test_llama_tokens_equal_stock_when_torch_compiles_the_model(llama: Path, stock_llama: list[Answer]) -> None:
    """vLLM's default on a CPU: the model is traced, and our layer is one opaque operation in it."""
    with watch_operator() as calls:
        answers = generate(llama, "FA4", PROMPTS, enforce_eager=False)
    assert tokens(answers) == tokens(stock_llama)
    assert calls.count > 0


def test_gemma2_tokens_equal_stock_with_soft_cap_and_windows(gemma2: Path, stock_gemma2: list[Answer]) -> None:
    with watch_operator() as calls:
        answers = generate(gemma2, "fa4", PROMPTS)  # lower case, as users may type it
    assert tokens(answers) == tokens(stock_gemma2)
    assert calls.count > 0


@pytest.mark.parametrize("name", with_slow(["llama", "gemma2"], ["gemma2"]))
def test_a_scale_five_percent_off_changes_tokens(name: str, request: pytest.FixtureRequest) -> None:
    """The control: without it, equal tokens would say nothing about the numbers."""
    with watch_operator(scale_error=1.05) as calls:
        answers = generate(request.getfixturevalue(name), "FA4", PROMPTS)
    reference = request.getfixturevalue(f"stock_{name}")
    assert calls.count > 0
    equal = sum(a == b for a, b in zip(tokens(answers), tokens(reference), strict=True))
    assert equal <= len(PROMPTS) // 2, f"{equal} of {len(PROMPTS)} answers did not notice a wrong softmax scale"
