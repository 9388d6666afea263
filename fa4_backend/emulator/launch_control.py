"""clusterlaunchcontrol: a CTA takes over the work of a cluster that has not started. PTX ISA 9.0, 9.7.13.17.

The 16-byte handle is opaque to programs; here it holds the first CTA's x, y, z and whether the cancellation succeeded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import UnsupportedInstruction
from fa4_backend.emulator.mbarrier import find_barrier
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import Instruction, Vector

if TYPE_CHECKING:
    from fa4_backend.emulator.warp import Warp


@handles("clusterlaunchcontrol.try_cancel")
def _try_cancel(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    mods.one("async")
    mods.has("shared::cta")
    mods.one("mbarrier::complete_tx::bytes")
    mods.one("b128")
    mods.done()
    where, barrier_at = b.smem_address(ins.operands[0]), b.smem_address(ins.operands[1])

    def handler(warp: Warp) -> None:
        lane, cta, waiting = warp.one_lane("clusterlaunchcontrol.try_cancel"), warp.cta, warp.cta.grid.waiting
        address, barrier = where(warp, lane), find_barrier(warp, barrier_at(warp, lane), asynchronous=True)
        offset = address & 0xFFFFFF
        access = warp.races.issue_copy(warp, barrier) if warp.races else None

        def run() -> None:
            first = waiting.popleft()[1] if waiting else None
            cta.smem[offset : offset + 16] = np.array([*(first or (0, 0, 0)), int(first is not None)], np.uint32).view(np.uint8)
            if access:
                access.races.smem_cells(access, cta, np.arange(offset // 4, offset // 4 + 4), write=True)
                access.races.complete(access, barrier)
            barrier.complete_tx(16)

        cta.cluster.submit(("copy", id(run)), run)

    return handler


@handles("clusterlaunchcontrol.query_cancel")
def _query(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    what = mods.one("is_canceled", "get_first_ctaid", "get_first_ctaid::x", "get_first_ctaid::y", "get_first_ctaid::z")
    mods.has("v4")
    mods.one("pred", "b32")
    mods.one("b128")
    mods.done()
    handle = b.quad(ins.operands[1])

    def words(warp: Warp) -> np.ndarray:
        """(32, 4) uint32"""
        halves = [warp.r64[slot * 16 : slot * 16 + 32] for slot in (handle, handle + 2)]
        return np.stack(halves, 1).copy().view(np.uint32)

    if what == "is_canceled":
        result = b.dest(ins.operands[0], "pred")

        def is_canceled(warp: Warp) -> None:
            flags = words(warp)[:, 3]
            warp.set_predicate(result, sum(1 << lane for lane in warp.lanes() if flags[lane]))

        return is_canceled
    dst = ins.operands[0]
    items = dst.items if isinstance(dst, Vector) else (dst,)
    if (what == "get_first_ctaid") != (len(items) == 4):
        raise UnsupportedInstruction(f"{ins.opcode} into {len(items)} registers")
    slots = [b.dest(item, "u32") for item in items]
    columns = range(4) if len(items) == 4 else ["xyz".index(what[-1])]

    def first_ctaid(warp: Warp) -> None:
        values, lanes = words(warp), warp.lanes()
        for slot, column in zip(slots, columns, strict=True):
            warp.r[slot, lanes] = values[lanes, column] if column < 3 else 0

    return first_ctaid
