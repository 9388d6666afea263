"""The largest batches that an SGLang runner makes."""

from __future__ import annotations

import math
from typing import Any

from fa4_backend import BatchLimits
from fa4_backend.problem import MAX_CONVERT_KEYS
from fa4_integration.sglang_backend.names import served_names


def batch_limits(runner: Any, draft_tokens: int) -> BatchLimits:
    """Bounds of every step of `runner`.

    Args:
        draft_tokens: tokens that a verification checks of each sequence; 0 without speculation.
    """
    from sglang.srt.runtime_context import get_exec, get_schedule

    schedule, graphs = get_schedule(), get_exec().graph.cuda_graph_config
    captured = (graphs.decode.max_bs or 0) if graphs is not None else 0
    max_num_seqs = max(runner.req_to_token_pool.size, captured)
    max_seqlen_k = runner.req_to_token_pool.req_to_token.shape[1]
    # Without chunks a prompt comes whole. SGLang may let a chunk grow by a quarter, pads it to whole pages, and mixes decode rows in.
    prompt = max(schedule.max_prefill_tokens or 0, math.ceil(1.25 * max(schedule.chunked_prefill_size or 0, 0)), max_seqlen_k)
    rows = max_num_seqs * max(draft_tokens, 1)
    # Where prompts are another backend's nothing is converted, and no room was reserved. SGLang settles that before it makes backends.
    serves_prompts = getattr(runner, "prefill_attention_backend_str", None) in (None, *served_names())
    keys = convert_keys() if serves_prompts else 0
    return BatchLimits(max_num_seqs, prompt + rows + runner.page_size, max_seqlen_k, max(draft_tokens, 1), keys)


def convert_keys() -> int:
    """Keys of a step of which K and V in FP8 may be brought to 16 bits, if there is room (`bounded` in `fa4_backend/plan.py`).

    All that `--max-running-requests` sequences of `--context-length` tokens have, if both are given. It follows from what SGLang knows
    before it sizes its pools, so that plans ask for what was reserved then.
    """
    from sglang.srt.runtime_context import get_model, get_schedule

    requests, context = get_schedule().max_running_requests, get_model().context_length
    return MAX_CONVERT_KEYS if requests is None or context is None else min(MAX_CONVERT_KEYS, requests * context)
