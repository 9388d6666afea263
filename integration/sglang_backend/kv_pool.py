"""SGLang's KV pool seen as ours, and written to."""

from __future__ import annotations

from typing import Any

import torch


def paged_views(pool: Any, layer: Any, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views k_cache and v_cache, each (num_pages, page_size, num_kv_heads, head_dim), of a layer's buffers, in either layout.

    Asked of the pool at each call: with a hierarchical cache that is where SGLang waits for a layer's pages to arrive.
    """
    from sglang.srt.mem_cache.layout.paged_view import paged_kv_view

    k_buffer, v_buffer = pool.get_kv_buffer(layer.layer_id)
    return (
        dense_heads(paged_kv_view(k_buffer, page_size, layer.tp_k_head_num, layer.qk_head_dim)),
        dense_heads(paged_kv_view(v_buffer, page_size, layer.tp_v_head_num, layer.v_head_dim)),
    )


def dense_heads(pages: torch.Tensor) -> torch.Tensor:
    """The same view, whose head stride is a row's where there is one head.

    torch lets a dimension of size 1 have any stride; a TMA descriptor takes it at its word and wants multiples of 16 bytes.
    """
    if pages.shape[2] != 1:
        return pages
    return pages.as_strided(pages.shape, (pages.stride(0), pages.stride(1), pages.shape[3], 1))


def write_kv(pool: Any, layer: Any, batch: Any, key: torch.Tensor, value: torch.Tensor, window_slots: torch.Tensor | None) -> None:
    """Store a step's new keys and values, as SGLang's pool wants it: to FP8 after a division by the layer's scales, where it has any.

    Args:
        key, value: (tokens, num_kv_heads, head_dim).
        window_slots: where a sliding-window layer of a hybrid pool writes them; None: the model has one pool.
    """
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool.set_kv_buffer(layer, KVWriteLoc.for_layer(batch, layer, swa_loc=window_slots), key, value, layer.k_scale, layer.v_scale)
