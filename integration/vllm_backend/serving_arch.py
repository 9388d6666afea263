"""Which kernels serve this process: the GPU's architecture, or on a machine without one what FA4_BACKEND_CPU names."""

from __future__ import annotations

from typing import Any

from fa4_backend import envs
from fa4_backend.arch import ARCHS, REFERENCE_ARCH, arch_of_capability
from fa4_backend.problem import EMULATED_PREFIX, UnsupportedProblem


def serving_arch(capability: Any = None) -> str:
    """The arch of an `AttentionProblem` served here.

    Args:
        capability: vLLM's DeviceCapability (major, minor) if it is known; default: the current device's.

    Raises:
        UnsupportedProblem: no kernel is made for the device.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        emulated = envs.EMULATED_ARCH[envs.cpu_kernel()]
        return REFERENCE_ARCH if emulated is None else f"{EMULATED_PREFIX}{emulated}"
    capability = capability or current_platform.get_device_capability()
    arch = arch_of_capability(capability.major, capability.minor) if capability and current_platform.is_cuda() else None
    if arch is None:
        made_for = ", ".join(f"{limits.chips} ({name})" for name, limits in ARCHS.items())
        got = f"compute capability {capability.major}.{capability.minor}" if capability else current_platform.device_name
        raise UnsupportedProblem(f"device: expected {made_for} or a CPU, got {got}; use another attention backend of vLLM here")
    return arch
