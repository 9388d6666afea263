"""KV pools of SGLang's kinds in place of the one that its attention tests make."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


class WindowPool(SWAKVPool):
    """A hybrid pool whose only layer is a sliding-window layer: its keys lie at other places than those that the scheduler names.

    Pages are shuffled, rows of a page keep their order; page 0, the padding, stays. The kit writes its prefixes by the scheduler's places, and
    seeds torch's own generator for its weights.
    """

    def __init__(self, *, size: int, page_size: int, layer_num: int, enable_alt_stream: bool, **more: Any) -> None:
        super().__init__(
            size=size,
            size_swa=size,
            page_size=page_size,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
            enable_alt_stream=enable_alt_stream,
            **more,
        )
        num_pages = size // page_size + 1
        pages = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(7))])
        slots = (pages[:, None] * page_size + torch.arange(page_size)).reshape(-1)
        self.register_mapping(torch.cat([slots, torch.tensor([-1])]))  # SGLang's mark for a slot that is none
        self.full_kv_pool.k_buffer[0].fill_(torch.nan)
        self.full_kv_pool.v_buffer[0].fill_(torch.nan)

    def set_kv_buffer(self, layer: Any, where: Any, *tensors: Any) -> None:
        if isinstance(where, torch.Tensor):
            where = KVWriteLoc(where, self.translate_loc_from_full_to_swa(where))
        super().set_kv_buffer(layer, where, *tensors)


class StridedPool(MHATokenToKVPool):
    """Slots of one layer lie apart, as in a pool whose pages hold all layers: NaN between them."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        for buffers in (self.k_buffer, self.v_buffer):
            slots, heads, dim = buffers[0].shape
            apart = torch.full((slots, 3, heads, dim), torch.nan, dtype=buffers[0].dtype)
            apart[:, 1] = 0.0
            buffers[0] = apart[:, 1]
