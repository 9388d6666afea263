"""Host side of the device-made schedule: its compile key and its launch. Imports no compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fa4_backend.kernels.work_list import NO_WINDOW, WorkLists

if TYPE_CHECKING:
    import torch

    from fa4_backend.plan import AttentionPlan


@dataclass(frozen=True)
class ScheduleConfig:
    """Compile key of the schedule: one kernel serves every problem of an arch."""

    arch: str
    max_num_seqs: int  # a power of two

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.schedule:build"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        return f"schedule-{self.arch}-s{self.max_num_seqs}"


def schedule_key(plan: AttentionPlan) -> ScheduleConfig:
    """Compile key of the plan's schedule; few sizes, so that plans share it."""
    return ScheduleConfig(plan.problem.target_arch, max(256, 1 << (plan.limits.max_num_seqs - 1).bit_length()))


def run_schedule(
    plan: AttentionPlan, work: WorkLists, cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor, window_left: int | None = None
) -> None:
    """Make both lists of `work` from a step's lengths; one launch.

    Args:
        cu_seqlens_q: (batch + 1,) int32.
        seqused_k: (batch,) int32.
        window_left: keys before the diagonal that any row of the step sees; None: all. A window wider than a layer's is
            correct for it, since the kernels apply their own.
    """
    s = work.shape
    _schedule_kernel(plan)(
        cu_seqlens_q, seqused_k, work.prefill_tiles, work.prefill_begin, work.decode_tiles, work.decode_first,
        s.num_kv_heads, s.tokens_per_tile, s.prefill_tile_n, s.decode_query_len, s.decode_tile_n, s.split_blocks, s.item_overhead,
        s.l2_tokens, NO_WINDOW if window_left is None else window_left, 0 if plan.problem.is_causal else NO_WINDOW, s.slot_vectors,
        s.num_sms, s.decode_tile_ticks, s.decode_full_sms,
    )  # fmt: skip


@cache
def _schedule_kernel(plan: AttentionPlan) -> Callable[..., None]:
    from fa4_backend.kernels.launch import load

    return load(plan, schedule_key(plan))
