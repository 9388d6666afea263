"""Our MLA prefill behind vLLM's registry: its contract, its selection, and calls through it beside vLLM's own CPU formula."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import AttentionConfig, set_current_vllm_config
from vllm.model_executor.layers.attention.mla_attention import MLACommonPrefillMetadata, build_mla_chunked_context_metadata
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions, MLAPrefillBackend
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
from vllm.v1.attention.backends.mla.prefill.selector import get_mla_prefill_backend

from fa4_backend import AttentionProblem, UnsupportedProblem, ragged_attention
from fa4_backend.arguments import AttentionArguments
from fa4_backend.error_budget import Judge, judge
from fa4_backend.model_config import prompt_problems
from fa4_backend.problem import FP8, LATENT
from fa4_integration.vllm_backend import mla_prefill, plugin
from fa4_integration.vllm_backend.mla_prefill import CONTEXT_STEPS, FA4PrefillBackend, head_dims
from fa4_integration.vllm_backend.mla_prefill_selection import add_prefill_member
from tests.engines.mla_step import make_config
from tests.engines.tiny_mla_models import write_deepseek

HEADS, NOPE, ROPE, V_DIM = 4, 128, 64, 128
LAYER = {"num_heads": HEADS, "kv_lora_rank": 512, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": V_DIM}
SCALE = 0.1  # unlike the default of the operator
QUERY_LENS, CONTEXT_LENS = (5, 40, 1, 33), (70, 0, 16, 130)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    plugin.register()


def make_backend(cls: type[MLAPrefillBackend]) -> MLAPrefillBackend:
    """A builder's clone of a layer's backend, as vLLM makes it."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=512),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=128),
        device_config=SimpleNamespace(device=torch.device("cpu")),
    )
    return cls(**LAYER, scale=SCALE, vllm_config=config).clone()


def draw(num_q: int, num_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of rows; v has the strides that vLLM's projection of latents gives it."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_q, HEADS, NOPE + ROPE, generator=generator).bfloat16()
    k_nope, v = torch.randn(num_k, HEADS, NOPE + V_DIM, generator=generator).bfloat16().split([NOPE, V_DIM], dim=-1)
    k_rope = torch.randn(num_k, 1, ROPE, generator=generator).bfloat16().expand(-1, HEADS, -1)
    return q, torch.cat((k_nope, k_rope), dim=-1), v


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, is_causal: bool) -> Judge:
    arguments = AttentionArguments(q, k, v, None, cu_q, cu_k.diff(), q, None, SCALE, None, None, 0.0, None, None, cu_seqlens_k=cu_k)
    return judge(arguments, is_causal=is_causal)


