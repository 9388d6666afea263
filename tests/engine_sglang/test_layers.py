"""What a model passes to its layers: sinks, soft cap, and what no problem describes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as dense
from torch import nn

from fa4_backend import UnsupportedProblem
from fa4_integration.sglang_backend import backend
from fa4_integration.sglang_backend.batch import describe_step
from fa4_integration.sglang_backend.limits import batch_limits
from fa4_integration.sglang_backend.names import NAME
from fa4_integration.sglang_backend.page_tables import TokenSlots
from fa4_integration.sglang_backend.steps import attention_layers
from tests.engine_sglang.test_kit import CASES, FLOAT32, SKIPS, WINDOW_CASES

CAP = 0.5  # the kit's logits are of this size


@pytest.fixture(params=["mha_extend_ragged_page_boundary", "gqa_decode_page_boundary"])
def fixture(request: pytest.FixtureRequest, kit: Any) -> Any:
    return kit.build_dense_attention_fixture(SKIPS(), CASES[request.param], device="cpu", dtype=torch.float32)


def run(fixture: Any, **arguments: Any) -> torch.Tensor:
    """The layer of a fixture, with arguments as a model gives them."""
    module, batch = fixture.actual_module, fixture.forward_batch
    with forward_context(ForwardContext(attn_backend=fixture.backend)):
        fixture.backend.init_forward_metadata(batch)
        return module.o_proj(module.attn(*module.project_qkv(fixture.input_hidden), batch, **arguments))


def expected(fixture: Any, monkeypatch: pytest.MonkeyPatch, change: Any) -> torch.Tensor:
    """The kit's reference with other weights: `change` makes them of the logits, (num_q_heads, keys) float32."""
    monkeypatch.setattr(dense, "torch", SimpleNamespace(**{**vars(torch), "softmax": lambda logits, dim: change(logits)}))
    result = dense.expected_dense_fixture_output(fixture)
    monkeypatch.setattr(dense, "torch", torch)
    return result


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_sinks(fixture: Any, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype)

    def with_sinks(logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits, sinks.float()[:, None]], dim=1).softmax(dim=1)[:, :-1]

    torch.testing.assert_close(run(fixture, sinks=sinks), expected(fixture, monkeypatch, with_sinks), **FLOAT32)
    assert calls[-1]["sinks"] is sinks and calls[-1]["plan"].problem.sinks_dtype == str(dtype).removeprefix("torch.")
    assert not torch.allclose(run(fixture), expected(fixture, monkeypatch, with_sinks), **FLOAT32)


