"""The chips this package knows, as one table: what they are called and what a kernel may use of them."""

from __future__ import annotations

from dataclasses import dataclass

REFERENCE_ARCH = "cpu"


@dataclass(frozen=True)
class ArchLimits:
    """What one streaming multiprocessor (SM) of a chip offers a kernel.

    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; PTX ISA, "Tensor Memory".
    """

    name: str
    chips: str
    compute_capability: tuple[int, int]
    num_sms: int  # of the largest part sold; the real count is read from the device
    smem_bytes: int  # dynamic shared memory one CTA may have
    registers: int  # 32-bit registers of the SM
    tmem_columns: int  # 32-bit columns of tensor memory, 128 lanes each; 0 where there is none


ARCHS: dict[str, ArchLimits] = {
    limits.name: limits
    for limits in (
        ArchLimits("sm_90a", "H100, H200, GH200", (9, 0), 132, 227 * 1024, 65536, 0),
        ArchLimits("sm_100a", "B200, GB200", (10, 0), 148, 227 * 1024, 65536, 512),
        ArchLimits("sm_103a", "B300, GB300", (10, 3), 160, 227 * 1024, 65536, 512),
    )
}


def arch_of_capability(major: int, minor: int) -> str | None:
    """Name of the arch with this compute capability, or None where there are no kernels for it (sm_80, sm_120, ...)."""
    for limits in ARCHS.values():
        if limits.compute_capability == (major, minor):
            return limits.name
    return None
