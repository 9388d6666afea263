"""cp.async: copies of 4 to 16 bytes by single threads. PTX ISA 9.0, 9.7.9.25.3, and mbarrier arrival on their completion 9.7.13.16.15."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import KernelFault, MemoryFault, UnsupportedInstruction
from fa4_backend.emulator.mbarrier import find_barrier, value_reader
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import Immediate, Instruction, Register

if TYPE_CHECKING:
    from fa4_backend.emulator.warp import Warp


@handles("cp.async")
def _copy(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """cp.async.ca/cg.shared.global [dst], [src], bytes {, source bytes}: what the source does not give is zero."""
    mods.one("ca", "cg")
    mods.one("shared", "shared::cta")
    mods.one("global")
    mods.has("L2::cache_hint")
    mods.has("L2::64B", "L2::128B", "L2::256B")
    mods.done()
    size = ins.operands[2]
    if not isinstance(size, Immediate) or size.bits not in (4, 8, 16):
        raise UnsupportedInstruction(f"{ins.opcode} of {size!r} bytes")
    num_bytes = size.bits
    where, source = b.smem_address(ins.operands[0]), b.global_address(ins.operands[1])
    extra = [o for o in ins.operands[3:] if not ("cache_hint" in ins.opcode and o is ins.operands[-1])]
    source_bytes = ignored = None
    if extra and isinstance(extra[0], Register) and extra[0].type == "pred":
        ignored = b.source(extra[0], "pred")  # a true predicate copies zeros
    elif extra:
        source_bytes = value_reader(b, extra[0])

    def handler(warp: Warp) -> None:
        cta, memory = warp.cta, warp.cta.grid.memory
        copies, sources = [], []
        for lane in warp.lanes():
            count = source_bytes(warp, lane) if source_bytes else num_bytes
            if ignored is not None and warp.predicate(ignored, lane):
                count = 0
            address, begin = where(warp, lane), source(warp, lane)
            if count > num_bytes:
                raise KernelFault(f"cp.async of {num_bytes} bytes with {count} source bytes")
            if address >> 24 != cta.rank or (address & 0xFFFFFF) + num_bytes > cta.smem.size:
                raise MemoryFault(f"cp.async to shared address {address:#x}; the CTA has {cta.smem.size} bytes")
            if address % num_bytes or (count and begin % num_bytes):
                raise MemoryFault(f"cp.async of {num_bytes} bytes from {begin:#x} to {address:#x}: misaligned")
            sources.append((begin, count))
            copies.append((address & 0xFFFFFF, memory.bytes_at(begin, count) if count else None, count))
        access = warp.races.issue_cp_async(warp) if warp.races else None
        if access:
            for size_read in {count for _, count in sources}:
                begins = np.array([begin for begin, count in sources if count == size_read])
                access.races.in_global.access(access, begins, size_read, write=False)

        def run() -> None:
            for offset, data, count in copies:
                if data is not None:
                    cta.smem[offset : offset + count] = data
                cta.smem[offset + count : offset + num_bytes] = 0
            if access:
                cells = (np.array([c[0] for c in copies])[:, None] + np.arange(0, num_bytes, 4)).reshape(-1) >> 2
                access.races.smem_cells(access, cta, cells, write=True)

        warp.submit_copy(run)

    return handler


@handles("cp.async.commit_group")
def _commit(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    mods.done()

    def handler(warp: Warp) -> None:
        warp.copy_groups.append(warp.open_copies)
        warp.open_copies = []
        if warp.races:
            warp.races.commit_cp_async(warp)

    return handler


@handles("cp.async.wait_group", "cp.async.wait_all")
def _wait(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    mods.done()
    everything = ins.opcode.endswith("wait_all")
    allowed = 0
    if not everything:
        operand = ins.operands[0]
        if not isinstance(operand, Immediate):
            raise UnsupportedInstruction(f"{ins.opcode} with {operand!r}")
        allowed = operand.bits

    def handler(warp: Warp) -> None:
        # Waiting for copies that may finish at any time is the same as finishing them now.
        while len(warp.copy_groups) > allowed:
            for operation in warp.copy_groups.pop(0):
                operation()
        if everything:
            for operation in warp.open_copies:
                operation()
            warp.open_copies = []
        if warp.races:
            warp.races.wait_cp_async(warp, allowed, everything)

    return handler


@handles("cp.async.mbarrier.arrive")
def _arrive(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """An arrive by each thread when all its earlier cp.async are complete; without `.noinc` the count is raised by one first."""
    no_increment = mods.has("noinc")
    mods.has("shared", "shared::cta")
    mods.one("b64")
    mods.done()
    where = b.smem_address(ins.operands[0])

    def handler(warp: Warp) -> None:
        barriers = [find_barrier(warp, where(warp, lane)) for lane in warp.lanes()]
        earlier = [operation for group in warp.copy_groups for operation in group] + warp.open_copies
        warp.copy_groups, warp.open_copies = [[] for _ in warp.copy_groups], []
        access = warp.races.issue_cp_async_arrive(warp) if warp.races else None
        if not no_increment:
            for barrier in barriers:
                barrier.pending += 1

        def run() -> None:
            for operation in earlier:
                operation()
            for barrier in barriers:
                if access:
                    access.races.complete(access, barrier)
                barrier.arrive(1)

        warp.cta.cluster.submit(("cp.async", warp.actor), run)

    return handler
