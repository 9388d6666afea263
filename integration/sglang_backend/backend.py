"""The backend of one of SGLang's model runners: a step's lengths and pages, then one call of the operator a layer."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.kv_shard_hooks import get_kv_shard_pool
from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule, get_spec

from fa4_backend import envs, paged_attention
from fa4_backend.problem import UnsupportedProblem
from fa4_integration.common import start
from fa4_integration.common.serving_device import arch_of_torch_device
from fa4_integration.sglang_backend.batch import describe_step, write_query_bounds
from fa4_integration.sglang_backend.kv_pool import paged_views, write_kv
from fa4_integration.sglang_backend.layers import EngineFacts, softcap, window_left
from fa4_integration.sglang_backend.limits import batch_limits
from fa4_integration.sglang_backend.page_tables import StepTensors, TokenSlots
from fa4_integration.sglang_backend.resolution import check_page_size
from fa4_integration.sglang_backend.steps import LayerSteps

# What SGLang calls the formats of a KV cache whose elements are those of its dtype; the others keep scales or packs of their own.
PLAIN_KV = ("auto", "bf16", "bfloat16", "fp16", "float16", "float32", "fp8_e4m3")


class FA4Backend(AttentionBackend):
    """FlashAttention-4 kernels behind SGLang's attention interface.

    A step outside of graphs has tensors of its own. Captured graphs read tensors at fixed addresses and record their refill, so that a
    replay follows the runner's buffers; the host's part of a replay is the places of the sliding-window layers' keys.

    Args:
        draft_step: which step of a chain of drafts this backend serves; 0 for everything else.

    Raises:
        UnsupportedProblem: at construction, for a model or an argument that no kernel on this device serves.
    """

    needs_cpu_seq_lens = False
    is_latent = False  # of multi-head latent attention

    def __init__(self, runner: Any, draft_step: int = 0) -> None:
        super().__init__()
        refuse_strange(runner, is_latent=self.is_latent)
        self.device = torch.device(runner.device)
        # Under these names SGLang asks the backend of a step for its pools.
        self.token_to_kv_pool, self.req_to_token_pool = runner.token_to_kv_pool, runner.req_to_token_pool
        self.pool = runner.token_to_kv_pool
        self.kv_index_translator = runner.kv_index_translator
        self.slots = TokenSlots(runner)
        self.draft_step = draft_step
        self.draft_tokens = get_spec().speculative_num_draft_tokens or 0
        self.steps = LayerSteps(engine_facts(runner, is_latent=self.is_latent), batch_limits(runner, self.draft_tokens), self.device)
        self.captured: StepTensors | None = None  # what captured graphs read
        self.step: StepTensors | None = None  # of the step under way; None: it has no sequences
        self.window_slots: torch.Tensor | None = None  # (tokens,), of that step; None: the model has one pool
        start.show_log_lines("sglang")
        self.steps.plan_model(runner.model)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Take over a step outside of graphs."""
        slots, num_seqs = self.slots, forward_batch.batch_size
        has_window_pool = slots.window_pool is not None
        step = StepTensors.allocate(num_seqs, 0, slots.max_pages, self.device, has_window_pool=has_window_pool)
        self.window_slots = slots.window_slots(forward_batch)
        self._take_over(forward_batch, step)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make what captured graphs read: for `max_bs` sequences of `max_num_tokens` tokens together."""
        slots = self.slots
        has_window_pool = slots.window_pool is not None
        self.captured = StepTensors.allocate(max_bs, max_num_tokens, slots.max_pages, self.device, has_window_pool=has_window_pool)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a capture and before each replay: what the host has to bring, the sliding-window layers' places.

        Raises:
            UnsupportedProblem: a whole prefill as one graph.
        """
        mode = forward_batch.forward_mode
        if mode.is_extend_without_speculative():
            raise UnsupportedProblem(f"CUDA graph: expected one of decode, verification or drafts, got {mode.name}; prefill graphs break")
        assert self.captured is not None, "init_cuda_graph_state comes before a capture"
        places = self.slots.window_slots(forward_batch)
        buffer = self.captured.window_slots
        if places is not None and buffer is not None:
            buffer[: places.shape[0]].copy_(places)
            buffer[places.shape[0] :].zero_()  # SGLang's padding page
            self.window_slots = buffer[: places.shape[0]]

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Recorded in the graph, so that each replay reads the runner's lengths and token slots. No host sync."""
        assert self.captured is not None, "init_cuda_graph_state comes before a capture"
        self._take_over(forward_batch, self.captured.first(forward_batch.batch_size), in_graph=True)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """KV length of padded rows: their own token, in SGLang's padding page."""
        return 1

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, sinks: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """Attention of a decode step; shapes as in `attend`."""
        return self.attend(q, k, v, layer, forward_batch, save_kv_cache, sinks, kwargs)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, sinks: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """Attention of a step with prompts, a verification or drafts; shapes as in `attend`."""
        return self.attend(q, k, v, layer, forward_batch, save_kv_cache, sinks, kwargs)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        batch: Any,
        save_kv_cache: bool,
        sinks: torch.Tensor | None,
        others: dict[str, Any],
    ) -> torch.Tensor:
        """Store a step's keys and values, then one call of the operator.

        Args:
            q: (tokens, num_q_heads * head_dim), may be longer than the step's queries: those rows get zeros.
            k, v: (tokens, num_kv_heads, head_dim); None where another layer's are read.
            sinks: (num_q_heads,) of the model's own dtype.
            others: what else the model passed to the layer.

        Returns:
            (tokens, num_q_heads * head_dim_v).

        Raises:
            UnsupportedProblem: the model wants something that the operator does not have.
        """
        refuse_arguments(layer, batch, others)
        if save_kv_cache and k is not None and v is not None:
            write_kv(self.pool, layer, batch, k, v, self.window_slots)
        tensors, step = self.step, self.steps.of_layer(layer, None if sinks is None else sinks.dtype)
        assert tensors is not None, "SGLang calls no layer for a step without sequences"
        k_cache, v_cache = paged_views(self.pool, layer, self.slots.page_size)
        has_scales = step.plan.problem.has_kv_scales
        given = getattr(batch, "_attn_output", None)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim) if given is None else given
        paged_attention(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k_cache,
            v_cache,
            self.page_table(layer, tensors),
            tensors.cu_seqlens_q,
            tensors.seqused_k,
            plan=step.plan,
            metadata=step,
            softmax_scale=layer.scaling,
            window_left=window_left(layer),
            softcap=softcap(layer),
            sinks=sinks,
            k_scale=layer.k_scale if has_scales else None,
            v_scale=layer.v_scale if has_scales else None,
            out=out.view(-1, layer.tp_q_head_num, layer.v_head_dim),
        )
        return out

    def page_table(self, layer: Any, tensors: StepTensors) -> torch.Tensor:
        """The page table of the pool that a layer's keys lie in."""
        pool = self.slots.window_pool
        if pool is not None and tensors.window_page_table is not None and pool.layers_mapping[layer.layer_id][1]:
            return tensors.window_page_table
        return tensors.page_table

    def _take_over(self, batch: Any, tensors: StepTensors, *, in_graph: bool = False) -> None:
        shape = describe_step(batch, draft_step=self.draft_step, draft_tokens=self.draft_tokens)
        self.forward_metadata = self.step = tensors if shape.num_seqs else None
        if self.step is None:
            return  # a data-parallel rank without work
        start.seal_warm_up()
        self.slots.write_tables(batch, shape.ahead, tensors)
        write_query_bounds(batch, shape, tensors.cu_seqlens_q)
        # A graph's replays may have shorter queries, and more keys, than the batch that it is captured of.
        known = (1, None) if in_graph else (shape.min_seqlen_q, shape.prefill_keys)
        self.steps.refresh(tensors.cu_seqlens_q, tensors.seqused_k, shape.max_seqlen_q, *known)


