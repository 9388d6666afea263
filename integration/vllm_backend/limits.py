"""The largest batches that vLLM makes for layers with K and V heads."""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode

from fa4_backend import BatchLimits
from fa4_backend.problem import MAX_CONVERT_KEYS


def batch_limits(vllm_config: Any, decode_query_len: int, chunk: int | None = None) -> BatchLimits:
    """Bounds of every step.

    Args:
        decode_query_len: longest row that vLLM puts among the decode rows.
        chunk: tokens of a chunk where tokens see their own chunk of a sequence alone: vLLM makes each chunk that a step has queries in a
            row. Of a sequence's n queries these are at most n / chunk + 2.
    """
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    # A captured graph or a draft step may be wider than what the scheduler hands out.
    max_num_tokens = max(
        scheduler.max_num_batched_tokens,
        compilation.max_cudagraph_capture_size or 0,
        scheduler.max_num_seqs * decode_query_len,
    )
    max_model_len = vllm_config.model_config.max_model_len
    convert_keys = 0 if captures_prompts(vllm_config) else min(MAX_CONVERT_KEYS, scheduler.max_num_seqs * max_model_len)
    rows = scheduler.max_num_seqs if chunk is None else 2 * scheduler.max_num_seqs + max_num_tokens // chunk
    return BatchLimits(rows, max_num_tokens, max_model_len, decode_query_len, convert_keys)


def captures_prompts(vllm_config: Any) -> bool:
    """Whether graphs hold attention of steps with prompts. They keep the way in which their capture converted K and V."""
    return bool(vllm_config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL)
