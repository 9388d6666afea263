"""SGLang's own attention tests pass for our name: all cases of dense attention that a CPU runs.

The kit compares with a torch reference of its own. Its graph cases go through the calls of a capture and a replay, without a graph.
"""

from __future__ import annotations

import unittest
from dataclasses import replace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as dense
from sglang.test.kits.attention_unittest.runner_modes import cuda_graph_decode_runner as decode_graphs
from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_extend_runner as draft_extends
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as verifications

from fa4_backend import UnsupportedProblem
from fa4_integration.sglang_backend.names import NAME

# Layouts of a request's pages in the pool. SGLang's fourth, "non_monotonic_extend", scatters the tokens of a page within it, which no page
# table says; the kit's cases for fa3 and fa4 list it as a known failure too.
LAYOUTS = ("contiguous", "shuffled_pages", "interleaved_pages")
CASES = {case.name: case for case in dense.make_dense_cases(NAME)}
WINDOW_CASES = {
    case.name: case for case in (*dense.make_swa_no_prefix_input_config_cases(NAME), *dense.make_swa_prefix_input_config_cases(NAME))
}
TOKEN_PAGES = "mha_extend_page_size_1"
SKIPS = unittest.TestCase  # the kit skips through it what it cannot import; our test then fails for want of a call


def window_decode(page_size: int) -> Any:
    """Decode rows below, at and above a window's edge, which the kit's lists do not have."""
    return dense.DenseAttentionCase("swa_decode", NAME, ForwardMode.DECODE, 4, 2, page_size, (2, 3, 4, 5, 40), sliding_window_size=4)


def speculative(mode: ForwardMode, window: int | None = None) -> Any:
    """Three draft tokens a sequence, over prefixes at and around a page's edge."""
    return dense.DenseAttentionCase("drafts", NAME, mode, 4, 2, 16, (14, 15, 16), (3, 3, 3), window)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in CASES if name != TOKEN_PAGES])
def test_dense_case(kit: Any, calls: list[dict[str, Any]], name: str, layout: str) -> None:
    kit.run_dense_attention_case(SKIPS(), CASES[name], device="cpu", loc_layout=layout)


@pytest.mark.parametrize("page_size", (32, 64, 128))
@pytest.mark.parametrize("name", ["mha_extend_ragged_page_boundary", "gqa_decode_page_boundary"])
def test_page_sizes(kit: Any, calls: list[dict[str, Any]], name: str, page_size: int) -> None:
    edge = (page_size - 2, page_size - 1, page_size)
    case = replace(CASES[name], page_size=page_size, prefix_lens=edge)
    kit.run_dense_attention_case(SKIPS(), case, device="cpu", max_context_len=4 * page_size)


def test_bfloat16(kit: Any, calls: list[dict[str, Any]]) -> None:
    kit.run_dense_attention_case(SKIPS(), CASES["mha_extend_ragged_page_boundary"], device="cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WINDOW_CASES)
def test_window_case(kit: Any, calls: list[dict[str, Any]], name: str, layout: str) -> None:
    kit.run_dense_attention_case(SKIPS(), WINDOW_CASES[name], device="cpu", loc_layout=layout)
    assert {call["window_left"] for call in calls} == {WINDOW_CASES[name].sliding_window_size}


@pytest.mark.parametrize("page_size", (16, 32))
def test_window_in_decode(kit: Any, calls: list[dict[str, Any]], page_size: int) -> None:
    kit.run_dense_attention_case(SKIPS(), window_decode(page_size), device="cpu")


def test_pages_of_a_token_are_refused(kit: Any) -> None:
    with pytest.raises(UnsupportedProblem, match=r"--page-size: expected 16, 32, 64, 128 .* got 1"):
        kit.run_dense_attention_case(SKIPS(), CASES[TOKEN_PAGES], device="cpu")


# As many rows as captured, and one row or more that pad the replay.
@pytest.mark.parametrize("captured", (3, 4, 8))
@pytest.mark.parametrize("window", (None, 4))
def test_decode_in_a_graph(kit: Any, calls: list[dict[str, Any]], captured: int, window: int | None) -> None:
    case = replace(CASES["gqa_decode_page_boundary"], sliding_window_size=window)
    decode_graphs.run_dense_cuda_graph_decode_case(SKIPS(), case, device="cpu", cuda_graph_capture_batch_size=captured)


@pytest.mark.parametrize("window", (None, 4))
@pytest.mark.parametrize("kind", ("eagle", "ngram", "frozen_kv_mtp"))
def test_verification(kit: Any, calls: list[dict[str, Any]], kind: Any, window: int | None) -> None:
    case = speculative(ForwardMode.TARGET_VERIFY, window)
    verifications.run_dense_spec_verify_case(SKIPS(), case, topk=1, spec_kind=kind, device="cpu")
    verifications.run_dense_spec_verify_cuda_graph_case(
        SKIPS(), case, topk=1, spec_kind=kind, device="cpu", cuda_graph_capture_batch_size=4
    )


@pytest.mark.parametrize("padding", ("small_real", "prod_fill"))
def test_drafts_after_a_verification_in_a_graph(kit: Any, calls: list[dict[str, Any]], padding: str) -> None:
    case = speculative(ForwardMode.DRAFT_EXTEND_V2)
    draft_extends.run_dense_draft_extend_v2_cuda_graph_case(SKIPS(), case, device="cpu", cuda_graph_capture_batch_size=4, pad_style=padding)


# The kit's projections give logits near 0, and its bound of 3e-2 lets a scale that is 5 % off pass even where they are 16 times as large.
# In float32 both sides are a few roundings from the truth: sums of at most 64 products of numbers below 10, 2^-24 each.
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


def run_peaked(kit: Any, case: Any, scale_error: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Our result of a case and the kit's reference, in float32 and with 16 times the logits."""
    fixture = kit.build_dense_attention_fixture(SKIPS(), case, device="cpu", dtype=torch.float32)
    for module in (fixture.actual_module, fixture.reference_module):
        module.q_proj.weight.mul_(16.0)
    fixture.actual_module.attn.scaling *= scale_error
    return kit.run_dense_fixture_eager(fixture), kit.expected_dense_fixture_output(fixture)


@pytest.mark.parametrize("name", [name for name in {**CASES, **WINDOW_CASES} if name != TOKEN_PAGES])
def test_peaked_rows_in_float32(kit: Any, calls: list[dict[str, Any]], name: str) -> None:
    torch.testing.assert_close(*run_peaked(kit, {**CASES, **WINDOW_CASES}[name]), **FLOAT32)


def test_a_wrong_scale_fails(kit: Any, calls: list[dict[str, Any]]) -> None:
    actual, expected = run_peaked(kit, CASES["mha_extend_ragged_page_boundary"], scale_error=1.05)
    assert not torch.allclose(actual, expected, **FLOAT32)


def test_a_wrong_length_fails(kit: Any, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    from fa4_integration.sglang_backend import backend

    describe = backend.describe_step
    monkeypatch.setattr(backend, "describe_step", lambda *args, **kwargs: describe(*args, **kwargs)._replace(ahead=-1))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        kit.run_dense_attention_case(SKIPS(), CASES["gqa_decode_page_boundary"], device="cpu")
