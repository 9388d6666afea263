"""Plans and device buffers of a model runner: one for each kind of layer, refreshed together once a step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits
from fa4_integration.common import start
from fa4_integration.sglang_backend.layers import EngineFacts, problem_of_layer, reads_latents, window_left

logger = logging.getLogger("sglang.srt.fa4_plugin")

# What modules of SGLang's models call the parameter that they pass as `sinks`.
SINKS_NAMES = ("sinks", "attention_sink_bias")


class LayerSteps:
    """The metadata of each layer, shared among layers of the same problem and window.

    SGLang tells of sinks only when a layer is called. The model's parameters tell at start in the models that are known here; of another
    model such a layer is planned at its first call, which SGLang makes before it captures graphs.
    """

    def __init__(self, engine: EngineFacts, limits: BatchLimits, device: torch.device) -> None:
        self.engine, self.limits, self.device = engine, limits, device
        self.by_kind: dict[tuple[AttentionProblem, int | None], AttentionMetadata] = {}
        self.by_layer: dict[tuple[Any, torch.dtype | None], AttentionMetadata] = {}  # by the layer itself: some share a layer_id
        self.refreshed: dict[str, Any] | None = None  # arguments of the step's `refresh`

    def plan_model(self, model: torch.nn.Module) -> None:
        """Plan every attention layer of `model`, of latent attention those in absorbed form.

        Raises:
            UnsupportedProblem: a layer is not served.
            CompileError: a kernel could not be compiled or linked.
        """
        start.open_warm_up()
        for layer, sinks_dtype in attention_layers(model):
            if not self.engine.is_latent or reads_latents(layer):
                self.of_layer(layer, sinks_dtype)

    def of_layer(self, layer: Any, sinks_dtype: torch.dtype | None) -> AttentionMetadata:
        """The metadata that serves a layer, planned if its kind is not there yet.

        Raises:
            UnsupportedProblem, CompileError: as `plan_model`.
        """
        found = self.by_layer.get((layer, sinks_dtype))
        if found is None:
            kind = problem_of_layer(layer, self.engine, sinks_dtype), window_left(layer)
            found = self.by_kind.get(kind)
            if found is None:
                found = self._plan(*kind)
                self.by_kind[kind] = found
            self.by_layer[layer, sinks_dtype] = found
        return found

    def refresh(
        self, cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor, max_seqlen_q: int, min_seqlen_q: int, prefill_keys: int | None
    ) -> None:
        """Take over the lengths of a step, for all layers. No host sync, no allocation: may be recorded in a graph."""
        self.refreshed = {
            "cu_seqlens_q": cu_seqlens_q,
            "seqused_k": seqused_k,
            "max_seqlen_q": max_seqlen_q,
            "min_seqlen_q": min_seqlen_q,
            "prefill_keys": prefill_keys,
            "max_seqlen_k": self.limits.max_seqlen_k,  # SGLang keeps the lengths on the device
            "decode_alone": max_seqlen_q <= self.limits.decode_query_len,  # of a graph's replays as well: they refresh as it was captured
        }
        for step in self.by_kind.values():
            step.refresh(**self.refreshed)

    def _plan(self, problem: AttentionProblem, window: int | None) -> AttentionMetadata:
        if self.refreshed is not None:
            logger.info("A kind of layer is planned at its first call: %s.", problem)
        step = start.allocate(problem, self.limits, self.device)
        step.window_left = window
        if self.refreshed is not None:
            step.refresh(**self.refreshed)
        return step


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[Any, torch.dtype | None]]:
    """Every `RadixAttention` of a model, and the dtype of the sinks that its owner holds."""
    from sglang.srt.layers.radix_attention import RadixAttention

    for module in model.modules():
        for child in module.children():
            if isinstance(child, RadixAttention):
                held = (getattr(module, name, None) for name in SINKS_NAMES)
                sinks = next((tensor for tensor in held if isinstance(tensor, torch.Tensor)), None)
                yield child, None if sinks is None else sinks.dtype
