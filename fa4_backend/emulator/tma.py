"""Bulk asynchronous copies. PTX ISA 9.0: 9.7.9.25.4 cp.async.bulk, 9.7.9.27 cp.async.bulk.tensor, 9.7.9.25.5 groups."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import KernelFault, MemoryFault, UnsupportedInstruction
from fa4_backend.emulator.mbarrier import find_barrier, value_reader, value_reader_16
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import Address, Immediate, Instruction
from fa4_backend.emulator.tensor_maps import (
    REDUCE,
    REDUCE_TYPES,
    TensorMap,
    box_chunks,
    check_coordinates,
    load_box,
    read_map,
    reduce_bytes,
    store_box,
    touch_boxes,
)
from fa4_backend.emulator.warp import BulkGroup

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cta
    from fa4_backend.emulator.memory import GlobalMemory
    from fa4_backend.emulator.races import Access
    from fa4_backend.emulator.warp import Warp


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
                chunks = box_chunks(cta, address & 0xFFFFFF, count, 0, 16)
                access = warp.races.issue_copy(warp, barrier) if warp.races else None
                if from_smem:
                    owner = cluster.cta_at(begin)
                    own = box_chunks(owner, begin & 0xFFFFFF, count, 0, 16)
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


@handles("prefetch")
def _prefetch_line(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.9.15: nothing moves here, but what is named must exist: a byte, or a tensor map."""
    is_map = mods.has("tensormap")
    mods.has("global", "param", "const", "local")
    mods.has("L1", "L2", "L2::evict_last", "L2::evict_normal")
    mods.done()
    source = b.global_address(ins.operands[0])

    def handler(warp: Warp) -> None:
        memory = warp.cta.grid.memory
        for address in {source(warp, lane) for lane in warp.lanes()}:
            if is_map:
                read_map(memory, address)
            elif not address >> 56:  # of shared and local memory, it does nothing
                memory.bytes_at(address, 1)

    return handler


@handles("cp.async.bulk.prefetch")
def _prefetch(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.9.25.4.3: nothing moves here, but the source must exist."""
    mods.one("L2")
    mods.one("global")
    mods.has("L2::cache_hint")
    mods.done()
    source, size = b.global_address(ins.operands[0]), value_reader(b, ins.operands[1])

    def handler(warp: Warp) -> None:
        for lane in warp.lanes():
            begin, count = source(warp, lane), size(warp, lane)
            if (begin | count) & 15:
                raise MemoryFault(f"cp.async.bulk.prefetch of {count} bytes at {begin:#x}: not multiples of 16")
            warp.cta.grid.memory.bytes_at(begin, count)

    return handler


@handles("cp.async.bulk.prefetch.tensor")
def _prefetch_tensor(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.9.27.1.4: nothing moves here, but the box must be one that a copy could take."""
    rank = int(mods.one("1d", "2d", "3d", "4d", "5d")[0])
    mods.one("L2")
    mods.one("global")
    mods.has("tile")
    four_rows = mods.has("tile::gather4")
    mods.has("L2::cache_hint")
    mods.done()
    where = ins.operands[0]
    if not isinstance(where, Address):
        raise UnsupportedInstruction(f"{ins.opcode}: operand {where!r}")
    tensor_at, coordinates = b.global_address(where), _coordinates(b, where, 5 if four_rows else rank)

    def handler(warp: Warp) -> None:
        memory = warp.cta.grid.memory
        for lane in warp.lanes():
            tensor = read_map(memory, tensor_at(warp, lane))
            if tensor.rank != rank:
                raise KernelFault(f"{rank}-dimensional prefetch with a tensor map of rank {tensor.rank}")
            coords = tuple(_signed(c(warp, lane)) for c in coordinates)
            check_coordinates(tensor, coords, store=False)
            _load_rows(memory, tensor, _rows_of(tensor, coords, four_rows))

    return handler


# -- reductions: 9.7.9.25.4.2 cp.reduce.async.bulk, 9.7.9.27.1.3 cp.reduce.async.bulk.tensor ------------------------------------


@handles("cp.reduce.async.bulk")
def _reduce(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    mods.one("global")
    mods.one("shared::cta")
    mods.one("bulk_group")
    operation = mods.one(*REDUCE)
    mods.has("noftz")
    _common(mods)
    kind = mods.one(*REDUCE_TYPES, "bf16")
    mods.done()
    return _bulk_store(b, ins, functools.partial(_reduce_bytes, operation=operation, kind=REDUCE_TYPES.get(kind, kind)), is_reduction=True)


def _reduce_bytes(memory: GlobalMemory, address: int, count: int, data: np.ndarray, *, operation: str, kind: str) -> None:
    view = memory.bytes_at(address, count, write=True)
    view[:] = reduce_bytes(view, data.reshape(-1), operation, kind)


@handles("cp.reduce.async.bulk.tensor")
def _tensor_reduce(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    rank = int(mods.one("1d", "2d", "3d", "4d", "5d")[0])
    operation = mods.one(*REDUCE)
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
            chunks = box_chunks(warp.cta, begin, count, 0, 16)
            if warp.races:
                access = warp.races.issue_bulk_write(warp)
                access.races.in_global.access(access, np.array([address]), count, write=True, strong=is_reduction)
            _submit_store(warp, chunks, functools.partial(write, warp.cta.grid.memory, address, count), count)

    return handler
