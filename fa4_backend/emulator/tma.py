"""Bulk asynchronous copies. PTX ISA 9.0: 9.7.9.25.4 cp.async.bulk, 9.7.9.27 cp.async.bulk.tensor, 9.7.9.25.5 groups; 5.5 tensors.

The 128-byte tensor map is decoded as the compiler writes it: see `TensorMap`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.cta import BulkGroup
from fa4_backend.emulator.decode import Builder, Handler, Modifiers, handles
from fa4_backend.emulator.errors import KernelFault, MemoryFault, UnsupportedInstruction
from fa4_backend.emulator.mbarrier import find_barrier, value_reader, value_reader_16
from fa4_backend.emulator.parser import Address, Immediate, Instruction

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cta, Warp
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


def box_chunks(cta: Cta, offset: int, num_bytes: int, mask: int) -> np.ndarray:
    """Chunks of 16 bytes of a CTA's shared memory that a box at `offset` fills, in the order of the box."""
    if (offset % 128 and mask) or offset % 16:
        raise MemoryFault(f"box at shared offset {offset:#x} is not aligned to 128 bytes")
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


# -- instructions ---------------------------------------------------------------------------------------------------------


def _common(mods: Modifiers) -> None:
    mods.has("L2::cache_hint")
    mods.has("cta_group::1")


def _coordinates(b: Builder, address: Address, rank: int) -> list[Callable[[Warp, int], int]]:
    if len(address.coords) != rank:
        raise UnsupportedInstruction(f"tensor copy with {len(address.coords)} coordinates, expected {rank}")
    return [value_reader(b, c) for c in address.coords]


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


