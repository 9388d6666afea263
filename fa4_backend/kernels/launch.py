"""From a checked call to launches: which compiled kernel, with which buffers. No sync, no allocation, nothing that depends on lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from fa4_backend.arguments import AttentionArguments
from fa4_backend.compile import CompileKey
from fa4_backend.compile_cache import load_kernel
from fa4_backend.kernels.decode.config import decode_config
from fa4_backend.kernels.decode.launch import launch_decode
from fa4_backend.kernels.tuning import prefill_key
from fa4_backend.plan import AttentionPlan

if TYPE_CHECKING:
    import torch

    from fa4_backend.kernels.schedule.work_list import WorkLists
    from fa4_backend.metadata import AttentionMetadata


def launch_attention(plan: AttentionPlan, metadata: AttentionMetadata, arguments: AttentionArguments) -> None:
    """Run the kernels of `plan` over the work lists that `metadata.refresh` made."""
    work = metadata.work
    assert work is not None, plan
    decode = _decode_kernel(plan)
    if decode is not None:
        launch_decode(decode, arguments, work)
    assert metadata.bounds is not None
    if decode is None or metadata.bounds.max_seqlen_q > plan.limits.decode_query_len:
        launch_prefill(_prefill_kernel(plan), arguments, work.prefill_tiles, work.prefill_begin)


def launch_prefill(kernel: Callable[..., None], arguments: AttentionArguments, tiles: torch.Tensor, begin: torch.Tensor) -> None:
    """Launch a prefill kernel over one work list: tiles (max_tiles, 8), begin (num_ctas + 1,), int32."""
    a = arguments
    kernel(
        a.q, a.k_cache, a.v_cache, a.page_table, a.cu_seqlens_q, tiles, begin, a.out, a.lse,
        None if a.sinks is None else a.sinks.float(),
        None if a.alibi_slopes is None else a.alibi_slopes.float(),
        a.softmax_scale, a.softcap, a.window_left or 0, a.window_right or 0,
    )  # fmt: skip


def launch_schedule(
    plan: AttentionPlan, work: WorkLists, window_left: int | None, cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor
) -> None:
    """Make the step's work lists on the device, for keys that a window of `window_left` lets anyone see."""
    from fa4_backend.kernels.schedule.launch import run_schedule

    run_schedule(plan, work, cu_seqlens_q, seqused_k, window_left)


def keys_of(plan: AttentionPlan) -> list[CompileKey]:
    """Compile keys of every kernel that `plan` launches."""
    from fa4_backend.kernels.schedule.launch import schedule_key

    decode = decode_config(plan.problem, plan.limits)
    return [schedule_key(plan), *([] if decode is None else [decode]), prefill_key(plan)]


def warm_up(plan: AttentionPlan) -> None:
    """Load every kernel of `plan`, compiling what the cache on disk lacks; afterwards no step compiles."""
    for key in keys_of(plan):
        load(plan, key)


def load(plan: AttentionPlan, key: CompileKey) -> Callable[..., None]:
    """The launcher of `key` for the place where `plan` runs: the GPU, or the emulator over CPU tensors."""
    if plan.problem.is_emulated:
        from fa4_backend.emulator.kernels import load_emulated

        return load_emulated(key)  # type: ignore[arg-type]  # keys are frozen dataclasses: hashable
    return load_kernel(key)  # type: ignore[arg-type]


@cache
def _prefill_kernel(plan: AttentionPlan) -> Callable[..., None]:
    return load(plan, prefill_key(plan))


@cache
def _decode_kernel(plan: AttentionPlan) -> Callable[..., None] | None:
    key = decode_config(plan.problem, plan.limits)
    return None if key is None else load(plan, key)
