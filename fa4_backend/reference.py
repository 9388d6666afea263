"""The oracle: attention in float32 (float64 on request), written to be read, against which every kernel is judged.

Also the yardstick of the error budget: the same mathematics rounded to a kernel's dtype where a kernel would round.
"""

from __future__ import annotations

import math

import torch

from fa4_backend.arguments import AttentionArguments


def attention_oracle(
    arguments: AttentionArguments, *, is_causal: bool, dtype: torch.dtype = torch.float32, accumulate: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one call, sequence by sequence.

    Args:
        arguments: a checked call; its `out` and `lse` are neither read nor written.
        is_causal: bottom-right aligned causal mask.
        dtype: float32 for the oracle; a 16-bit dtype rounds the products' operands to it, as a kernel does.
        accumulate: dtype of products, softmax and results; float64 judges kernels that compute in float32.

    Returns:
        out (total_q, num_q_heads, head_dim_v) and lse (num_q_heads, total_q), natural log, in `accumulate`; rows past
        `cu_seqlens_q[-1]` are NaN.
    """
    a = arguments
    total_q, num_q_heads, _ = a.q.shape
    out = torch.full((total_q, num_q_heads, a.v_cache.shape[-1]), math.nan, dtype=accumulate, device=a.q.device)
    lse = torch.full((num_q_heads, total_q), math.nan, dtype=accumulate, device=a.q.device)
    bounds = a.cu_seqlens_q.tolist()
    for seq_idx, seqlen_k in enumerate(a.seqused_k.tolist()):
        rows = slice(bounds[seq_idx], bounds[seq_idx + 1])
        if rows.start == rows.stop:
            continue
        first_key = visible_columns(rows.stop - rows.start, seqlen_k, is_causal, a.window_left, a.window_right)[0][0]
        k, v = (gather_pages(cache, a.page_table[seq_idx], seqlen_k, first_key) for cache in (a.k_cache, a.v_cache))
        out[rows], lse[:, rows] = _one_sequence(a, a.q[rows], k, v, is_causal, dtype, accumulate)
    return out, lse


def gather_pages(cache: torch.Tensor, pages: torch.Tensor, seqlen_k: int, first_key: int = 0) -> torch.Tensor:
    """The first `seqlen_k` tokens of a sequence: (seqlen_k, num_kv_heads, head_dim), from pages listed in `pages`.

    Tokens before `first_key`, which no row sees, come out as zeros, whatever they hold and whatever stands in `pages` for them.
    """
    page_size = cache.shape[1]
    first_page, num_pages = first_key // page_size, -(-seqlen_k // page_size)
    skipped = first_page * page_size
    tokens = cache[pages[first_page:num_pages].long()].flatten(0, 1)
    tokens[: first_key - skipped] = 0
    return torch.cat([tokens.new_zeros((skipped, *tokens.shape[1:])), tokens])[:seqlen_k]


def visible_columns(
    seqlen_q: int, seqlen_k: int, is_causal: bool, window_left: int | None, window_right: int | None
) -> tuple[list[int], list[int]]:
    """First visible key and one past the last, for each of `seqlen_q` query rows; first >= last for a row that sees none."""
    diagonal = [seqlen_k - seqlen_q + row for row in range(seqlen_q)]
    right = 0 if is_causal else window_right
    first = [0 if window_left is None else max(0, d - window_left) for d in diagonal]
    last = [seqlen_k if right is None else min(seqlen_k, d + right + 1) for d in diagonal]
    return first, last


def _one_sequence(
    a: AttentionArguments, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, dtype: torch.dtype, accumulate: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (seqlen_q, num_q_heads, d), k and v (seqlen_k, num_kv_heads, d) -> out (seqlen_q, num_q_heads, dv), lse (num_q_heads, seqlen_q)."""
    seqlen_q, num_q_heads, _ = q.shape
    seqlen_k, num_kv_heads, head_dim_v = v.shape
    if seqlen_k == 0:
        out = q.new_zeros((seqlen_q, num_q_heads, head_dim_v), dtype=accumulate)
        return out, q.new_full((num_q_heads, seqlen_q), -math.inf, dtype=accumulate)
    q_per_kv = num_q_heads // num_kv_heads
    k, v = (x.to(dtype).repeat_interleave(q_per_kv, dim=1).transpose(0, 1).to(accumulate) for x in (k, v))
    scores = torch.matmul(q.to(dtype).transpose(0, 1).to(accumulate), k.transpose(1, 2)) * a.softmax_scale
    if a.softcap > 0:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    columns = torch.arange(seqlen_k, device=q.device)
    if a.alibi_slopes is not None:
        diagonal = torch.arange(seqlen_q, device=q.device) + seqlen_k - seqlen_q
        scores = scores - a.alibi_slopes.to(accumulate)[:, None, None] * (diagonal[:, None] - columns).abs()
    first, last = (
        torch.tensor(x, device=q.device)[:, None] for x in visible_columns(seqlen_q, seqlen_k, is_causal, a.window_left, a.window_right)
    )
    scores = scores.masked_fill((columns < first) | (columns >= last), -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if a.sinks is not None:
        # A row without a key stays neutral (O = 0, lse = -inf) even with a sink, so that merging parts never counts a sink twice.
        lse = torch.where(lse.isneginf(), lse, torch.logaddexp(lse, a.sinks.to(accumulate)[:, None].expand_as(lse)))
    # A row without a key has lse = -inf; exp(-inf - 0) = 0 keeps its output 0 instead of NaN.
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    out = torch.matmul(weights.to(dtype).to(accumulate), v)
    return out.to(dtype).to(accumulate).transpose(0, 1), lse
