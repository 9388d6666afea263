"""A layer of multi-head latent attention in vLLM: its numbers, translated once, then one operator call for the decode rows of a step."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
from vllm.v1.attention.backend import AttentionType

from fa4_backend import AttentionProblem, mla_decode
from fa4_backend.problem import LATENT, UnsupportedProblem
from fa4_backend.support import PAGE_MULTIPLE, check_problem
from fa4_integration.vllm_backend.kv_cache import stored_dtype, write_latents
from fa4_integration.vllm_backend.mla_metadata_builder import FA4MLAMetadata
from fa4_integration.vllm_backend.serving_arch import serving_arch

_ADVICE = "use another attention backend of vLLM for this model"


class FA4MLAImpl(MLACommonImpl[FA4MLAMetadata]):
    """Decode of one layer in absorbed form. Prefill is the base class's: projections, then the engine's MLA prefill backend.

    Raises:
        UnsupportedProblem: at construction, for what no kernel on this device serves.
    """

    can_return_lse_for_decode = True  # vLLM asks for it under decode-context parallelism; a natural logarithm (`lse_base_on_e`)
    supports_dcp = True
    supports_pcp = False  # the base class says True; prefill-context parallelism was never tried

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        unserved = {"alibi_slopes": alibi_slopes, "sliding_window": sliding_window, "logits_soft_cap": logits_soft_cap}
        unserved |= {"indexer": mla_args.get("indexer")}
        for name, value in unserved.items():
            if value is not None:
                raise UnsupportedProblem(f"{name}: expected none in a layer of latent attention, got {value}; {_ADVICE}")
        if attn_type != AttentionType.DECODER:
            raise UnsupportedProblem(f"attention type: expected decoder, got {attn_type}; {_ADVICE}")
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap, attn_type,
            kv_sharing_target_layer_name, **mla_args,
        )  # fmt: skip
        self.supports_quant_query_input = False  # with latents in FP8 too: q in 16 bits makes products of what is stored exact
        # Of q: vLLM makes a model's layers with its dtype as torch's default. The cache's own dtype may be another, and says nothing of q.
        self.dtype = str(torch.get_default_dtype()).removeprefix("torch.")
        # The page size is not known yet. Refusing here what no page size changes stops the engine before it loads the weights.
        self.kind = self.problem(PAGE_MULTIPLE)
        check_problem(self.kind)

    def problem(self, page_size: int) -> AttentionProblem:
        """What this layer's decode rows ask of the operator, for pages of `page_size` tokens."""
        from vllm import envs

        return AttentionProblem(
            num_q_heads=self.num_heads * self.dcp_world_size,  # decode-context parallelism gathers the heads of all ranks
            num_kv_heads=1,
            head_dim=self.kv_lora_rank + self.qk_rope_head_dim,
            head_dim_v=self.kv_lora_rank,
            dtype=self.dtype,
            kv_dtype=stored_dtype(self.kv_cache_dtype),
            kv_source=LATENT,
            page_size=page_size,
            arch=serving_arch(),
            has_lse=self.need_to_return_lse_for_decode,
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        )

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: FA4MLAMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of a step's decode rows over the cache, which already holds the step's own latents.

        Args:
            q: (num_decode_tokens, heads, kv_lora_rank) and (num_decode_tokens, heads, rope), or both as columns of one tensor.
            kv_c_and_k_pe_cache: (num_pages, page_size, kv_lora_rank + rope), any page stride.
            layer: of vLLM; its scale of K is that of FP8 latents, read at each call: a checkpoint's replaces the tensor it starts with.

        Returns:
            (num_decode_tokens, heads, kv_lora_rank), and lse (num_decode_tokens, heads) where the engine wants it.
        """
        decode = attn_metadata.decode
        assert decode is not None, attn_metadata
        q_latent, q_rope = q if isinstance(q, tuple) else q.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        step = decode.steps[self.kind]
        out, lse = mla_decode(
            q_latent,
            q_rope,
            kv_c_and_k_pe_cache,
            decode.block_table,
            decode.cu_seqlens_q,
            decode.seq_lens,
            plan=step.plan,
            metadata=step,
            softmax_scale=self.scale,
            latent_scale=layer._k_scale if self.kind.has_kv_scales else None,
        )
        return out, None if lse is None else lse.transpose(0, 1)

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        *more: Any,
    ) -> None:
        """Store the step's latents in the pages that `slot_mapping` names; vLLM calls it before attention.

        Args:
            more: what vLLM tells its own kernel beside that: from 0.33 on whether the scale is known to be 1.
        """
        if kv_cache.is_cuda:
            super().do_kv_cache_update(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, *more)
        elif kv_cache.numel():
            write_latents(kv_c_normed, k_pe, kv_cache, slot_mapping.flatten(), kv_cache_dtype, k_scale)
