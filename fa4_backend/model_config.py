"""A model's config.json -> the attention problems of its layers. For planning ahead of serving; an engine passes its own facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fa4_backend.model_layers import ATTENTION, MLA, NOT_ATTENTION, NOT_SERVED, Layer, ModelConfigError, read_layers
from fa4_backend.problem import COMPUTE_DTYPES, LATENT, PAGED, RAGGED, SAME_AS_Q, AttentionProblem, MaskFeatures, UnsupportedProblem
from fa4_backend.support import LATENT_PAGE, PAGE_MULTIPLE


@dataclass(frozen=True)
class LayerGroup:
    """Layers that ask the same. Without a problem, `remark` says why; with a refusal too, the model is not served."""

    kind: str  # "attention", "mla", or what the layers are instead: "linear", "encoder", "cross", ...
    num_layers: int
    problem: AttentionProblem | None = None
    window: int | None = None  # visible tokens including the row's own, as configs count; None: all
    remark: str | None = None  # a sentence about layers that ask nothing of attention
    refusal: str | None = None  # a sentence about layers that no arch serves
    prompts: tuple[AttentionProblem, ...] = ()  # of MLA, whose `problem` is that of decode rows; see `prompt_problems`


def layer_groups(
    path: Path,
    *,
    arch: str,
    page_size: int | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    tp: int = 1,
    text_only: bool = False,
    **modes: Any,
) -> list[LayerGroup]:
    """Read a Hugging Face config.json (or the folder that holds one) and group its layers by what they ask.

    Args:
        page_size: tokens a page; default: vLLM's, which is 16, and `LATENT_PAGE` for latents.
        dtype: one of `COMPUTE_DTYPES`; default: the config's own, bfloat16 where it says none or float32, as vLLM does.
        kv_dtype: of K and V, "auto" for that of q; default: FP8 where the checkpoint declares it, else "auto".
        tp: GPUs that share the heads (tensor parallelism); the problems are those of one GPU.
        text_only: a multimodal model will be given no images.
        modes: what no config says, such as `batch_invariant` or `q_dtype`; fields of `AttentionProblem`.

    Raises:
        ModelConfigError: the config cannot be read; see `read_layers`.
        UnsupportedProblem: `arch`, `page_size`, `dtype`, `kv_dtype`, `modes` or what the checkpoint declares are wrong for any model.
    """
    model = read_layers(path, text_only=text_only)
    dtype = dtype or {None: "bfloat16", "float32": "bfloat16"}.get(model.dtype, model.dtype)
    if dtype not in COMPUTE_DTYPES:
        raise ModelConfigError(f"dtype: expected one of {', '.join(COMPUTE_DTYPES)}, got {dtype!r}")
    common = AttentionProblem(
        1, 1, 1, 1, dtype, page_size or PAGE_MULTIPLE, arch, kv_dtype=kv_dtype or model.kv_dtype or SAME_AS_Q, **modes
    )
    latent_page = page_size or LATENT_PAGE
    return [
        _group(layer, count, replace(common, page_size=latent_page) if layer.kind == MLA else common, tp)
        for layer, count in Counter(model.layers).items()
    ]


def attention_problems(groups: Sequence[LayerGroup]) -> list[AttentionProblem]:
    """The problems of a model's attention layers.

    Raises:
        UnsupportedProblem: some layers ask for attention that no arch serves; the message says which.
    """
    refusals = [f"{group.num_layers} layers ({group.kind}): {group.refusal}" for group in groups if group.refusal]
    if refusals:
        raise UnsupportedProblem("; ".join(refusals))
    return [group.problem for group in groups if group.problem is not None]


def prompt_problems(decode: AttentionProblem, head_dim: int, head_dim_v: int) -> tuple[AttentionProblem, ...]:
    """What prompts ask where `decode` are the decode rows of MLA: attention to each other, and all of it to chunks of cached context.

    Keys and values are made of latents for each query head, in the model's dtype, and have no pages.
    """
    expanded = replace(
        decode, num_kv_heads=decode.num_q_heads, head_dim=head_dim, head_dim_v=head_dim_v, kv_dtype=decode.dtype, page_size=1,
        kv_source=RAGGED, has_lse=True,
    )  # fmt: skip
    return tuple(replace(expanded, mask=MaskFeatures(is_causal=is_causal)) for is_causal in (True, False))


def _group(layer: Layer, num_layers: int, common: AttentionProblem, tp: int) -> LayerGroup:
    if layer.kind in NOT_ATTENTION:
        return LayerGroup(layer.kind, num_layers, remark=NOT_ATTENTION[layer.kind])
    if layer.kind not in (ATTENTION, MLA):
        refusal = NOT_SERVED.get(layer.kind, f"layers of kind {layer.kind} are not served")
        return LayerGroup(layer.kind, num_layers, refusal=refusal)
    try:
        problem = _problem(layer, common, tp)
        prompts = () if layer.prompt_dims is None else prompt_problems(problem, *layer.prompt_dims)
        return LayerGroup(layer.kind, num_layers, problem, layer.window, prompts=prompts)
    except UnsupportedProblem as error:
        return LayerGroup(layer.kind, num_layers, window=layer.window, refusal=str(error))


def _problem(layer: Layer, common: AttentionProblem, tp: int) -> AttentionProblem:
    """One GPU's share of a layer, split as vLLM splits it: a KV head is copied where there are fewer than GPUs."""
    if layer.num_q_heads % tp:
        raise UnsupportedProblem(f"tp: expected a divisor of {layer.num_q_heads} query heads, got {tp}")
    if layer.kind != MLA and max(layer.num_kv_heads, tp) % min(layer.num_kv_heads, tp):
        raise UnsupportedProblem(f"tp: expected a divisor or a multiple of {layer.num_kv_heads} KV heads, got {tp}")
    return replace(
        common,
        num_q_heads=layer.num_q_heads // tp,
        num_kv_heads=max(1, layer.num_kv_heads // tp),
        head_dim=layer.head_dim,
        head_dim_v=layer.head_dim_v,
        kv_source=LATENT if layer.kind == MLA else PAGED,
        mask=MaskFeatures(
            has_window_left=layer.window is not None,
            has_softcap=layer.has_softcap,
            has_sinks=layer.has_sinks,
            has_alibi=layer.has_alibi,
        ),
        sinks_dtype=common.dtype,  # engines keep sinks as they keep a model's other parameters
    )
