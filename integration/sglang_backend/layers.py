"""An attention layer of SGLang (`RadixAttention`) as a problem of the operator, or the reason why it is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fa4_backend import AttentionProblem, MaskFeatures
from fa4_backend.problem import LATENT, PAGED, UnsupportedProblem

ADVICE = "use another --attention-backend for this model"


@dataclass(frozen=True)
class EngineFacts:
    """What all layers of a model runner have in common."""

    dtype: torch.dtype  # of q and of the output
    kv_dtype: torch.dtype
    page_size: int
    arch: str
    context_len: int  # tokens of the longest sequence
    attention_chunk_size: int | None  # tokens; of models whose local layers see a chunk
    batch_invariant: bool
    exact: bool
    is_latent: bool = False  # multi-head latent attention, absorbed: keys and values are latents, which all heads share


def problem_of_layer(layer: Any, engine: EngineFacts, sinks_dtype: torch.dtype | None) -> AttentionProblem:
    """What a layer asks of the operator.

    Args:
        sinks_dtype: of the tensor of sinks that the model passes; None: it passes none.

    Raises:
        UnsupportedProblem: the layer wants what the operator does not have.
    """
    refuse_strange(layer, engine)
    return AttentionProblem(
        num_q_heads=layer.tp_q_head_num,
        num_kv_heads=layer.tp_k_head_num,
        head_dim=layer.qk_head_dim,
        head_dim_v=layer.v_head_dim,
        dtype=name_of(engine.dtype),
        kv_dtype=name_of(engine.kv_dtype),
        kv_source=LATENT if engine.is_latent else PAGED,
        page_size=engine.page_size,
        arch=engine.arch,
        mask=MaskFeatures(
            has_window_left=window_left(layer) is not None,
            has_softcap=softcap(layer) > 0,
            has_sinks=sinks_dtype is not None,
        ),
        sinks_dtype="float32" if sinks_dtype is None else name_of(sinks_dtype),
        batch_invariant=engine.batch_invariant,
        exact=engine.exact,
    )


def reads_latents(layer: Any) -> bool:
    """Whether a layer is the absorbed form of latent attention; models of that kind have another layer for prompts beside it."""
    return bool(layer.tp_k_head_num == 1 and layer.v_head_dim < layer.qk_head_dim)


def window_left(layer: Any) -> int | None:
    """Keys that a query sees besides its own; None: all. SGLang's number does not count the query's own token either; -1 means all."""
    window = layer.sliding_window_size
    return None if window is None or window < 0 else int(window)


def softcap(layer: Any) -> float:
    """Bound of the logits' tanh; 0: none."""
    return float(layer.logit_cap or 0.0)


def name_of(dtype: torch.dtype) -> str:
    """torch's dtype as problems call it."""
    return str(dtype).removeprefix("torch.")


def refuse_strange(layer: Any, engine: EngineFacts) -> None:
    """Refuse what changes scores or keys in ways that no problem describes.

    Raises:
        UnsupportedProblem: the layer has one of them.
    """
    chunk = engine.attention_chunk_size
    for what, expected, got, is_served in (
        ("attention type", "decoder", layer.attn_type.value, layer.attn_type.value == "decoder"),
        ("cross attention", "none", "a layer of it", not layer.is_cross_attention),
        ("heads of V", f"{layer.tp_k_head_num}, those of K", layer.tp_v_head_num, layer.tp_v_head_num == layer.tp_k_head_num),
        ("logit capping", "tanh", layer.logit_capping_method, not softcap(layer) or layer.logit_capping_method == "tanh"),
        ("temperature by position", "none", layer.xai_temperature_len, (layer.xai_temperature_len or 0) <= 0),
        (
            "chunked local attention",
            f"a context of at most one chunk ({chunk} tokens; set --context-length)",
            engine.context_len,
            not layer.use_irope or chunk is None or engine.context_len <= chunk,
        ),
    ):
        if not is_served:
            raise UnsupportedProblem(f"{what} in layer {layer.layer_id}: expected {expected}, got {got}; {ADVICE}")
