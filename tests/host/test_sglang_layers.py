"""SGLang's layers and steps in the operator's words, without SGLang: what is refused says so by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fa4_backend import MaskFeatures, UnsupportedProblem
from fa4_backend.support import check_problem
from fa4_integration.common.serving_device import arch_of_torch_device
from fa4_integration.sglang_backend.layers import EngineFacts, problem_of_layer, softcap, window_left
from fa4_integration.sglang_backend.resolution import check_page_size

ENGINE = EngineFacts(torch.bfloat16, torch.bfloat16, 64, "cpu", 8192, None, False, False)


def layer(**facts: Any) -> Any:
    """An ordinary layer as SGLang's models make it, with some facts of its own."""
    ordinary = {
        "layer_id": 3,
        "tp_q_head_num": 8,
        "tp_k_head_num": 2,
        "tp_v_head_num": 2,
        "qk_head_dim": 128,
        "v_head_dim": 128,
        "sliding_window_size": -1,
        "logit_cap": 0.0,
        "logit_capping_method": "tanh",
        "attn_type": SimpleNamespace(value="decoder"),
        "is_cross_attention": False,
        "xai_temperature_len": -1,
        "use_irope": False,
    }
    return SimpleNamespace(**{**ordinary, **facts})


def test_ordinary_layer() -> None:
    problem = problem_of_layer(layer(), ENGINE, None)
    assert (problem.num_q_heads, problem.num_kv_heads, problem.head_dim, problem.head_dim_v) == (8, 2, 128, 128)
    assert (problem.dtype, problem.kv_dtype, problem.page_size) == ("bfloat16", "bfloat16", 64)
    assert problem.mask == MaskFeatures() and not problem.batch_invariant


def test_mask_of_a_layer() -> None:
    gpt_oss = layer(sliding_window_size=127, logit_cap=30.0)
    problem = problem_of_layer(gpt_oss, ENGINE, torch.bfloat16)
    assert problem.mask == MaskFeatures(has_window_left=True, has_softcap=True, has_sinks=True)
    assert (problem.sinks_dtype, window_left(gpt_oss), softcap(gpt_oss)) == ("bfloat16", 127, 30.0)


# SGLang counts as the operator does, without the query's own token; a window of 0 sees that token alone.
@pytest.mark.parametrize(("given", "window"), ((None, None), (-1, None), (0, 0), (4, 4)))
def test_window(given: int | None, window: int | None) -> None:
    assert window_left(layer(sliding_window_size=given)) == window


def test_value_heads_of_another_width() -> None:
    problem = problem_of_layer(layer(qk_head_dim=192), ENGINE, None)
    assert (problem.head_dim, problem.head_dim_v) == (192, 128)


def test_fp8_cache_has_a_dtype_of_its_own() -> None:
    problem = problem_of_layer(layer(), replace(ENGINE, kv_dtype=torch.float8_e4m3fn), None)
    assert (problem.dtype, problem.kv_dtype, problem.has_kv_scales) == ("bfloat16", "float8_e4m3fn", True)


@pytest.mark.parametrize("dtype", (torch.float8_e5m2, torch.uint8), ids=str)
def test_other_caches_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedProblem, match=f"kv_dtype.*{str(dtype).removeprefix('torch.')}"):
        check_problem(problem_of_layer(layer(), replace(ENGINE, kv_dtype=dtype), None))


@pytest.mark.parametrize(
    ("facts", "message"),
    (
        ({"attn_type": SimpleNamespace(value="encoder_only")}, "attention type in layer 3: expected decoder, got encoder_only"),
        ({"attn_type": SimpleNamespace(value="decoder_bidirectional")}, "attention type .* got decoder_bidirectional"),
        ({"is_cross_attention": True}, "cross attention in layer 3"),
        ({"tp_v_head_num": 4}, "heads of V in layer 3: expected 2, those of K, got 4"),
        ({"logit_cap": 5.0, "logit_capping_method": "clip"}, "logit capping in layer 3: expected tanh, got clip"),
        ({"xai_temperature_len": 1024}, "temperature by position in layer 3: expected none, got 1024"),
    ),
)
def test_strange_layers_are_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedProblem, match=f"{message}.*--attention-backend"):
        problem_of_layer(layer(**facts), ENGINE, None)


def test_local_layers_are_served_as_long_as_all_fits_a_chunk() -> None:
    local, engine = layer(use_irope=True), replace(ENGINE, attention_chunk_size=8192)
    assert problem_of_layer(local, engine, None).mask == MaskFeatures()
    with pytest.raises(UnsupportedProblem, match=r"chunked local attention in layer 3: expected a context of at most one chunk \(8192"):
        problem_of_layer(local, replace(engine, context_len=8193), None)
    assert problem_of_layer(layer(), replace(engine, context_len=8193), None)  # a layer that sees all


@pytest.mark.parametrize("page_size", (16, 32, 64, 128, 256))
def test_page_sizes(page_size: int) -> None:
    check_page_size(page_size)


@pytest.mark.parametrize("page_size", (1, 8, 48))
def test_other_page_sizes(page_size: int) -> None:
    with pytest.raises(UnsupportedProblem, match=f"--page-size.*got {page_size}"):
        check_page_size(page_size)


def test_other_devices_are_refused_by_name() -> None:
    assert arch_of_torch_device(torch.device("cpu")) == "cpu"
    with pytest.raises(UnsupportedProblem, match=r"device: expected .* got xpu:0"):
        arch_of_torch_device(torch.device("xpu:0"))
