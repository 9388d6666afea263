"""Tensor memory: who allocates it, and what moves between it and registers. PTX ISA 9.0, 9.7.16.7 and 9.7.16.8.

128 lanes x 512 columns of 32-bit cells; an address is lane << 16 | column. What computes on it: `tcgen05.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import KernelFault, MemoryFault, UnsupportedInstruction
from fa4_backend.emulator.matrices import canonical
from fa4_backend.emulator.mbarrier import value_reader
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import Instruction, Operand, Register, Vector

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cta
    from fa4_backend.emulator.warp import Warp

LANES, COLUMNS = 128, 512


def group_of(mods: Modifiers) -> int:
    """CTAs that an instruction is of: its `.cta_group`."""
    return int(mods.one("cta_group::1", "cta_group::2")[-1])


def tmem_address(b: Builder, operand: Operand) -> Callable[[Warp, int], int]:
    """Reader of a tensor memory address for one lane: lane << 16 | column."""
    slot, offset, wide = b.address(operand)
    if wide:
        raise UnsupportedInstruction("tensor memory address in a 64-bit register")
    return lambda warp, lane: (int(warp.r[slot, lane]) + offset) & 0xFFFFFFFF


# -- allocation: 9.7.16.7 -------------------------------------------------------------------------------------------------


def ctas_of(warp: Warp, group: int) -> list[Cta]:
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
    group = group_of(mods)
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
    group = group_of(mods)
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
    group = group_of(mods)
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
    where = tmem_address(b, where_operand)
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
