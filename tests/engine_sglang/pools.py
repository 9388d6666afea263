"""KV pools of SGLang's kinds in place of the one that its attention tests make."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.test.kits.attention_unittest.attention_methods.dense_attention import (
    MockModelRunner,
    ProjectedDenseAttention,
    ReferenceDenseAttention,
)

FP8 = torch.float8_e4m3fn
# Neither is a power of two, so that a scale that is left out, doubled or swapped shows.
K_SCALE, V_SCALE = 0.037, 0.11


class WindowPool(SWAKVPool):
    """A hybrid pool whose only layer is a sliding-window layer: its keys lie at other places than those that the scheduler names.

    Pages are shuffled, rows of a page keep their order; page 0, the padding, stays. The kit writes its prefixes by the scheduler's places,
    and seeds torch's own generator for its weights.
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
        pages = torch.cat(
            [torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(7))]
        )
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


class Fp8Pool(MHATokenToKVPool):
    """`--kv-cache-dtype fp8_e4m3`: the kit writes its prefixes without the layer's scales, SGLang's backends with them."""

    def __init__(self, *, dtype: torch.dtype, **facts: Any) -> None:
        super().__init__(dtype=FP8, **facts)

    def set_kv_buffer(self, layer: Any, where: Any, key: torch.Tensor, value: torch.Tensor, *scales: Any) -> None:
        # SGLang divides in place; the reference reads the same tensors.
        super().set_kv_buffer(layer, where, key.clone(), value.clone(), *(scales or (layer.k_scale, layer.v_scale)))


class Fp8Runner(MockModelRunner):
    """The kit's runner with that cache."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        self.kv_cache_dtype, self.kv_cache_dtype_str = FP8, "fp8_e4m3"


class Fp8Attention(ProjectedDenseAttention):
    """The kit's layer with scales of its own, as a checkpoint brings them."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        self.attn.k_scale, self.attn.v_scale = torch.tensor(K_SCALE), torch.tensor(V_SCALE)


class Fp8Reference(ReferenceDenseAttention):
    """The kit's reference over what FP8 keeps of K and V."""

    def project_qkv(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().project_qkv(hidden_states)
        return q, stored(k, K_SCALE), stored(v, V_SCALE)


def stored(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """A tensor after its way through the cache."""
    return (tensor / torch.tensor(scale)).to(FP8).to(tensor.dtype) * torch.tensor(scale)
