"""What backends of K and V heads, of latents and of MLA prefill answer vLLM alike: from the code that refuses, so it cannot go stale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from fa4_backend import AttentionProblem
from fa4_backend.problem import FP8, UnsupportedProblem
from fa4_backend.support import PAGE_MULTIPLE, check_problem
from fa4_integration.vllm_backend.kv_cache import STORED
from fa4_integration.vllm_backend.layers import announce_layers
from fa4_integration.vllm_backend.serving_arch import serving_arch

# How a reason of vLLM's begins -> what to do about it. vLLM says what it misses; a user wants to know what to start instead.
ADVICE = {
    "partial multimodal token full attention": "image tokens of this model see each other: --language-model-only serves its text on FA4",
    "non-causal attention": "FA4 serves causal decoder layers",
    "attention type": "FA4 serves decoder layers; encoders and cross attention want another --attention-backend",
    "DCP": "FA4 wants all KV of a sequence's heads on one GPU: --decode-context-parallel-size 1",
    "PCP": "FA4 wants all tokens of a prompt on one GPU: --prefill-context-parallel-size 1",
    "R-SWA": "FA4's windows are of one width for all tokens: start without --attention-backend",
}


def with_advice(reasons: list[str]) -> list[str]:
    """Why vLLM cannot have a backend for a layer, each with what to do where that is known."""
    found = [next((advice for start, advice in ADVICE.items() if reason.startswith(start)), None) for reason in reasons]
    return [reason if advice is None else f"{reason}: {advice}" for reason, advice in zip(reasons, found, strict=True)]


def refusal_of(ordinary: Mapping[str, Any], capability: Any = None, **facts: Any) -> str | None:
    """Why no kernel serves a problem with these facts, the rest being `ordinary`; None if one does.

    Args:
        capability: vLLM's DeviceCapability; default: the current device's.
    """
    try:
        check_problem(AttentionProblem(arch=serving_arch(capability), **{**ordinary, **facts}))
    except UnsupportedProblem as reason:
        return str(reason)
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """The `dtype` of an `AttentionProblem`."""
    return str(dtype).removeprefix("torch.")


def page_sizes(kv_cache_spec: Any) -> list[int | MultipleOf]:
    """The pages that kernels take."""
    config = get_current_vllm_config_or_none()
    if kv_cache_spec is not None and config is not None:
        # Asked of all backends of a KV cache group at start. Where they have no size in common, vLLM stops here, before any builder
        # is made; the line that says which layers chose another backend has to come first.
        announce_layers(config)
    return [MultipleOf(PAGE_MULTIPLE)]


class SharedAnswers(AttentionBackend):
    """What does not depend on the kind of a layer, for a backend that says what it takes for ordinary."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012  vLLM's declaration; `supports_dtype` decides
    supported_kv_cache_dtypes = [*STORED]  # noqa: RUF012  likewise
    ordinary: ClassVar[Mapping[str, Any]]  # the fields of a problem that nobody asks for

    @classmethod
    def refusal(cls, capability: Any = None, **facts: Any) -> str | None:
        """Why no kernel on this device serves layers with these facts, the rest being ordinary; None if one does."""
        return refusal_of(cls.ordinary, capability, **facts)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return page_sizes(kv_cache_spec)

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return cls.refusal(dtype=dtype_name(dtype)) is None

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        # A name of a 16-bit dtype is right for the models that have it; `supports_combination` knows the model's.
        is_stored = kv_cache_dtype is None or kv_cache_dtype in STORED
        return is_stored and (STORED[kv_cache_dtype or "auto"] != FP8 or cls.refusal(kv_dtype=FP8) is None)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return cls.refusal(batch_invariant=True) is None

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return cls.refusal(capability) is None

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        try:
            serving_arch(kwargs.get("device_capability"))
        except UnsupportedProblem as reason:
            return [str(reason)]  # alone: where there are no kernels, every other question is answered with no
        return with_advice(super().validate_configuration(*args, **kwargs))
