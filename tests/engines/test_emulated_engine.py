"""The whole engine path with a GPU's kernels: vLLM's runner, our adapter, the compiled Blackwell and Hopper programs on the emulator.

Two prompts of different lengths, so that steps hold prefill, decode and both; bfloat16 and pages of 16, as on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.engine import Answer, generate, tokens, watch_operator
from tests.engines.tiny_models import write_llama

pytestmark = [pytest.mark.engine, pytest.mark.emulated]

PROMPTS = [list(range(2, 11)), list(range(100, 123))]
ARGUMENTS = {"max_tokens": 3, "dtype": "bfloat16", "max_num_seqs": 2, "max_model_len": 64, "max_num_batched_tokens": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def stock(model: Path) -> list[Answer]:
    return generate(model, "CPU_ATTN", PROMPTS, **ARGUMENTS)


@pytest.mark.parametrize("chip", ["sm100", "sm90"])
def test_gpu_kernels_serve_a_model(chip: str, model: Path, stock: list[Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_BACKEND_CPU", f"emulate-{chip}")
    with watch_operator() as calls:
        answers = generate(model, "FA4", PROMPTS, block_size=16, **ARGUMENTS)
    assert calls.kernels == {f"{chip} kernels"} and calls.count > 0
    assert 1 in calls.query_lens and max(calls.query_lens) > 1, calls.query_lens  # decode steps, and chunks of a prefill
    assert tokens(answers) == tokens(stock)
