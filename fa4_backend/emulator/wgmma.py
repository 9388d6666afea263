"""Warpgroup matrix products of sm_90a. PTX ISA 9.0, 9.7.15.

A warpgroup is four consecutive warps; each warp holds 16 of the 64 rows of D (and of A, when A is in registers). The emulator computes
the rows of a warp when that warp executes the instruction; products are added exactly and rounded once, then added in float32. What its
registers need: `wgmma_registers.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.barriers import predicate_source
from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import UnsupportedInstruction
from fa4_backend.emulator.matrices import ELEMENT_BYTES, RAW_TYPES, canonical, load_operand, matrix_product, to_float32, wgmma_descriptor
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import Immediate, Instruction, Operand, Vector

if TYPE_CHECKING:
    from fa4_backend.emulator.warp import Warp

ROWS = 16  # rows of one warp


def _constant(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise UnsupportedInstruction(f"wgmma: constant expected, got {operand!r}")
    return operand.bits


def _d_cells(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of (register, thread) of the float32 accumulator, each (n / 2, 32). Figure 150."""
    register, thread = np.arange(n // 2)[:, None], np.arange(32)[None, :]
    return thread // 4 + 8 * (register // 2 % 2), register // 4 * 8 + thread % 4 * 2 + register % 2


def _a_cells(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and first element of (register, thread) of A in registers, each (4, 32). Figures 147 to 149."""
    register, thread = np.arange(4)[:, None], np.arange(32)[None, :]
    per_register = 4 // size
    return thread // 4 + 8 * (register % 2), (register // 2 * 4 + thread % 4) * per_register


@handles("wgmma.mma_async", aligned=True)
def _mma(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.15.6"""
    mods.one("sync")
    mods.one("aligned")
    shape = re.fullmatch(r"m64n(\d+)k(8|16|32)", mods.parts.pop(0))
    d_kind, a_kind, b_kind = mods.parts
    if (
        shape is None
        or d_kind not in ("f32", "f16")
        or (d_kind == "f16" and a_kind in ("bf16", "tf32"))
        or a_kind not in ELEMENT_BYTES
        or b_kind not in ELEMENT_BYTES
    ):
        raise UnsupportedInstruction(ins.opcode)
    n, k, size = int(shape.group(1)), int(shape.group(2)), ELEMENT_BYTES[a_kind]
    if k * size != 32 or n % 8 or not 8 <= n <= 256:
        raise UnsupportedInstruction(ins.opcode)
    d_operand, a_operand, b_operand, scale, *rest = ins.operands
    if not isinstance(d_operand, Vector) or len(d_operand.items) != n // (2 if d_kind == "f32" else 4):
        raise UnsupportedInstruction(f"{ins.opcode}: accumulator {d_operand!r}")
    d_slots = np.array([b.source(item, "f32") for item in d_operand.items])
    half = d_kind == "f16"  # two results a register
    signs = (_constant(rest[0]), _constant(rest[1]))
    transposed = [bool(_constant(r)) for r in rest[2:]]
    in_registers = isinstance(a_operand, Vector)
    a_major = bool(transposed.pop(0)) if transposed and not in_registers else False
    b_major = bool(transposed.pop(0)) if transposed else False
    if in_registers:
        a_slots = np.array([b.u32(item) for item in a_operand.items])  # type: ignore[union-attr]
        a_row, a_column = _a_cells(size)
        a_desc_slot = 0
    else:
        a_desc_slot = b.u64(a_operand)
    b_desc_slot, accumulate = b.u64(b_operand), predicate_source(b, scale)
    d_row, d_column = _d_cells(n)
    kind = RAW_TYPES[size]

    def registers_a(warp: Warp) -> np.ndarray:
        out = np.empty((ROWS, k), kind)
        values = np.ascontiguousarray(warp.r[a_slots]).view(kind).reshape(4, 32, 4 // size)
        for part in range(4 // size):
            out[a_row, a_column + part] = values[:, :, part]
        return to_float32(out, a_kind)

    def handler(warp: Warp) -> None:
        cta, lane = warp.cta, warp.first_lane()
        warp.products.issue()
        access = warp.races.issue_wgmma(warp) if warp.races else None
        raw, chunks = load_operand(cta.smem16, wgmma_descriptor(int(warp.r64[b_desc_slot * 16 + lane])), n, k, size, b_major)
        b_matrix = to_float32(raw, b_kind)
        if access:
            access.races.smem_chunks(access, cta, chunks, write=False)
        if in_registers:
            a_matrix = registers_a(warp)
        else:
            desc = wgmma_descriptor(int(warp.r64[a_desc_slot * 16 + lane]))
            raw, chunks = load_operand(cta.smem16, desc, 64, k, size, a_major)
            first = warp.index % 4 * ROWS
            a_matrix = to_float32(raw[first : first + ROWS], a_kind)
            if access:
                # The ISA does not say which warp of a warpgroup reads which rows of A.
                access.races.smem_chunks(access, cta, chunks, write=False)
        product = matrix_product(-a_matrix if signs[0] != signs[1] else a_matrix, b_matrix.T)
        registers = product[d_row, d_column]
        add = accumulate if isinstance(accumulate, bool) else warp.predicate(accumulate[0], lane) != accumulate[1]
        if half:
            pairs = registers.reshape(-1, 2, 32).transpose(0, 2, 1)
            if add:
                pairs = pairs + np.ascontiguousarray(warp.products.read(d_slots)).view(np.float16).reshape(pairs.shape)
            warp.products.write(d_slots, np.ascontiguousarray(pairs.astype(np.float16)).view(np.uint32)[..., 0])
        else:
            if add:
                registers += warp.products.read(d_slots).view(np.float32)
            warp.products.write(d_slots, canonical(registers).view(np.uint32))
        cta.grid.session.report.tensor_flops += 2 * ROWS * n * k

    return handler


@handles("wgmma.fence", aligned=True)
def _fence(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.15.7.1: orders registers between wgmma and other instructions."""
    mods.one("sync")
    mods.one("aligned")
    mods.done()
    return lambda warp: warp.products.fence()


@handles("wgmma.commit_group", aligned=True)
def _commit(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.15.7.2"""
    mods.one("sync")
    mods.one("aligned")
    mods.done()

    def handler(warp: Warp) -> None:
        warp.products.commit()
        if warp.races:
            warp.races.commit_wgmma(warp)

    return handler


@handles("wgmma.wait_group", aligned=True)
def _wait(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.15.7.3"""
    mods.one("sync")
    mods.one("aligned")
    mods.done()
    allowed = _constant(ins.operands[0])

    def handler(warp: Warp) -> None:
        warp.products.wait(allowed)
        if warp.races:
            warp.races.wait_wgmma(warp, allowed)

    return handler
