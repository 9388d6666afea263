"""What SGLang's model runner says of the device, in the words of `fa4_integration.common.serving_device`."""

from __future__ import annotations

import torch

from fa4_integration.common.serving_device import DeviceFacts, arch_of_device


def serving_arch(device: torch.device) -> str:
    """The arch of an `AttentionProblem` served on `device`.

    Raises:
        UnsupportedProblem: no kernel is made for the device.
    """
    if device.type == "cpu":
        return arch_of_device(DeviceFacts(True, None, "CPU"))
    if device.type != "cuda" or torch.version.hip:
        return arch_of_device(DeviceFacts(False, None, str(device)))
    return arch_of_device(DeviceFacts(False, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)))
