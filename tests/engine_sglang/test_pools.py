"""Every kind of KV pool that SGLang makes for grouped-query attention, through SGLang's own attention tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as dense
from sglang.test.kits.attention_unittest.runner_modes import cuda_graph_decode_runner as decode_graphs
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as verifications

from fa4_backend import UnsupportedProblem
from fa4_integration.sglang_backend import backend, kv_pool
from fa4_integration.sglang_backend.draft import DraftSteps
from fa4_integration.sglang_backend.names import NAME
from tests.engine_sglang.pools import Fp8Runner, StridedPool, WindowPool
from tests.engine_sglang.test_kit import CASES, FLOAT32, SKIPS, WINDOW_CASES, run_peaked, window_decode

EXTEND, DECODE, ONE_HEAD = "mha_extend_ragged_page_boundary", "gqa_decode_page_boundary", "mqa_extend_total_exact_page"


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every K that the operator was given."""
    seen: list[torch.Tensor] = []
    make = kv_pool.paged_views

    def keep(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        k_cache, v_cache = make(*args)
        seen.append(k_cache)
        return k_cache, v_cache

    monkeypatch.setattr(backend, "paged_views", keep)
    return seen


@pytest.fixture
def hybrid(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's pool has an index space of its own for its sliding-window layer."""
    monkeypatch.setattr(dense, "MHATokenToKVPool", WindowPool)


@pytest.mark.parametrize("name", (EXTEND, DECODE, ONE_HEAD))
def test_head_major_pool(kit: Any, calls: list[dict[str, Any]], views: list[torch.Tensor], name: str) -> None:
    with envs.SGLANG_USE_HND_KVCACHE.override(True):
        kit.run_dense_attention_case(SKIPS(), CASES[name], device="cpu")
    if CASES[name].num_kv_heads > 1:
        assert views[0].stride(2) > views[0].stride(1)  # a head's tokens together


@pytest.mark.parametrize("name", (EXTEND, DECODE, ONE_HEAD))
def test_pool_of_strided_slots(
    kit: Any, calls: list[dict[str, Any]], views: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(dense, "MHATokenToKVPool", StridedPool)
    kit.run_dense_attention_case(SKIPS(), CASES[name], device="cpu")
    assert views[0].stride(1) == 3 * CASES[name].num_kv_heads * dense.DEFAULT_HEAD_DIM


@pytest.mark.parametrize("name", WINDOW_CASES)
def test_window_pool_in_prefill(hybrid: None, kit: Any, calls: list[dict[str, Any]], name: str) -> None:
    kit.run_dense_attention_case(SKIPS(), WINDOW_CASES[name], device="cpu")


def test_window_pool_in_decode(hybrid: None, kit: Any, calls: list[dict[str, Any]]) -> None:
    kit.run_dense_attention_case(SKIPS(), window_decode(16), device="cpu")


@pytest.mark.parametrize("captured", (5, 8))
def test_window_pool_in_a_graph(hybrid: None, kit: Any, calls: list[dict[str, Any]], captured: int) -> None:
    decode_graphs.run_dense_cuda_graph_decode_case(SKIPS(), window_decode(16), device="cpu", cuda_graph_capture_batch_size=captured)


def test_window_pool_in_a_verification(hybrid: None, kit: Any, calls: list[dict[str, Any]]) -> None:
    case = dense.DenseAttentionCase("drafts", NAME, ForwardMode.TARGET_VERIFY, 4, 2, 16, (14, 15, 16), (3, 3, 3), 4)
    verifications.run_dense_spec_verify_cuda_graph_case(SKIPS(), case, topk=1, device="cpu", cuda_graph_capture_batch_size=4)


# Without the places of its own pool a window layer reads and writes those of the others, and finds them too: both have to be right.
@pytest.mark.parametrize("table", ("page_table", "window_slots"))
def test_another_pools_places_fail(
    hybrid: None, kit: Any, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    if table == "page_table":
        monkeypatch.setattr(backend.FA4Backend, "page_table", lambda self, layer, tensors: tensors.page_table)
    else:
        monkeypatch.setattr(backend.TokenSlots, "window_slots", lambda self, batch: batch.out_cache_loc)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        kit.run_dense_attention_case(SKIPS(), WINDOW_CASES["swa_extend_prefix_window_edges"], device="cpu")


def test_a_drafter_with_a_window_pool_is_refused(hybrid: None, kit: Any) -> None:
    fixture = kit.build_dense_attention_fixture(SKIPS(), window_decode(16), device="cpu")
    with pytest.raises(UnsupportedProblem, match="drafter: expected one KV pool"):
        DraftSteps(fixture.runner, 1, 3)


def test_full_layers_of_a_hybrid_pool(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 of the hybrid pool is not a sliding-window layer: its table is the scheduler's own."""
    monkeypatch.setattr(dense, "MHATokenToKVPool", WindowPool)
    fixture = kit.build_dense_attention_fixture(SKIPS(), window_decode(16), device="cpu")
    fixture.backend.init_forward_metadata(fixture.forward_batch)
    tables = fixture.backend.step
    fixture.actual_module.attn.layer_id = 1
    assert fixture.backend.page_table(fixture.actual_module.attn, tables) is tables.page_table
    fixture.actual_module.attn.layer_id = 0
    assert fixture.backend.page_table(fixture.actual_module.attn, tables) is tables.window_page_table


@pytest.mark.parametrize("name", (EXTEND, DECODE, ONE_HEAD, *WINDOW_CASES))
def test_fp8_cache(fp8: None, kit: Any, calls: list[dict[str, Any]], name: str) -> None:
    """Prefill as well as decode: the reference reads the numbers that the cache keeps."""
    torch.testing.assert_close(*run_peaked(kit, {**CASES, **WINDOW_CASES}[name]), **FLOAT32)
    assert {call["plan"].problem.kv_dtype for call in calls} == {"float8_e4m3fn"}


@pytest.mark.parametrize("lost", ("k_scale", "v_scale"))
def test_a_lost_fp8_scale_fails(fp8: None, kit: Any, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    operator = backend.paged_attention
    monkeypatch.setattr(backend, "paged_attention", lambda *args, **kwargs: operator(*args, **{**kwargs, lost: None}))
    actual, expected = run_peaked(kit, CASES[DECODE])
    assert not torch.allclose(actual, expected, **FLOAT32)


def test_packed_caches_are_refused_by_name(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mxfp8Runner(Fp8Runner):
        def __init__(self, **facts: Any) -> None:
            super().__init__(**facts)
            self.kv_cache_dtype_str = "mxfp8"

    monkeypatch.setattr(dense, "MockModelRunner", Mxfp8Runner)
    with pytest.raises(UnsupportedProblem, match=r"--kv-cache-dtype: expected .*fp8_e4m3, got mxfp8"):
        kit.build_dense_attention_fixture(SKIPS(), CASES[DECODE], device="cpu")
