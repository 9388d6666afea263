"""Once a step: vLLM's batch description, translated for the operator. One builder serves the layers of one KV cache group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

from fa4_backend import MaskFeatures, UnsupportedProblem
from fa4_integration.common import start
from fa4_integration.vllm_backend.alibi import DeviceSlopes
from fa4_integration.vllm_backend.layers import announce_layers
from fa4_integration.vllm_backend.limits import batch_limits, captures_prompts
from fa4_integration.vllm_backend.serving_arch import serving_arch

if TYPE_CHECKING:
    from fa4_backend import AttentionMetadata

LayerKind = tuple[MaskFeatures, str]  # what layers of a group may differ in: their masks, and the dtype of their K and V
# Specs whose pages hold one sequence's tokens in order, each once: what the operator's page table describes.
SERVED_SPECS = ("FullAttentionSpec", "SlidingWindowSpec")


@dataclass
class FA4Metadata:
    """A step, as every layer of a group reads it. All tensors are vLLM's persistent ones: their addresses stay from step to step."""

    num_actual_tokens: int  # query rows to compute; padded rows of a captured graph included
    cu_seqlens_q: torch.Tensor  # (batch + 1,) int32
    seqused_k: torch.Tensor  # (batch,) int32
    page_table: torch.Tensor  # (batch, max_pages_per_seq) int32
    slot_mapping: torch.Tensor  # (num_tokens,), where the step's keys and values were written
    max_seqlen_q: int  # host upper bounds of the step's lengths; in a captured graph the capture's
    max_seqlen_k: int
    steps: dict[LayerKind, AttentionMetadata]  # refreshed for this step
    fused_steps: dict[LayerKind, AttentionMetadata]  # the same for layers that write FP8; empty where vLLM fuses no quantisation


