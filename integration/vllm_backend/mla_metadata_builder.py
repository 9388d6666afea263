"""Once a step: the decode rows of vLLM's batch, translated for the operator of latent attention. Prefill rows are the base class's.

A message behind a long cached context is decode too, as rows of a few queries (`mla_messages.py`): as prefill its whole context would be
made keys and values first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport

from fa4_backend import AttentionProblem, BatchLimits, UnsupportedProblem
from fa4_integration.common import start
from fa4_integration.vllm_backend.layers import announce_layers
from fa4_integration.vllm_backend.mla_messages import MessageSteps
from fa4_integration.vllm_backend.serving_arch import serving_arch

if TYPE_CHECKING:
    from fa4_backend import AttentionMetadata

SERVED_SPEC = "MLAAttentionSpec"  # pages hold one sequence's latents in order, each once


@dataclass
class FA4MLADecodeMetadata(MLACommonDecodeMetadata):
    """The decode rows of a step. All tensors are vLLM's persistent ones or views of their beginnings: addresses stay from step to step. In
    a step with messages, which no graph holds, they are those of `MessageSteps`."""

    # block_table: (num_rows, max_pages_per_seq) int32; seq_lens: (num_rows,) int32, of this rank's keys: the base class's fields
    cu_seqlens_q: torch.Tensor  # (num_rows + 1,) int32
    steps: dict[AttentionProblem, AttentionMetadata] = field(default_factory=dict)  # refreshed for this step; by `FA4MLAImpl.kind`


@dataclass
class FA4MLAMetadata(MLACommonMetadata[FA4MLADecodeMetadata]):
    """A step, as every layer of a group reads it."""


class FA4MLAMetadataBuilder(MLACommonMetadataBuilder[FA4MLAMetadata]):
    """Plans at start, one plan for each kind of layer in the group; `build` refreshes their device buffers.

    Raises:
        UnsupportedProblem: at construction, for a KV cache or a layer that no kernel on this device serves.
    """

    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN  # rows of a step may have any number of drafts, up to the plan's
    # Of a row that may be decode. The base class adds the engine's draft tokens, unless ranks share a sequence's keys (DCP); messages
    # raise it where they are served.
    reorder_batch_threshold: int = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        spec_name = type(kv_cache_spec).__name__
        if spec_name != SERVED_SPEC:
            raise UnsupportedProblem(f"KV cache: expected {SERVED_SPEC}, got {spec_name}; use another attention backend of vLLM")
        # A row's mask is bottom-right aligned to the keys that a rank has. With keys dealt out among ranks that is right for one query.
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, FA4MLAMetadata, supports_dcp_with_varlen=False)
        start.show_log_lines("vllm")
        announce_layers(vllm_config)
        # vLLM makes the builders of all KV cache groups, and its drafter's, before any batch; so the first batch ends the warm-up.
        start.open_warm_up()
        self.decode_query_len = self.reorder_batch_threshold
        limits = self._limits()
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        problems = {layer.impl.kind: layer.impl.problem(kv_cache_spec.block_size) for layer in layers.values()}
        self.steps: dict[AttentionProblem, AttentionMetadata] = {
            kind: start.allocate(problem, limits, device) for kind, problem in problems.items()
        }
        self.messages = MessageSteps.allocate(problems, limits, vllm_config, device)
        if self.messages is not None:
            self.reorder_batch_threshold = max(self.decode_query_len, self.messages.longest)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """The decode kernel takes every length from device memory; prefill rows do not go into a graph with it, and the torch reference
        reads lengths on the host."""
        return AttentionCGSupport.UNIFORM_BATCH if serving_arch().startswith("sm_") else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> FA4MLAMetadata:
        """Take over a step; of its decode rows no host sync, and no allocation but in steps with messages."""
        start.seal_warm_up()
        longest = self.reorder_batch_threshold
        if self.messages is None or not self.messages.serve(common_attn_metadata, self.decode_query_len):
            self.reorder_batch_threshold = self.decode_query_len
        try:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        finally:
            self.reorder_batch_threshold = longest  # by which the runner orders its batches

    def _build_decode(
        self,
        block_table_tensor: torch.Tensor,
        seq_lens_device: torch.Tensor,
        max_seq_len: int,
        query_start_loc_cpu: torch.Tensor,
        query_start_loc_device: torch.Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: torch.Tensor | None,
    ) -> FA4MLADecodeMetadata:
        steps = self.steps
        if max_query_len > self.decode_query_len:
            assert self.messages is not None, f"{max_query_len=}, {self.decode_query_len=}"
            steps, max_query_len = self.messages.steps, self.messages.rows.queries
            query_start_loc_device, seq_lens_device, block_table_tensor = self.messages.split(
                query_start_loc_cpu, query_start_loc_device, seq_lens_device, block_table_tensor
            )
        for step in steps.values():
            step.refresh(
                cu_seqlens_q=query_start_loc_device,
                seqused_k=seq_lens_device,
                max_seqlen_q=max_query_len,
                # As in `FA4MetadataBuilder`: dummy batches and batches of drafts may claim more than max_model_len.
                max_seqlen_k=min(max_seq_len, step.plan.limits.max_seqlen_k),
            )
        return FA4MLADecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            cu_seqlens_q=query_start_loc_device,
            steps=steps,
        )

    def _limits(self) -> BatchLimits:
        scheduler, compilation = self.vllm_config.scheduler_config, self.vllm_config.compilation_config
        decode_query_len = self.decode_query_len
        # A captured graph may be wider than what the scheduler hands out.
        max_num_tokens = max(scheduler.max_num_seqs * decode_query_len, compilation.max_cudagraph_capture_size or 0)
        return BatchLimits(scheduler.max_num_seqs, max_num_tokens, self.vllm_config.model_config.max_model_len, decode_query_len)
