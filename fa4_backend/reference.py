"""The oracle: attention in float32 (float64 on request), written to be read, against which every kernel is judged.

Also the yardstick of the error budget (`fa4_backend.error_budget`): the same mathematics rounded to a kernel's dtype where a kernel
would round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fa4_backend.arguments import AttentionArguments, LatentArguments
from fa4_backend.problem import FP8_MAX


class Sequence(NamedTuple):
    """One sequence of a call, gathered: what its rows see and nothing else."""

    rows: slice  # of q and out
    q: torch.Tensor  # (seqlen_q, num_q_heads, head_dim)
    k: torch.Tensor  # (last - first, num_kv_heads, head_dim)
    v: torch.Tensor  # (last - first, num_kv_heads, head_dim_v)
    first: int  # position of the first key that any row sees
    seqlen_k: int  # one past the last


def sequences(arguments: AttentionArguments, *, is_causal: bool) -> Iterator[Sequence]:
    """The sequences of a call that have rows. Lengths are cut to `kv_room`; pages that no row sees are not followed."""
    a = arguments
    bounds = a.cu_seqlens_q.tolist()
    for seq_idx, seqused in enumerate(a.seqused_k.tolist()):
        rows, seqlen_k = slice(bounds[seq_idx], bounds[seq_idx + 1]), min(seqused, kv_room(a, seq_idx))
        if rows.start == rows.stop:
            continue
        first_visible, _ = visible_columns(rows.stop - rows.start, seqlen_k, is_causal, a.window_left, a.window_right)
        first = min(first_visible[0], seqlen_k)
        k, v = (
            dequantise(_gather(a, cache, seq_idx, first, seqlen_k), scale)
            for cache, scale in ((a.k_cache, a.k_scale), (a.v_cache, a.v_scale))
        )
        yield Sequence(rows, dequantised_queries(a, a.q[rows]), k, v, first, seqlen_k)


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
        `cu_seqlens_q[-1]` are 0 and -inf.
    """
    a = arguments
    total_q, num_q_heads, _ = a.q.shape
    out = torch.zeros((total_q, num_q_heads, a.v_cache.shape[-1]), dtype=accumulate, device=a.q.device)
    lse = torch.full((num_q_heads, total_q), -math.inf, dtype=accumulate, device=a.q.device)
    for sequence in sequences(a, is_causal=is_causal):
        if sequence.k.shape[0]:
            out[sequence.rows], lse[:, sequence.rows] = _one_sequence(a, sequence, is_causal, dtype, accumulate)
    return out, lse


def kv_room(arguments: AttentionArguments, seq_idx: int) -> int:
    """Tokens that a sequence's pages hold, or without pages rows of k from its first key on: no sequence is longer."""
    a = arguments
    if a.page_table is not None:
        return a.page_table.shape[1] * a.k_cache.shape[1]
    assert a.cu_seqlens_k is not None
    return max(0, a.k_cache.shape[0] - int(a.cu_seqlens_k[seq_idx]))


def _gather(a: AttentionArguments, cache: torch.Tensor, seq_idx: int, first: int, last: int) -> torch.Tensor:
    """Tokens `first` to `last` (exclusive) of a sequence: (last - first, num_kv_heads, head_dim)."""
    if a.page_table is not None:
        return gather_pages(cache, a.page_table[seq_idx], first, last)
    assert a.cu_seqlens_k is not None
    begin = int(a.cu_seqlens_k[seq_idx])
    return cache[begin + first : begin + last]