class FA4MetadataBuilder(AttentionMetadataBuilder):
    """Plans at start, one plan for each kind of layer in the group; `build` refreshes their device buffers.

    Metadata that another group's builder made cannot be taken over with an exchanged block table (`supports_update_block_table`): a graph
    that was captured of this group reads the work lists of this builder, so each replay needs them refreshed.

    Raises:
        UnsupportedProblem: at construction, for a KV cache or a layer that no kernel on this device serves.
    """

    supports_draft_decode_metadata_update: bool = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        spec_name = type(kv_cache_spec).__name__
        if spec_name not in SERVED_SPECS:
            raise UnsupportedProblem(
                f"KV cache: expected {' or '.join(SERVED_SPECS)}, got {spec_name}; use another attention backend of vLLM"
            )
        # Of layers whose tokens see their own chunk alone. vLLM hands over a row a chunk, with lengths that no drafter's loop changes.
        self._chunk: int | None = getattr(kv_cache_spec, "attention_chunk_size", None)
        self.supports_draft_decode_metadata_update = self._chunk is None
        # Rows of up to 1 + speculative tokens count as decode rows; vLLM moves them to the front of the batch.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        start.show_log_lines("vllm")
        announce_layers(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        impls = [layer.impl for layer in layers.values()]
        self.steps: dict[LayerKind, AttentionMetadata] = self._allocate_steps(impls, device)
        self.fused_steps: dict[LayerKind, AttentionMetadata] = {}
        if vllm_config.compilation_config.pass_config.fuse_attn_quant:
            # Which layers write FP8 is seen at their first call, when nothing may be compiled any more.
            self.fused_steps = {kind: start.allocate_fused(step, device) for kind, step in self.steps.items()}
        self.counts_keys = any(step.converted is not None or step.messages is not None for step in self.steps.values())
        # A graph of a step with prompts is replayed for decode rows alone too, and keeps the kernels of its capture.
        self.captures_prompts = captures_prompts(vllm_config)
        self.slopes = share_slopes(impls, device)
        for impl in impls:
            target = impl.kv_sharing_target_layer_name
            if target is not None:
                impl.writer = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, [target])[target]

    def _allocate_steps(self, impls: list[Any], device: torch.device) -> dict[LayerKind, AttentionMetadata]:
        # vLLM makes the builders of all KV cache groups, and its drafter's, before any batch; so the first batch ends the warm-up.
        start.open_warm_up()
        limits = batch_limits(self.vllm_config, self.reorder_batch_threshold or 1, self._chunk)
        steps: dict[LayerKind, AttentionMetadata] = {}
        for impl in impls:
            if impl.kind not in steps:
                steps[impl.kind] = start.allocate(impl.problem(self.kv_cache_spec.block_size), limits, device)
        for kind, step in steps.items():
            windows = [impl.window_left for impl in impls if impl.kind == kind]
            step.window_left = max(windows) if step.plan.problem.mask.has_window_left else None
        return steps

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Kernels take every length from device memory, so a graph holds for any batch; the torch reference reads them on the host."""
        return AttentionCGSupport.ALWAYS if serving_arch().startswith("sm_") else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> FA4Metadata:
        """Take over a step; no host sync, no allocation.

        Raises:
            UnsupportedProblem: the batch is not causal.
        """
        batch = common_attn_metadata
        if batch.causal is not True:
            raise UnsupportedProblem(f"causal: expected True, got {batch.causal}; use another attention backend of vLLM for this model")
        start.seal_warm_up()
        for slopes in self.slopes:
            slopes.restore()
        metadata = FA4Metadata(
            num_actual_tokens=batch.num_actual_tokens,
            cu_seqlens_q=batch.query_start_loc,
            seqused_k=batch.seq_lens,
            page_table=batch.block_table_tensor,
            slot_mapping=batch.slot_mapping,
            max_seqlen_q=batch.max_query_len,
            max_seqlen_k=batch.max_seq_len,
            steps=self.steps,
            fused_steps=self.fused_steps,
        )
        self._refresh(metadata, *self._prompts(batch))
        return metadata

    def update_draft_decode_metadata(self, metadata: FA4Metadata) -> None:
        """Take over the lengths that `metadata`'s tensors hold at this moment.

        A drafter's loop lengthens its sequences on the device and calls this before each of its steps. vLLM records it in the loop's CUDA
        graph: one launch a plan, at fixed addresses, with no host sync and no allocation. Rows may be shorter than at `build`.
        """
        self._refresh(metadata, 1)

    def _prompts(self, batch: Any) -> tuple[int, int | None]:
        """`min_seqlen_q` and `prefill_keys` of a batch; its keys are added up only where that may choose a plan's kernels."""
        decode_query_len = self.reorder_batch_threshold or 1
        if batch.max_query_len <= decode_query_len:
            return 1, None
        lengths = np.diff(batch.query_start_loc_cpu.numpy())
        shortest = int(np.min(lengths, where=lengths > 0, initial=batch.max_query_len))
        bounds = batch.seq_lens_cpu_upper_bound
        if not self.counts_keys or bounds is None or self.captures_prompts:
            return shortest, None
        return shortest, int(bounds.numpy()[: len(lengths)].sum(where=lengths > decode_query_len))

    def _refresh(self, metadata: FA4Metadata, min_seqlen_q: int, prefill_keys: int | None = None) -> None:
        for step in self.steps.values():
            step.refresh(
                cu_seqlens_q=metadata.cu_seqlens_q,
                seqused_k=metadata.seqused_k,
                max_seqlen_q=metadata.max_seqlen_q,
                # A dummy or captured batch says that each sequence is as long as all its tokens together, a batch of drafts that it may
                # grow by them: above max_model_len. No page table holds more than that, and kernels read no further.
                max_seqlen_k=min(metadata.max_seqlen_k, step.plan.limits.max_seqlen_k),
                min_seqlen_q=min_seqlen_q,
                prefill_keys=prefill_keys,
                decode_alone=not self.captures_prompts and metadata.max_seqlen_q <= step.plan.limits.decode_query_len,
            )


def share_slopes(impls: list[Any], device: torch.device) -> list[DeviceSlopes]:
    """Give layers with the same ALiBi slopes the same device tensor. A layer that has one keeps it: a graph may hold its address."""
    shared: dict[tuple[float, ...], DeviceSlopes] = {}
    for impl in impls:
        if impl.given_slopes is not None:
            if impl.slopes is None:
                impl.slopes = shared.get(impl.given_slopes) or DeviceSlopes(impl.given_slopes, device)
            shared[impl.given_slopes] = impl.slopes
    return list({id(impl.slopes): impl.slopes for impl in impls if impl.slopes is not None}.values())
