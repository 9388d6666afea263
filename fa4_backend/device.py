"""A plan for the device at hand: how many SMs it has and how fast its memory is, as it says itself. Nothing follows from its name."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

from fa4_backend.plan import AttentionPlan, plan_attention
from fa4_backend.problem import AttentionProblem, BatchLimits

if TYPE_CHECKING:
    import torch

MEMORY_CLOCK_RATE, GLOBAL_MEMORY_BUS_WIDTH = 36, 37  # CUdevice_attribute: kHz, bits


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


@functools.cache
def peak_memory_gb(index: int) -> float | None:
    """GB/s of the memory of the CUDA device `index`, clock times width of the bus (an H100 SXM: 3,352).

    None where there is no driver, or it does not say, as that of a virtual GPU may not.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    clock, width = ctypes.c_int(), ctypes.c_int()
    for value, attribute in ((clock, MEMORY_CLOCK_RATE), (width, GLOBAL_MEMORY_BUS_WIDTH)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return 2 * clock.value * (width.value // 8) / 1e6 or None  # two transfers a clock
