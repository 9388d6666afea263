"""vLLM's KV cache seen as ours, and written to.

vLLM hands each layer one tensor (num_pages, num_kv_heads, page_size, 2 * head_dim) in which a token's K and V are neighbours, in one of
several physical orders. Nothing is copied: K and V are strided views. In FP8 the tensor is of bytes: e4m3 numbers, each the value divided
by the layer's scale.
"""

from __future__ import annotations

from typing import Any

import torch

from fa4_backend.problem import FP8, FP8_MAX, SAME_AS_Q, UnsupportedProblem

# vLLM's name of a KV cache dtype -> ours.
STORED = {"auto": SAME_AS_Q, "float16": "float16", "bfloat16": "bfloat16", "fp8": FP8, "fp8_e4m3": FP8}


def stored_dtype(kv_cache_dtype: str | None) -> str:
    """The `kv_dtype` of an `AttentionProblem` for vLLM's name of a KV cache dtype; None is vLLM's "auto".

    Raises:
        UnsupportedProblem: the cache holds something else, such as e5m2, integers or packed groups with scales of their own.
    """
    name = kv_cache_dtype or "auto"
    if name not in STORED:
        raise UnsupportedProblem(f"kv_cache_dtype: expected one of {', '.join(STORED)}, got {name}")
    return STORED[name]


def split_kv_cache(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views k_cache and v_cache, each (num_pages, page_size, num_kv_heads, head_dim), of a layer's cache, in its dtype.

    Args:
        kv_cache: (num_pages, num_kv_heads, page_size, 2 * head_dim), any strides with last stride 1.
    """
    num_pages, num_heads, page_size, row = kv_cache.shape
    page_stride, head_stride, row_stride, stride = kv_cache.stride()
    if num_heads == 1:
        # torch lets a dimension of size 1 have any stride; a TMA descriptor takes it at its word and wants multiples of 16 bytes.
        head_stride = row
    begin, strides = kv_cache.storage_offset(), (page_stride, row_stride, head_stride, stride)
    # One view each: a layer's call is host time wherever no graph replays it.
    k_cache = kv_cache.as_strided((num_pages, page_size, num_heads, head_dim), strides, begin)
    v_cache = kv_cache.as_strided((num_pages, page_size, num_heads, row - head_dim), strides, begin + head_dim * stride)
    return k_cache, v_cache


def write_kv(
    layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, kv_cache_dtype: str
) -> None:
    """Store a step's new keys and values.

    Args:
        key, value: (num_tokens or more, num_kv_heads, head_dim); rows past `slot_mapping` are padding.
        slot_mapping: (num_tokens,), page * page_size + row of each token; -1 for padding, which is not written.
    """
    k_cache, v_cache = split_kv_cache(kv_cache, key.shape[-1])
    if kv_cache.is_cuda:
        # vLLM's own scatter kernel: takes these strides, skips slot -1 on the device.
        from vllm import _custom_ops

        _custom_ops.reshape_and_cache_flash(key, value, k_cache, v_cache, slot_mapping, kv_cache_dtype, layer._k_scale, layer._v_scale)
        return
    tokens = torch.nonzero(slot_mapping >= 0).squeeze(1)
    slots = slot_mapping[tokens]
    page_size = k_cache.shape[1]
    page, row = slots // page_size, slots % page_size
    for cache, new, scale in ((k_cache, key[tokens], layer._k_scale), (v_cache, value[tokens], layer._v_scale)):
        cache[page, row] = quantise(new, scale).view(cache.dtype) if stored_dtype(kv_cache_dtype) == FP8 else new


def quantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 numbers of `values` (tokens, num_kv_heads, head_dim) as vLLM's scatter kernel makes them: divided in float32, cut to what is
    finite, rounded to the nearest. `scale`: one for all, or one a KV head."""
    divided = values.float() / scale.view(-1, 1)
    return divided.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def write_latents(
    kv_c: torch.Tensor, k_pe: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, kv_cache_dtype: str, scale: torch.Tensor
) -> None:
    """Store a step's new latents on a CPU; a GPU has vLLM's own scatter kernel.

    Args:
        kv_c: (num_tokens or more, kv_lora_rank); rows past `slot_mapping` are padding.
        k_pe: (num_tokens or more, 1, rope).
        cache: (num_pages, page_size, kv_lora_rank + rope), any page stride; bytes where latents are FP8.
        slot_mapping: as in `write_kv`.
        scale: (), of FP8 latents.
    """
    tokens = torch.nonzero(slot_mapping >= 0).squeeze(1)
    slots, page_size = slot_mapping[tokens], cache.shape[1]
    new = torch.cat((kv_c[tokens], k_pe[tokens].flatten(1)), dim=-1)
    cache[slots // page_size, slots % page_size] = quantise(new, scale).view(cache.dtype) if stored_dtype(kv_cache_dtype) == FP8 else new
