"""Room for converted K and V, reserved before SGLang sizes its pools.

SGLang settles the dtype of K and V when a model is loaded, before it asks how much memory is left for them. Its plugins reach that step by
a hook. What is reserved there is held by the model; backends find it when they plan.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from fa4_backend import BatchLimits, envs
from fa4_integration.sglang_backend.names import served_names

if TYPE_CHECKING:
    import torch

SETTLES_DTYPE = "sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype"


def reserve_with_models() -> None:
    """Let SGLang call `reserve_room` for each model that it loads, once a process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if all(hook is not reserve_room for _, hook, _ in HookRegistry._hooks.get(SETTLES_DTYPE, ())):
        HookRegistry.register(SETTLES_DTYPE, reserve_room, HookType.AFTER)


def reserve_room(settled: tuple[str | None, torch.dtype], **asked: Any) -> None:
    """After SGLang's step: what the prompts of a model with K and V in FP8 need, if our backend serves them.

    Args:
        settled: SGLang's result, of which the second is the dtype of K and V.
        asked: its arguments.

    Raises:
        UnsupportedProblem: a layer is not served, as the backend's constructor would say.
    """
    from sglang.srt.runtime_context import attention_backends, get_exec, get_schedule

    from fa4_backend.problem import FP8
    from fa4_integration.common import start
    from fa4_integration.common.serving_device import arch_of_torch_device
    from fa4_integration.sglang_backend.layers import EngineFacts, name_of, problem_of_layer
    from fa4_integration.sglang_backend.limits import convert_keys
    from fa4_integration.sglang_backend.steps import attention_layers

    model, kv_dtype = asked["model"], settled[1]
    of_draft = asked["speculative_draft_attention_backend"] if asked["is_draft_worker"] else None
    if model is None or name_of(kv_dtype) != FP8 or (of_draft or attention_backends()[0]) not in served_names():
        return
    device = next(model.parameters()).device
    engine = EngineFacts(
        dtype=asked["model_dtype"],
        kv_dtype=kv_dtype,
        page_size=get_schedule().page_size,
        arch=arch_of_torch_device(device),
        context_len=sys.maxsize,
        attention_chunk_size=None,  # the backend's constructor checks it
        batch_invariant=bool(get_exec().deterministic.enable_deterministic_inference),
        exact=envs.exact(),
    )
    start.show_log_lines("sglang")
    limits = BatchLimits(1, 1, 1, convert_keys=convert_keys())
    problems = dict.fromkeys(problem_of_layer(layer, engine, sinks_dtype) for layer, sinks_dtype in attention_layers(model))
    model.fa4_convert_rooms = [start.reserve(problem, limits, device) for problem in problems]
