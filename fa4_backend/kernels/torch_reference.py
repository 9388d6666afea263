"""Attention on CPU tensors, with pages or without, with torch's own fused CPU attention: what serves a machine without a GPU.

Query heads of a KV head are stacked as rows, so that keys and values are gathered once a KV head whatever the ratio. Long
queries go in chunks, each against the keys its rows can see only; short queries of several sequences go together.

FP8 keys and values become those of q's dtype, which holds every e4m3 number; their scales multiply logits and results, so that no key and
no value is rounded.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from fa4_backend.arguments import AttentionArguments, LatentArguments
from fa4_backend.problem import AttentionProblem
from fa4_backend.reference import as_paged, kv_room, rounded, softmax_weights

# Query tokens a chunk. SmolLM2-135M (9/3 heads, d64, bf16), 2 cores of an AVX-512 server: see docs/benchmarks.md, "CPU reference".
QUERY_CHUNK = 256
# Queries of at most this many tokens share operations with other sequences of as many: an operation costs more than their work.
SHORT_QUERY = 16
# Keys of a group, padding included: bounds its memory.
GROUP_KEYS = 16384
# Keys that a group may be padded by: about the cost of a group's operations.
GROUP_PADDING = 2048


class Span(NamedTuple):
    """Consecutive query rows of one sequence and the keys that any of them sees."""

    seq_idx: int
    begin: int  # first row of q
    num_rows: int
    diagonal: int  # position of the first row's diagonal key; negative where the row sees no key
    first: int  # position of the first key seen
    last: int  # one past the last; `first` where no row sees a key

    @property
    def num_keys(self) -> int:
        """Keys between the first and the last that any row sees."""
        return self.last - self.first


def run_reference(problem: AttentionProblem, arguments: AttentionArguments) -> None:
    """Compute one call into `arguments.out` (and `lse`). Tensors on the CPU; shapes as in `AttentionArguments`.

    Raises:
        ValueError: a row sees a page that the page table puts outside the pool.
    """
    a = arguments
    right, dtype = 0 if problem.mask.is_causal else a.window_right, getattr(torch, problem.dtype)
    num_tokens = min(int(a.cu_seqlens_q[-1]), a.q.shape[0])
    spans = _spans(a, right)
    page_table = None if a.page_table is None else _followed_pages(a, a.page_table, spans)
    if num_tokens < a.q.shape[0]:
        a.out[num_tokens:] = 0.0
        if a.lse is not None:
            a.lse[:, num_tokens:] = -math.inf
    for group in _groups(spans, alone=problem.batch_invariant):
        rows = _rows(group)
        if group[0].num_keys == 0:
            _store(a, rows, None, torch.full((problem.num_q_heads, group[0].num_rows), -math.inf))
            continue
        if page_table is None:
            assert a.cu_seqlens_k is not None
            k, v = (_slice(x, a.cu_seqlens_k, group).to(dtype) for x in (a.k_cache, a.v_cache))
        else:
            pages = _pages(page_table, group, a.k_cache.shape[1])
            k, v = (_gather(cache, pages, group).to(dtype) for cache in (a.k_cache, a.v_cache))
        _store(a, rows, *_attend(problem, a, group, rows, k, v, right))


def run_latent_reference(problem: AttentionProblem, arguments: LatentArguments) -> None:
    """Compute one call of latent attention into `arguments.out` (and `lse`), as attention over one KV head; tensors on the CPU.

    Raises:
        ValueError: a row sees a page that the page table puts outside the pool.
    """
    run_reference(problem, as_paged(arguments))


def _spans(a: AttentionArguments, right: int | None) -> list[Span]:
    """Chunks of at most `QUERY_CHUNK` rows of each sequence. `right`: keys visible past the diagonal key; None: all.

    Lengths are cut to the rows of q and the pages of the table, as `kernels.common.seqlen_info` does on a GPU.
    """
    spans = []
    bounds = [min(bound, a.q.shape[0]) for bound in a.cu_seqlens_q.tolist()]
    for seq_idx, seqused in enumerate(a.seqused_k.tolist()):
        seqlen_k, end = max(0, min(seqused, kv_room(a, seq_idx))), bounds[seq_idx + 1]
        for begin in range(bounds[seq_idx], end, QUERY_CHUNK):
            num_rows = min(QUERY_CHUNK, end - begin)
            diagonal = seqlen_k - end + begin  # bottom-right alignment
            first = 0 if a.window_left is None else min(max(0, diagonal - a.window_left), seqlen_k)
            last = seqlen_k if right is None else max(min(seqlen_k, diagonal + num_rows + right), first)
            spans.append(Span(seq_idx, begin, num_rows, diagonal, first, last))
    return spans


def _followed_pages(a: AttentionArguments, page_table: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """The page table with 0 in place of entries outside the pool, none of which a row may need."""
    num_pages, page_size = a.k_cache.shape[:2]
    if not any(span.num_keys for span in spans) or all(0 <= int(page) < num_pages for page in torch.aminmax(page_table)):
        return page_table
    outside = (page_table < 0) | (page_table >= num_pages)
    for span in spans:
        begin, end = span.first // page_size, -(-span.last // page_size)
        if span.num_keys and outside[span.seq_idx, begin:end].any():
            logical = begin + int(outside[span.seq_idx, begin:end].int().argmax())
            raise ValueError(
                f"page_table[{span.seq_idx}, {logical}]: expected a page below {num_pages}, the pool's, since keys of sequence "
                f"{span.seq_idx} on logical page {logical} are visible, got {int(page_table[span.seq_idx, logical])}"
            )
    return page_table.masked_fill(outside, 0)


def _groups(spans: list[Span], *, alone: bool) -> list[list[Span]]:
    """Spans that are computed together: equally many rows, similar numbers of keys. `alone`: each by itself, whatever its neighbours."""
    # Leading rows without a key are told apart in a group of one only.
    shares = [not alone and span.num_rows <= SHORT_QUERY and span.num_keys > 0 and span.diagonal >= 0 for span in spans]
    singles = [[span] for span, shared in zip(spans, shares, strict=True) if not shared]
    shared = [span for span, shared in zip(spans, shares, strict=True) if shared]
    # Spans that a window cuts off at the left all see as many keys; `_gather` wants them apart from others.
    shared.sort(key=lambda span: (span.num_rows, span.first > 0, -span.num_keys))
    groups: list[list[Span]] = []
    padding = 0
    for span in shared:
        longest = groups[-1][0] if groups else None
        if longest is not None and (longest.num_rows, longest.first > 0) == (span.num_rows, span.first > 0):
            padding += longest.num_keys - span.num_keys
            if padding <= GROUP_PADDING and longest.num_keys * (len(groups[-1]) + 1) <= GROUP_KEYS:
                groups[-1].append(span)
                continue
        groups.append([span])
        padding = 0
    return singles + groups


def _rows(group: list[Span]) -> slice | torch.Tensor:
    """Rows of q and out that a group covers, span by span."""
    if len(group) == 1:
        return slice(group[0].begin, group[0].begin + group[0].num_rows)
    return (torch.tensor([span.begin for span in group])[:, None] + torch.arange(group[0].num_rows)).flatten()


def _rows_of(q: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """Those rows; torch takes no list of rows of an FP8 tensor."""
    return q[rows] if isinstance(rows, slice) or q.dtype.itemsize > 1 else q.view(torch.uint8)[rows].view(q.dtype)


def _pages(page_table: torch.Tensor, group: list[Span], page_size: int) -> torch.Tensor:
    """(spans, pages): physical pages of each span's keys. A shorter span is padded with pages of no meaning."""
    if len(group) == 1:
        (span,) = group
        return page_table[span.seq_idx, None, span.first // page_size : -(-span.last // page_size)]
    begins = torch.tensor([span.first // page_size for span in group])
    num_pages = max(-(-span.last // page_size) - span.first // page_size for span in group)
    columns = (begins[:, None] + torch.arange(num_pages)).clamp_(max=page_table.shape[1] - 1)  # a padded span's may lie past the table
    return page_table[torch.tensor([span.seq_idx for span in group])[:, None], columns]


def _gather(cache: torch.Tensor, pages: torch.Tensor, group: list[Span]) -> torch.Tensor:
    """Keys or values of a group, (spans, num_kv_heads, keys, head_dim), from `_pages`; zero past a span's last key.

    Whole pages are copied: torch copies slices of a first dimension 3 to 20 times faster than it follows any other index.
    """
    page_size = cache.shape[1]
    num_keys = max(span.num_keys for span in group)
    tokens = cache.index_select(0, pages.flatten()).unflatten(0, pages.shape).flatten(1, 2)
    offsets = [span.first % page_size for span in group]
    if len(set(offsets)) == 1:
        tokens = tokens[:, offsets[0] : offsets[0] + num_keys]
    else:
        tokens = torch.stack([one[offset : offset + num_keys] for one, offset in zip(tokens, offsets, strict=True)])
    for i, span in enumerate(group):
        if span.num_keys < num_keys:
            tokens[i, span.num_keys :].zero_()
    return tokens.transpose(1, 2)


def _slice(x: torch.Tensor, cu_seqlens_k: torch.Tensor, group: list[Span]) -> torch.Tensor:
    """The same from k or v without pages, (total_k, num_kv_heads, head_dim)."""
    num_keys = max(span.num_keys for span in group)
    begins = [int(cu_seqlens_k[span.seq_idx]) + span.first for span in group]
    if len(group) == 1:
        return x[None, begins[0] : begins[0] + num_keys].transpose(1, 2)
    tokens = x.new_zeros(len(group), num_keys, *x.shape[1:])
    for i, (begin, span) in enumerate(zip(begins, group, strict=True)):
        tokens[i, : span.num_keys] = x[begin : begin + span.num_keys]
    return tokens.transpose(1, 2)


def _attend(
    problem: AttentionProblem,
    a: AttentionArguments,
    group: list[Span],
    rows: slice | torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    right: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A group against its keys and values, as `_gather` makes them.

    Returns:
        out (rows, num_q_heads, head_dim_v) and lse (num_q_heads, rows), without sinks.
    """
    num_rows = group[0].num_rows
    # (spans, num_kv_heads, q_per_kv * num_rows, d): heads of a KV head one below the other.
    q = _rows_of(a.q, rows).to(k.dtype).unflatten(0, (len(group), num_rows)).unflatten(2, (problem.num_kv_heads, problem.q_per_kv))
    q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
    bias = _mask(problem, a, group, k.shape[2], right, k.dtype)
    parts = []
    for heads, scale in _logit_scales(a):
        own_bias = bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
        if a.softcap > 0:
            parts.append(_softcapped_attention(q[:, heads], k[:, heads], v[:, heads], own_bias, scale, a.softcap))
        else:
            parts.append(_fused_attention(q[:, heads], k[:, heads], v[:, heads], own_bias, scale))
    out, lse = parts[0] if len(parts) == 1 else (torch.cat([part[i] for part in parts], dim=1) for i in (0, 1))
    if a.v_scale is not None:
        out = out.float() * a.v_scale[:, None, None]
    out = out.unflatten(2, (problem.q_per_kv, num_rows)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    lse = lse.float().unflatten(2, (problem.q_per_kv, num_rows)).permute(1, 2, 0, 3).reshape(problem.num_q_heads, -1)
    # Only leading rows can be empty: those whose diagonal key, and all it may look ahead to, lies before key 0.
    num_empty = 0 if right is None else min(max(0, -(group[0].diagonal + right)), num_rows)
    if num_empty:
        out, lse = out.clone(), lse.clone()
        out[:num_empty], lse[:, :num_empty] = 0.0, -math.inf
    return out, lse


def _logit_scales(a: AttentionArguments) -> list[tuple[slice, float]]:
    """What dot products of given queries with stored keys are multiplied by, for each run of KV heads with the same scales."""
    if a.k_scale is None:
        return [(slice(None), a.softmax_scale)]
    runs, begin = [], 0
    scales = a.k_scale if a.q_scale is None else a.k_scale * a.q_scale
    for scale, equal in itertools.groupby(scales.tolist()):
        end = begin + sum(1 for _ in equal)
        runs.append((slice(begin, end), a.softmax_scale * scale))
        begin = end
    return runs


def _mask(
    problem: AttentionProblem, a: AttentionArguments, group: list[Span], num_keys: int, right: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Additive mask, (spans, 1 or num_kv_heads, q_per_kv * num_rows, num_keys); None where every row sees every key."""
    num_rows = group[0].num_rows
    sees_all_left = a.window_left is None or all(s.first >= s.diagonal + num_rows - 1 - a.window_left for s in group)
    sees_all_right = right is None or all(s.last <= s.diagonal + right + 1 for s in group)
    is_padded = any(span.num_keys < num_keys for span in group)
    if sees_all_left and sees_all_right and not is_padded and a.alibi_slopes is None:
        return None
    keys = torch.arange(num_keys)
    diagonals = torch.tensor([span.diagonal - span.first for span in group])[:, None, None] + torch.arange(num_rows)[:, None]
    distance = keys - diagonals  # of the key to the row's diagonal key: (spans, num_rows, num_keys)
    hidden = keys >= torch.tensor([span.num_keys for span in group])[:, None, None]
    if right is not None:
        hidden = hidden | (distance > right)
    if a.window_left is not None:
        hidden = hidden | (distance < -a.window_left)
    if a.alibi_slopes is None:
        bias = torch.zeros(distance.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
        return bias.repeat(1, problem.q_per_kv, 1)[:, None]
    # Stays float32: rounding slope * distance to 16 bits would shift far keys by whole units.
    slopes = a.alibi_slopes.float().view(problem.num_kv_heads, problem.q_per_kv, 1, 1)
    return (-slopes * distance[:, None, None].abs()).masked_fill_(hidden[:, None, None], -math.inf).flatten(2, 3)


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
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    return out[..., :head_dim_v], lse


def _softcapped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with capped logits, which torch's fused kernel does not have; scores in float32."""
    scores = torch.matmul(q.float(), k.float().transpose(2, 3)).mul_(scale / softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul(softmax_weights(scores, None).to(v.dtype), v), lse


def _store(a: AttentionArguments, rows: slice | torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor) -> None:
    """Write out (rows, num_q_heads, dv) and lse (num_q_heads, rows); None is all-empty rows. Sinks join here."""
    if a.sinks is not None and out is not None:
        with_sink = torch.where(lse.isneginf(), lse, torch.logaddexp(lse, a.sinks.float()[:, None].expand_as(lse)))
        out = out.float() * torch.exp(torch.where(lse.isneginf(), 0.0, lse - with_sink)).T[..., None]
        lse = with_sink
    stored = a.out.new_zeros(()) if out is None else rounded(out, a.out.dtype, a.out_scale)
    if a.out_scale is None:
        a.out[rows] = stored
    else:  # torch takes no list of rows of an FP8 tensor
        a.out.view(torch.uint8)[rows] = stored.view(torch.uint8)
    if a.lse is not None:
        a.lse[:, rows] = lse
