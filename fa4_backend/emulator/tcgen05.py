"""Tensor memory and the fifth-generation tensor core. PTX ISA 9.0, 9.7.16.

TMEM is 128 lanes x 512 columns of 32-bit cells; an address is lane << 16 | column. MMAs, copies and commits of one warp finish in
the order of issue; warps are independent of each other. With `isa_order`, only products of one shape, kind and accumulator are in order
(9.7.16.6.2, pipelined instructions), which released kernels do not keep to. Products are added exactly and rounded once, then added in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.barriers import predicate_source
from fa4_backend.emulator.errors import KernelFault, MemoryFault, UnsupportedInstruction
from fa4_backend.emulator.lowering import Builder, Handler, Modifiers, handles
from fa4_backend.emulator.matrices import (
    ELEMENT_BYTES,
    RAW_TYPES,
    InstructionDescriptor,
    canonical,
    check_shape,
    instruction_descriptor,
    load_operand,
    matrix_product,
    tcgen05_descriptor,
    to_float32,
)
from fa4_backend.emulator.mbarrier import find_barrier, value_reader, value_reader_16
from fa4_backend.emulator.parser import Address, Instruction, Operand, Register, Vector

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cta
    from fa4_backend.emulator.races import Access
    from fa4_backend.emulator.warp import Warp

LANES, COLUMNS = 128, 512


def _group(mods: Modifiers) -> int:
    return int(mods.one("cta_group::1", "cta_group::2")[-1])


def _tmem_address(b: Builder, operand: Operand) -> Callable[[Warp, int], int]:
    slot, offset, wide = b.address(operand)
    if wide:
        raise UnsupportedInstruction("tensor memory address in a 64-bit register")
    return lambda warp, lane: (int(warp.r[slot, lane]) + offset) & 0xFFFFFFFF


# -- allocation: 9.7.16.7 -------------------------------------------------------------------------------------------------


def _pair(warp: Warp, group: int) -> list[Cta]:
    """CTAs that take part in an instruction of `cta_group::group`; for a pair, the even rank first."""
    cta = warp.cta
    if group == 1:
        return [cta]
    if cta.cluster.size < 2:
        raise KernelFault("cta_group::2 in a cluster of one CTA")
    even = cta.rank & ~1
    return [cta.cluster.ctas[even], cta.cluster.ctas[even + 1]]


def _pair_call(warp: Warp, group: int, what: str, columns: int) -> None:
    """One warp of each CTA of a pair performs what concerns the tensor memory of both (PTX ISA 9.7.16.7)."""
    if group == 2:
        warp.cta.pair_calls.append((what, columns))


def _check_columns(count: int) -> None:
    if count < 32 or count > COLUMNS or count & (count - 1):
        raise KernelFault(f"tensor memory allocation of {count} columns, expected a power of two from 32 to {COLUMNS}")


@handles("tcgen05.alloc", aligned=True)
def _alloc(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    group = _group(mods)
    mods.one("sync")
    mods.one("aligned")
    mods.has("shared::cta")
    mods.one("b32")
    mods.done()
    where, count = b.smem_address(ins.operands[0]), value_reader(b, ins.operands[1])

    def handler(warp: Warp) -> bool | None:
        lane, cta = warp.first_lane(), warp.cta
        columns = count(warp, lane)
        _check_columns(columns)
        if not cta.tmem_permit:
            raise KernelFault("tcgen05.alloc after relinquish_alloc_permit")
        free = [c for c in range(0, COLUMNS - columns + 1, columns) if not any(cta.tmem_owner[c : c + columns])]
        if not free:
            warp.wait(f"tcgen05.alloc of {columns} columns in {cta.name}: allocated are {cta.tmem_allocations}")
            cta.tmem_waiters.append((warp, warp.waiting_lanes))
            return True
        first = free[0]
        _pair_call(warp, group, "alloc", columns)
        cta.tmem_owner[first : first + columns] = [group] * columns
        cta.tmem_allocations[first] = columns
        cta.write_smem(where(warp, lane) & 0xFFFFFF, first.to_bytes(4, "little"), warp)
        return None

    return handler


@handles("tcgen05.dealloc", aligned=True)
def _dealloc(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    group = _group(mods)
    mods.one("sync")
    mods.one("aligned")
    mods.one("b32")
    mods.done()
    where, count = value_reader(b, ins.operands[0]), value_reader(b, ins.operands[1])

    def handler(warp: Warp) -> None:
        lane, cta = warp.first_lane(), warp.cta
        first, columns = where(warp, lane) & 0xFFFF, count(warp, lane)
        if cta.tmem_allocations.get(first) != columns:
            raise KernelFault(f"tcgen05.dealloc of {columns} columns at {first}: allocated are {cta.tmem_allocations}")
        del cta.tmem_allocations[first]
        _pair_call(warp, group, "dealloc", columns)
        cta.tmem_owner[first : first + columns] = [0] * columns
        if warp.races:
            warp.races.tmem_access(warp.races.synchronous(warp), cta, range(8), first, columns, write=True)
        waiters, cta.tmem_waiters = cta.tmem_waiters, []
        for other, lanes in waiters:
            other.wake(lanes)

    return handler


@handles("tcgen05.relinquish_alloc_permit", aligned=True)
def _relinquish(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    group = _group(mods)
    mods.one("sync")
    mods.one("aligned")
    mods.done()

    def handler(warp: Warp) -> None:
        _pair_call(warp, group, "relinquish_alloc_permit", 0)
        warp.cta.tmem_permit = False

    return handler


def check_allocated(cta: Cta, column: int, columns: int, group: int = 0) -> None:
    """Raise `MemoryFault` unless all these columns belong to an allocation, of `cta_group::group` when that is given."""
    if column + columns > COLUMNS:
        raise MemoryFault(f"tensor memory columns {column} to {column + columns - 1}: there are {COLUMNS}")
    if not all(cta.tmem_owner[column : column + columns]):
        raise MemoryFault(f"tensor memory columns {column} to {column + columns - 1} are not allocated; allocated: {cta.tmem_allocations}")
    if group and set(cta.tmem_owner[column : column + columns]) != {group}:
        raise MemoryFault(f"tensor memory columns {column} to {column + columns - 1} of {cta.name} are not allocated by cta_group::{group}")


# -- tcgen05.ld, st: 9.7.16.8 ---------------------------------------------------------------------------------------------


def _move_shape(mods: Modifiers, kind: str = "b32") -> tuple[str, int]:
    mods.one("sync")
    mods.one("aligned")
    shape = mods.one("32x32b", "16x64b", "16x128b", "16x256b", "16x32bx2")
    repeat = int(mods.one(*(f"x{1 << i}" for i in range(8)))[1:])
    mods.one(kind)
    mods.done()
    return shape, repeat


# Shape -> (registers of one repetition, columns of one repetition)
_SHAPES = {"32x32b": (1, 1), "16x64b": (1, 2), "16x128b": (2, 4), "16x256b": (4, 8)}


def _cell_indices(shape: str, repeat: int) -> tuple[np.ndarray, np.ndarray]:
    """Lane and column offsets of every (register, thread), each (registers, 32). Figures 185 to 195 of the PTX ISA."""
    thread = np.arange(32)[None, :]
    registers, columns = _SHAPES[shape]
    register = np.arange(registers * repeat)[:, None]
    step, part = register // registers, register % registers
    if shape == "32x32b":
        return np.broadcast_to(thread, (repeat, 32)), np.broadcast_to(register, (repeat, 32))
    if shape == "16x64b":
        lane = thread // 4 + 8 * (thread % 2)
        return np.broadcast_to(lane, (repeat, 32)), step * columns + thread // 2 % 2
    if shape == "16x128b":
        lane = thread // 4 + 8 * part
        return lane + 0 * step, step * columns + thread % 4
    lane = thread // 4 + 8 * (part // 2)
    return lane + 0 * step, step * columns + thread % 4 * 2 + part % 2


def _move(b: Builder, ins: Instruction, mods: Modifiers, is_load: bool, kind: str = "b32") -> Handler:
    packed = mods.has("pack::16b" if is_load else "unpack::16b")
    shape, repeat = _move_shape(mods, kind)
    if packed and shape != "32x32b":
        raise UnsupportedInstruction(f"{ins.opcode}: packing with shape {shape}")
    if shape not in _SHAPES:
        raise UnsupportedInstruction(f"{ins.opcode}: shape {shape}")
    data, where_operand = (ins.operands[0], ins.operands[1]) if is_load else (ins.operands[1], ins.operands[0])
    items = data.items if isinstance(data, Vector) else (data,)
    registers, columns = _SHAPES[shape][0] * repeat, _SHAPES[shape][1] * repeat * (2 if packed else 1)
    if len(items) != registers:
        raise UnsupportedInstruction(f"{ins.opcode} with {len(items)} registers, expected {registers}")
    slots = np.array([b.dest(i, "u32") if is_load else b.u32(i) for i in items])
    start = int(slots[0])
    run: slice | np.ndarray = slice(start, start + registers) if np.array_equal(slots, np.arange(start, start + registers)) else slots
    where = _tmem_address(b, where_operand)
    simple = shape == "32x32b"
    lane_index, column_index = _cell_indices(shape, repeat)
    height = 32 if simple else 16
    what = ins.opcode
    results = [item.index for item in items if isinstance(item, Register)]
    known_readers: list[np.ndarray] = []

    def readers(warp: Warp) -> np.ndarray:
        if not known_readers:
            table = warp.program.register_readers
            known_readers.append(np.unique([pc for r in results for pc in table.get(r, ())]).astype(np.int64))
        return known_readers[0]

    def handler(warp: Warp) -> None:
        cta = warp.cta
        address = where(warp, 0)
        lane, column = address >> 16, address & 0xFFFF
        quarter = warp.index % 4 * 32
        if not quarter <= lane <= quarter + 32 - height or lane % 16:
            raise MemoryFault(f"{what} at TMEM lane {lane}: warp {warp.index} may access lanes {quarter} to {quarter + 31}")
        check_allocated(cta, column, columns)
        tmem = cta.tmem_cells()
        if warp.races:
            access = warp.races.tmem_load(warp, readers(warp)) if is_load else warp.races.tmem_store(warp)
            warp.races.tmem_access(access, cta, range(lane // 16, (lane + height) // 16), column, columns, write=not is_load)
        if simple:
            block = tmem[lane : lane + 32, column : column + columns]
            if packed and is_load:  # two columns of 16 bits in a register
                warp.r[run] = (block[:, ::2] & 0xFFFF | block[:, 1::2] << np.uint32(16)).T
            elif packed:
                block[:, ::2], block[:, 1::2] = warp.r[run].T & 0xFFFF, warp.r[run].T >> np.uint32(16)
            elif is_load:
                warp.r[run] = block.T
            else:
                block[:] = warp.r[run].T
        elif is_load:
            warp.r[run] = tmem[lane + lane_index, column + column_index]
        else:
            tmem[lane + lane_index, column + column_index] = warp.r[run]

    return handler


@handles("tcgen05.ld", aligned=True)
def _ld(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    return _reducing_load(b, ins, mods) if mods.has("red") else _move(b, ins, mods, is_load=True)


def _reducing_load(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.16.8.1, tcgen05.ld.red: the load, and in a register more the largest or smallest of each thread's values.

    Only .f32 of shape .32x32b. Without .NaN a value that is NaN does not count; a result of NaN is the canonical one.
    """
    operator, with_nan = mods.one("max", "min"), mods.has("NaN")
    data, reduced, where = ins.operands
    load = _move(b, replace(ins, operands=(data, where)), mods, is_load=True, kind="f32")
    if not isinstance(data, Vector) or not ins.opcode.startswith("tcgen05.ld.red.sync.aligned.32x32b."):
        raise UnsupportedInstruction(ins.opcode)
    slots = np.array([b.dest(item, "u32") for item in data.items])
    target = b.dest(reduced, "u32")
    reduce = {
        ("max", False): np.fmax, ("min", False): np.fmin, ("max", True): np.maximum, ("min", True): np.minimum,
    }[operator, with_nan].reduce  # fmt: skip

    def handler(warp: Warp) -> None:
        load(warp)
        warp.r[target] = canonical(reduce(np.ascontiguousarray(warp.r[slots]).view(np.float32), axis=0)).view(np.uint32)

    return handler


