"""transformers' `generate()` and continuous batching on `attn_implementation="fa4_flash"` give the tokens of its eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import smollm2
from fa4_backend import UnsupportedProblem
from fa4_integration import transformers_attention
from fa4_integration.transformers_attention import NAME
from tests.engines.tiny_models import write_gemma2, write_llama

pytestmark = pytest.mark.engine

TEXTS = ["The capital of France is", "Once upon a time, in a small village by the sea, there lived"]
# Prompts of one and of several pages, beyond the window of the Gemma model (64).
PROMPTS = [[5 + index % 7 for index in range(150)], [17, 3, 90], list(range(100, 133))]
NEW_TOKENS = 20


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Keyword arguments of every call of our operator in a test, which has to make some."""
    made: list[dict[str, Any]] = []
    operator = transformers_attention.paged_attention

    def count(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs)
        return operator(*args, **kwargs)

    monkeypatch.setattr(transformers_attention, "paged_attention", count)
    transformers_attention.register()
    transformers_attention.register()
    yield made
    assert made, "our operator did not run"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma2(tmp_path_factory.mktemp("gemma2") / "model")


def load(folder: Path, implementation: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation).eval()


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch with its padding at the left, as generate() wants it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generate(folder: Path, implementation: str, prompts: list[list[int]] = PROMPTS, **more: Any) -> list[list[int]]:
    """Greedy tokens after the prompts."""
    batch = padded(prompts)
    with torch.no_grad():
        ids = load(folder, implementation).generate(**batch, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, **more)
    return ids[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.slow  # the tiny models' tokens are compared below, this model's in `test_smollm2.py`
def test_smollm2(calls: list[dict[str, Any]]) -> None:
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenizer(TEXTS)["input_ids"]
    ours = generate(folder, NAME, prompts)
    assert ours == generate(folder, "eager", prompts)
    assert "Paris" in tokenizer.decode(ours[0])


@pytest.mark.parametrize("prompts", (PROMPTS, PROMPTS[:1]), ids=("padded", "one"))
def test_tokens(calls: list[dict[str, Any]], llama: Path, prompts: list[list[int]]) -> None:
    ours = generate(llama, NAME, prompts)
    assert all(len(set(tokens)) > NEW_TOKENS // 3 for tokens in ours), "a model that repeats itself proves nothing"
    assert ours == generate(llama, "eager", prompts)


def test_window_and_soft_cap(calls: list[dict[str, Any]], gemma2: Path) -> None:
    assert generate(gemma2, NAME) == generate(gemma2, "eager")
    assert {call["window_left"] for call in calls} == {63, None} and {call["softcap"] for call in calls} == {5.0}


def test_cache_of_fixed_size(calls: list[dict[str, Any]], llama: Path) -> None:
    assert generate(llama, NAME, cache_implementation="static", disable_compile=True) == generate(llama, "eager")


def test_a_wrong_scale_changes_tokens(calls: list[dict[str, Any]], llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = transformers_attention.paged_attention

    def wrong(*args: Any, softmax_scale: float, **kwargs: Any) -> Any:
        return operator(*args, softmax_scale=1.05 * softmax_scale, **kwargs)

    monkeypatch.setattr(transformers_attention, "paged_attention", wrong)
    assert generate(llama, NAME) != generate(llama, "eager")


def test_continuous_batching(calls: list[dict[str, Any]], llama: Path) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load(llama, NAME)
    sampling = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, block_size=32)
    answers = model.generate_batch(PROMPTS, generation_config=sampling, continuous_batching_config=settings)
    ours = [answers[key].generated_tokens for key in sorted(answers, key=lambda key: int(key.split("_")[-1]))]
    assert ours == [generate(llama, "eager", [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize(("argument", "value"), (("dropout", 0.1), ("output_attentions", True), ("block_table", torch.zeros(1, 1))))
def test_what_is_not_there_is_refused(argument: str, value: Any) -> None:
    q = torch.zeros(1, 2, 4, 64)
    with pytest.raises(UnsupportedProblem, match=r"got one"):
        transformers_attention.attend(torch.nn.Module(), q, q, q, None, **{argument: value})


def test_pages_of_a_ragged_batch() -> None:
    """Sequences below, at and above a page, an empty one, and tokens past the last that belong to none."""
    bounds = torch.tensor([0, 15, 15, 31, 48], dtype=torch.int32)
    batch = transformers_attention.Ragged(torch.empty(0), torch.empty(50, 1, 8), torch.empty(0), bounds, bounds, 17, 17, None)
    slots, table, num_pages = transformers_attention.place_in_pages(batch)
    page_of = [0] * 15 + [1] * 16 + [2] * 16 + [3]
    assert (slots[:48] // 16).tolist() == page_of
    assert (slots[:48] % 16).tolist() == [*range(15), *range(16), *range(16), 0]
    assert table.tolist() == [[0, 1], [1, 2], [1, 2], [2, 3]]
    assert set(slots[48:].tolist()) == {(num_pages - 1) * 16} and num_pages - 1 > 3
