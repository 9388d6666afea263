"""Which kernels serve a device: a GPU's own, or on a machine without one those that FA4_BACKEND_CPU names."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fa4_backend import UnsupportedProblem, envs
from fa4_backend.arch import ARCHS, REFERENCE_ARCH, arch_of_capability
from fa4_backend.problem import EMULATED_PREFIX

if TYPE_CHECKING:
    import torch


class DeviceFacts(NamedTuple):
    """What an engine says of the device that will serve."""

    is_cpu: bool
    compute_capability: tuple[int, int] | None  # (major, minor); None: not a CUDA device, or not known
    name: str  # for the refusal


def arch_of_device(device: DeviceFacts) -> str:
    """The arch of an `AttentionProblem` served on `device`.

    Raises:
        UnsupportedProblem: no kernel is made for it; the sentence says for which there are.
        ValueError: FA4_BACKEND_CPU holds an unknown name.
    """
    if device.is_cpu:
        emulated = envs.EMULATED_ARCH[envs.cpu_kernel()]
        return REFERENCE_ARCH if emulated is None else f"{EMULATED_PREFIX}{emulated}"
    arch = arch_of_capability(*device.compute_capability) if device.compute_capability else None
    if arch is None:
        made_for = ", ".join(f"{limits.chips} ({name})" for name, limits in ARCHS.items())
        got = "compute capability {}.{}".format(*device.compute_capability) if device.compute_capability else device.name
        raise UnsupportedProblem(f"device: expected {made_for} or a CPU, got {got}; use another attention backend of the engine here")
    return arch


def arch_of_torch_device(device: torch.device) -> str:
    """The arch of an `AttentionProblem` over tensors on `device`.

    Raises:
        UnsupportedProblem, ValueError: as `arch_of_device`.
    """
    import torch

    if device.type == "cpu":
        return arch_of_device(DeviceFacts(True, None, "CPU"))
    if device.type != "cuda" or torch.version.hip:
        return arch_of_device(DeviceFacts(False, None, str(device)))
    return arch_of_device(DeviceFacts(False, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)))