def engine_facts(runner: Any, *, is_latent: bool = False) -> EngineFacts:
    """What all layers of `runner` have in common."""
    return EngineFacts(
        dtype=runner.dtype,
        kv_dtype=runner.kv_cache_dtype,
        page_size=runner.page_size,
        arch=arch_of_torch_device(torch.device(runner.device)),
        context_len=runner.model_config.context_len,
        attention_chunk_size=runner.attention_chunk_size,
        batch_invariant=bool(get_exec().deterministic.enable_deterministic_inference),
        exact=envs.exact(),
        is_latent=is_latent,
    )


def refuse_strange(runner: Any, *, is_latent: bool = False) -> None:
    """Refuse what no step of ours describes. Under its own name `fa4` SGLang lets more pass than under ours.

    Raises:
        UnsupportedProblem: the model or an argument wants it.
    """
    check_page_size(runner.page_size)
    without_cache = get_schedule().prefill_only_disable_kv_cache
    is_sharded, sees_prompts = get_kv_shard_pool(runner.token_to_kv_pool) is not None, getattr(runner, "prefill_aware_swa", False)
    spec, parallel = get_spec(), get_parallel()
    topk, algorithm = spec.speculative_eagle_topk or 0, (spec.speculative_algorithm or "").upper()
    for what, expected, got, is_served in (
        ("model", "multi-head or grouped-query attention", "MLA", is_latent or not runner.use_mla_backend),
        ("model", "a decoder", "an encoder-decoder", not runner.model_config.is_encoder_decoder),
        ("--kv-cache-dtype", ", ".join(PLAIN_KV), runner.kv_cache_dtype_str, runner.kv_cache_dtype_str in PLAIN_KV),
        ("--speculative-eagle-topk", "1: a chain of drafts", topk, topk <= 1),
        # With a breadth of 1 too: each suffix of the text that was found begins a branch of its own.
        ("--speculative-algorithm", "chains of drafts", "NGRAM, whose drafts are trees", algorithm != "NGRAM"),
        ("decode context parallelism", "a size of 1", parallel.attn_dcp_size, parallel.attn_dcp_size == 1),
        ("prefill context parallelism", "a size of 1", parallel.attn_cp_size, parallel.attn_cp_size == 1),
        ("KV pool", "whole pages on each rank", "pages shared out among ranks", not is_sharded),
        ("--prefill-only-disable-kv-cache", "not given", "given", not without_cache),
        ("windows", "the same in decode as in prefill", "windows that see the whole prompt", not sees_prompts),
    ):
        if not is_served:
            raise UnsupportedProblem(f"{what}: expected {expected}, got {got}; use another --attention-backend here")


def refuse_arguments(layer: Any, batch: Any, others: dict[str, Any]) -> None:
    """Refuse what a model passes to a layer beside q, k, v and sinks.

    Raises:
        UnsupportedProblem: it passes something.
    """
    names = [name for name, value in others.items() if value is not None and value is not False]
    if batch.mha_return_lse:
        names.append("mha_return_lse")
    if names:
        raise UnsupportedProblem(f"{names[0]} in layer {layer.layer_id}: expected none, got a value; use another --attention-backend")
