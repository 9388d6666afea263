"""Stores to the shared memory of a peer CTA that signal an mbarrier there. PTX ISA 9.0: 9.7.9.12 st.async, 9.7.13.7 red.async."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import MemoryFault, UnsupportedInstruction
from fa4_backend.emulator.mbarrier import find_barrier
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import TYPE_BYTES, Instruction, Vector

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cta
    from fa4_backend.emulator.mbarrier import MBarrier
    from fa4_backend.emulator.races import Access
    from fa4_backend.emulator.warp import Warp


@handles("st.async")
def _st_async(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    mods.has("weak")
    mods.one("shared::cluster")
    mods.one("mbarrier::complete_tx::bytes")
    vector = int(mods.one("v2", "v4", default="v1")[1:])
    kind = mods.parts.pop()
    mods.done()
    if kind not in TYPE_BYTES or TYPE_BYTES[kind] not in (4, 8):
        raise UnsupportedInstruction(ins.opcode)
    size = TYPE_BYTES[kind]
    where, data, bar = ins.operands
    items = data.items if isinstance(data, Vector) else (data,)
    if len(items) != vector:
        raise UnsupportedInstruction(f"{ins.opcode} with {len(items)} registers")
    slots = [b.source(item, {"f32": "f32", "f64": "f64"}.get(kind, "u64" if size == 8 else "u32")) for item in items]
    address_of, barrier_of = b.smem_address(where), b.smem_address(bar)

    def handler(warp: Warp) -> None:
        cluster = warp.cta.cluster
        for lane in warp.lanes():
            address, barrier = address_of(warp, lane), find_barrier(warp, barrier_of(warp, lane), asynchronous=True)
            cta, offset = cluster.cta_at(address), address & 0xFFFFFF
            if offset % (size * vector) or offset + size * vector > cta.smem.size:
                raise MemoryFault(f"st.async of {size * vector} bytes at shared address {address:#x}; the CTA has {cta.smem.size} bytes")
            values = [int(warp.r64[s * 16 + lane] if size == 8 else warp.r[s, lane]).to_bytes(size, "little") for s in slots]
            access = warp.races.issue_copy(warp, barrier) if warp.races else None

            operation = functools.partial(_store, cta, offset, b"".join(values), barrier, access)
            cluster.submit(("copy", id(operation)), operation)

    return handler


def _store(cta: Cta, offset: int, raw: bytes, barrier: MBarrier, access: Access | None) -> None:
    cta.smem[offset : offset + len(raw)] = np.frombuffer(raw, np.uint8)
    if access:
        access.races.smem_cells(access, cta, np.arange(offset // 4, (offset + len(raw)) // 4), write=True)
        access.races.complete(access, barrier)
    barrier.complete_tx(len(raw))
