"""The tensors and values of one attention call, checked once and handed down unchanged to the kernel that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class CallTensors(NamedTuple):
    """The tensors of one call as the caller gave them; shapes as in `AttentionArguments`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    out: torch.Tensor | None  # None: made by the operator
    lse: torch.Tensor | None
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    q_scale: torch.Tensor | None = None


class RaggedTensors(NamedTuple):
    """The same of a call whose K and V have no pages."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    out: torch.Tensor | None
    lse: torch.Tensor | None
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    q_scale: torch.Tensor | None = None


class LatentTensors(NamedTuple):
    """The tensors of one call of `mla_decode` as the caller gave them; shapes as in `LatentArguments`."""

    q: torch.Tensor
    q_rope: torch.Tensor
    latent_cache: torch.Tensor
    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    out: torch.Tensor | None  # None: made by the operator
    lse: torch.Tensor | None
    latent_scale: torch.Tensor | None = None


class AttentionArguments(NamedTuple):
    """One call of `paged_attention` or `ragged_attention` (`fa4_backend.ops`) after its checks; optional values are resolved."""

    q: torch.Tensor  # (total_q, num_q_heads, head_dim)
    k_cache: torch.Tensor  # (num_pages, page_size, num_kv_heads, head_dim); without pages (total_k, num_kv_heads, head_dim)
    v_cache: torch.Tensor  # likewise, head_dim_v
    page_table: torch.Tensor | None  # (batch, max_pages_per_seq) int32; None without pages
    cu_seqlens_q: torch.Tensor  # (batch + 1,) int32
    seqused_k: torch.Tensor  # (batch,) int32
    out: torch.Tensor  # (total_q, num_q_heads, head_dim_v)
    lse: torch.Tensor | None  # (num_q_heads, total_q) float32, natural log
    softmax_scale: float  # multiplies raw logits
    window_left: int | None  # keys visible before the diagonal key; None: all
    window_right: int | None  # keys visible after the diagonal key; None: all (0 for causal)
    softcap: float  # logits become softcap * tanh(logits / softcap); 0: off
    sinks: torch.Tensor | None  # (num_q_heads,) logit of the row's sink, scaled already; in the problem's sinks_dtype
    alibi_slopes: torch.Tensor | None  # (num_q_heads,) float32; adds -slope * distance to the diagonal key
    k_scale: torch.Tensor | None = None  # (num_kv_heads,) float32, any stride: K is k_cache times it; None unless K and V are FP8
    v_scale: torch.Tensor | None = None  # the same of V
    out_scale: torch.Tensor | None = None  # (1,) float32: the result is out times it; None unless out is FP8
    cu_seqlens_k: torch.Tensor | None = None  # (batch + 1,) int32, where sequences begin in k and v without pages; None with pages
    q_scale: torch.Tensor | None = None  # (num_kv_heads,) float32, any stride: a query is q times it; None unless q is FP8


class LatentArguments(NamedTuple):
    """One call of `fa4_backend.mla_ops.mla_decode` after its checks; head_dim and head_dim_v are the problem's, 576 and 512."""

    q: torch.Tensor  # (total_q, num_q_heads, head_dim_v): the part of a query that meets the latents
    q_rope: torch.Tensor  # (total_q, num_q_heads, head_dim - head_dim_v): the rotary part
    latent_cache: torch.Tensor  # (num_pages, page_size, head_dim): head_dim_v elements are K and V, the others K's rotary part
    page_table: torch.Tensor  # (batch, max_pages_per_seq) int32
    cu_seqlens_q: torch.Tensor  # (batch + 1,) int32
    seqused_k: torch.Tensor  # (batch,) int32
    out: torch.Tensor  # (total_q, num_q_heads, head_dim_v)
    lse: torch.Tensor | None  # (num_q_heads, total_q) float32, natural log
    softmax_scale: float  # multiplies raw logits
    latent_scale: torch.Tensor | None = None  # (1,) float32: a latent is what is stored times it; None unless latents are FP8
