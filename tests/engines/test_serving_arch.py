"""Which kernels a device gets, and what vLLM is told about devices that get none. Devices are stand-ins: no GPU is here."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport

from fa4_backend import UnsupportedProblem
from fa4_backend.problem import FP8
from fa4_backend.support import SUPPORT
from fa4_integration.vllm_backend.backend import FA4Backend
from fa4_integration.vllm_backend.serving_arch import serving_arch

ORDINARY = {
    "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False, "has_sink": False,
    "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False, "attn_type": "decoder",
}  # fmt: skip


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DeviceCapability:
    """A CUDA platform whose device has the parametrised compute capability."""
    capability = DeviceCapability(*request.param)
    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, get_device_capability=lambda: capability, device_name="NVIDIA stand-in"
    )
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    return capability


@pytest.mark.parametrize(("cuda", "arch"), [((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_103a")], indirect=["cuda"])
def test_gpus_get_their_kernels(cuda: DeviceCapability, arch: str) -> None:
    assert serving_arch() == serving_arch(cuda) == arch
    reasons = FA4Backend.validate_configuration(device_capability=cuda, **ORDINARY)
    if arch in SUPPORT:
        assert reasons == []
        assert FA4Backend.get_builder_cls().get_cudagraph_support(None, None) is AttentionCGSupport.ALWAYS
    else:
        assert any(f"kernels for {chip}" in reason for reason in reasons for chip in ("H100",)), reasons


@pytest.mark.parametrize("cuda", [(8, 0), (8, 9), (12, 0)], indirect=True)
def test_other_gpus_are_refused_with_a_sentence(cuda: DeviceCapability) -> None:
    with pytest.raises(UnsupportedProblem, match=r"expected H100, H200.*or a CPU, got compute capability .*use another attention backend"):
        serving_arch()
    assert not FA4Backend.supports_compute_capability(cuda)
    (reason,) = FA4Backend.validate_configuration(device_capability=cuda, **ORDINARY)
    assert f"got compute capability {cuda.major}.{cuda.minor}" in reason


@pytest.mark.parametrize("cuda", [(10, 0)], indirect=True)
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": torch.float32}, "dtype on sm_100a: expected one of bfloat16, float16, got 'float32'"),
        ({"head_size": 80}, "head_dim/head_dim_v on sm_100a: expected one of"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "got fp8_e5m2"),
    ],
)
def test_gpus_refuse_with_a_reason(cuda: DeviceCapability, facts: dict[str, Any], reason: str) -> None:
    reasons = FA4Backend.validate_configuration(device_capability=cuda, **{**ORDINARY, **facts})
    assert any(reason in one for one in reasons), reasons


@pytest.mark.parametrize(("cuda", "arch"), [((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_103a")], indirect=["cuda"])
@pytest.mark.parametrize("is_served", [True, False])
def test_fp8_is_what_the_table_says(cuda: DeviceCapability, arch: str, is_served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arch's row decides, for the cache and for scales of each head; nothing else is kept that could say otherwise."""
    monkeypatch.setitem(SUPPORT, arch, dataclasses.replace(SUPPORT[arch], quantised_kv=(FP8,) if is_served else ()))
    facts = {**ORDINARY, "kv_cache_dtype": "fp8", "use_per_head_quant_scales": True}
    reasons = FA4Backend.validate_configuration(device_capability=cuda, **facts)
    if is_served:
        assert reasons == []
        return
    assert {"kv_cache_dtype not supported", "per-head quant scales not supported"} <= set(reasons)
    assert any(reason.startswith(f"kv_dtype on {arch}: expected bfloat16 with q in bfloat16, got {FP8}; see") for reason in reasons)


@pytest.mark.parametrize(
    ("name", "arch"), [("reference", "cpu"), ("emulate-sm100", "emulated-sm_100a"), ("emulate-sm90", "emulated-sm_90a")]
)
def test_cpus_get_what_the_environment_names(name: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_BACKEND_CPU", name)
    assert serving_arch() == arch


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_BACKEND_CPU", "fastest")
    with pytest.raises(ValueError, match=r"FA4_BACKEND_CPU: expected one of reference, .*, got 'fastest'"):
        serving_arch()
