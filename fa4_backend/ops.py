"""The public operators: check the call, then run the planned kernels."""

from __future__ import annotations

import math

import torch

from fa4_backend.arguments import AttentionArguments, CallTensors, RaggedTensors
from fa4_backend.kernels.launch_abi import convert_arguments, converted_arguments, decode_arguments, prefill_arguments
from fa4_backend.metadata import AttentionMetadata
from fa4_backend.plan import AttentionPlan
from fa4_backend.trace import announce
from fa4_backend.validation import check_no_backward, check_tensors, check_values, check_whole_tables, clamp_window


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of ragged queries over a paged KV cache.

    Causal attention is aligned bottom-right: query i of a sequence sees keys up to `seqused_k - query_len + i`. A row that sees
    no key gives O = 0 and lse = -inf, and so does every row past `cu_seqlens_q[-1]`, as the padded batch of a captured graph has them.

    What no row of a sequence sees may hold anything, NaN and infinity included, and reaches no result: page rows past `seqused_k` or left
    of a window, and rows of `q` past `cu_seqlens_q[-1]`. Page-table entries of which no row sees a key are never followed. A KV length
    past the plan's limit or the page table is cut to it.

    Weighted values are added up in float32 before they are divided by their weights' sum. Results are finite where the largest |V| times
    the number of keys that a row sees is below 2^113, which float16 and FP8 cannot pass, and on Hopper under a soft cap for every finite V
    (docs/numerics.md, "Large values").

    Args:
        q: (total_q, num_q_heads, head_dim) in the plan's `q_dtype`, last stride 1; may be longer than `cu_seqlens_q[-1]`.
        k_cache: (num_pages, page_size, num_kv_heads, head_dim), any page, row and head strides, last stride 1.
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v), likewise; may share an allocation with `k_cache`.
        page_table: (batch, max_pages_per_seq) int32, physical page of each logical page; any number where no row sees a key of the page.
        cu_seqlens_q: (batch + 1,) int32, exclusive prefix sum of query tokens, non-decreasing.
        seqused_k: (batch,) int32, valid KV tokens, this step's included; more than the page table holds means all that it holds.
        plan: from `plan_attention`; says which mask features are compiled in.
        metadata: `AttentionMetadata.allocate(plan, device)`, refreshed for this step's lengths.
        softmax_scale: multiplies raw logits; default `head_dim ** -0.5`.
        window_left, window_right: keys visible besides the diagonal key, 0 or more; given exactly when the plan has them.
        softcap: logits become `softcap * tanh(logits / softcap)`; above 0 exactly when the plan has it.
        sinks: (num_q_heads,) logit that joins each row's softmax without a value, in the problem's `sinks_dtype`; given exactly when the
            plan has it.
        alibi_slopes: (num_q_heads,) float32; `-slope * |distance to the diagonal key|` is added to the scaled logits.
        k_scale, v_scale: float32 on the device, of shape (num_kv_heads,), or () or (1,) for all heads, any stride: K and V are what is
            stored times this. Only with FP8 K and V; default: 1. Read by the kernels, so that a captured graph follows its value.
        q_scale: likewise, float32 on the device: a query is what is given times this, that of its KV head. Only with q in FP8.
        out_scale: () or (1,) float32 on the device, above 0, likewise: `out` is the result divided by this, cut to +-448, as e4m3. Given
            exactly when the plan's `out_dtype` is FP8.
        out: (total_q, num_q_heads, head_dim_v) in the plan's `out_dtype`, written in place; default: a new tensor. Shares no element with
            q, the caches or lse.
        lse: (num_q_heads, total_q) float32, written in place, likewise; default: a new tensor when the plan has it.

    Returns:
        `out` and `lse` (natural log of the softmax denominator, None unless the plan has it). A sink is part of the denominator of every
        row that sees a key; a row that sees none has -inf, with a sink too: merging parts must not count a sink for an empty part.

    Raises:
        ValueError: a tensor or value does not fit the plan, or a tensor wants a gradient; nothing was launched. On CPU tensors also: a
            row sees a page that the page table puts outside the pool (kernels on a GPU cannot say so).
    """
    tensors = CallTensors(
        q, k_cache, v_cache, page_table, cu_seqlens_q, seqused_k, out, lse, sinks, alibi_slopes, k_scale, v_scale, out_scale, q_scale
    )
    check_tensors(plan, metadata, tensors)
    if torch.is_grad_enabled():
        check_no_backward(tensors)
    scale = plan.problem.head_dim**-0.5 if softmax_scale is None else softmax_scale
    check_values(plan, metadata, seqused_k.shape[0], scale, window_left, window_right, softcap)
    check_whole_tables(metadata, page_table)
    left, right = clamp_window(window_left), clamp_window(window_right)
    out, lse = _results(plan, q, out, lse)
    if q.shape[0] == 0:
        return out, lse  # a step without tokens; a tensor map cannot describe zero rows
    arguments = AttentionArguments(
        q, k_cache, v_cache, page_table, cu_seqlens_q, seqused_k, out, lse,
        scale, left, right, softcap, sinks, alibi_slopes, _head_scales(metadata, k_scale), _head_scales(metadata, v_scale),
        None if out_scale is None else out_scale.view(1), q_scale=_query_scales(metadata, q_scale),
    )  # fmt: skip
    _run(metadata, arguments)
    return out, lse


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    plan: AttentionPlan,
    metadata: AttentionMetadata,
    softmax_scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of ragged queries over ragged keys and values, which have no pages: one sequence behind the other in `k` and `v`.

    Masks, empty rows, padding rows, results and refusals are those of `paged_attention`, and so are the bits. Rows of `k` and `v` past
    `cu_seqlens_k[-1]`, or left of a window, may hold anything. A KV length past the plan's limit, or past the end of `k`, is cut to it.

    Args:
        q: (total_q, num_q_heads, head_dim), last stride 1; may be longer than `cu_seqlens_q[-1]`.
        k: (total_k, num_kv_heads, head_dim), any row and head strides, last stride 1; may be longer than `cu_seqlens_k[-1]`, or empty.
        v: (total_k, num_kv_heads, head_dim_v), likewise; may share an allocation with `k`.
        cu_seqlens_q: (batch + 1,) int32, exclusive prefix sum of query tokens, non-decreasing.
        cu_seqlens_k: (batch + 1,) int32, exclusive prefix sum of KV tokens, non-decreasing; that of the metadata's last refresh.
        plan: from `plan_attention`, of a problem with `kv_source="ragged"`.
        metadata: `AttentionMetadata.allocate(plan, device)`, refreshed with `cu_seqlens_q` and `cu_seqlens_k`.
        softmax_scale, window_left, window_right, softcap, sinks, alibi_slopes, k_scale, v_scale, q_scale, out_scale, out, lse: as in
            `paged_attention`.

    Returns:
        `out` and `lse`, as `paged_attention` does.

    Raises:
        ValueError: a tensor or value does not fit the plan, or a tensor wants a gradient; nothing was launched.
    """
    tensors = RaggedTensors(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, sinks, alibi_slopes, k_scale, v_scale, out_scale, q_scale)
    check_tensors(plan, metadata, tensors)
    if torch.is_grad_enabled():
        check_no_backward(tensors)
    scale = plan.problem.head_dim**-0.5 if softmax_scale is None else softmax_scale
    num_seqs = cu_seqlens_k.shape[0] - 1
    check_values(plan, metadata, num_seqs, scale, window_left, window_right, softcap)
    left, right = clamp_window(window_left), clamp_window(window_right)
    out, lse = _results(plan, q, out, lse)
    if q.shape[0] == 0:
        return out, lse
    if k.shape[0] == 0:  # a tensor map cannot describe zero rows
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return out, lse
    assert metadata.kv_lens is not None, plan
    _run(metadata, AttentionArguments(
        q, k, v, None, cu_seqlens_q, metadata.kv_lens[:num_seqs], out, lse,
        scale, left, right, softcap, sinks, alibi_slopes, _head_scales(metadata, k_scale), _head_scales(metadata, v_scale),
        None if out_scale is None else out_scale.view(1), cu_seqlens_k, _query_scales(metadata, q_scale),
    ))  # fmt: skip
    return out, lse


