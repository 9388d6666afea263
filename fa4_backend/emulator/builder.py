"""Slots of a kernel's operands, and the record of one instruction: what lowering and all makers of instructions share.

Register file of a warp: slots of 128 bytes (32 lanes of 4 bytes; 64-bit registers take two). Constants, special registers and
addresses of variables have slots of their own after the registers, so that every operand is just a slot number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.errors import PtxSyntaxError, UnsupportedInstruction
from fa4_backend.emulator.lowered_program import FIRST_SLOT, RESERVED_SMEM, SINK_SLOT
from fa4_backend.emulator.native_core import OP, WIDE
from fa4_backend.emulator.syntax import (
    TYPE_BYTES,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Register,
    Sink,
    Special,
    Symbol,
)
from fa4_backend.emulator.undefined import registers_in, results

if TYPE_CHECKING:
    from fa4_backend.emulator.warp import Warp

DYNAMIC_SMEM_ALIGN = 1024


class Builder:
    """What makers of instructions are given: operands become slots, and `emit` sets the record of the instruction that is being lowered."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.register_slots: list[int] = []
        slot = FIRST_SLOT
        for register in kernel.registers:
            self.register_slots.append(slot)
            slot += _num_slots(register.type)
        self.const_start = self.next_slot = slot
        self.const_values: dict[tuple[int, int], int] = {}
        self.specials: dict[str, tuple[int, int]] = {}
        self.symbols: dict[str, tuple[int, int]] = {}
        self.aux: list[int] = []
        self.carry: int | None = None
        self.record: dict[str, int] = {}
        self.layout_variables()

    def layout_variables(self) -> None:
        shared, local = RESERVED_SMEM, 0
        for variable in self.kernel.variables.values():
            if variable.space == "shared" and not variable.dynamic:
                shared = variable.offset = -(-shared // variable.align) * variable.align
                shared += variable.num_bytes
            elif variable.space == "local":
                local = variable.offset = -(-local // variable.align) * variable.align
                local += variable.num_bytes
        self.static_smem = shared - RESERVED_SMEM
        self.has_dynamic = False
        for variable in self.kernel.variables.values():
            if variable.dynamic:
                self.has_dynamic = True
                variable.offset = -(-shared // DYNAMIC_SMEM_ALIGN) * DYNAMIC_SMEM_ALIGN
        self.local_bytes = -(-local // 16) * 16

    # -- operands -----------------------------------------------------------------------------------------------

    def take(self, num_slots: int) -> int:
        slot, self.next_slot = self.next_slot, self.next_slot + num_slots
        return slot

    def const(self, bits: int, num_bytes: int) -> int:
        bits &= (1 << 8 * num_bytes) - 1
        key = (bits, num_bytes)
        if key not in self.const_values:
            self.const_values[key] = self.take(2 if num_bytes == 8 else 1)
        return self.const_values[key]

    def source(self, operand: Operand, kind: str) -> int:
        """Slot of a source of expression type `kind` (see alu.py)."""
        wide = kind in WIDE
        if isinstance(operand, Register):
            slot, is_wide = self.register_slots[operand.index], _num_slots(operand.type) == 2
            if operand.type == "b128":
                raise UnsupportedInstruction(f"128-bit register {operand.name} where {kind} is expected")
            if is_wide != wide or (operand.type == "pred") != (kind in ("pred", "mask")):
                raise UnsupportedInstruction(f"register {operand.name} of type {operand.type} where {kind} is expected")
            return slot
        if isinstance(operand, Immediate):
            return self.const(immediate_bits(operand, kind), 8 if wide else 4)
        if isinstance(operand, Special):
            return self.special(operand.name, 8 if wide else 4)
        if isinstance(operand, Symbol):
            return self.symbol(operand.name, 8 if wide else 4)
        raise UnsupportedInstruction(f"operand {operand!r} where {kind} is expected")

    def carry_slot(self) -> int:
        """The hidden register of CC.CF, one bit a lane."""
        if self.carry is None:
            self.carry = self.take(1)
        return self.carry

    def special(self, name: str, num_bytes: int) -> int:
        if name in self.specials and self.specials[name][1] != num_bytes:
            raise UnsupportedInstruction(f"{name} read with two widths")
        if name not in self.specials:
            self.specials[name] = (self.take(num_bytes // 4), num_bytes)
        return self.specials[name][0]

    def symbol(self, name: str, num_bytes: int) -> int:
        if name not in self.kernel.variables and name not in self.kernel.params:
            raise UnsupportedInstruction(f"unknown name {name!r}")
        key = f"{name}:{num_bytes}"
        if key not in self.symbols:
            self.symbols[key] = (self.take(num_bytes // 4), num_bytes)
        return self.symbols[key][0]

    def dest(self, operand: Operand, kind: str) -> int:
        if isinstance(operand, Sink):
            return SINK_SLOT
        if not isinstance(operand, Register):
            raise UnsupportedInstruction(f"destination {operand!r}")
        return self.source(operand, kind)

    def u32(self, operand: Operand) -> int:
        return self.source(operand, "u32")

    def u64(self, operand: Operand) -> int:
        return self.source(operand, "u64")

    def address(self, operand: Operand) -> tuple[int, int, bool]:
        """Slot of the base (0: none), byte offset, and whether the base is 64 bits wide."""
        if not isinstance(operand, Address):
            raise UnsupportedInstruction(f"address expected, got {operand!r}")
        base = operand.base
        if base is None or isinstance(base, Immediate):
            return 0, operand.offset + (base.bits if base else 0), True
        if isinstance(base, Register):
            wide = _num_slots(base.type) == 2
            return self.register_slots[base.index], operand.offset, wide
        if isinstance(base, Symbol):
            variable = self.kernel.variables.get(base.name)
            if base.name in self.kernel.params:
                return 0, self.kernel.params[base.name].offset + operand.offset, True
            wide = variable is not None and variable.space in ("global", "const")
            return self.symbol(base.name, 8 if wide else 4), operand.offset, wide
        raise UnsupportedInstruction(f"address {operand!r}")

    def smem_address(self, operand: Operand) -> Callable[[Warp, int], int]:
        """Reader of a shared-memory address for one lane (rank << 24 | offset), from a 32-bit or generic address."""
        slot, offset, wide = self.address(operand)
        if slot == 0:
            return lambda warp, lane: offset & 0xFFFFFFFF
        if wide:
            return lambda warp, lane: (int(warp.r64[slot * 16 + lane]) + offset) & 0xFFFFFFFF
        return lambda warp, lane: (int(warp.r[slot, lane]) + offset) & 0xFFFFFFFF

    def smem_addresses(self, operand: Operand) -> Callable[[Warp], list[int]]:
        """Reader of the same for all 32 lanes at once: many times faster than lane by lane."""
        slot, offset, wide = self.address(operand)
        if slot == 0:
            return lambda warp: [offset & 0xFFFFFFFF] * 32
        if wide:
            return lambda warp: (warp.r64[slot * 16 : slot * 16 + 32].astype(np.uint32) + np.uint32(offset & 0xFFFFFFFF)).tolist()
        return lambda warp: (warp.r[slot] + np.uint32(offset & 0xFFFFFFFF)).tolist()

    def global_address(self, operand: Operand) -> Callable[[Warp, int], int]:
        slot, offset, wide = self.address(operand)
        if not wide:
            raise UnsupportedInstruction(f"64-bit address expected, got {operand!r}")
        if slot == 0:
            return lambda warp, lane: offset
        return lambda warp, lane: int(warp.r64[slot * 16 + lane]) + offset

    @functools.cached_property
    def read_registers(self) -> frozenset[int]:
        """Registers (by index) that some instruction names besides writing them."""
        read = set()
        for instruction in self.kernel.instructions:
            for operand in instruction.operands[len(results(instruction)) :]:
                read |= {register.index for register in registers_in(operand)}
            for operand in results(instruction):
                if instruction.opcode.startswith("wgmma."):  # accumulators are read as well
                    read |= {register.index for register in registers_in(operand)}
            if instruction.guard is not None:
                read.add(instruction.guard.index)
        return frozenset(read)

    def is_unused(self, operand: Operand) -> bool:
        """A register that nothing reads: part of a wider load, for its alignment."""
        return isinstance(operand, Register) and operand.index not in self.read_registers

    def quad(self, operand: Operand) -> int:
        """First slot of a 128-bit register: its lower half, then its upper half."""
        if not isinstance(operand, Register) or operand.type != "b128":
            raise UnsupportedInstruction(f"128-bit register expected, got {operand!r}")
        return self.register_slots[operand.index]

    # -- records ------------------------------------------------------------------------------------------------

    def emit(self, op: str | int, **fields: int) -> None:
        self.record = {"op": OP[op] if isinstance(op, str) else op, **fields}

    def target(self, ins: Instruction, operand: Operand) -> int:
        if not isinstance(operand, Symbol) or operand.name not in ins.labels:
            raise PtxSyntaxError(f"PTX line {ins.line}: unknown label {operand!r}")
        return ins.labels[operand.name]

    def list_slots(self, slots: list[int]) -> int:
        start = len(self.aux)
        self.aux += slots
        return start


def _num_slots(kind: str) -> int:
    return max(1, TYPE_BYTES[kind] // 4)


def immediate_bits(operand: Immediate, kind: str) -> int:
    """Bits of a constant as the type that uses it; PTX ISA 4.5 (float constants are 64 bits wide unless written 0f)."""
    if kind in ("pred", "mask"):
        return 0xFFFFFFFF if operand.bits else 0
    if kind in ("f32", "f32x2", "f16", "bf16", "f64"):
        value: float | None = None
        if operand.float_bytes == 8:
            value = float(np.uint64(operand.bits).view(np.float64))
        elif operand.float_bytes == 4:
            value = float(np.uint32(operand.bits).view(np.float32))
        if kind == "f32":
            if operand.float_bytes == 4:
                return operand.bits
            if value is not None:
                return int(np.float32(value).view(np.uint32))
        if kind == "f64" and value is not None:
            return int(np.float64(value).view(np.uint64))
        if operand.float_bytes == 0:
            return operand.bits  # the bits of a packed or half value, written as an integer
        raise UnsupportedInstruction(f"float constant for {kind}")
    if operand.float_bytes == 4 and kind in ("u64", "i64"):
        raise UnsupportedInstruction("32-bit float constant for a 64-bit integer")
    return operand.bits
