"""stmatrix and ldmatrix: 8x8 tiles between registers and shared memory. PTX ISA 9.0, 9.7.14.5.15 and 9.7.14.5.16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import MemoryFault, UnsupportedInstruction
from fa4_backend.emulator.lowered_program import SHARED_WINDOW
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import Instruction, Vector

if TYPE_CHECKING:
    from fa4_backend.emulator.warp import Warp


def _decode(b: Builder, ins: Instruction, mods: Modifiers, is_load: bool) -> Handler:
    mods.one("sync")
    mods.one("aligned")
    mods.one("m8n8")
    count = int(mods.one("x1", "x2", "x4")[1:])
    transposed = mods.has("trans")
    mods.has("shared", "shared::cta")
    mods.one("b16")
    mods.done()
    data, where = (ins.operands[0], ins.operands[1]) if is_load else (ins.operands[1], ins.operands[0])
    items = data.items if isinstance(data, Vector) else (data,)
    if len(items) != count:
        raise UnsupportedInstruction(f"{ins.opcode} with {len(items)} registers")
    slots = np.array([b.u32(item) for item in items])
    base, offset, wide = b.address(where)

    def rows(warp: Warp) -> np.ndarray:
        """Chunk of each of the 8 * count rows: lane l gives the address of row l."""
        values = warp.r64[base * 16 : base * 16 + 32].astype(np.int64) & (SHARED_WINDOW - 1) if wide else warp.r[base].astype(np.int64)
        address = (values[: 8 * count] + offset) & 0xFFFFFFFF
        if ((address >> 24) != warp.cta.rank).any() or (address & 15).any():
            raise MemoryFault(f"{ins.opcode}: row addresses are not 16-byte aligned shared addresses of this CTA")
        chunk = (address & 0xFFFFFF) >> 4
        if int(chunk.max()) >= len(warp.cta.smem16):
            raise MemoryFault(f"{ins.opcode}: row at shared offset {int(chunk.max()) << 4:#x}; the CTA has {warp.cta.smem.size} bytes")
        return chunk

    def load(warp: Warp) -> None:
        chunk = rows(warp)
        if warp.races:
            warp.races.smem_chunks(warp.races.by_lanes(warp, warp.exec), warp.cta, chunk, write=False)
        tiles = warp.cta.smem16[chunk].view(np.uint16).reshape(count, 8, 8)
        if transposed:
            tiles = np.ascontiguousarray(tiles.transpose(0, 2, 1))
        warp.r[slots] = tiles.reshape(count, 64).view(np.uint32)

    def store(warp: Warp) -> None:
        chunk = rows(warp)
        tiles = np.ascontiguousarray(warp.r[slots]).view(np.uint16).reshape(count, 8, 8)
        if transposed:
            tiles = np.ascontiguousarray(tiles.transpose(0, 2, 1))
        warp.cta.smem16[chunk] = tiles.reshape(count * 8, 8).view(np.uint8)
        if warp.races:
            warp.races.smem_chunks(warp.races.by_lanes(warp, warp.exec), warp.cta, chunk, write=True)

    return load if is_load else store


@handles("movmatrix", aligned=True)
def _movmatrix(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.14.5.17: transpose an 8x8 tile across the lanes."""
    for part in ("sync", "aligned", "m8n8", "trans", "b16"):
        mods.one(part)
    mods.done()
    dst, src = b.dest(ins.operands[0], "u32"), b.u32(ins.operands[1])

    def handler(warp: Warp) -> None:
        tile = np.ascontiguousarray(warp.r[src]).view(np.uint16).reshape(8, 8)
        warp.r[dst] = np.ascontiguousarray(tile.T).view(np.uint32).reshape(32)

    return handler


@handles("ldmatrix", aligned=True)
def _ldmatrix(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    return _decode(b, ins, mods, is_load=True)


@handles("stmatrix", aligned=True)
def _stmatrix(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    return _decode(b, ins, mods, is_load=False)
