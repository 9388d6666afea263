"""What vLLM may ask of this backend; what kernels serve is answered by `answers.py`."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_layout import KVCacheLayout

from fa4_backend import MaskFeatures
from fa4_backend.problem import FP8, UnsupportedProblem
from fa4_backend.support import PAGE_MULTIPLE
from fa4_integration.vllm_backend.answers import SharedAnswers, dtype_name
from fa4_integration.vllm_backend.impl import FA4Impl
from fa4_integration.vllm_backend.kv_cache import stored_dtype
from fa4_integration.vllm_backend.metadata_builder import FA4MetadataBuilder
from fa4_integration.vllm_backend.names import NAME

ORDINARY = {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 128, "head_dim_v": 128, "dtype": "bfloat16", "page_size": PAGE_MULTIPLE}


class FA4Backend(SharedAnswers):
    """FlashAttention-4 kernels behind vLLM's attention interface."""

    forward_includes_kv_cache_update = False
    supports_kv_cache_update_bypass = True  # forward never reads key and value
    ordinary = ORDINARY

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[FA4Impl]:
        return FA4Impl

    @staticmethod
    def get_builder_cls() -> type[FA4MetadataBuilder]:
        return FA4MetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Strides are honoured, so any layer-compact order will do. Head-major first: KV connectors (Nixl, offloading) ask for it.
        return (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return cls.refusal(head_dim=head_size, head_dim_v=head_size) is None

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return cls.refusal(kv_dtype=FP8) is None

    @classmethod
    def supports_sink(cls) -> bool:
        return cls.refusal(mask=MaskFeatures(has_sinks=True)) is None

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return cls.refusal(mask=MaskFeatures(has_window_left=True)) is None

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        *args: Any,
        **kwargs: Any,
    ) -> str | None:
        """The reason, in a sentence, why this layer cannot be served here; None if it can."""
        try:
            kv_dtype = stored_dtype(kv_cache_dtype)
        except UnsupportedProblem as reason:
            return str(reason)
        return cls.refusal(
            head_dim=head_size,
            head_dim_v=head_size,
            dtype=dtype_name(dtype),
            kv_dtype=kv_dtype,
            page_size=block_size or PAGE_MULTIPLE,
            mask=MaskFeatures(has_sinks=has_sink),
        )
