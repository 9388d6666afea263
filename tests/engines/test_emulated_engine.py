"""The whole engine path with a GPU's kernels: vLLM's runner, our adapter, the compiled Blackwell program, executed on the emulator.

Two prompts of different lengths, so that steps hold prefill, decode and both; bfloat16 and pages of 16, as on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.engine import generate, tokens, watch_operator
from tests.engines.tiny_models import write_llama

pytestmark = [pytest.mark.engine, pytest.mark.emulated]

PROMPTS = [list(range(2, 11)), list(range(100, 123))]
ARGUMENTS = {"max_tokens": 3, "dtype": "bfloat16", "max_num_seqs": 2, "max_model_len": 64, "max_num_batched_tokens": 16}


def test_blackwell_kernels_serve_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_llama(tmp_path)
    stock = generate(model, "CPU_ATTN", PROMPTS, **ARGUMENTS)
    monkeypatch.setenv("FA4_BACKEND_CPU", "emulate-sm100")
    with watch_operator() as calls:
        answers = generate(model, "FA4", PROMPTS, block_size=16, **ARGUMENTS)
    assert calls.kernels == {"sm100 kernels"} and calls.count > 0
    assert {1, 15} <= calls.query_lens or {1, 7} <= calls.query_lens, calls.query_lens  # decode steps and chunks of a prefill
    assert tokens(answers) == tokens(stock)
