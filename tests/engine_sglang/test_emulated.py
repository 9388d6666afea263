"""The compiled GPU kernels under SGLang's own attention tests, on the emulator: alignment and strides of its pools are real there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as dense
from sglang.test.kits.attention_unittest.runner_modes import cuda_graph_decode_runner as decode_graphs

from fa4_integration.sglang_backend.names import NAME
from tests.engine_sglang.pools import StridedPool
from tests.engine_sglang.test_kit import SKIPS

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

SIZES = {"device": "cpu", "dtype": torch.bfloat16, "head_dim": 64, "max_context_len": 128}


def mixed(num_kv_heads: int) -> Any:
    """A prompt, a short one over a cached prefix and a decode row, over pages of 32."""
    return dense.DenseAttentionCase("mixed", NAME, ForwardMode.MIXED, 4, num_kv_heads, 32, (0, 33, 64), (40, 5, 1))


def decode(num_kv_heads: int) -> Any:
    return dense.DenseAttentionCase("decode", NAME, ForwardMode.DECODE, 4, num_kv_heads, 32, (30, 31, 32))


@pytest.mark.parametrize("chip", ("sm90", "sm100"))
@pytest.mark.parametrize("pool", ("token-major", "head-major", "strided"))
def test_kernels(kit: Any, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, pool: str, chip: str) -> None:
    monkeypatch.setenv("FA4_BACKEND_CPU", f"emulate-{chip}")
    if pool == "strided":
        monkeypatch.setattr(dense, "MHATokenToKVPool", StridedPool)
    with envs.SGLANG_USE_HND_KVCACHE.override(pool == "head-major"):
        for num_kv_heads in (1, 2):
            kit.run_dense_attention_case(SKIPS(), mixed(num_kv_heads), **SIZES)
    assert {call["plan"].problem.target_arch for call in calls} == {f"{chip.replace('sm', 'sm_')}a"}


@pytest.mark.parametrize("chip", ("sm90", "sm100"))
def test_padded_rows_of_a_graph(kit: Any, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    monkeypatch.setenv("FA4_BACKEND_CPU", f"emulate-{chip}")
    decode_graphs.run_dense_cuda_graph_decode_case(SKIPS(), decode(2), cuda_graph_capture_batch_size=5, **SIZES)


def test_fp8_cache(fp8: None, kit: Any, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and decode rows of one step over e4m3, with the layer's scales. One KV head: a token is 64 bytes of the pool."""
    monkeypatch.setenv("FA4_BACKEND_CPU", "emulate-sm90")
    for num_kv_heads in (1, 2):
        kit.run_dense_attention_case(SKIPS(), mixed(num_kv_heads), **SIZES)
    assert {call["plan"].problem.kv_dtype for call in calls} == {"float8_e4m3fn"}
