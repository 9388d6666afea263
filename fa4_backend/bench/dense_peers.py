"""Peers of `fa4 bench prefill` that read K and V without a page table: FlashAttention-4 and cuDNN, and FA3's varlen kernel.

For batches with pages a bound rather than a choice that a server has; of batches without, FA3's is what vLLM runs.
"""

from __future__ import annotations

import torch

from fa4_backend.bench.batch import BatchTensors
from fa4_backend.bench.peers import Call, has_module
from fa4_backend.bench.prefill_batches import PrefillBatch
from fa4_backend.problem import FP8

FLASH_ATTN_4, CUDNN = "fa4-sm90 dense", "cudnn dense"
FA3_VARLEN = "fa3 varlen"
DENSE = (FLASH_ATTN_4, CUDNN, FA3_VARLEN)


def installed(kv_dtype: str) -> list[str]:
    """Dense peers of K and V in `kv_dtype` that can be imported here."""
    if kv_dtype == FP8:
        return []
    return [*([FLASH_ATTN_4] if has_module("flash_attn.cute") else []), CUDNN]


def installed_ragged(kv_dtype: str) -> list[str]:
    """Peers of batches without pages that can be imported here."""
    if kv_dtype == FP8:
        return []
    return [*([FA3_VARLEN] if has_module("vllm") else []), *([FLASH_ATTN_4] if has_module("flash_attn.cute") else [])]


def prepare(peer: str, batch: PrefillBatch, tensors: BatchTensors) -> Call | None:
    """One layer's call of `peer`; but for FA3 None where the batch is more than whole prompts under a plain mask."""
    mask = batch.mask
    if peer == FA3_VARLEN:
        return _fa3_varlen(batch, tensors)
    if batch.query_len != batch.kv_len or mask.window or mask.softcap or mask.has_sinks:
        return None
    return _flash_attn_4(batch, tensors) if peer == FLASH_ATTN_4 else _cudnn(batch, tensors)


def _fa3_varlen(b: PrefillBatch, t: BatchTensors) -> Call | None:
    if t.cu_seqlens_k is None:
        return None
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return lambda: flash_attn_varlen_func(
        q=t.q, k=t.k_cache, v=t.v_cache, out=t.out, cu_seqlens_q=t.cu_seqlens_q, cu_seqlens_k=t.cu_seqlens_k, max_seqlen_q=b.query_len,
        max_seqlen_k=b.kv_len, softmax_scale=b.head_dim**-0.5, causal=b.is_causal, fa_version=3,
    )  # fmt: skip


def _contiguous(b: PrefillBatch, t: BatchTensors) -> tuple[torch.Tensor, ...]:
    """q, k, v as (rows, tokens, heads, head_dim); contiguous where they were in pages."""
    if t.page_table is None:
        return tuple(x.unflatten(0, (b.rows, -1)) for x in (t.q, t.k_cache, t.v_cache))
    k, v = (x[t.page_table.long()].flatten(1, 2)[:, : b.kv_len].contiguous() for x in (t.k_cache, t.v_cache))
    return t.q.unflatten(0, (b.rows, b.query_len)), k, v


def _flash_attn_4(b: PrefillBatch, t: BatchTensors) -> Call:
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = _contiguous(b, t)

    def call() -> None:
        out = flash_attn_func(q, k, v, causal=b.is_causal)
        t.out = (out[0] if isinstance(out, tuple) else out).flatten(0, 1)

    return call


def _cudnn(b: PrefillBatch, t: BatchTensors) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in _contiguous(b, t))

    def call() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=b.is_causal, enable_gqa=True)
        t.out = out.transpose(1, 2).flatten(0, 1)

    return call
