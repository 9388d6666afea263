"""The peers of `fa4 bench prefill`, as an engine calls them: FA3, Triton and FlashInfer paged; FlashAttention-4 and cuDNN dense.

The dense peers read contiguous K and V, without a page table: a bound for a paged kernel rather than a choice that a server has.
With K and V in FP8, FA3 takes q in FP8 too, which vLLM quantises before (not timed); Triton takes it in bf16.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from fa4_backend.bench.peers import Call
from fa4_backend.bench.prefill_batches import DTYPE, PrefillBatch, PrefillTensors
from fa4_backend.problem import FP8, RAGGED

PAGED_PEERS = ("fa3", "flashinfer", "triton")
DENSE = ("fa4-sm90 dense", "cudnn dense")
FA3_RAGGED = "fa3 varlen"  # of batches without pages, as vLLM runs it for multi-head latent attention
WIDE = "fa3 bf16"  # beside FP8 K and V: FA3 with the same values in bf16
FLASHINFER_WORKSPACE_BYTES = 512 << 20


def installed(batch: PrefillBatch) -> list[str]:
    """Peers of a batch that can be imported here."""

    def has(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            return False

    if batch.kv_source == RAGGED:
        found = [FA3_RAGGED] if has("vllm") and batch.kv_dtype != FP8 else []
        return [*found, "fa4-sm90 dense"] if has("flash_attn.cute") else [*found, "cudnn dense"]
    if batch.kv_dtype == FP8:
        return ["fa3", WIDE, "triton"] if has("vllm") else []
    found = ["fa3", "triton"] if has("vllm") else []
    found += ["flashinfer"] if has("flashinfer") else []
    found += ["fa4-sm90 dense"] if has("flash_attn.cute") else []
    return [*found, "cudnn dense"]


def prepare(peer: str, batch: PrefillBatch, tensors: PrefillTensors) -> Call | None:
    """One layer's call of `peer`, its metadata made; None where the peer has nothing to say about the batch."""
    if peer in DENSE and batch.query_len != batch.kv_len:
        return None
    if peer == WIDE:
        return _fa3(batch, tensors.in_bf16())
    if peer == FA3_RAGGED:
        return _fa3_ragged(batch, tensors)
    makers = {"fa3": _fa3, "triton": _triton, "flashinfer": _flashinfer, "fa4-sm90 dense": _fa4, "cudnn dense": _cudnn}
    if peer not in makers:
        raise ValueError(f"peer: expected one of {', '.join([*makers, WIDE, FA3_RAGGED])}, got {peer!r}")
    return makers[peer](batch, tensors)


def _fa3(b: PrefillBatch, t: PrefillTensors) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    dtype = t.k_cache.dtype
    q, scales = t.q, {}
    if dtype != DTYPE:
        q, ones = t.q.to(dtype), torch.ones(b.rows, b.num_kv_heads, device="cuda")
        scales = {"q_descale": ones, "k_descale": ones, "v_descale": ones}
    metadata = get_scheduler_metadata(
        b.rows, b.query_len, b.kv_len, b.num_q_heads, b.num_kv_heads, b.head_dim, t.seqused_k, headdim_v=b.value_dim,
        qkv_dtype=dtype, cu_seqlens_q=t.cu_seqlens_q, page_size=b.page_size, causal=b.is_causal, num_splits=0,
    )  # fmt: skip
    return lambda: flash_attn_varlen_func(
        q=q, k=t.k_cache, v=t.v_cache, out=t.out, cu_seqlens_q=t.cu_seqlens_q, max_seqlen_q=b.query_len, seqused_k=t.seqused_k,
        max_seqlen_k=b.kv_len, softmax_scale=b.head_dim**-0.5, causal=b.is_causal, block_table=t.page_table,
        scheduler_metadata=metadata, fa_version=3, num_splits=0, **scales,
    )  # fmt: skip


def _fa3_ragged(b: PrefillBatch, t: PrefillTensors) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return lambda: flash_attn_varlen_func(
        q=t.q, k=t.k_cache, v=t.v_cache, out=t.out, cu_seqlens_q=t.cu_seqlens_q, cu_seqlens_k=t.cu_seqlens_k, max_seqlen_q=b.query_len,
        max_seqlen_k=b.kv_len, softmax_scale=b.head_dim**-0.5, causal=b.is_causal, fa_version=3,
    )  # fmt: skip


def _triton(b: PrefillBatch, t: PrefillTensors) -> Call | None:
    if not b.is_causal or b.value_dim != b.head_dim:
        return None
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    scale = None if t.k_cache.dtype == DTYPE else torch.ones((), device="cuda")
    return lambda: unified_attention(
        t.q, t.k_cache, t.v_cache, t.out, t.cu_seqlens_q, b.query_len, t.seqused_k, b.kv_len, b.head_dim**-0.5, True,
        (-1, -1), t.page_table, 0.0, None, scale, scale,
    )  # fmt: skip


@cache
def _workspace() -> torch.Tensor:
    return torch.empty(FLASHINFER_WORKSPACE_BYTES, device="cuda", dtype=torch.uint8)


def _flashinfer(b: PrefillBatch, t: PrefillTensors) -> Call:
    import flashinfer

    assert t.page_table is not None
    pages = t.page_table.shape[1]
    indptr = torch.arange(0, b.rows + 1, device="cuda", dtype=torch.int32) * pages
    last = ((t.seqused_k - 1) % b.page_size + 1).int()
    # Its paged layouts want K and V in tensors of their own.
    kv_cache = (t.k_cache.contiguous(), t.v_cache.contiguous())
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa3")
    wrapper.plan(
        t.cu_seqlens_q, indptr, t.page_table.flatten(), last, b.num_q_heads, b.num_kv_heads, b.head_dim, b.page_size,
        causal=b.is_causal, q_data_type=DTYPE, kv_data_type=DTYPE,
    )  # fmt: skip
    return lambda: wrapper.run(t.q, kv_cache, out=t.out)


def _dense(b: PrefillBatch, t: PrefillTensors) -> tuple[torch.Tensor, ...]:
    """q, k, v as (rows, tokens, heads, head_dim)."""
    if t.page_table is None:
        k, v = (x.unflatten(0, (b.rows, b.kv_len)) for x in (t.k_cache, t.v_cache))
    else:
        k, v = (x[t.page_table.long()].flatten(1, 2)[:, : b.kv_len].contiguous() for x in (t.k_cache, t.v_cache))
    return t.q.unflatten(0, (b.rows, b.query_len)), k, v


def _fa4(b: PrefillBatch, t: PrefillTensors) -> Call:
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = _dense(b, t)

    def call() -> None:
        out = flash_attn_func(q, k, v, causal=b.is_causal)
        t.out = (out[0] if isinstance(out, tuple) else out).flatten(0, 1)

    return call


def _cudnn(b: PrefillBatch, t: PrefillTensors) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in _dense(b, t))

    def call() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=b.is_causal, enable_gqa=True)
        t.out = out.transpose(1, 2).flatten(0, 1)

    return call
