"""A plan for the device at hand: how many SMs it has and how fast its memory is, as it says itself. Nothing follows from its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa4_backend.driver import peak_memory_gb
from fa4_backend.plan import AttentionPlan, plan_attention
from fa4_backend.problem import AttentionProblem, BatchLimits

if TYPE_CHECKING:
    import torch


def plan_on(problem: AttentionProblem, limits: BatchLimits, device: torch.device) -> AttentionPlan:
    """The plan of `problem` for `device`; on a CPU as `plan_attention` makes it without a device.

    Raises:
        UnsupportedProblem: as `plan_attention`.
    """
    import torch

    if device.type != "cuda":
        return plan_attention(problem, limits)
    index = torch.cuda.current_device() if device.index is None else device.index
    num_sms = torch.cuda.get_device_properties(index).multi_processor_count
    return plan_attention(problem, limits, num_sms=num_sms, memory_gb=peak_memory_gb(index))
