"""Prefill of vLLM's MLA layers: keys and values made from latents for each query head, through the operator without pages.

vLLM makes an object a layer and, for each builder of metadata, a clone whose calls serve all layers of a step. Plans and buffers are the
clone's, made at start: one plan for a step's own tokens (causal), one for chunks of cached context (unmasked). Both give the logarithm of
the denominator, by which vLLM merges what they return. Prefill is never part of a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions, MLAPrefillBackend

from fa4_backend import AttentionProblem, BatchLimits, MaskFeatures, ragged_attention
from fa4_backend.problem import RAGGED, UnsupportedProblem
from fa4_backend.support import check_problem
from fa4_integration.common import start
from fa4_integration.vllm_backend.answers import dtype_name, refusal_of
from fa4_integration.vllm_backend.names import NAME
from fa4_integration.vllm_backend.serving_arch import serving_arch

if TYPE_CHECKING:
    from fa4_backend import AttentionMetadata

DEEPSEEK = MLADimensions(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
# Metadata for chunks of context. A layer runs all chunks of a step before the next layer does, so chunks up to this number are refreshed
# once a step, and more of them once a layer. Each holds some megabytes for parts of tiles.
CONTEXT_STEPS = 2


class FA4PrefillBackend(MLAPrefillBackend):
    """FlashAttention-4 kernels behind vLLM's interface of MLA prefill.

    Raises:
        UnsupportedProblem: at construction, for what no kernel on this device serves.
    """

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012  vLLM's declaration; `supports_dtype` decides

    def __init__(self, **layer: Any) -> None:
        super().__init__(**layer)
        self.steps: dict[bool, list[AttentionMetadata]] = {}  # by whether the mask is causal; of a clone
        self._chunks: list[object] = [None] * CONTEXT_STEPS  # what the metadata of context was refreshed for
        for is_causal in (True, False):
            check_problem(self._problem(is_causal))

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def supports_compute_capability(cls, device_capability: Any) -> bool:
        return refusal(device_capability) is None

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return refusal(dtype=dtype_name(dtype)) is None

    @classmethod
    def supports_mla_dimensions(cls, mla_dimensions: MLADimensions) -> bool:
        return refusal(**head_dims(mla_dimensions)) is None

    def supports_out(self) -> bool:
        return True

    def clone(self) -> FA4PrefillBackend:
        """The same for a builder of metadata, with plans, buffers and loaded kernels."""
        clone = super().clone()
        assert isinstance(clone, FA4PrefillBackend)
        start.show_log_lines("vllm")
        start.open_warm_up()
        device, limits = torch.device(self.vllm_config.device_config.device), self._limits()
        for is_causal, number in ((True, 1), (False, CONTEXT_STEPS)):
            clone.steps[is_causal] = [start.allocate(self._problem(is_causal), limits, device) for _ in range(number)]
        return clone

    def prepare_metadata(self, prefill_metadata: Any) -> None:
        """Take over a step's prefill rows; no host sync."""
        super().prepare_metadata(prefill_metadata)
        start.seal_warm_up()
        tokens = prefill_metadata
        self._refresh(self.steps[True][0], tokens.query_start_loc, tokens.query_start_loc, tokens.max_query_len, tokens.max_query_len)

    def run_prefill_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        return_softmax_lse: bool,
        out: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of a step's prefill rows to each other.

        Args:
            q: (num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim), and k likewise.
            v: (num_tokens, num_heads, v_head_dim), any strides in multiples of 16 bytes but the last, which is 1.
            out: (num_tokens, num_heads, v_head_dim), written in place; None: a new tensor.

        Returns:
            out, and where it is asked for lse (num_heads, num_tokens) float32, natural log.
        """
        if output_scale is not None:
            raise UnsupportedProblem("output quantisation: expected none (supports_quant_output says False), got an output scale")
        cu_seqlens = self._prefill_metadata.query_start_loc
        result, lse = self._run(self.steps[True][0], q, k, v, cu_seqlens, cu_seqlens, out)
        return (result, lse) if return_softmax_lse else result

    def run_prefill_context_chunk(
        self, chunk: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of a chunk's rows to keys and values of their cached context, which all of them see.

        Args:
            chunk: vLLM's `MLACommonPrefillMetadata.ContextChunk`; its tensors of lengths lie on the device.
            q: (tokens of the chunk's requests, num_heads, head_dim); k, v: (context tokens, num_heads, ...), as for new tokens.

        Returns:
            out and lse, as for new tokens.
        """
        slot = chunk.index % CONTEXT_STEPS
        step = self.steps[False][slot]
        if self._chunks[slot] is not chunk:
            self._refresh(step, chunk.query_start_loc, chunk.cu_seq_lens, chunk.max_query_len, chunk.max_seq_len)
            self._chunks[slot] = chunk
        return self._run(step, q, k, v, chunk.query_start_loc, chunk.cu_seq_lens, out)

    def _refresh(
        self, step: AttentionMetadata, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int
    ) -> None:
        step.refresh(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=int(max_seqlen_q), max_seqlen_k=int(max_seqlen_k))

    def _run(
        self,
        step: AttentionMetadata,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result, lse = ragged_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, plan=step.plan, metadata=step, softmax_scale=self.scale, out=out
        )  # fmt: skip
        assert lse is not None, step.plan
        return result, lse

    def _problem(self, is_causal: bool) -> AttentionProblem:
        """What a layer's prefill asks of the operator."""
        from vllm import envs

        dims: dict[str, Any] = head_dims(MLADimensions(
            qk_nope_head_dim=self.qk_nope_head_dim, qk_rope_head_dim=self.qk_rope_head_dim, v_head_dim=self.v_head_dim
        ))  # fmt: skip
        return AttentionProblem(
            num_q_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            **dims,
            dtype=str(self.vllm_config.model_config.dtype).removeprefix("torch."),
            page_size=1,
            arch=serving_arch(),
            mask=MaskFeatures(is_causal=is_causal),
            kv_source=RAGGED,
            has_lse=True,
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        )

    def _limits(self) -> BatchLimits:
        scheduler = self.vllm_config.scheduler_config
        max_num_tokens = scheduler.max_num_batched_tokens
        # Of new tokens there are no more than a step has; a chunk of context is part of a sequence.
        return BatchLimits(scheduler.max_num_seqs, max_num_tokens, max(self.vllm_config.model_config.max_model_len, max_num_tokens))


def head_dims(dimensions: MLADimensions) -> dict[str, int]:
    """head_dim and head_dim_v of a problem."""
    return {"head_dim": dimensions.qk_nope_head_dim + dimensions.qk_rope_head_dim, "head_dim_v": dimensions.v_head_dim}


def refusal(capability: Any = None, **facts: Any) -> str | None:
    """Why no kernel on this device serves MLA prefill with these facts, the rest being DeepSeek's; None if one does."""
    ordinary = {
        "num_q_heads": 16, "num_kv_heads": 16, **head_dims(DEEPSEEK), "dtype": "bfloat16", "page_size": 1, "kv_source": RAGGED,
        "has_lse": True,
    }  # fmt: skip
    masks = (MaskFeatures(is_causal=is_causal) for is_causal in (True, False))
    reasons = (refusal_of(ordinary, capability, mask=mask, **facts) for mask in masks)
    return next((reason for reason in reasons if reason is not None), None)
