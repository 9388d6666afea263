"""The public operator: check the call, then run the planned kernel."""

from __future__ import annotations

import torch

from fa4_backend.arch import REFERENCE_ARCH
from fa4_backend.arguments import AttentionArguments
from fa4_backend.metadata import AttentionMetadata
from fa4_backend.plan import AttentionPlan
from fa4_backend.trace import trace_forward
from fa4_backend.validation import check_call_values, check_tensors


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    *,
    plan: AttentionPlan,
    metadata: AttentionMetadata,
    softmax_scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of ragged queries over a paged KV cache.

    Causal attention is aligned bottom-right: query i of a sequence sees keys up to `seqused_k - query_len + i`. A row that sees
    no key gives O = 0 and lse = -inf. Page rows past `seqused_k` and rows of q past `cu_seqlens_q[-1]` are not read into a result; they
    may hold NaN. Rows of `out` past `cu_seqlens_q[-1]` are 0, of `lse` -inf. A KV length past the plan's limit or the page table is cut.

    Args:
        q: (total_q, num_q_heads, head_dim), last stride 1; may be longer than `cu_seqlens_q[-1]`.
        k_cache: (num_pages, page_size, num_kv_heads, head_dim), any page, row and head strides, last stride 1.
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v), likewise; may share an allocation with `k_cache`.
        page_table: (batch, max_pages_per_seq) int32, physical page of each logical page; entries past a sequence's pages are ignored.
        cu_seqlens_q: (batch + 1,) int32, exclusive prefix sum of query tokens, non-decreasing.
        seqused_k: (batch,) int32, valid KV tokens, this step's included.
        plan: from `plan_attention`; says which mask features are compiled in.
        metadata: `AttentionMetadata.allocate(plan, device)`, refreshed for this step's lengths.
        softmax_scale: multiplies raw logits; default `head_dim ** -0.5`.
        window_left, window_right: keys visible besides the diagonal key; given exactly when the plan has them.
        softcap: logits become `softcap * tanh(logits / softcap)`; above 0 exactly when the plan has it.
        sinks: (num_q_heads,) logit that joins each row's softmax without a value; given exactly when the plan has it.
        alibi_slopes: (num_q_heads,) float32; `-slope * |distance to the diagonal key|` is added to the scaled logits.
        out: (total_q, num_q_heads, head_dim_v), written in place; default: a new tensor.
        lse: (num_q_heads, total_q) float32, written in place; default: a new tensor when the plan has it.

    Returns:
        `out` and `lse` (natural log of the softmax denominator, sink included; None unless the plan has it).

    Raises:
        ValueError: a tensor or value does not fit the plan; nothing was launched.
    """
    check_tensors(plan, q, k_cache, v_cache, page_table, cu_seqlens_q, seqused_k, out)
    check_call_values(plan, metadata, seqused_k, q.shape[0], window_left, window_right, softcap, sinks, alibi_slopes, lse)
    if out is None:
        out = q.new_empty(q.shape[0], plan.problem.num_q_heads, plan.problem.head_dim_v)
    if plan.problem.has_lse and lse is None:
        lse = q.new_empty(plan.problem.num_q_heads, q.shape[0], dtype=torch.float32)
    scale = plan.problem.head_dim**-0.5 if softmax_scale is None else softmax_scale
    if not scale > 0:  # the kernels take maxima of raw logits and mask with -inf before they scale
        raise ValueError(f"softmax_scale: expected a number above 0, got {scale}")
    arguments = AttentionArguments(
        q, k_cache, v_cache, page_table, cu_seqlens_q, seqused_k, out, lse,
        scale, window_left, window_right, softcap, sinks, alibi_slopes,
    )  # fmt: skip
    trace_forward(plan, metadata)
    if plan.problem.arch == REFERENCE_ARCH:
        from fa4_backend.kernels.torch_reference import run_reference

        run_reference(plan.problem, arguments)
    else:
        from fa4_backend.kernels.launch import launch_attention

        launch_attention(plan, metadata, arguments)
    return out, lse
