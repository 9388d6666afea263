"""The public operator of multi-head latent attention, absorbed form: check the call, then run the planned kernel."""

from __future__ import annotations

import torch

from fa4_backend.arguments import LatentArguments, LatentTensors
from fa4_backend.kernels.launch_abi import mla_decode_arguments
from fa4_backend.metadata import AttentionMetadata
from fa4_backend.plan import AttentionPlan
from fa4_backend.trace import announce
from fa4_backend.validation import check_no_backward, check_tensors, check_values


def mla_decode(
    q: torch.Tensor,
    q_rope: torch.Tensor,
    latent_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    *,
    plan: AttentionPlan,
    metadata: AttentionMetadata,
    softmax_scale: float,
    latent_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of short ragged queries over a paged cache of latents, which all heads share.

    Latent c and rotary part r of a token lie one behind the other in the cache. Logits are `(q . c + q_rope . r) * softmax_scale`, and
    the values are the latents c: projections to and from the latent space are the caller's. Causal attention is aligned bottom-right:
    query i of a sequence sees keys up to `seqused_k - query_len + i`. What holds for rows without a key, rows past `cu_seqlens_q[-1]`,
    poisoned memory and lengths past a limit is as in `fa4_backend.ops.paged_attention`.

    Args:
        q: (total_q, num_q_heads, head_dim_v), any row and head strides, last stride 1; may be longer than `cu_seqlens_q[-1]`.
        q_rope: (total_q, num_q_heads, head_dim - head_dim_v), likewise; may be columns of the rows that q is columns of.
        latent_cache: (num_pages, page_size, head_dim), any page and row strides, last stride 1.
        page_table: (batch, max_pages_per_seq) int32, physical page of each logical page; any number where no row sees a key of the page.
        cu_seqlens_q: (batch + 1,) int32, exclusive prefix sum of query tokens, non-decreasing. A sequence has at most
            `plan.limits.decode_query_len` of them; of a longer one, which a wrong `max_seqlen_q` let through, the rows are undefined.
        seqused_k: (batch,) int32, valid KV tokens, this step's included; more than the page table holds means all that it holds.
        plan: from `plan_attention`, of a problem whose `kv_source` is "latent".
        metadata: `AttentionMetadata.allocate(plan, device)`, refreshed for this step's lengths.
        softmax_scale: multiplies raw logits; that of the model's heads before absorption, so there is no default.
        latent_scale: float32 on the device, () or (1,): a latent and its rotary part are what is stored times this. Only with FP8 latents;
            default: 1. Read by the kernels, so that a captured graph follows its value.
        out: (total_q, num_q_heads, head_dim_v), written in place; default: a new tensor. Shares no element with the others.
        lse: (num_q_heads, total_q) float32, written in place, likewise; default: a new tensor when the plan has it.

    Returns:
        `out` and `lse` (natural log of the softmax denominator, None unless the plan has it).

    Raises:
        ValueError: a tensor or value does not fit the plan, or a tensor wants a gradient; nothing was launched. On CPU tensors also: a
            row sees a page that the page table puts outside the pool (kernels on a GPU cannot say so).
    """
    tensors = LatentTensors(q, q_rope, latent_cache, page_table, cu_seqlens_q, seqused_k, out, lse, latent_scale)
    check_tensors(plan, metadata, tensors)
    if torch.is_grad_enabled():
        check_no_backward(tensors)
    check_values(plan, metadata, seqused_k.shape[0], softmax_scale, None, None, 0.0)
    if out is None:
        out = q.new_empty(q.shape)
    if plan.problem.has_lse and lse is None:
        lse = q.new_empty(plan.problem.num_q_heads, q.shape[0], dtype=torch.float32)
    if q.shape[0] == 0:
        return out, lse  # a step without tokens; a tensor map cannot describe zero rows
    scale = metadata.unit_scale if latent_scale is None else latent_scale
    if scale is not None and scale.dim() == 0:
        scale = scale.expand(1)
    arguments = LatentArguments(q, q_rope, latent_cache, page_table, cu_seqlens_q, seqused_k, out, lse, softmax_scale, scale)
    announce(metadata)
    if metadata.kernels is None:
        from fa4_backend.kernels.torch_reference import run_latent_reference

        run_latent_reference(plan.problem, arguments)
    else:
        _launch(metadata, arguments)
    return out, lse


def _launch(metadata: AttentionMetadata, arguments: LatentArguments) -> None:
    """Run the plan's kernel over the work list that `refresh` made. No sync, no allocation, nothing that depends on lengths."""
    kernels, work = metadata.kernels, metadata.work
    assert kernels is not None and kernels.decode is not None and work is not None, metadata.plan
    kernels.decode(*mla_decode_arguments(arguments, work))
