"""One attention layer in vLLM: its numbers and masks, translated once, then one call of the operator a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from fa4_backend import AttentionProblem, MaskFeatures, paged_attention
from fa4_backend import envs as fa4_envs
from fa4_backend.problem import FP8, SAME_AS_Q, UnsupportedProblem
from fa4_backend.support import PAGE_MULTIPLE, check_problem
from fa4_integration.common import start
from fa4_integration.vllm_backend.alibi import DeviceSlopes
from fa4_integration.vllm_backend.kv_cache import split_kv_cache, stored_dtype, write_kv
from fa4_integration.vllm_backend.limits import batch_limits
from fa4_integration.vllm_backend.metadata_builder import FA4Metadata, LayerKind
from fa4_integration.vllm_backend.serving_arch import serving_arch

if TYPE_CHECKING:
    from fa4_backend.convert_room import ConvertRoom


class FA4Impl(AttentionImpl):
    """The attention of one layer.

    Raises:
        UnsupportedProblem: at construction, for what no kernel on this device serves.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise UnsupportedProblem(
                f"attention type: expected decoder, got {attn_type}; use another attention backend of vLLM for this model"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        # Of q: vLLM makes a model's layers with its dtype as torch's default. The cache's own dtype may be another, and says nothing of q.
        self.dtype = str(torch.get_default_dtype()).removeprefix("torch.")
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sliding_window = sliding_window
        # vLLM counts the query's own token, the operator the tokens besides it.
        self.window_left = None if sliding_window is None else sliding_window - 1
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.given_slopes = None if alibi_slopes is None else tuple(alibi_slopes)
        self.slopes: DeviceSlopes | None = None  # made by the builder, which restores them
        self.writer: Any = None  # the layer that wrote the cache, where this one shares another's; set by the builder
        self._sinks = sinks
        self.mask = MaskFeatures(
            has_window_left=self.window_left is not None,
            has_softcap=self.logits_soft_cap > 0,
            has_sinks=sinks is not None,
            has_alibi=alibi_slopes is not None,
        )
        # vLLM reads this once a layer is made, and then hands queries over in FP8 in every step, decode rows and prompts alike.
        self.supports_quant_query_input = fa4_envs.fp8_query() and stored_dtype(kv_cache_dtype) == FP8
        # The page size is not known yet. Refusing here what no page size changes stops the engine before it loads the weights.
        problem = self.problem(PAGE_MULTIPLE)
        check_problem(problem)
        self.is_fp8 = problem.has_kv_scales
        # vLLM makes layers before it measures what its KV cache may take. Held for the builders' plans, which share it.
        self.convert_room = reserve_room(problem)
        self.kind: LayerKind = (self.mask, problem.kv_dtype)

    @property
    def sinks(self) -> torch.Tensor | None:
        """What the engine's own parameter holds, in its dtype, wherever its storage is: no copy that a reload would miss."""
        return None if self._sinks is None else self._sinks.data

    @property
    def alibi_slopes(self) -> torch.Tensor | None:
        """(num_q_heads,) float32 on the device; None without ALiBi, and until a builder serves the layer."""
        return None if self.slopes is None else self.slopes.tensor

    def problem(self, page_size: int) -> AttentionProblem:
        """What this layer asks of the operator, for pages of `page_size` tokens."""
        from vllm import envs

        return AttentionProblem(
            num_q_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            head_dim_v=self.head_size,
            dtype=self.dtype,
            kv_dtype=stored_dtype(self.kv_cache_dtype),
            q_dtype=FP8 if self.supports_quant_query_input else SAME_AS_Q,
            page_size=page_size,
            arch=serving_arch(),
            mask=self.mask,
            sinks_dtype="float32" if self._sinks is None else str(self._sinks.dtype).removeprefix("torch."),
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
            exact=fa4_envs.exact(),
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: FA4Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a step's queries over the KV cache, which already holds the step's own keys and values.

        Args:
            layer: of vLLM; its scales of Q, K and V are read at each call, since a checkpoint's replace the tensors it starts with.
            query: (num_tokens, num_q_heads, head_dim), e4m3 where `supports_quant_query_input`; may be longer than the step's
                `num_actual_tokens`; key and value are not read.
            kv_cache: (num_pages, num_kv_heads, page_size, 2 * head_dim), any strides; bytes where K and V are FP8.
            attn_metadata: None in a profiling run, which has no cache.
            output: (num_tokens, num_q_heads, head_dim), written in place; e4m3 where vLLM fused the quantisation behind the layer.
            output_scale: one float32, what e4m3 outputs are multiplied by to be the result; None: outputs in the dtype of q.
        """
        if output_block_scale is not None:
            raise UnsupportedProblem("output quantisation: expected one scale (fused_output_quant_supported says so), got scales of blocks")
        if attn_metadata is None:
            return output.fill_(0)
        num_tokens = attn_metadata.num_actual_tokens
        k_cache, v_cache = split_kv_cache(kv_cache, self.head_size)
        k_scale = v_scale = None
        if self.is_fp8:
            # After the split: of a cache whose elements are no bytes a row becomes too long, which the operator refuses.
            k_cache, v_cache = k_cache.view(torch.float8_e4m3fn), v_cache.view(torch.float8_e4m3fn)
            writer = layer if self.writer is None else self.writer
            k_scale, v_scale = writer._k_scale, writer._v_scale
        step = (attn_metadata.steps if output_scale is None else attn_metadata.fused_steps)[self.kind]
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            step.expect_short_queries()
        paged_attention(
            query[:num_tokens],
            k_cache,
            v_cache,
            attn_metadata.page_table,
            attn_metadata.cu_seqlens_q,
            attn_metadata.seqused_k,
            plan=step.plan,
            metadata=step,
            softmax_scale=self.scale,
            window_left=self.window_left,
            softcap=self.logits_soft_cap,
            sinks=self.sinks,
            alibi_slopes=self.alibi_slopes,
            k_scale=k_scale,
            v_scale=v_scale,
            q_scale=layer._q_scale if self.supports_quant_query_input else None,
            out_scale=None if output_scale is None else output_scale.view(1),
            out=output[:num_tokens],
        )
        return output

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """FP8 with one scale known before: vLLM's pass then drops the kernel that would quantise a layer's outputs."""
        from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

        return bool(quant_key == kFp8StaticTensorSym)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store the step's keys and values in the pages that `slot_mapping` names; vLLM calls it before `forward`."""
        write_kv(layer, key, value, kv_cache, slot_mapping, self.kv_cache_dtype)


def reserve_room(problem: AttentionProblem) -> ConvertRoom | None:
    """What the steps of a layer need of memory for converted K and V; None where they convert none, or no engine is being made."""
    config = get_current_vllm_config_or_none()
    if config is None or not problem.has_kv_scales:
        return None
    from vllm.platforms import current_platform

    start.show_log_lines("vllm")
    return start.reserve(problem, batch_limits(config, 1), torch.device(current_platform.device_type))
