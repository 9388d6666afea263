"""The whole engine path with a GPU's kernels: vLLM's runner, our adapter, the compiled Blackwell and Hopper programs on the emulator.

Two prompts of different lengths, so that steps hold prefill, decode and both; bfloat16 and pages of 16, as on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fa4_backend import compile_cache
from fa4_backend.emulator.kernels import load_emulated, load_function
from fa4_backend.kernels.loading import load_kernels
from fa4_integration.vllm_backend.metadata_builder import FA4MetadataBuilder
from tests.engines.engine import Answer, error_of, generate, tokens, watch_operator
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
    """In strict mode: whatever a step needs was compiled when the engine started."""
    monkeypatch.setenv("FA4_BACKEND_CPU", f"emulate-{chip}")
    monkeypatch.setenv("FA4_BACKEND_STRICT", "1")
    with watch_operator() as calls:
        answers = generate(model, "FA4", PROMPTS, block_size=16, **ARGUMENTS)
    assert calls.kernels == {f"{chip} kernels"} and calls.count > 0
    assert 1 in calls.query_lens and max(calls.query_lens) > 1, calls.query_lens  # decode steps, and chunks of a prefill
    assert tokens(answers) == tokens(stock)


@pytest.mark.parametrize("strict", ["1", "0"])
def test_a_step_that_needs_a_missing_kernel(strict: str, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second step finds the cache empty and asks for its kernels again: an error in strict mode, else a compile that is counted."""
    monkeypatch.setenv("FA4_BACKEND_CPU", "emulate-sm90")
    monkeypatch.setenv("FA4_BACKEND_STRICT", strict)
    monkeypatch.setattr("fa4_backend.compile_cache.num_late_compiles", 0)
    honest, steps = FA4MetadataBuilder.build, []

    def build(self: Any, *arguments: Any, **more: Any) -> Any:
        metadata = honest(self, *arguments, **more)
        steps.append(metadata)
        if len(steps) == 2:
            monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(tmp_path))
            for cached in (load_emulated, load_function):
                cached.cache_clear()
            (step,) = metadata.steps.values()
            step.kernels = load_kernels(step.plan.kernels, emulated=True)
        return metadata

    monkeypatch.setattr(FA4MetadataBuilder, "build", build)
    arguments = {**ARGUMENTS, "block_size": 16}
    if strict == "1":
        message = error_of(RuntimeError, model, "FA4", PROMPTS[:1], **arguments)
        assert "expected every compile before the end of warm-up, got one after it" in message
        assert compile_cache.num_late_compiles == 1
    else:
        generate(model, "FA4", PROMPTS[:1], **arguments)
        assert compile_cache.num_late_compiles == 3
