"""Paged attention on CPU tensors with torch's own fused CPU attention: what serves a machine without a GPU.

Query heads of a KV head are stacked as rows, so that keys and values are gathered once a KV head whatever the ratio. Long
queries go in chunks, each against the keys its rows can see only.
"""

from __future__ import annotations

import math

import torch

from fa4_backend.arguments import AttentionArguments
from fa4_backend.problem import AttentionProblem
from fa4_backend.reference import gather_pages

# Query tokens a chunk. SmolLM2-135M (9/3 heads, d64, bf16), 2 cores of an AVX-512 server: see docs/benchmarks.md, "CPU reference".
QUERY_CHUNK = 256


def run_reference(problem: AttentionProblem, arguments: AttentionArguments) -> None:
    """Compute one call into `arguments.out` (and `lse`). Tensors on the CPU; shapes as in `AttentionArguments`."""
    a = arguments
    bounds = a.cu_seqlens_q.tolist()
    for seq_idx, seqlen_k in enumerate(a.seqused_k.tolist()):
        begin, end = bounds[seq_idx], bounds[seq_idx + 1]
        if begin == end:
            continue
        k = gather_pages(a.k_cache, a.page_table[seq_idx], seqlen_k).transpose(0, 1)
        v = gather_pages(a.v_cache, a.page_table[seq_idx], seqlen_k).transpose(0, 1)
        for chunk in range(begin, end, QUERY_CHUNK):
            rows = slice(chunk, min(chunk + QUERY_CHUNK, end))
            # Key that the chunk's first row has on its diagonal (bottom-right alignment).
            _run_chunk(problem, a, rows, k, v, diagonal=seqlen_k - end + chunk)


def _run_chunk(problem: AttentionProblem, a: AttentionArguments, rows: slice, k: torch.Tensor, v: torch.Tensor, diagonal: int) -> None:
    """Rows `rows` of q against k (num_kv_heads, seqlen_k, d) and v (num_kv_heads, seqlen_k, dv)."""
    num_rows, seqlen_k = rows.stop - rows.start, k.shape[1]
    right = 0 if problem.mask.is_causal else a.window_right
    first = 0 if a.window_left is None else min(max(0, diagonal - a.window_left), seqlen_k)
    last = seqlen_k if right is None else max(min(seqlen_k, diagonal + num_rows + right), first)
    if first == last:
        _store(problem, a, rows, None, torch.full((problem.num_q_heads, num_rows), -math.inf))
        return
    k, v = k[:, first:last], v[:, first:last]
    # (num_kv_heads, q_per_kv * num_rows, d): heads of a KV head one below the other.
    q = a.q[rows].unflatten(1, (problem.num_kv_heads, problem.q_per_kv)).permute(1, 2, 0, 3).flatten(1, 2)
    bias = _mask(problem, a, num_rows, diagonal, first, last, right, q.dtype)
    if a.softcap > 0:
        out, lse = _softcapped_attention(q, k, v, bias, a.softmax_scale, a.softcap)
    else:
        out, lse = _fused_attention(q, k, v, bias, a.softmax_scale)
    out = out.unflatten(1, (problem.q_per_kv, num_rows)).flatten(0, 1)
    lse = lse.float().reshape(problem.num_q_heads, num_rows)
    # Only leading rows can be empty: those whose diagonal key, and all it may look ahead to, lies before key 0.
    num_empty = 0 if right is None else min(max(0, -(diagonal + right)), num_rows)
    if num_empty:
        out, lse = out.clone(), lse.clone()
        out[:, :num_empty], lse[:, :num_empty] = 0.0, -math.inf
    _store(problem, a, rows, out, lse)


def _mask(
    problem: AttentionProblem,
    a: AttentionArguments,
    num_rows: int,
    diagonal: int,
    first: int,
    last: int,
    right: int | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """Additive mask, (1 or num_kv_heads, q_per_kv * num_rows, last - first); None where every row sees every key."""
    sees_all_left = a.window_left is None or first >= diagonal + num_rows - 1 - a.window_left
    sees_all_right = right is None or last <= diagonal + right + 1
    if sees_all_left and sees_all_right and a.alibi_slopes is None:
        return None
    distance = torch.arange(first, last) - torch.arange(diagonal, diagonal + num_rows)[:, None]  # of the key to the diagonal key
    bias = torch.zeros(num_rows, last - first, dtype=dtype)
    if a.alibi_slopes is not None:
        bias = -(a.alibi_slopes.float().view(problem.num_kv_heads, problem.q_per_kv, 1, 1) * distance.abs())
    if right is not None:
        bias = bias.masked_fill(distance > right, -math.inf)
    if a.window_left is not None:
        bias = bias.masked_fill(distance < -a.window_left, -math.inf)
    if a.alibi_slopes is not None:
        return bias.flatten(1, 2)  # stays float32: rounding slope * distance to 16 bits would shift far keys by whole units
    return bias.repeat(problem.q_per_kv, 1)[None]


def _fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's CPU flash attention; it wants equal head dims, so the shorter of k and v gets zero columns."""
    head_dim, head_dim_v = k.shape[-1], v.shape[-1]
    width = max(head_dim, head_dim_v)
    if head_dim < width:
        q, k = torch.nn.functional.pad(q, (0, width - head_dim)), torch.nn.functional.pad(k, (0, width - head_dim))
    if head_dim_v < width:
        v = torch.nn.functional.pad(v, (0, width - head_dim_v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, False, attn_mask=None if bias is None else bias[None], scale=scale
    )
    return out[0, ..., :head_dim_v], lse[0]


def _softcapped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with capped logits, which torch's fused kernel does not have; scores in float32."""
    scores = torch.matmul(q.float(), k.float().transpose(1, 2)).mul_(scale / softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return torch.matmul(weights.to(v.dtype), v), lse


def _store(problem: AttentionProblem, a: AttentionArguments, rows: slice, out: torch.Tensor | None, lse: torch.Tensor) -> None:
    """Write out (num_q_heads, num_rows, dv) and lse (num_q_heads, num_rows); None is all-empty rows. Sinks join here."""
    target = a.out[rows].transpose(0, 1)
    if a.sinks is not None and out is not None:
        with_sink = torch.where(lse.isneginf(), lse, torch.logaddexp(lse, a.sinks.float()[:, None].expand_as(lse)))
        out = out.float() * torch.exp(torch.where(lse.isneginf(), 0.0, lse - with_sink))[..., None]
        lse = with_sink
    if out is None:
        target.zero_()
    else:
        target.copy_(out)
    if a.lse is not None:
        a.lse[:, rows] = lse
