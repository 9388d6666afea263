"""Which layers of an engine run on FA4, which do not and why: one line in vLLM's log at start.

Derived from vLLM's registry of layers, where each knows its backend. A drafter does not inherit the backend of its target, and an image
encoder chooses among backends of its own, so selecting FA4 does not mean that all attention runs on it.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase

from fa4_integration.vllm_backend.names import NAME, PATHS

DRAFTER = f"drafter: vLLM picks its backend apart, set attention_backend to {NAME} in --speculative-config"
MLA = "MLA, whose backend was selected apart"
RECURRENT = "linear attention or Mamba, which has no attention kernel"
OTHER = "vLLM's choice for these layers"
IMAGE_ENCODER = "The image encoder runs on vLLM's choice (--mm-encoder-attn-backend)."


def announce_layers(vllm_config: Any) -> None:
    """Write the line, once a process for the same layers."""
    init_logger("vllm.fa4").info_once("%s", describe_layers(vllm_config))


def describe_layers(vllm_config: Any) -> str:
    """The line: how many layers run on FA4; the others by backend, with the reason."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    others: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        backend = layer.get_attn_backend().get_name()
        if backend not in PATHS:
            others.setdefault((backend, _reason(name, layer, vllm_config)), []).append(name)
    num_others = sum(len(names) for names in others.values())
    line = f"{NAME} runs {len(layers) - num_others} of {len(layers)} attention layers."
    if others:
        parts = (f"{len(names)} on {backend}, first {names[0]} ({reason})" for (backend, reason), names in others.items())
        line += f" Not on {NAME}: {'; '.join(parts)}."
    # Its layers are not in the registry; they ask for a backend by themselves.
    if getattr(vllm_config.model_config, "multimodal_config", None) is not None:
        line += f" {IMAGE_ENCODER}"
    return line


def _reason(name: str, layer: Any, vllm_config: Any) -> str:
    if is_drafter(name, layer, vllm_config):
        return DRAFTER
    if isinstance(layer, MambaBase):
        return RECURRENT
    return MLA if layer.get_attn_backend().is_mla() else OTHER


def is_drafter(name: str, layer: Any, vllm_config: Any) -> bool:
    """Whether a layer belongs to a model that drafts tokens.

    vLLM's second runner marks them. Its first does not; there a drafter has a prefix of its own, or counts on after the target's layers.
    """
    if vllm_config.speculative_config is None:
        return False
    parts = name.split(".")
    index = next((int(part) for part in parts if part.isdigit()), -1)
    after_target = index >= vllm_config.model_config.get_total_num_hidden_layers()
    return layer.is_draft_layer or parts[0] == "draft_model" or "mtp" in parts or after_target