@handles("tcgen05.st", aligned=True)
def _st(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    return _move(b, ins, mods, is_load=False)


@handles("tcgen05.wait::ld", "tcgen05.wait::st", aligned=True)
def _wait(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.16.8.4: the loads (stores) of this thread are done; registers (TMEM) may be used."""
    mods.one("sync")
    mods.one("aligned")
    mods.done()
    is_load = "wait::ld" in ins.opcode

    def handler(warp: Warp) -> None:
        if warp.races:
            warp.races.tmem_wait(warp, is_load)

    return handler


@handles("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def _fence(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.16.12. Not checked: released kernels leave these out where a commit or wait orders enough."""
    mods.done()
    return lambda warp: None


# -- tcgen05.mma: 9.7.16.10 -----------------------------------------------------------------------------------------------


def _enabled(warp: Warp, lane: int, source: tuple[int, bool] | bool) -> bool:
    if isinstance(source, bool):
        return source
    slot, negated = source
    return warp.predicate(slot, lane) != negated


def _row_lanes(m: int) -> np.ndarray | slice:
    """TMEM lane of each row of a one-CTA accumulator: M = 64 uses the first 16 lanes of each quarter. 9.7.16.10.5"""
    if m == 128:
        return slice(0, 128)
    row = np.arange(64)
    return row // 16 * 32 + row % 16


def _zero_mask(operand: Vector, b: Builder) -> Callable[[Warp, int], None]:
    readers = [value_reader(b, item) for item in operand.items]

    def check(warp: Warp, lane: int) -> None:
        if any(reader(warp, lane) for reader in readers):
            raise UnsupportedInstruction("tcgen05.mma with disabled output lanes")

    return check


@handles("tcgen05.mma")
def _mma(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    group = _group(mods)
    kind = mods.one("kind::f16", "kind::f8f6f4", "kind::tf32")[6:]
    mods.has("collector::a::discard", "collector::a::lastuse", "collector::a::fill", "collector::a::use")
    mods.done()
    d_operand, a_operand, b_operand, idesc_operand, *rest = ins.operands
    check_mask = None
    if rest and isinstance(rest[0], Vector):
        check_mask = _zero_mask(rest.pop(0), b)
    if len(rest) != 1:
        raise UnsupportedInstruction(f"{ins.opcode} with {len(ins.operands)} operands")
    accumulate = predicate_source(b, rest[0])
    d_address, idesc = _tmem_address(b, d_operand), value_reader(b, idesc_operand)
    a_in_tmem = isinstance(a_operand, Address)
    a_address = _tmem_address(b, a_operand) if a_in_tmem else None
    a_slot = 0 if a_in_tmem else b.u64(a_operand)
    b_slot = b.u64(b_operand)
    k = {"f16": 16, "f8f6f4": 32, "tf32": 8}[kind]

    def handler(warp: Warp) -> None:
        lane = warp.one_lane("tcgen05.mma")
        desc = instruction_descriptor(idesc(warp, lane), kind)
        check_shape(desc, group)
        if check_mask:
            check_mask(warp, lane)
        a_where = a_address(warp, lane) if a_address else int(warp.r64[a_slot * 16 + lane])
        b_where = int(warp.r64[b_slot * 16 + lane])
        d_where, add = d_address(warp, lane), _enabled(warp, lane, accumulate)
        pipeline = (kind, group, desc.m, desc.n, d_where) if warp.cta.grid.session.isa_order else None
        access = warp.races.issue_mma(warp, pipeline) if warp.races else None
        ctas = _pair(warp, group)

        def run() -> None:
            multiply(ctas, desc, k, d_where, a_where, a_in_tmem, b_where, add, access)

        warp.cta.cluster.submit(("tensor core", warp.actor, pipeline), run)

    return handler


def _operand_a(cta: Cta, desc: InstructionDescriptor, rows: int, k: int, where: int, in_tmem: bool, access: Access | None) -> np.ndarray:
    size = ELEMENT_BYTES[desc.a_kind]
    if not in_tmem:
        raw, chunks = load_operand(cta.smem16, tcgen05_descriptor(where), rows, k, size, desc.a_mn_major)
        if access:
            access.races.smem_chunks(access, cta, chunks, write=False)
        return to_float32(raw, desc.a_kind)
    column, columns = where & 0xFFFF, k * size // 4
    if where >> 16 or desc.a_mn_major:
        raise UnsupportedInstruction(f"tcgen05.mma with A at tensor memory lane {where >> 16}, or transposed")
    check_allocated(cta, column, columns)
    if access:
        access.races.tmem_access(access, cta, range(8), column, columns, write=False)
    cells = np.ascontiguousarray(cta.tmem_cells()[_row_lanes(rows), column : column + columns])
    return to_float32(cells.view(RAW_TYPES[size]), desc.a_kind)


def multiply(
    ctas: list[Cta],
    desc: InstructionDescriptor,
    k: int,
    d_where: int,
    a_where: int,
    a_in_tmem: bool,
    b_where: int,
    add: bool,
    access: Access | None,
) -> None:
    """D (+)= A B over one or two CTAs. With two, each holds half of the rows of A and D and half of the columns of B. 9.7.16.5"""
    rows, columns_b = desc.m // len(ctas), desc.n // len(ctas)
    size = ELEMENT_BYTES[desc.b_kind]
    parts = []
    for cta in ctas:
        raw, chunks = load_operand(cta.smem16, tcgen05_descriptor(b_where), columns_b, k, size, desc.b_mn_major)
        if access:
            access.races.smem_chunks(access, cta, chunks, write=False)
        parts.append(to_float32(raw, desc.b_kind))
    b_matrix = parts[0] if len(parts) == 1 else np.concatenate(parts)
    column = d_where & 0xFFFF
    if d_where >> 16:
        raise UnsupportedInstruction(f"tcgen05.mma with D at tensor memory lane {d_where >> 16}")
    split = len(ctas) == 2 and desc.m == 128  # M = 128 over two CTAs: 64 rows each, N in two halves, stacked in the lanes
    width = desc.n // 2 if split else desc.n
    for cta in ctas:
        a_matrix = _operand_a(cta, desc, rows, k, a_where, a_in_tmem, access)
        product = matrix_product(-a_matrix if desc.negate_a != desc.negate_b else a_matrix, b_matrix.T)
        check_allocated(cta, column, width, len(ctas))
        if access:
            access.races.tmem_access(access, cta, range(8), column, width, write=True, read=add)
        cells = cta.tmem_cells().view(np.float32)
        if split:
            product = np.concatenate((product[:, :width], product[:, width:]))
            lanes: np.ndarray | slice = slice(0, 128)
        else:
            lanes = _row_lanes(rows)
        if add:
            product += cells[lanes, column : column + width]
        cells[lanes, column : column + width] = canonical(product)
        cta.cluster.grid.session.report.tensor_flops += 2 * product.size * k


@handles("tcgen05.cp")
def _copy(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.16.9.2: shared memory to tensor memory, 32 bytes (.128x256b) or 16 bytes (.128x128b) a lane."""
    group = _group(mods)
    width = {"128x256b": 8, "128x128b": 4}[mods.one("128x256b", "128x128b")]
    mods.done()
    if group == 2:
        raise UnsupportedInstruction(ins.opcode)
    address, desc_slot = _tmem_address(b, ins.operands[0]), b.u64(ins.operands[1])

    def handler(warp: Warp) -> None:
        lane, cta = warp.one_lane("tcgen05.cp"), warp.cta
        if cta.grid.session.isa_order:
            raise UnsupportedInstruction(f"{ins.opcode} with isa_order")
        desc, column = tcgen05_descriptor(int(warp.r64[desc_slot * 16 + lane])), address(warp, lane) & 0xFFFF
        access = warp.races.issue_mma(warp) if warp.races else None

        def run() -> None:
            raw, chunks = load_operand(cta.smem16, desc, LANES, width * 4, 1, False)
            check_allocated(cta, column, width)
            if access:
                access.races.smem_chunks(access, cta, chunks, write=False)
                access.races.tmem_access(access, cta, range(8), column, width, write=True)
            cta.tmem_cells()[:, column : column + width] = np.ascontiguousarray(raw).view(np.uint32)

        cta.cluster.submit(("tensor core", warp.actor, None), run)

    return handler


@handles("tcgen05.commit")
def _commit(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.16.12.1: an arrive on an mbarrier when all earlier operations of this thread are complete."""
    _group(mods)
    mods.one("mbarrier::arrive::one")
    mods.has("shared::cluster")
    multicast = mods.has("multicast::cluster")
    mods.one("b64")
    mods.done()
    where = b.smem_address(ins.operands[0])
    targets = value_reader_16(b, ins.operands[1]) if multicast else None

    def handler(warp: Warp) -> None:
        lane, cluster = warp.one_lane("tcgen05.commit"), warp.cta.cluster
        address = where(warp, lane)
        addresses = [address]
        if targets:
            mask = targets(warp, lane)
            addresses = [rank << 24 | address & 0xFFFFFF for rank in range(cluster.size) if mask >> rank & 1]
        barriers = [find_barrier(warp, a, asynchronous=True) for a in addresses]
        access = warp.races.issue_commit(warp) if warp.races else None

        def run() -> None:
            for barrier in barriers:
                if access:
                    access.races.complete(access, barrier)
                barrier.arrive(1)

        queue = ("tensor core", warp.actor, None)
        cluster.submit_behind([q for q in cluster.pending if q[:2] == queue[:2]] or [queue], run)

    return handler
