"""The demo's model on real text: 9 query and 3 KV heads, 30 layers, through vLLM with our backend and with its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from examples.smollm2 import smollm2
from tests.engines.engine import generate, tokens, watch_operator

pytestmark = pytest.mark.engine

LICENCE = (Path(__file__).parents[2] / "LICENSE").read_text()[:1300]  # more tokens than a step takes, and two pages
MAX_TOKENS = 12
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea, there lived",
    "The three laws of thermodynamics are, in plain words:",
    f"{LICENCE}\n\nIn one sentence, this licence says that",
    f"{LICENCE}\n\nThe word that this text uses most is",
]


def test_real_prompts_give_stock_tokens() -> None:
    model = smollm2()
    with watch_operator() as calls:
        answers = generate(model, "FA4", PROMPTS, max_tokens=MAX_TOKENS)
    assert calls.count > 0 and calls.kernels == {"torch reference"}
    assert answers[-1].num_cached_tokens > 0, "the shared text was computed twice"
    assert tokens(answers) == tokens(generate(model, "CPU_ATTN", PROMPTS, max_tokens=MAX_TOKENS))
    # Wrongly converted weights (heads or rotation permuted) give equal tokens too, but not this one.
    assert "Paris" in AutoTokenizer.from_pretrained(model).decode(answers[0].token_ids)
