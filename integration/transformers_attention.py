"""Hugging Face transformers: `attn_implementation="fa4_flash"`, in `generate()` and in continuous batching.

    from fa4_integration import transformers_attention
    transformers_attention.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fa4_flash")

transformers keeps a layer's keys without pages and calls attention layer by layer: each call copies K and V into pages and makes its own
work lists. A door for models and tests, not for speed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits, MaskFeatures, UnsupportedProblem, paged_attention
from fa4_backend.device import plan_on
from fa4_integration.common.serving_device import arch_of_torch_device

NAME = "fa4_flash"  # continuous batching takes names with "flash" in them only
PAGE_SIZE = 16

_held: dict[tuple[AttentionProblem, torch.device], AttentionMetadata] = {}  # one for each kind of layer; grows with the batches


def register() -> None:
    """Make `fa4_flash` an attention implementation of transformers. May be called any number of times."""
    from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    # Of a name with "flash" in it transformers imports the functions of a flash-attn package at once, and fails for want of one.
    load = modeling_utils.lazy_import_flash_attention
    if not hasattr(load, "fa4_wraps"):
        modeling_utils.lazy_import_flash_attention = _load_others(load)


def _load_others(load: Any) -> Any:
    """transformers' import of a flash-attn package, without ours, which is none."""

    def lazy_import_flash_attention(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        return None if implementation == NAME else load(implementation, *args, **kwargs)

    lazy_import_flash_attention.fa4_wraps = load  # type: ignore[attr-defined]
    return lazy_import_flash_attention


class Ragged(NamedTuple):
    """A batch without padding between its sequences."""

    q: torch.Tensor  # (total_q, num_q_heads, head_dim); may be longer than cu_seqlens_q[-1]
    k: torch.Tensor  # (total_k, num_kv_heads, head_dim), likewise
    v: torch.Tensor  # (total_k, num_kv_heads, head_dim_v), likewise
    cu_seqlens_q: torch.Tensor  # (batch + 1,) int32
    cu_seqlens_k: torch.Tensor  # (batch + 1,) int32
    max_seqlen_q: int  # upper bounds
    max_seqlen_k: int
    places: torch.Tensor | None  # (batch, query_len) bool, which rows of the padded batch these are; None: all


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        query: (batch, num_q_heads, query_len, head_dim); in continuous batching one row of all sequences' tokens.
        key, value: (batch, num_kv_heads, kv_len, head_dim); in continuous batching the step's own, which `cache` joins to the others.
        attention_mask: (batch, keys) bool, False where a key is padding; None: none is.
        sliding_window: keys that a query sees, its own included.
        s_aux: (num_q_heads,) sinks.

    Returns:
        (batch, query_len, num_q_heads, head_dim_v) and None, for the weights that nobody computes.

    Raises:
        UnsupportedProblem: the layer or the call wants what the operator does not have.
    """
    if dropout or kwargs.get("output_attentions"):
        raise UnsupportedProblem("attention: expected neither dropout nor output_attentions, got one; use another attn_implementation")
    if kwargs.get("block_table") is not None:
        raise UnsupportedProblem("continuous batching: expected no block table (use_block_table), got one")
    if cache is not None and hasattr(cache, "layer_to_allocator"):  # continuous batching's; it writes this layer's lengths into kwargs
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    causal = module.is_causal if is_causal is None else is_causal
    window = None if sliding_window is None else sliding_window - 1
    batch = as_ragged(query, key, value, attention_mask, kwargs)
    problem = AttentionProblem(
        num_q_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[3],
        head_dim_v=value.shape[3],
        dtype=_name(query),
        kv_dtype=_name(key),
        page_size=PAGE_SIZE,
        arch=arch_of_torch_device(query.device),
        mask=MaskFeatures(
            is_causal=bool(causal),
            has_window_left=window is not None,
            has_window_right=window is not None and not causal,
            has_softcap=bool(softcap),
            has_sinks=s_aux is not None,
        ),
        sinks_dtype="float32" if s_aux is None else _name(s_aux),
    )
    out = run(problem, batch, scaling, window, softcap or 0.0, s_aux)
    if batch.places is not None:
        padded = out.new_zeros(*batch.places.shape, *out.shape[1:])
        padded[batch.places] = out
        return padded, None
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def as_ragged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> Ragged:
    """The batch without its padding; shapes as in `attend`."""
    batch, _, query_len, _ = query.shape
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None:
        cu_seqlens_q, cu_seqlens_k = (tensor.to(torch.int32) for tensor in (bounds, kwargs["cu_seq_lens_k"]))
        return Ragged(q[0], k[0], v[0], cu_seqlens_q, cu_seqlens_k, int(kwargs["max_length_q"]), int(kwargs["max_length_k"]), None)
    if mask is None:
        kv_len = k.shape[1]
        cu_seqlens_q, cu_seqlens_k = (
            torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device) for length in (query_len, kv_len)
        )
        return Ragged(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q, cu_seqlens_k, query_len, kv_len, None)
    keys = mask.bool()
    kv_len = keys.shape[1]  # a cache of fixed size is longer: what lies behind are no keys yet
    places = keys[:, -query_len:]
    cu_seqlens_q, cu_seqlens_k = (torch.nn.functional.pad(some.sum(1).cumsum(0), (1, 0)).to(torch.int32) for some in (places, keys))
    return Ragged(q[places], k[:, :kv_len][keys], v[:, :kv_len][keys], cu_seqlens_q, cu_seqlens_k, query_len, kv_len, places)


def run(
    problem: AttentionProblem, batch: Ragged, scale: float | None, window: int | None, softcap: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One call of the operator. Returns (total_q, num_q_heads, head_dim_v)."""
    num_seqs = batch.cu_seqlens_q.shape[0] - 1
    slots, page_table, num_pages = place_in_pages(batch)
    k_cache, v_cache = (tensor.new_empty(num_pages * PAGE_SIZE, *tensor.shape[1:]) for tensor in (batch.k, batch.v))
    k_cache[slots], v_cache[slots] = batch.k, batch.v
    step = metadata_of(problem, batch.q.device, num_seqs, max(batch.q.shape[0], batch.max_seqlen_q), batch.max_seqlen_k)
    seqused_k = batch.cu_seqlens_k.diff()
    step.window_left = window if problem.mask.is_causal else None
    step.refresh(
        cu_seqlens_q=batch.cu_seqlens_q,
        seqused_k=seqused_k,
        max_seqlen_q=batch.max_seqlen_q,
        max_seqlen_k=batch.max_seqlen_k,
        decode_alone=batch.max_seqlen_q <= step.plan.limits.decode_query_len,
    )
    out, _ = paged_attention(
        batch.q.contiguous(),
        k_cache.view(num_pages, PAGE_SIZE, *batch.k.shape[1:]),
        v_cache.view(num_pages, PAGE_SIZE, *batch.v.shape[1:]),
        page_table,
        batch.cu_seqlens_q,
        seqused_k,
        plan=step.plan,
        metadata=step,
        softmax_scale=scale,
        window_left=window,
        window_right=window if problem.mask.has_window_right else None,
        softcap=softcap,
        sinks=sinks,
    )
    return out


def place_in_pages(batch: Ragged) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Where the tokens of K and V go: each sequence begins a page. No host sync.

    Returns:
        slots (total_k,) int64, the page table (batch, max_pages_per_seq) int32, and the number of pages.
    """
    cu_seqlens_k, total = batch.cu_seqlens_k.long(), batch.k.shape[0]
    num_seqs = cu_seqlens_k.shape[0] - 1
    pages = (cu_seqlens_k.diff() + PAGE_SIZE - 1) // PAGE_SIZE
    last = total // PAGE_SIZE + num_seqs  # no sequence reaches it: there go the tokens past the last sequence's
    first_page = torch.nn.functional.pad(pages.cumsum(0), (1, 0))
    tokens = torch.arange(total, device=cu_seqlens_k.device)
    owner = torch.searchsorted(cu_seqlens_k[1:], tokens, right=True)
    of_a_sequence = owner < num_seqs
    owner = owner.clamp(max=num_seqs - 1)
    slots = torch.where(of_a_sequence, first_page[owner] * PAGE_SIZE + tokens - cu_seqlens_k[owner], last * PAGE_SIZE)
    width = max(1, -(-batch.max_seqlen_k // PAGE_SIZE))
    page_table = first_page[:-1, None] + torch.arange(width, device=tokens.device)
    return slots, page_table.to(torch.int32), last + 1


def metadata_of(problem: AttentionProblem, device: torch.device, *needed: int) -> AttentionMetadata:
    """Kernels and buffers for a kind of layer, made anew when a batch outgrows them.

    Args:
        needed: sequences, tokens of the step, KV tokens of a sequence.
    """
    held = _held.get((problem, device))
    limits = (0, 0, 0) if held is None else (held.plan.limits.max_num_seqs, held.plan.limits.max_num_tokens, held.plan.limits.max_seqlen_k)
    if held is None or any(n > limit for n, limit in zip(needed, limits, strict=True)):
        # Powers of two: sequences grow by a token a step.
        room = (1 << (max(n, limit, 1) - 1).bit_length() for n, limit in zip(needed, limits, strict=True))
        plan = plan_on(problem, BatchLimits(*room), device)
        held = _held[problem, device] = AttentionMetadata.allocate(plan, device)
    return held


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
