"""Global memory: host buffers that kernels may touch. Everything else is a fault.

Addresses are host addresses, so a buffer is used in place, without a copy. Shared memory and TMEM belong to the CTA (`cta.py`).
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from fa4_backend.emulator.errors import EmulatorError, MemoryFault
from fa4_backend.emulator.native_core import Region


@dataclass(frozen=True, slots=True)
class Buffer:
    """A range of host memory that kernels may touch."""

    name: str
    base: int
    num_bytes: int
    read_only: bool
    owner: object  # keeps the memory alive

    @property
    def end(self) -> int:
        return self.base + self.num_bytes


class GlobalMemory:
    """Registered buffers, sorted by address; they may not overlap unless one contains the other."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}
        self.bases: list[int] = []
        self.views: dict[int, np.ndarray] = {}
        self.table = (Region * 0)()

    def register(self, name: str, base: int, num_bytes: int, owner: object = None, read_only: bool = False) -> None:
        """Let kernels access `num_bytes` bytes at host address `base`. A range inside a known buffer changes nothing."""
        if num_bytes <= 0:
            return
        known = self.find(base, 1)
        if known is not None and known.end >= base + num_bytes:
            return
        end = base + num_bytes
        for other in [b for b in self.buffers.values() if b.base < end and base < b.end]:
            # Views of one allocation: the union is what the allocation holds.
            base, end = min(base, other.base), max(end, other.end)
            del self.buffers[other.base]
        self.buffers[base] = Buffer(name, base, end - base, read_only, owner)
        self.rebuild()

    def forget(self, base: int) -> None:
        self.buffers.pop(base, None)
        self.rebuild()

    def rebuild(self) -> None:
        ordered = sorted(self.buffers.values(), key=lambda b: b.base)
        self.bases = [b.base for b in ordered]
        self.table = (Region * len(ordered))(*(Region(b.base, b.end, int(b.read_only), 0) for b in ordered))
        self.views = {}

    def find(self, address: int, num_bytes: int) -> Buffer | None:
        index = bisect_right(self.bases, address) - 1
        if index < 0:
            return None
        buffer = self.buffers[self.bases[index]]
        return buffer if address + num_bytes <= buffer.end else None

    def bytes_at(self, address: int, num_bytes: int, write: bool = False) -> np.ndarray:
        """uint8 view of registered memory. Raises `MemoryFault` when it is not wholly inside one buffer."""
        buffer = self.find(address, num_bytes)
        if buffer is None:
            raise MemoryFault(f"{num_bytes} bytes at {address:#x} are outside every registered buffer; nearest: {self.nearest(address)}")
        if write and buffer.read_only:
            raise MemoryFault(f"write of {num_bytes} bytes at {address:#x} into read-only {buffer.name}")
        view = self.views.get(buffer.base)
        if view is None:
            view = np.frombuffer((ctypes.c_uint8 * buffer.num_bytes).from_address(buffer.base), np.uint8)
            self.views[buffer.base] = view
        offset = address - buffer.base
        return view[offset : offset + num_bytes]

    def nearest(self, address: int) -> str:
        if not self.bases:
            return "none is registered"
        buffer = min(self.buffers.values(), key=lambda b: max(b.base - address, address - b.end + 1, 0))
        if address < buffer.base:
            where = f"{buffer.base - address} bytes before its start"
        elif address >= buffer.end:
            where = f"{address - buffer.end} bytes past its end"
        else:
            where = f"inside, at {address - buffer.base}, but running past its end"
        return f"{buffer.name} ({buffer.num_bytes} bytes), {where}"


def host_array(address: int, num_bytes: int) -> np.ndarray:
    """uint8 view of any host memory (launch parameters); the caller knows that it is there."""
    if address == 0:
        raise EmulatorError("null pointer")
    return np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), np.uint8)