def latent_oracle(
    arguments: LatentArguments, *, dtype: torch.dtype = torch.float32, accumulate: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed latent attention of one call, sequence by sequence: for query i of a head, with latents c and rotary parts r of its keys,

        logit[j] = (q[i] . c[j] + q_rope[i] . r[j]) * softmax_scale,   out[i] = sum over j of softmax(logit)[j] * c[j]

    Args:
        arguments: a checked call; its `out` and `lse` are neither read nor written.
        dtype, accumulate: as in `attention_oracle`.

    Returns:
        out (total_q, num_q_heads, head_dim_v) and lse (num_q_heads, total_q), natural log, in `accumulate`; rows without a key and rows
        past `cu_seqlens_q[-1]` are 0 and -inf.
    """
    a = arguments
    out = torch.zeros(a.q.shape, dtype=accumulate, device=a.q.device)
    lse = torch.full((a.q.shape[1], a.q.shape[0]), -math.inf, dtype=accumulate, device=a.q.device)
    bounds, width = a.cu_seqlens_q.tolist(), a.page_table.shape[1] * a.latent_cache.shape[1]
    for seq_idx, seqused in enumerate(a.seqused_k.tolist()):
        rows, seqlen_k = slice(bounds[seq_idx], bounds[seq_idx + 1]), min(seqused, width)
        if rows.start == rows.stop or seqlen_k == 0:
            continue
        latents = gather_pages(a.latent_cache[:, :, None], a.page_table[seq_idx], 0, seqlen_k)
        c, r = dequantise(latents, a.latent_scale)[:, 0].to(dtype).to(accumulate).tensor_split([a.q.shape[-1]], dim=-1)
        q, q_rope = (x[rows].to(dtype).to(accumulate).transpose(0, 1) for x in (a.q, a.q_rope))
        scores = (q @ c.T + q_rope @ r.T) * a.softmax_scale
        diagonal = torch.arange(rows.stop - rows.start, device=q.device) + seqlen_k - (rows.stop - rows.start)
        scores = scores.masked_fill(torch.arange(seqlen_k, device=q.device) > diagonal[:, None], -math.inf)
        out[rows] = (softmax_weights(scores, None).to(dtype).to(accumulate) @ c).to(dtype).to(accumulate).transpose(0, 1)
        lse[:, rows] = torch.logsumexp(scores, dim=-1)
    return out, lse


def as_paged(a: LatentArguments) -> AttentionArguments:
    """A latent call as one of paged attention: one KV head, whose values are the first columns of its keys."""
    cache = a.latent_cache[:, :, None]
    return AttentionArguments(
        torch.cat((a.q, a.q_rope), dim=-1), cache, cache[..., : a.q.shape[-1]], a.page_table, a.cu_seqlens_q, a.seqused_k, a.out, a.lse,
        a.softmax_scale, None, None, 0.0, None, None, a.latent_scale, a.latent_scale,
    )  # fmt: skip


def gather_pages(cache: torch.Tensor, pages: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Tokens `first` to `last` (exclusive) of a sequence: (last - first, num_kv_heads, head_dim), from pages listed in `pages`."""
    page_size = cache.shape[1]
    begin = first // page_size
    listed = pages[begin : -(-last // page_size)].long()
    return cache[listed].flatten(0, 1)[first - begin * page_size : last - begin * page_size]


def dequantised_queries(a: AttentionArguments, q: torch.Tensor) -> torch.Tensor:
    """What rows of q, (rows, num_q_heads, head_dim), stand for: `q` itself where the call has no scale of q, else float32."""
    if a.q_scale is None:
        return q
    return dequantise(q, a.q_scale.repeat_interleave(q.shape[1] // a.q_scale.shape[0]))


def dequantise(stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What K or V in FP8 stand for, in float32; `stored` itself without a scale.

    Args:
        stored: (keys, num_kv_heads, head_dim).
        scale: (num_kv_heads,) float32.
    """
    return stored if scale is None else stored.float() * scale[:, None]


def rounded(out: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """Results as `out` holds them: rounded to `dtype`; with a scale of FP8 divided by it first and cut to what e4m3 holds.

    Args:
        scale: (1,) float32, above 0.
    """
    if scale is None:
        return out.to(dtype)
    return (out.float() * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(dtype)


def visible_columns(
    seqlen_q: int, seqlen_k: int, is_causal: bool, window_left: int | None, window_right: int | None
) -> tuple[list[int], list[int]]:
    """First visible key and one past the last, for each of `seqlen_q` query rows; first >= last for a row that sees none."""
    diagonal = [seqlen_k - seqlen_q + row for row in range(seqlen_q)]
    right = 0 if is_causal else window_right
    first = [0 if window_left is None else max(0, d - window_left) for d in diagonal]
    last = [seqlen_k if right is None else min(seqlen_k, d + right + 1) for d in diagonal]
    return first, last


def logits(
    a: AttentionArguments, sequence: Sequence, is_causal: bool, dtype: torch.dtype, accumulate: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one sequence, (num_q_heads, seqlen_q, keys), -inf where masked, and their lse (num_q_heads, seqlen_q), sinks included."""
    q, k, seqlen_k = sequence.q, sequence.k, sequence.seqlen_k
    seqlen_q, q_per_kv = q.shape[0], q.shape[1] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(q_per_kv, dim=1).transpose(0, 1).to(accumulate)
    scores = torch.matmul(q.to(dtype).transpose(0, 1).to(accumulate), keys.transpose(1, 2)) * a.softmax_scale
    if a.softcap > 0:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    columns = torch.arange(sequence.first, seqlen_k, device=q.device)
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
    return scores, lse


def softmax_weights(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Weights of logits (num_q_heads, seqlen_q, keys), relative to the largest: exp(scores - lse) would be off by the lse's rounding, which
    at large logits is more than the lse says. A row without a key has weights 0."""
    largest = scores.amax(-1, keepdim=True)
    sink = None if sinks is None else sinks.to(scores.dtype)[:, None, None]
    if sink is not None:
        largest = torch.maximum(largest, sink)
    largest = torch.where(largest.isneginf(), 0.0, largest)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - largest)
    return weights / torch.where(total == 0, 1.0, total)


def _one_sequence(
    a: AttentionArguments, sequence: Sequence, is_causal: bool, dtype: torch.dtype, accumulate: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out (seqlen_q, num_q_heads, dv), lse (num_q_heads, seqlen_q)."""
    scores, lse = logits(a, sequence, is_causal, dtype, accumulate)
    q_per_kv = sequence.q.shape[1] // sequence.v.shape[1]
    v = sequence.v.to(dtype).repeat_interleave(q_per_kv, dim=1).transpose(0, 1).to(accumulate)
    out = torch.matmul(softmax_weights(scores, a.sinks).to(dtype).to(accumulate), v)
    return out.to(dtype).to(accumulate).transpose(0, 1), lse