def _results(
    plan: AttentionPlan, q: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`out` and `lse` as given, or made."""
    if out is None:
        out_dtype = getattr(torch, plan.problem.out_dtype)
        out = q.new_empty(q.shape[0], plan.problem.num_q_heads, plan.problem.head_dim_v, dtype=out_dtype)
    if plan.problem.has_lse and lse is None:
        lse = q.new_empty(plan.problem.num_q_heads, q.shape[0], dtype=torch.float32)
    return out, lse


def _head_scales(metadata: AttentionMetadata, scale: torch.Tensor | None) -> torch.Tensor | None:
    """One scale a KV head, as kernels read them; None where K and V have none."""
    if metadata.unit_scale is None:
        return None
    return (metadata.unit_scale if scale is None else scale).expand(metadata.plan.problem.num_kv_heads)


def _query_scales(metadata: AttentionMetadata, scale: torch.Tensor | None) -> torch.Tensor | None:
    """The same of q."""
    return _head_scales(metadata, scale) if metadata.plan.problem.has_q_scale else None


def _run(metadata: AttentionMetadata, arguments: AttentionArguments) -> None:
    """Run the plan's kernels, or the reference."""
    announce(metadata)
    if metadata.kernels is None:
        from fa4_backend.kernels.torch_reference import run_reference

        run_reference(metadata.plan.problem, arguments)
    else:
        _launch(metadata, arguments)


def _launch(metadata: AttentionMetadata, arguments: AttentionArguments) -> None:
    """Run the plan's kernels over the work lists that `refresh` made. No sync, no allocation, nothing that depends on lengths."""
    kernels, work, bounds = metadata.kernels, metadata.work, metadata.bounds
    assert kernels is not None and work is not None and bounds is not None, metadata.plan
    decode_query_len = metadata.plan.limits.decode_query_len
    if bounds.is_narrow:
        assert metadata.narrow is not None, metadata.plan
        metadata.narrow.launch(*prefill_arguments(arguments, metadata.narrow.work))
        return
    if bounds.converts:
        # Before the decode kernel, beside which the prefill kernel runs: that one then begins when both K and V are there.
        assert kernels.convert is not None and metadata.converted is not None, metadata.plan
        keys, values, room = metadata.converted
        room.enter()
        kernels.convert(*convert_arguments(arguments, work, keys, values))
    if kernels.decode is not None and (kernels.prefill is None or bounds.min_seqlen_q <= decode_query_len):
        kernels.decode(*decode_arguments(arguments, work))
    if kernels.decode is None or bounds.max_seqlen_q > decode_query_len:
        if bounds.has_messages:
            assert metadata.messages is not None, metadata.plan
            metadata.messages.launch(*prefill_arguments(arguments, metadata.messages.work))
        elif bounds.converts:
            assert kernels.converted is not None and metadata.converted is not None, metadata.plan
            keys, values, _ = metadata.converted
            kernels.converted(*converted_arguments(arguments, work, keys, values))
        else:
            assert kernels.prefill is not None, metadata.plan
            kernels.prefill(*prefill_arguments(arguments, work))
