"""vLLM's KV cache seen as ours, and written to.

vLLM hands each layer one tensor (num_pages, num_kv_heads, page_size, 2 * head_dim) in which a token's K and V are neighbours, in one of
several physical orders. Nothing is copied: K and V are strided views.
"""

from __future__ import annotations

from typing import Any

import torch


def split_kv_cache(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views k_cache and v_cache, each (num_pages, page_size, num_kv_heads, head_dim), of a layer's cache.

    Args:
        kv_cache: (num_pages, num_kv_heads, page_size, 2 * head_dim), any strides with last stride 1.
    """
    pages = kv_cache.transpose(1, 2)
    if pages.shape[2] == 1:
        # torch lets a dimension of size 1 have any stride; a TMA descriptor takes it at its word and wants multiples of 16 bytes.
        pages = pages.as_strided(pages.shape, (pages.stride(0), pages.stride(1), 2 * head_dim, 1))
    return pages[..., :head_dim], pages[..., head_dim:]


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
    k_cache[page, row] = key[tokens]
    v_cache[page, row] = value[tokens]