def test_soft_cap(fixture: Any, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def capped(logits: torch.Tensor) -> torch.Tensor:
        return (CAP * torch.tanh(logits / CAP)).softmax(dim=1)

    assert not torch.allclose(run(fixture), expected(fixture, monkeypatch, capped), **FLOAT32)
    fixture.actual_module.attn.logit_cap = CAP
    fixture.backend.steps.by_layer.clear()
    torch.testing.assert_close(run(fixture), expected(fixture, monkeypatch, capped), **FLOAT32)


def test_output_that_sglang_has_made(fixture: Any, calls: list[dict[str, Any]]) -> None:
    """SGLang offers a buffer to a breaking prefill graph; what is written there need not be copied."""
    plain = run(fixture)
    fixture.forward_batch._attn_output = torch.full((fixture.input_hidden.shape[0], 64), torch.nan)
    torch.testing.assert_close(run(fixture), plain, rtol=0, atol=0)
    assert calls[-1]["out"].data_ptr() == fixture.forward_batch._attn_output.data_ptr()


def test_keys_that_are_there_already(fixture: Any, calls: list[dict[str, Any]]) -> None:
    """Models that write K with the rotary embedding, or read another layer's, pass `save_kv_cache=False` or no K and V."""
    plain, pool = run(fixture), fixture.runner.token_to_kv_pool
    before = pool.k_buffer[0].clone()
    torch.testing.assert_close(run(fixture, save_kv_cache=False), plain, rtol=0, atol=0)
    torch.testing.assert_close(pool.k_buffer[0], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ("q_rope", "score_mod", "rel_bias", "return_lse"))
def test_unknown_arguments_are_refused(fixture: Any, name: str) -> None:
    with pytest.raises(UnsupportedProblem, match=f"{name} in layer 0: expected none, got a value"):
        run(fixture, **{name: torch.ones(1)})


def test_a_models_layers_are_planned_at_start(kit: Any) -> None:
    """Whatever an owner calls its sinks; windows of two widths are two plans, equal layers one."""

    def owner(layer_id: int, window: int, **sinks: torch.Tensor) -> nn.Module:
        module = nn.Module()
        module.attn = RadixAttention(4, 16, 0.25, 2, layer_id, sliding_window_size=window)
        for name, tensor in sinks.items():
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        return module

    ones = torch.ones(4, dtype=torch.bfloat16)
    layers = [owner(0, -1), owner(1, 4), owner(2, 8), owner(3, 8), owner(4, -1, sinks=ones), owner(5, 4, attention_sink_bias=ones)]
    model = nn.Sequential(*layers)
    assert [(layer.layer_id, dtype) for layer, dtype in attention_layers(model)] == [
        *((index, None) for index in range(4)),
        (4, torch.bfloat16),
        (5, torch.bfloat16),
    ]
    steps = kit.build_dense_attention_fixture(SKIPS(), next(iter(WINDOW_CASES.values())), device="cpu").backend.steps
    steps.plan_model(model)
    assert len(steps.by_kind) == 5 and len(steps.by_layer) == 6
    assert sorted(step.window_left for step in steps.by_kind.values() if step.window_left is not None) == [4, 4, 8]


def test_limits_of_a_runner(fixture: Any) -> None:
    limits, table = fixture.backend.steps.limits, fixture.runner.req_to_token_pool.req_to_token
    assert limits.max_seqlen_k == table.shape[1]
    assert limits.max_num_seqs >= fixture.runner.req_to_token_pool.size
    assert limits.max_num_tokens >= table.shape[1] + limits.max_num_seqs


def test_no_room_where_prompts_are_another_backends(fixture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {}
    for prompts in (NAME, "triton"):
        monkeypatch.setattr(fixture.runner, "prefill_attention_backend_str", prompts, raising=False)
        keys[prompts] = batch_limits(fixture.runner, 0).convert_keys
    assert keys[NAME] > 0 == keys["triton"]


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"runner": {"use_mla_backend": True}}, "model: expected multi-head or grouped-query attention, got MLA"),
        ({"runner": {"prefill_aware_swa": True}}, "windows: expected the same in decode as in prefill"),
        ({"runner": {"kv_cache_dtype_str": "fp4_e2m1"}}, "--kv-cache-dtype: expected .*, got fp4_e2m1"),
        ({"get_parallel": {"attn_dcp_size": 2, "attn_cp_size": 1}}, "decode context parallelism: expected a size of 1, got 2"),
        ({"get_parallel": {"attn_dcp_size": 1, "attn_cp_size": 2}}, "prefill context parallelism: expected a size of 1, got 2"),
        ({"get_schedule": {"prefill_only_disable_kv_cache": True}}, "--prefill-only-disable-kv-cache: expected not given"),
        ({"get_spec": {"speculative_eagle_topk": 4, "speculative_algorithm": "EAGLE"}}, "--speculative-eagle-topk: expected 1"),
        ({"get_spec": {"speculative_eagle_topk": 1, "speculative_algorithm": "NGRAM"}}, "--speculative-algorithm: expected chains"),
    ),
)
def test_strange_runners_are_refused(fixture: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    backend.refuse_strange(fixture.runner)
    for name, facts in change.items():
        if name == "runner":
            for fact, value in facts.items():
                monkeypatch.setattr(fixture.runner, fact, value, raising=False)
        else:
            monkeypatch.setattr(backend, name, lambda facts=facts: SimpleNamespace(**facts))
    with pytest.raises(UnsupportedProblem, match=message):
        backend.refuse_strange(fixture.runner)


def test_virtual_slots_are_refused(fixture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixture.runner, "kv_index_translator", SimpleNamespace(is_translating=True), raising=False)
    with pytest.raises(UnsupportedProblem, match=r"KV pool: expected slots that are places in the pool.*omit --enable-unified-memory"):
        TokenSlots(fixture.runner)


@pytest.mark.parametrize(
    ("mode", "layout", "message"),
    [
        (ForwardMode.TARGET_VERIFY, object(), "verification: expected as many draft tokens a sequence, got a ragged one"),
        (ForwardMode.PREBUILT, None, "forward mode: expected decode, extend, mixed, verification or draft, got PREBUILT"),
    ],
)
def test_steps_of_other_kinds_are_refused(mode: ForwardMode, layout: object, message: str) -> None:
    step = SimpleNamespace(forward_mode=mode, batch_size=1, spec_info=SimpleNamespace(ragged_verify_layout=layout))
    with pytest.raises(UnsupportedProblem, match=message):
        describe_step(step, draft_step=0, draft_tokens=4)
