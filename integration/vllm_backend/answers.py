"""What backends of K and V heads, of latents and of MLA prefill answer vLLM alike: from the code that refuses, so it cannot go stale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import MultipleOf

from fa4_backend import AttentionProblem
from fa4_backend.problem import UnsupportedProblem
from fa4_backend.support import PAGE_MULTIPLE, check_problem
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
