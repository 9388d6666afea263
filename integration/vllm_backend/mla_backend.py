"""What vLLM may ask of this backend for layers of multi-head latent attention; what kernels serve is answered by `answers.py`."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend

from fa4_backend.problem import LATENT, UnsupportedProblem
from fa4_backend.support import LATENT_PAGE, PAGE_MULTIPLE
from fa4_integration.vllm_backend.answers import SharedAnswers, dtype_name
from fa4_integration.vllm_backend.kv_cache import stored_dtype
from fa4_integration.vllm_backend.mla_impl import FA4MLAImpl
from fa4_integration.vllm_backend.mla_metadata_builder import FA4MLAMetadataBuilder
from fa4_integration.vllm_backend.names import MLA_NAME

DEEPSEEK = {
    "num_q_heads": 16, "num_kv_heads": 1, "head_dim": 576, "head_dim_v": 512, "dtype": "bfloat16", "page_size": PAGE_MULTIPLE,
    "kv_source": LATENT,
}  # fmt: skip
ROPE_DIM = 64  # rotary elements of a latent, in all models that vLLM has; a layer with others is refused by `FA4MLAImpl`
SPARSE = "sparse MLA, over tokens that an indexer chooses, belongs to vLLM's *_MLA_SPARSE backends: start without --attention-backend"


class FA4MLABackend(SharedAnswers, MLACommonBackend):
    """Our decode kernel of latent attention behind vLLM's MLA layers; their prefill is an MLA prefill backend's (`mla_prefill_backend`)."""

    ordinary = DEEPSEEK

    @staticmethod
    def get_name() -> str:
        return MLA_NAME

    @staticmethod
    def get_impl_cls() -> type[FA4MLAImpl]:
        return FA4MLAImpl

    @staticmethod
    def get_builder_cls() -> type[FA4MLAMetadataBuilder]:
        return FA4MLAMetadataBuilder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Pages where the user names none (`--block-size`): vLLM's default, or a tile's keys where that is no multiple of them."""
        return default_block_size if default_block_size % LATENT_PAGE == 0 else LATENT_PAGE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [size for size in MLACommonBackend.get_supported_head_sizes() if cls.supports_head_size(size)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return cls.refusal(head_dim=head_size, head_dim_v=head_size - ROPE_DIM) is None

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        *args: Any,
        **kwargs: Any,
    ) -> str | None:
        """The reason, in a sentence, why this layer cannot be served here; None if it can."""
        if use_sparse:
            return SPARSE
        try:
            kv_dtype = stored_dtype(kv_cache_dtype)
        except UnsupportedProblem as reason:
            return str(reason)
        return cls.refusal(
            head_dim=head_size,
            head_dim_v=head_size - ROPE_DIM,
            dtype=dtype_name(dtype),
            kv_dtype=kv_dtype,
            page_size=block_size or PAGE_MULTIPLE,
        )