@handles("cp.async.bulk.tensor")
def _tensor(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    rank = int(mods.one("1d", "2d", "3d", "4d", "5d")[0])
    if "bulk_group" in mods.parts:
        return _tensor_store(b, ins, mods, rank)
    return _tensor_load(b, ins, mods, rank)


def _rows_of(tensor: TensorMap, coords: tuple[int, ...], four_rows: bool) -> list[tuple[int, ...]]:
    """Coordinates of the boxes of one copy: tile::gather4 and scatter4 name a column and four rows, each a box of one row. 5.5.3.2"""
    if not four_rows:
        return [coords]
    if tensor.rank != 2 or tensor.box[1] != 1:
        raise KernelFault(f"gather4 or scatter4 with a tensor map of rank {tensor.rank} and box {tensor.box}, expected (columns, 1)")
    return [(coords[0], row) for row in coords[1:]]


def _load_rows(memory: GlobalMemory, tensor: TensorMap, boxes: list[tuple[int, ...]]) -> np.ndarray:
    return np.concatenate([load_box(memory, tensor, box) for box in boxes]) if len(boxes) > 1 else load_box(memory, tensor, boxes[0])


def _store_rows(memory: GlobalMemory, tensor: TensorMap, boxes: list[tuple[int, ...]], operation: str, data: np.ndarray) -> None:
    for box, part in zip(boxes, np.split(data, len(boxes)), strict=True):
        store_box(memory, tensor, box, part, operation)


def _tensor_load(b: Builder, ins: Instruction, mods: Modifiers, rank: int) -> Handler:
    mods.one("shared::cta", "shared::cluster")
    mods.one("global")
    mods.has("tile")
    four_rows = mods.has("tile::gather4")
    mods.one("mbarrier::complete_tx::bytes")
    multicast = mods.has("multicast::cluster")
    mods.has("cta_group::2")
    _common(mods)
    mods.done()
    dst, src, bar, *rest = ins.operands
    if not isinstance(src, Address):
        raise UnsupportedInstruction(f"{ins.opcode}: operand {src!r}")
    where, tensor_at, barrier_at = b.smem_address(dst), b.global_address(src), b.smem_address(bar)
    coordinates = _coordinates(b, src, 5 if four_rows else rank)
    ranks = None
    if multicast:
        ranks = value_reader_16(b, rest[0])

    def handler(warp: Warp) -> None:
        cluster, memory = warp.cta.cluster, warp.cta.grid.memory
        for lane in warp.lanes():
            tensor = read_map(memory, tensor_at(warp, lane))
            if tensor.rank != rank:
                raise KernelFault(f"{rank}-dimensional copy with a tensor map of rank {tensor.rank}")
            coords = tuple(_signed(c(warp, lane)) for c in coordinates)
            check_coordinates(tensor, coords, store=False)
            boxes = _rows_of(tensor, coords, four_rows)
            num_bytes = tensor.box_bytes * len(boxes)
            address, bar_address = where(warp, lane), barrier_at(warp, lane)
            mask = ranks(warp, lane) if ranks else 0
            targets = [r << 24 for r in range(cluster.size) if mask >> r & 1] if ranks else [address & ~0xFFFFFF]
            for base in targets:
                barrier = find_barrier(warp, base | bar_address & 0xFFFFFF if ranks else bar_address, asynchronous=True)
                cta = cluster.cta_at(base)
                chunks = box_chunks(cta, address & 0xFFFFFF, num_bytes, tensor.swizzle)
                access = warp.races.issue_copy(warp, barrier) if warp.races else None
                if access:
                    touch_boxes(access, memory, tensor, boxes, write=False)
                _submit_load(warp, cta, barrier, chunks, functools.partial(_load_rows, memory, tensor, boxes), num_bytes, access)

    return handler


def _submit_load(
    warp: Warp, cta: Cta, barrier: object, chunks: np.ndarray, read: Callable[[], np.ndarray], num_bytes: int, access: Access | None
) -> None:
    place = warp.place(lane=warp.first_lane())

    def run() -> None:
        try:
            data = read()
        except MemoryFault as fault:
            raise MemoryFault(fault.message, place) from None
        cta.smem16[chunks] = data
        if access:
            access.races.smem_chunks(access, cta, chunks, write=True)
            access.races.complete(access, barrier)
        cta.grid.session.report.tma_bytes += num_bytes
        barrier.complete_tx(num_bytes)  # type: ignore[attr-defined]

    warp.cta.cluster.submit(("copy", id(run)), run)


def _tensor_store(b: Builder, ins: Instruction, mods: Modifiers, rank: int, operation: str = "") -> Handler:
    """Shared memory to global memory."""
    mods.one("global")
    mods.one("shared::cta")
    mods.has("tile")
    four_rows = mods.has("tile::scatter4")
    mods.one("bulk_group")
    _common(mods)
    mods.done()
    dst, src = ins.operands[:2]
    if not isinstance(dst, Address):
        raise UnsupportedInstruction(f"{ins.opcode}: operand {dst!r}")
    where, tensor_at = b.smem_address(src), b.global_address(dst)
    coordinates = _coordinates(b, dst, 5 if four_rows else rank)

    def handler(warp: Warp) -> None:
        cta, memory = warp.cta, warp.cta.grid.memory
        for lane in warp.lanes():
            tensor = read_map(memory, tensor_at(warp, lane))
            if tensor.rank != rank:
                raise KernelFault(f"{rank}-dimensional copy with a tensor map of rank {tensor.rank}")
            coords = tuple(_signed(c(warp, lane)) for c in coordinates)
            check_coordinates(tensor, coords, store=True)
            boxes = _rows_of(tensor, coords, four_rows)
            num_bytes = tensor.box_bytes * len(boxes)
            chunks = box_chunks(cta, where(warp, lane) & 0xFFFFFF, num_bytes, tensor.swizzle)
            if warp.races:
                touch_boxes(warp.races.issue_bulk_write(warp), memory, tensor, boxes, write=True, strong=bool(operation))
            _submit_store(warp, chunks, functools.partial(_store_rows, memory, tensor, boxes, operation), num_bytes)

    return handler


def _submit_store(warp: Warp, chunks: np.ndarray, write: Callable[[np.ndarray], None], num_bytes: int) -> None:
    cta = warp.cta
    if warp.open_bulk_group is None:
        warp.open_bulk_group = BulkGroup()
    group = warp.open_bulk_group
    group.reads_left += 1
    group.writes_left += 1
    access = warp.races.issue_bulk_read(warp) if warp.races else None
    if access:
        access.races.smem_chunks(access, cta, chunks, write=False)
    place = warp.place(lane=warp.first_lane())

    def run() -> None:
        try:
            write(cta.smem16[chunks])
        except MemoryFault as fault:
            raise MemoryFault(fault.message, place) from None
        group.reads_left -= 1
        group.writes_left -= 1
        cta.grid.session.report.tma_bytes += num_bytes
        waiters, group.waiters = group.waiters, []
        for other, lanes in waiters:
            other.wake(lanes)

    cta.cluster.submit(("store", id(run)), run)


@handles("cp.async.bulk.commit_group")
def _commit_group(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    mods.done()

    def handler(warp: Warp) -> None:
        group = warp.open_bulk_group or BulkGroup()
        warp.open_bulk_group = None
        warp.bulk_groups.append(group)
        if warp.races:
            group.epoch = warp.races.commit_bulk(warp)

    return handler


@handles("cp.async.bulk.wait_group")
def _wait_group(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """All but the newest N groups are complete; `.read`: have read their source."""
    only_read = mods.has("read")
    mods.done()
    operand = ins.operands[0]
    if not isinstance(operand, Immediate):
        raise UnsupportedInstruction(f"{ins.opcode} with {operand!r}")
    allowed = operand.bits

    def handler(warp: Warp) -> bool | None:
        groups = warp.bulk_groups
        while len(groups) > allowed:
            group = groups[0]
            if group.reads_left:
                warp.wait(f"cp.async.bulk.wait_group {allowed}: {group.reads_left} copies of the oldest group")
                group.waiters.append((warp, warp.waiting_lanes))
                return True
            groups.popleft()
            if warp.races:
                warp.races.acquire_bulk(warp, group.epoch, only_read)
        return None

    return handler


@handles("cp.async.bulk")
def _bulk(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """Copies of consecutive bytes: global or own shared memory to shared memory of the cluster, shared to global in a bulk group."""
    if "bulk_group" in mods.parts:
        mods.one("global")
        mods.one("shared::cta")
        mods.one("bulk_group")
        _common(mods)
        mods.done()
        return _bulk_store(b, ins, _write_bytes, is_reduction=False)
    # The first space of the opcode is the destination.
    to_cluster, from_smem = ins.opcode.split(".")[3], ins.opcode.split(".")[4] == "shared::cta"
    if to_cluster not in ("shared::cta", "shared::cluster"):
        raise UnsupportedInstruction(ins.opcode)
    mods.parts = mods.parts[2:]
    mods.one("mbarrier::complete_tx::bytes")
    multicast = mods.has("multicast::cluster")
    _common(mods)
    mods.done()
    where, size = b.smem_address(ins.operands[0]), value_reader(b, ins.operands[2])
    source = b.smem_address(ins.operands[1]) if from_smem else b.global_address(ins.operands[1])
    barrier_at = b.smem_address(ins.operands[3])
    ranks = value_reader_16(b, ins.operands[4]) if multicast else None

    def handler(warp: Warp) -> None:
        cluster, memory = warp.cta.cluster, warp.cta.grid.memory
        for lane in warp.lanes():
            address, count, begin = where(warp, lane), size(warp, lane), source(warp, lane)
            if (address | count | begin) & 15:
                raise MemoryFault(f"cp.async.bulk of {count} bytes from {begin:#x} to shared {address:#x}: not multiples of 16")
            bar_address = barrier_at(warp, lane)
            mask = ranks(warp, lane) if ranks else 0
            targets = [r << 24 for r in range(cluster.size) if mask >> r & 1] if ranks else [address & ~0xFFFFFF]
            for base in targets:
                barrier = find_barrier(warp, base | bar_address & 0xFFFFFF if ranks else bar_address, asynchronous=True)
                cta = cluster.cta_at(base)
                chunks = box_chunks(cta, address & 0xFFFFFF, count, 0)
                access = warp.races.issue_copy(warp, barrier) if warp.races else None
                if from_smem:
                    owner = cluster.cta_at(begin)
                    own = box_chunks(owner, begin & 0xFFFFFF, count, 0)
                    if access:
                        access.races.smem_chunks(access, owner, own, write=False)
                    read: Callable[[], np.ndarray] = functools.partial(_read_chunks, owner, own)
                else:
                    read = functools.partial(_read_bytes, memory, begin, count)
                    if access:
                        access.races.in_global.access(access, np.array([begin]), count, write=False)
                _submit_load(warp, cta, barrier, chunks, read, count, access)

    return handler


def _read_chunks(cta: Cta, chunks: np.ndarray) -> np.ndarray:
    return cta.smem16[chunks]


@handles("cp.async.bulk.prefetch")
def _prefetch(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.9.25.4.3, 9.7.9.27.1.4: a hint; the source must exist all the same."""
    return lambda warp: None


# -- reductions: 9.7.9.25.4.2 cp.reduce.async.bulk, 9.7.9.27.1.3 cp.reduce.async.bulk.tensor ------------------------------------

_REDUCE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda old, x: np.where(old >= x, 0, old + 1),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - 1),
}
_REDUCE_TYPES = {
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
        bits = _REDUCE[operation](*wide).astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(bits & 0x7FFFFFFF > 0x7F800000, 0x7FFF, rounded).astype("<u2").view(np.uint8)
    result: np.ndarray = _REDUCE[operation](old.view(kind), new.view(kind)).astype(kind).view(np.uint8)
    return result


@handles("cp.reduce.async.bulk")
def _reduce(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    mods.one("global")
    mods.one("shared::cta")
    mods.one("bulk_group")
    operation = mods.one(*_REDUCE)
    mods.has("noftz")
    _common(mods)
    kind = mods.one(*_REDUCE_TYPES, "bf16")
    mods.done()
    return _bulk_store(b, ins, functools.partial(_reduce_bytes, operation=operation, kind=_REDUCE_TYPES.get(kind, kind)), is_reduction=True)


def _reduce_bytes(memory: GlobalMemory, address: int, count: int, data: np.ndarray, *, operation: str, kind: str) -> None:
    view = memory.bytes_at(address, count, write=True)
    view[:] = reduce_bytes(view, data.reshape(-1), operation, kind)


@handles("cp.reduce.async.bulk.tensor")
def _tensor_reduce(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    rank = int(mods.one("1d", "2d", "3d", "4d", "5d")[0])
    operation = mods.one(*_REDUCE)
    return _tensor_store(b, ins, mods, rank, operation)


def _read_bytes(memory: GlobalMemory, address: int, count: int) -> np.ndarray:
    return memory.bytes_at(address, count).reshape(-1, 16)


def _write_bytes(memory: GlobalMemory, address: int, count: int, data: np.ndarray) -> None:
    memory.bytes_at(address, count, write=True)[:] = data.reshape(-1)


def _bulk_store(b: Builder, ins: Instruction, write: Callable[..., None], is_reduction: bool) -> Handler:
    dest, source, size = b.global_address(ins.operands[0]), b.smem_address(ins.operands[1]), value_reader(b, ins.operands[2])

    def handler(warp: Warp) -> None:
        for lane in warp.lanes():
            address, count, begin = dest(warp, lane), size(warp, lane), source(warp, lane) & 0xFFFFFF
            if (address | count | begin) & 15:
                raise MemoryFault(f"cp.async.bulk of {count} bytes from shared {begin:#x} to {address:#x}: not multiples of 16")
            chunks = box_chunks(warp.cta, begin, count, 0)
            if warp.races:
                access = warp.races.issue_bulk_write(warp)
                access.races.in_global.access(access, np.array([address]), count, write=True, strong=is_reduction)
            _submit_store(warp, chunks, functools.partial(write, warp.cta.grid.memory, address, count), count)

    return handler
