"""What the CUDA driver says of itself and of its GPUs, asked through libcuda: needs neither torch nor a context on a GPU."""

from __future__ import annotations

import ctypes
import functools

MEMORY_CLOCK_RATE, GLOBAL_MEMORY_BUS_WIDTH = 36, 37  # CUdevice_attribute: kHz, bits


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, (13, 0) say; None where there is no driver."""
    driver, version = _libcuda(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def num_gpus() -> int:
    """GPUs that the driver shows this process (CUDA_VISIBLE_DEVICES hides some); 0 where there is no driver."""
    driver, count = _libcuda(), ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


@functools.cache
def peak_memory_gb(index: int) -> float | None:
    """GB/s of the memory of the CUDA device `index`, clock times width of the bus (an H100 SXM: 3,352).

    None where there is no driver, or it does not say, as that of a virtual GPU may not.
    """
    driver, device = _libcuda(), ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    clock, width = ctypes.c_int(), ctypes.c_int()
    for value, attribute in ((clock, MEMORY_CLOCK_RATE), (width, GLOBAL_MEMORY_BUS_WIDTH)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return 2 * clock.value * (width.value // 8) / 1e6 or None  # two transfers a clock


def _libcuda() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
