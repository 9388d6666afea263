"""Tensor maps, the boxes that they describe in global and shared memory, and reductions of bytes. PTX ISA 9.0: 5.5 tensors.

The 128-byte tensor map is decoded as the compiler writes it: see `TensorMap`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.errors import MemoryFault, UnsupportedInstruction

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cta
    from fa4_backend.emulator.memory import GlobalMemory
    from fa4_backend.emulator.races import Access

# Data type code of a tensor map -> element bytes: u8 u16 u32 i32 u64 i64 f16 f32 f32.ftz f64 bf16
ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
NAN_FILLS = {6: 0x7FFF, 7: 0x7FFFFFFF, 8: 0x7FFFFFFF, 9: 0x7FFFFFFFFFFFFFFF, 10: 0x7FFF}
SWIZZLE_MASKS = (0, 1, 3, 7)


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A tiled tensor map.

    Layout, recorded from the CUDA driver (tests/device/results/tensor_maps_h200.json): bytes 0-7 base address; 8-11 flags (bits 4-6
    rank - 1, 7-10 data type, 11-12 interleave, 13-14 swizzle, 15 NaN fill, 16 tf32, 17-18 L2 promotion; the low four are 0 from the
    driver and 2 from the DSL); 12-27 strides of dimensions 1 to 4 in units of 16 bytes, 28-31 their bits 32 to 35, four bits each;
    32-51 dimensions - 1; 52-54 element strides - 1, three bits each; 55-59 box - 1. What follows is derived from these.
    """

    base: int
    rank: int
    element_bytes: int
    swizzle: int  # 16-byte chunk bits that are XORed
    dims: tuple[int, ...]  # elements, dimension 0 contiguous
    strides: tuple[int, ...]  # bytes
    box: tuple[int, ...]  # elements of the tensor that a box spans
    steps: tuple[int, ...]  # every how manieth element is copied; PTX ISA 5.5.3 traversal strides
    fill: bytes  # an element outside of the tensor
    kind: int  # data type code

    @property
    def counts(self) -> tuple[int, ...]:
        """Elements that one box copies, by dimension."""
        return tuple(-(-b // s) for b, s in zip(self.box, self.steps, strict=True))

    @property
    def box_bytes(self) -> int:
        return self.element_bytes * int(np.prod(self.counts))


@functools.lru_cache(maxsize=1024)
def decode_tensor_map(raw: bytes) -> TensorMap:
    """Decode 128 bytes; fields that are not modelled raise `UnsupportedInstruction`."""
    words = np.frombuffer(raw, np.uint32)
    flags = int(words[2])
    rank, kind, swizzle = (flags >> 4 & 7) + 1, flags >> 7 & 15, flags >> 13 & 3
    if kind not in ELEMENT_BYTES or rank > 5:
        raise UnsupportedInstruction(f"tensor map with data type {kind}, rank {rank} (flags {flags:#010x})")
    if flags & 0xF not in (0, 2) or flags >> 11 & 3 or flags >> 16 & 1 or flags >> 19 not in (0, 4):  # the DSL sets bit 21
        raise UnsupportedInstruction(f"tensor map flags {flags:#010x}: not tiled, interleaved, or tf32")
    size = ELEMENT_BYTES[kind]
    dims = tuple(int(d) + 1 for d in words[8 : 8 + rank])
    high = int(words[7])
    strides = (size, *((int(s) | (high >> 4 * i & 15) << 32) * 16 for i, s in enumerate(words[3 : 3 + rank - 1])))
    box = tuple(b + 1 for b in raw[55 : 55 + rank])
    packed = int.from_bytes(raw[52:55], "little")
    steps = (1, *((packed >> 3 * i & 7) + 1 for i in range(1, rank)))  # that of dimension 0 counts only in interleaved layouts
    fill = (NAN_FILLS.get(kind, 0) if flags >> 15 & 1 else 0).to_bytes(size, "little")
    base = int(words[0]) | int(words[1]) << 32
    if base % 16:
        raise MemoryFault(f"tensor map base {base:#x} is not a multiple of 16 bytes")
    if box[0] * size % 16:
        raise UnsupportedInstruction(f"tensor map with an inner box of {box[0] * size} bytes: not a multiple of 16")
    if swizzle and box[0] * size > 16 << swizzle:
        raise MemoryFault(f"tensor map with an inner box of {box[0] * size} bytes and a swizzle span of {16 << swizzle}")
    return TensorMap(base, rank, size, SWIZZLE_MASKS[swizzle], dims, strides, box, steps, fill, kind)


def check_coordinates(tensor: TensorMap, coords: tuple[int, ...], store: bool) -> None:
    """What an H200 answers with an illegal instruction (tests/device/results): the ISA does not say it."""
    if coords[0] * tensor.element_bytes % 16:
        raise MemoryFault(
            f"tensor copy at inner coordinate {coords[0]}: {coords[0] * tensor.element_bytes} bytes, expected a multiple of 16"
        )
    if store and min(coords) < 0:
        raise MemoryFault(f"tensor store at the negative coordinate {coords}")


def read_map(memory: GlobalMemory, address: int) -> TensorMap:
    """The tensor map at a global address."""
    if address % 64:
        raise MemoryFault(f"tensor map at {address:#x} is not a multiple of 64 bytes")
    return decode_tensor_map(memory.bytes_at(address, 128).tobytes())


@functools.lru_cache(maxsize=4096)
def smem_chunks(num_chunks: int, phase: int, mask: int) -> np.ndarray:
    """Chunks of 16 bytes of a box in shared memory, relative to the 1024-byte block of its start. 5.5.6 swizzling modes."""
    chunk = np.arange(num_chunks) + phase
    return chunk ^ (chunk >> 3 & mask)


def box_chunks(cta: Cta, offset: int, num_bytes: int, mask: int, align: int = 128) -> np.ndarray:
    """Chunks of 16 bytes of a CTA's shared memory that a box at `offset` fills, in its order. `align`: 16 for copies of bytes."""
    if offset % align:
        raise MemoryFault(f"copy at shared offset {offset:#x} is not aligned to {align} bytes")
    if offset + num_bytes > cta.smem.size:
        raise MemoryFault(f"box of {num_bytes} bytes at shared offset {offset:#x}: the CTA has {cta.smem.size} bytes")
    phase = offset >> 4 & 63
    return smem_chunks(num_bytes // 16, phase, mask) + ((offset >> 4) - phase)


def global_box(
    memory: GlobalMemory, tensor: TensorMap, coords: tuple[int, ...], write: bool
) -> tuple[np.ndarray | None, tuple[slice, ...]]:
    """View of the part of a box that lies inside the tensor, outermost dimension first, bytes last; and where it lies in the box."""
    inside, start = [], 0
    shape, strides = [], []
    for dim, extent, count, step, stride in zip(coords, tensor.dims, tensor.counts, tensor.steps, tensor.strides, strict=True):
        low, high = max(0, -(dim // step)), min(count, -((dim - extent) // step))
        if low >= high:
            return None, ()
        inside.append(slice(low, high))
        start += (dim + low * step) * stride
        shape.append(high - low)
        strides.append(stride * step)
    size = tensor.element_bytes
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + size
    data = memory.bytes_at(tensor.base + start, span, write)
    shape[0], strides[0] = shape[0] * size, 1
    inside[0] = slice(inside[0].start * size, inside[0].stop * size)
    return np.lib.stride_tricks.as_strided(data, shape[::-1], strides[::-1], writeable=write), tuple(inside[::-1])


def run_addresses(view: np.ndarray) -> np.ndarray:
    """Addresses of the runs of consecutive bytes that make up a box in global memory."""
    addresses = np.array([view.ctypes.data], np.uint64)
    for extent, stride in zip(view.shape[:-1], view.strides[:-1], strict=True):
        addresses = (addresses[:, None] + np.arange(extent, dtype=np.uint64) * np.uint64(stride)).reshape(-1)
    return addresses


def touch_boxes(
    access: Access, memory: GlobalMemory, tensor: TensorMap, boxes: list[tuple[int, ...]], write: bool, strong: bool = False
) -> None:
    """Tell the race detector which global memory a tensor copy accesses."""
    for box in boxes:
        view, _ = global_box(memory, tensor, box, write)
        if view is not None:
            access.races.in_global.access(access, run_addresses(view), view.shape[-1], write, strong)


def load_box(memory: GlobalMemory, tensor: TensorMap, coords: tuple[int, ...]) -> np.ndarray:
    """The box as bytes, (chunks, 16); what lies outside the tensor is the map's fill value."""
    view, inside = global_box(memory, tensor, coords, write=False)
    shape = (*tensor.counts[:0:-1], tensor.counts[0] * tensor.element_bytes)
    if view is not None and view.shape == shape:
        return np.ascontiguousarray(view).reshape(-1, 16)
    out = np.zeros(shape, np.uint8)
    if any(tensor.fill):
        out.reshape(-1, tensor.element_bytes)[:] = np.frombuffer(tensor.fill, np.uint8)
    if view is not None:
        out[inside] = view
    return out.reshape(-1, 16)


def store_box(memory: GlobalMemory, tensor: TensorMap, coords: tuple[int, ...], data: np.ndarray, operation: str = "") -> None:
    """Write a box, or combine it with what is there; what lies outside the tensor is dropped."""
    view, inside = global_box(memory, tensor, coords, write=True)
    if view is not None:
        new = data.reshape(*tensor.counts[:0:-1], tensor.counts[0] * tensor.element_bytes)[inside]
        view[...] = reduce_bytes(view, new, operation, _MAP_TYPES[tensor.kind]) if operation else new


REDUCE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda old, x: np.where(old >= x, 0, old + 1),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - 1),
}
REDUCE_TYPES = {
    "u32": "<u4",
    "s32": "<i4",
    "u64": "<u8",
    "s64": "<i8",
    "b32": "<u4",
    "b64": "<u8",
    "f16": "<f2",
    "f32": "<f4",
    "f64": "<f8",
}
# Types of tensor maps, by their code
_MAP_TYPES = {0: "u1", 1: "<u2", 2: "<u4", 3: "<i4", 4: "<u8", 5: "<i8", 6: "<f2", 7: "<f4", 8: "<f4", 9: "<f8", 10: "bf16"}


def reduce_bytes(old: np.ndarray, new: np.ndarray, operation: str, kind: str) -> np.ndarray:
    """Element by element; both are bytes, of one shape with the bytes last."""
    old, new = np.ascontiguousarray(old), np.ascontiguousarray(new)
    if kind == "bf16":
        wide = [(x.view("<u2").astype(np.uint32) << 16).view(np.float32) for x in (old, new)]
        bits = REDUCE[operation](*wide).astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(bits & 0x7FFFFFFF > 0x7F800000, 0x7FFF, rounded).astype("<u2").view(np.uint8)
    result: np.ndarray = REDUCE[operation](old.view(kind), new.view(kind)).astype(kind).view(np.uint8)
    return result
