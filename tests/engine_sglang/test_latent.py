"""SGLang's own tests of latent attention pass for our name where SGLang asks it: decode steps and verifications, in graphs too.

Prompts are another backend's. The kit's latents are small: here 64 and a rotary part of 16, as columns of one row of q.
"""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import mla_attention as mla
from sglang.test.kits.attention_unittest.runner_modes import cuda_graph_decode_runner as decode_graphs
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as verifications

from fa4_backend import UnsupportedProblem
from fa4_integration.sglang_backend.names import NAME

LAYOUTS = ("contiguous", "shuffled_pages", "interleaved_pages")
CASES = {case.name: case for case in mla.make_mla_cases(NAME)}
DECODE = {name: case for name, case in CASES.items() if case.forward_mode.is_decode()}
SKIPS = unittest.TestCase
SIZES: dict[str, Any] = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "device": "cpu"}
# Sums of at most 80 products of numbers below 10, 2^-24 each, on both sides.
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def model(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's runner of latent attention has no model to look for layers in; its layer is planned at its first call."""
    monkeypatch.setattr(mla.MockMLAModelRunner, "model", torch.nn.Module(), raising=False)


@pytest.fixture
def calls(kit: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Keyword arguments of every call of `mla_decode` in a test, which has to make some."""
    from fa4_integration.sglang_backend import latent

    made: list[dict[str, Any]] = []
    operator = latent.mla_decode

    def count(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs)
        return operator(*args, **kwargs)

    monkeypatch.setattr(latent, "mla_decode", count)
    yield made
    assert made, "our operator did not run"


def drafts() -> Any:
    """Three draft tokens a sequence, over prefixes at and around a page's edge."""
    return mla.MLAAttentionCase("drafts", NAME, ForwardMode.TARGET_VERIFY, 4, 16, (14, 15, 16), (3, 3, 3))


def run_peaked(case: Any, layout: str = "shuffled_pages", scale_error: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Our result of a case and the kit's reference, in float32 and with 16 times the logits."""
    fixture = mla.build_mla_attention_fixture(SKIPS(), case, dtype=torch.float32, loc_layout=layout, **SIZES)
    for module in (fixture.actual_module, fixture.reference_module):
        module.q_proj.weight.mul_(16.0)
    fixture.actual_module.attn_mqa.scaling *= scale_error
    return mla.run_mla_fixture_eager(fixture), mla.expected_mla_fixture_output(fixture)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DECODE)
def test_decode_case(calls: list[dict[str, Any]], name: str, layout: str) -> None:
    mla.run_mla_attention_case(SKIPS(), DECODE[name], loc_layout=layout, **SIZES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DECODE)
def test_peaked_rows_in_float32(calls: list[dict[str, Any]], name: str, layout: str) -> None:
    torch.testing.assert_close(*run_peaked(DECODE[name], layout), **FLOAT32)


def test_a_wrong_scale_fails(calls: list[dict[str, Any]]) -> None:
    actual, expected = run_peaked(DECODE["mla_decode_page_boundary"], scale_error=1.05)
    assert not torch.allclose(actual, expected, **FLOAT32)


@pytest.mark.parametrize("page_size", (32, 64, 128))
def test_page_sizes(calls: list[dict[str, Any]], page_size: int) -> None:
    case = replace(DECODE["mla_decode_page_boundary"], page_size=page_size, prefix_lens=(page_size - 2, page_size - 1, page_size))
    mla.run_mla_attention_case(SKIPS(), case, max_context_len=4 * page_size, **SIZES)


@pytest.mark.parametrize("captured", (3, 4, 8))
def test_decode_in_a_graph(calls: list[dict[str, Any]], captured: int) -> None:
    case = DECODE["mla_decode_page_boundary"]
    decode_graphs.run_mla_cuda_graph_decode_case(SKIPS(), case, cuda_graph_capture_batch_size=captured, **SIZES)


@pytest.mark.parametrize("kind", ("eagle", "ngram"))
def test_verification(calls: list[dict[str, Any]], kind: Any) -> None:
    verifications.run_mla_eagle_verify_case(SKIPS(), drafts(), topk=1, spec_kind=kind, **SIZES)
    verifications.run_mla_eagle_verify_cuda_graph_case(SKIPS(), drafts(), topk=1, spec_kind=kind, cuda_graph_capture_batch_size=4, **SIZES)


@pytest.mark.parametrize("apart", (False, True))
def test_parts_of_q_and_k_may_come_apart(calls: list[dict[str, Any]], apart: bool) -> None:
    """As models pass them: q and k as one row of 80, or the rotary parts beside them; the step's latents are stored by the backend."""
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    fixture = mla.build_mla_attention_fixture(SKIPS(), DECODE["mla_decode_page_boundary"], dtype=torch.float32, **SIZES)
    expected = mla.run_mla_fixture_eager(fixture)
    module, batch = fixture.actual_module, fixture.forward_batch
    q, k, q_rope, k_rope = module.forward_absorb_prepare(fixture.input_hidden)
    fixture.runner.token_to_kv_pool.get_key_buffer(0)[batch.out_cache_loc] = torch.nan
    with forward_context(ForwardContext(attn_backend=fixture.backend)):
        if apart:
            out = module.attn_mqa(q, k, k, batch, q_rope=q_rope, k_rope=k_rope)
        else:
            out = module.attn_mqa(torch.cat([q, q_rope], -1).flatten(1, 2), torch.cat([k, k_rope], -1), k, batch)
    latents = torch.bmm(out.view(-1, module.num_heads, module.kv_lora_rank).transpose(0, 1), module.w_vc).transpose(0, 1)
    torch.testing.assert_close(module.o_proj(latents.flatten(1, 2)), expected, **FLOAT32)


@pytest.mark.parametrize("scaling", (None, {"beta": 0.1}), ids=("plain", "llama 4 scaling"))
def test_models_hand_over_parts(kit: Any, monkeypatch: pytest.MonkeyPatch, scaling: Any) -> None:
    """SGLang's list of backends that take q in two parts has our name, but for a model whose queries it scales only side by side."""
    from sglang.srt.models.deepseek_common import utils

    from fa4_integration.sglang_backend import latent

    names = ["fa3"]
    monkeypatch.setattr(utils, "FORWARD_ABSORB_CORE_ATTENTION_BACKENDS", names)
    for _ in range(2):
        latent.ask_for_parts(SimpleNamespace(hf_config=SimpleNamespace(llama_4_scaling=scaling)))
    assert names == (["fa3", NAME] if scaling is None else ["fa3"])
    mla.build_mla_attention_fixture(SKIPS(), DECODE["mla_decode_page_boundary"], dtype=torch.float32, **SIZES)
    assert names == ["fa3", NAME], "a backend that is made asks"


class RoundedPool(mla.MLATokenToKVPool):
    """Latents as FP8 would round them, in the model's dtype."""

    def set_mla_kv_buffer(self, layer: Any, loc_info: Any, cache_k_nope: torch.Tensor, cache_k_rope: torch.Tensor) -> None:
        rounded = [part.to(torch.float8_e4m3fn).to(part.dtype) for part in (cache_k_nope, cache_k_rope)]
        super().set_mla_kv_buffer(layer, loc_info, *rounded)


def test_latents_in_fp8(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**more: Any) -> torch.Tensor:
        case = DECODE["mla_decode_page_boundary"]
        return mla.run_mla_fixture_eager(mla.build_mla_attention_fixture(SKIPS(), case, dtype=torch.float32, **SIZES, **more))

    plain, fp8 = run(), run(fp8_kv_cache=True)
    assert {call["plan"].problem.kv_dtype for call in calls} == {"float32", "float8_e4m3fn"}
    monkeypatch.setattr(mla, "MLATokenToKVPool", RoundedPool)
    torch.testing.assert_close(fp8, run(), **FLOAT32)
    assert not torch.allclose(fp8, plain, **FLOAT32)


def test_prompts_are_refused(kit: Any) -> None:
    with pytest.raises(UnsupportedProblem, match="step of latent attention: expected decode or verification, got EXTEND"):
        mla.run_mla_attention_case(SKIPS(), CASES["mla_extend_prefix_exact_page"], **SIZES)
