"""What vLLM's platform says of the device, in the words of `fa4_integration.common.serving_device`."""

from __future__ import annotations

from typing import Any

from fa4_integration.common.serving_device import DeviceFacts, arch_of_device


def serving_arch(capability: Any = None) -> str:
    """The arch of an `AttentionProblem` served here.

    Args:
        capability: vLLM's DeviceCapability (major, minor) if it is known; default: the current device's.

    Raises:
        UnsupportedProblem: no kernel is made for the device.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return arch_of_device(DeviceFacts(True, None, "CPU"))
    capability = (capability or current_platform.get_device_capability()) if current_platform.is_cuda() else None
    pair = None if capability is None else (capability.major, capability.minor)
    return arch_of_device(DeviceFacts(False, pair, current_platform.device_name))
