"""The fifth-generation tensor core: products and copies to tensor memory, commits, fences. PTX ISA 9.0, 9.7.16.

MMAs, copies and commits of one warp finish in the order of issue; warps are independent of each other. With `isa_order`, only products of
one shape, kind and accumulator are in order (9.7.16.6.2, pipelined instructions), which released kernels do not keep to. Products are added
exactly and rounded once, then added in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.barriers import predicate_source
from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import UnsupportedInstruction
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
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import Address, Instruction, Vector
from fa4_backend.emulator.tensor_memory import LANES, check_allocated, ctas_of, group_of, tmem_address

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cta
    from fa4_backend.emulator.races import Access
    from fa4_backend.emulator.warp import Warp


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
    group = group_of(mods)
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
    d_address, idesc = tmem_address(b, d_operand), value_reader(b, idesc_operand)
    a_in_tmem = isinstance(a_operand, Address)
    a_address = tmem_address(b, a_operand) if a_in_tmem else None
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
        ctas = ctas_of(warp, group)

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
    group = group_of(mods)
    width = {"128x256b": 8, "128x128b": 4}[mods.one("128x256b", "128x128b")]
    mods.done()
    if group == 2:
        raise UnsupportedInstruction(ins.opcode)
    address, desc_slot = tmem_address(b, ins.operands[0]), b.u64(ins.operands[1])

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
    group_of(mods)
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


@handles("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def _fence(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.16.12. Not checked: released kernels leave these out where a commit or wait orders enough."""
    mods.done()
    return lambda warp: None
