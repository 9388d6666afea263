"""The peers of `fa4 bench decode`, as an engine calls them: FA3 and Triton from vLLM, FlashInfer.

With K and V in FP8, FA3 takes q in FP8 too, which vLLM quantises before (not timed), Triton and FlashInfer take it in bf16.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache

import torch

from fa4_backend.bench.decode_batches import DTYPE, BatchTensors, DecodeBatch
from fa4_backend.bench.peers import Call
from fa4_backend.problem import FP8

TRITON_SEGMENTS = 16
FLASHINFER_WORKSPACE_BYTES = 512 << 20


WIDE = "fa3 bf16"  # beside FP8 K and V: FA3 with the same values in bf16


def installed(kv_dtype: str) -> list[str]:
    """Peers of K and V in `kv_dtype` that can be imported here."""
    found = []
    if importlib.util.find_spec("vllm") is not None:
        found += ["fa3", WIDE, "triton"] if kv_dtype == FP8 else ["fa3", "fa3 invariant", "triton"]
    if importlib.util.find_spec("flashinfer") is not None:
        found.append("flashinfer")
    return found


def prepare(peer: str, batch: DecodeBatch, tensors: BatchTensors) -> Call | None:
    """One layer's call of `peer`, its metadata made; None where the peer has nothing to say about the batch."""
    if peer == "fa3":
        return _fa3(batch, tensors, num_splits=0)
    if peer == WIDE:
        # One pool, as the other peers have it: a token's K and V are adjacent.
        wide = torch.cat([tensors.k_cache.to(DTYPE), tensors.v_cache.to(DTYPE)], dim=-1)
        k_cache, v_cache = wide.split(batch.head_dim, dim=-1)
        return _fa3(batch, replace(tensors, k_cache=k_cache, v_cache=v_cache), num_splits=0)
    if peer == "fa3 invariant":
        # What vLLM uses for batch invariance; the same as fa3 where no row is split.
        return _fa3(batch, tensors, num_splits=1) if len(set(batch.kv_lens)) > 1 else None
    if peer == "triton":
        return _triton(batch, tensors)
    if peer == "flashinfer":
        return _flashinfer(batch, tensors)
    raise ValueError(f"peer: expected one of fa3, fa3 invariant, {WIDE}, triton, flashinfer, got {peer!r}")


def _fa3(b: DecodeBatch, t: BatchTensors, num_splits: int) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    max_kv = max(b.kv_lens)
    dtype = t.k_cache.dtype
    q, scales = t.q, {}
    if dtype != DTYPE:
        q, ones = t.q.to(dtype), torch.ones(len(b.kv_lens), b.num_kv_heads, device="cuda")
        scales = {"q_descale": ones, "k_descale": ones, "v_descale": ones}
    metadata = get_scheduler_metadata(
        len(b.kv_lens), b.max_query_len, max_kv, b.num_q_heads, b.num_kv_heads, b.head_dim, t.seqused_k, qkv_dtype=dtype,
        cu_seqlens_q=t.cu_seqlens_q, page_size=b.page_size, causal=True, num_splits=num_splits,
    )  # fmt: skip
    return lambda: flash_attn_varlen_func(
        q=q, k=t.k_cache, v=t.v_cache, out=t.out, cu_seqlens_q=t.cu_seqlens_q, max_seqlen_q=b.max_query_len, seqused_k=t.seqused_k,
        max_seqlen_k=max_kv, softmax_scale=b.head_dim**-0.5, causal=True, block_table=t.page_table, scheduler_metadata=metadata,
        fa_version=3, num_splits=num_splits, **scales,
    )  # fmt: skip


def _triton(b: DecodeBatch, t: BatchTensors) -> Call:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    segments: dict[str, object] = {}
    scale = None if t.k_cache.dtype == DTYPE else torch.ones((), device="cuda")
    if b.max_query_len == 1:
        shape = (t.q.shape[0], b.num_q_heads, TRITON_SEGMENTS)
        segments = {
            "seq_threshold_3D": 128 // b.num_kv_heads,
            "num_par_softmax_segments": TRITON_SEGMENTS,
            "softmax_segm_output": torch.empty(*shape, b.head_dim, device="cuda"),
            "softmax_segm_max": torch.empty(shape, device="cuda"),
            "softmax_segm_expsum": torch.empty(shape, device="cuda"),
        }
    return lambda: unified_attention(
        t.q, t.k_cache, t.v_cache, t.out, t.cu_seqlens_q, b.max_query_len, t.seqused_k, max(b.kv_lens), b.head_dim**-0.5, True,
        (-1, -1), t.page_table, 0.0, None, scale, scale, **segments,
    )  # fmt: skip


@cache
def _workspace() -> torch.Tensor:
    return torch.empty(FLASHINFER_WORKSPACE_BYTES, device="cuda", dtype=torch.uint8)


def _flashinfer(b: DecodeBatch, t: BatchTensors) -> Call:
    import flashinfer

    indptr = torch.tensor([0, *t.pages_of], device="cuda").cumsum(0).int()
    last = ((t.seqused_k - 1) % b.page_size + 1).int()
    pages = torch.cat([t.page_table[row, :n] for row, n in enumerate(t.pages_of)])
    # Its paged layouts want K and V in tensors of their own.
    kv_cache = (t.k_cache.contiguous(), t.v_cache.contiguous())
    types = {"q_data_type": DTYPE, "kv_data_type": t.k_cache.dtype}
    if b.max_query_len == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", use_tensor_cores=True)
        wrapper.plan(indptr, pages, last, b.num_q_heads, b.num_kv_heads, b.head_dim, b.page_size, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2")
        wrapper.plan(
            t.cu_seqlens_q, indptr, pages, last, b.num_q_heads, b.num_kv_heads, b.head_dim, b.page_size, causal=True, **types
        )  # fmt: skip
    return lambda: wrapper.run(t.q, kv_cache, out=t.out)