def make_metadata(workspace: int = 64) -> MLACommonPrefillMetadata:
    """vLLM's description of the prefill rows of a step, its context in chunks of at most `workspace` tokens."""
    starts = torch.tensor([0, *QUERY_LENS]).cumsum(0).int()
    context = build_mla_chunked_context_metadata(
        context_lens_cpu=torch.tensor(CONTEXT_LENS, dtype=torch.int32), prefill_query_start_loc_cpu=starts,
        chunked_prefill_workspace=torch.empty(workspace, 576), chunked_prefill_workspace_size=workspace, block_size=16,
        align_chunk_to_block=True, device=torch.device("cpu"), dcp_world_size=1, dcp_local_block_size=1, dcp_virtual_block_size=1,
    )  # fmt: skip
    return MLACommonPrefillMetadata(
        block_table=torch.zeros(len(QUERY_LENS), 1, dtype=torch.int32), query_start_loc=starts, max_query_len=max(QUERY_LENS),
        chunked_context=context,
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Plans of the operator's calls that the adapter makes."""
    seen: list[Any] = []

    def watched(*args: Any, plan: Any, **kwargs: Any) -> Any:
        seen.append(plan)
        return ragged_attention(*args, plan=plan, **kwargs)

    monkeypatch.setattr(mla_prefill, "ragged_attention", watched)
    return seen


def check_new_tokens(backend: MLAPrefillBackend) -> None:
    """A step's own tokens through a backend, against the oracle."""
    metadata = make_metadata()
    q, k, v = draw(sum(QUERY_LENS), sum(QUERY_LENS))
    backend.prepare_metadata(metadata)
    out, lse = backend.run_prefill_new_tokens(q, k, v, return_softmax_lse=True)
    want = oracle(q, k, v, metadata.query_start_loc, metadata.query_start_loc, is_causal=True)
    assert out.shape == v.shape and lse.shape == (HEADS, len(q)) and lse.dtype == torch.float32
    assert (out.float() - want.out).abs().max() <= want.out_budget
    assert (lse - want.lse).abs().max() <= want.lse_budget


@pytest.mark.parametrize("cls", [FA4PrefillBackend, CPUSDPAMLAPrefillBackend])
def test_new_tokens(cls: type[MLAPrefillBackend], calls: list[Any]) -> None:
    """Ours and vLLM's formula are as far from the oracle as rounding allows, lse and all."""
    check_new_tokens(make_backend(cls))
    assert len(calls) == (cls is FA4PrefillBackend)
    assert all(plan.problem.kv_source == "ragged" and plan.problem.mask.is_causal for plan in calls)


def test_fa4_plan_and_compile_know_the_same_problems() -> None:
    """Of the model's configuration, before any engine is there."""
    backend = make_backend(FA4PrefillBackend)
    decode = AttentionProblem(HEADS, 1, 512 + ROPE, 512, "bfloat16", 64, "cpu", kv_source=LATENT, kv_dtype=FP8)
    planned = {problem.mask.is_causal: problem for problem in prompt_problems(decode, NOPE + ROPE, V_DIM)}
    assert {is_causal: step.plan.problem for is_causal, (step, *_) in backend.steps.items()} == planned


def test_out_is_written_in_place() -> None:
    backend, metadata = make_backend(FA4PrefillBackend), make_metadata()
    q, k, v = draw(sum(QUERY_LENS), sum(QUERY_LENS))
    backend.prepare_metadata(metadata)
    assert backend.supports_out()
    given = torch.full(v.shape, torch.nan, dtype=q.dtype)
    assert backend.run_prefill_new_tokens(q, k, v, False, out=given) is given
    assert torch.equal(given, backend.run_prefill_new_tokens(q, k, v, return_softmax_lse=False))
    with pytest.raises(UnsupportedProblem, match="output quantisation: expected none"):
        backend.run_prefill_new_tokens(q, k, v, False, output_scale=torch.ones(1))


@pytest.mark.parametrize("cls", [FA4PrefillBackend, CPUSDPAMLAPrefillBackend])
def test_chunks_of_context(cls: type[MLAPrefillBackend], calls: list[Any]) -> None:
    """Two layers over all chunks of a step, more chunks than there is metadata for; one row's context is cut between chunks."""
    backend, metadata = make_backend(cls), make_metadata()
    backend.prepare_metadata(metadata)
    assert metadata.chunked_context is not None
    chunks = metadata.chunked_context.chunks
    assert len(chunks) > CONTEXT_STEPS and any(chunk.is_continuation for chunk in chunks)
    for layer in range(2):
        q, _, _ = draw(sum(QUERY_LENS), 1, seed=layer)
        for chunk in chunks:
            rows = q[chunk.token_slice]
            _, k, v = draw(1, chunk.num_context_tokens, seed=10 * layer + chunk.index)
            out, lse = backend.run_prefill_context_chunk(chunk, rows, k, v)
            want = oracle(rows, k, v, chunk.query_start_loc - chunk.query_start_loc[0], chunk.cu_seq_lens, is_causal=False)
            assert (out.float() - want.out).abs().max() <= want.out_budget
            assert (lse - want.lse).abs().max() <= want.lse_budget
    assert len(calls) == (2 * len(chunks) if cls is FA4PrefillBackend else 0)
    assert not any(plan.problem.mask.is_causal for plan in calls)


def test_lengths_are_taken_over_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many chunks as there is metadata for: no layer but the first makes a schedule."""
    backend, metadata = make_backend(FA4PrefillBackend), make_metadata(workspace=160)
    assert metadata.chunked_context is not None
    chunks = metadata.chunked_context.chunks
    assert len(chunks) == CONTEXT_STEPS
    refreshed: list[bool] = []
    stock = FA4PrefillBackend._refresh
    monkeypatch.setattr(
        FA4PrefillBackend, "_refresh", lambda self, step, *a: (refreshed.append(step.plan.problem.mask.is_causal), stock(self, step, *a))
    )
    for _ in range(2):
        metadata = make_metadata(workspace=160)
        assert metadata.chunked_context is not None
        refreshed.clear()
        backend.prepare_metadata(metadata)
        for _ in range(3):
            q, k, v = draw(sum(QUERY_LENS), sum(QUERY_LENS))
            backend.run_prefill_new_tokens(q, k, v, return_softmax_lse=True)
            for chunk in metadata.chunked_context.chunks:
                _, k, v = draw(1, chunk.num_context_tokens)
                backend.run_prefill_context_chunk(chunk, q[chunk.token_slice], k, v)
        assert refreshed == [True, False, False]


def test_a_planted_error_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        mla_prefill,
        "ragged_attention",
        lambda *a, softmax_scale, **values: ragged_attention(*a, softmax_scale=1.05 * softmax_scale, **values),
    )
    with pytest.raises(AssertionError):
        check_new_tokens(make_backend(FA4PrefillBackend))


def test_it_answers_all_that_vllm_asks() -> None:
    """Every abstract method, and every parameter of the base class by its name."""
    assert not FA4PrefillBackend.__abstractmethods__
    for name, method in inspect.getmembers(MLAPrefillBackend, inspect.isfunction):
        if not name.startswith("__"):
            asked, taken = (list(inspect.signature(x).parameters) for x in (method, getattr(FA4PrefillBackend, name)))
            assert asked == taken, name
    assert MLAPrefillBackendEnum["FA4"].get_class() is FA4PrefillBackend and FA4PrefillBackend.get_name() == "FA4"
    assert FA4PrefillBackend.supports_dtype(torch.bfloat16) and not FA4PrefillBackend.supports_dtype(torch.float64)
    served = MLADimensions(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    assert FA4PrefillBackend.supports_mla_dimensions(served) and head_dims(served) == {"head_dim": 192, "head_dim_v": 128}
    assert not FA4PrefillBackend.supports_mla_dimensions(MLADimensions(qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=5))


def test_the_member_survives_a_spawned_process() -> None:
    """vLLM unpickles its configuration before it loads plugins."""
    plugin.register()
    assert list(MLAPrefillBackendEnum.__members__).count("FA4") == 1
    config = AttentionConfig(mla_prefill_backend="fa4")  # type: ignore[arg-type]  # vLLM's validator takes the name
    assert config.mla_prefill_backend is add_prefill_member()
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).mla_prefill_backend.get_class().__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code, pickle.dumps(config).hex()], env=dict(os.environ), text=True, capture_output=True, timeout=900
    )
    assert done.stdout.strip().splitlines()[-1:] == ["FA4PrefillBackend"], done.stderr[-2000:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek(tmp_path_factory.mktemp("deepseek"))


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ({}, True),
        ({"attention_backend": "CPU_MLA"}, False),
        ({"attention_backend": "CPU_MLA", "attention_config": {"mla_prefill_backend": "FA4"}}, True),
        ({"attention_config": {"mla_prefill_backend": "CPU"}}, False),
    ],
)
def test_which_prefill_an_engine_takes(arguments: dict[str, Any], ours: bool, model: Path) -> None:
    """With FA4 as the backend ours unless another is named; else only where it is named. vLLM remembers answers from engine to engine."""
    if "attention_backend" in arguments and "attention_config" in arguments:
        arguments = {
            "attention_config": {**arguments["attention_config"], "backend": arguments["attention_backend"]},
            "attention_backend": None,
        }
    config = make_config(model, **arguments)
    with set_current_vllm_config(config):
        assert (get_mla_prefill_backend(config) is FA4PrefillBackend) == ours
