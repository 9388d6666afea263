"""From a parsed kernel to a `Program`: every operand becomes a slot, every instruction a record or a handler.

Register file of a warp: slots of 128 bytes (32 lanes of 4 bytes; 64-bit registers take two). Constants, special registers and
addresses of variables have slots of their own after the registers, so that every operand is just a slot number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator import alu
from fa4_backend.emulator.contraction import Fusion
from fa4_backend.emulator.errors import LaunchError, PtxSyntaxError, UnsupportedInstruction
from fa4_backend.emulator.lowered_program import FIRST_SLOT, INST, INST_ALIGNED, INST_WATCHED, RESERVED_SMEM, SINK_SLOT, Program
from fa4_backend.emulator.native_core import OP, WIDE
from fa4_backend.emulator.opcodes import Handler, Modifiers, handler_maker, native_maker
from fa4_backend.emulator.syntax import (
    TYPE_BYTES,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Not,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from fa4_backend.emulator.undefined import registers_in, results, watch_list

if TYPE_CHECKING:
    from fa4_backend.emulator.warp import Warp

DYNAMIC_SMEM_ALIGN = 1024


class Builder:
    """Turns operands into slots and instructions into records."""

    def __init__(self, kernel: Kernel, fusions: dict[int, Fusion]) -> None:
        self.kernel, self.fusions = kernel, fusions
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

    # -- records ------------------------------------------------------------------------------------------------

    def build(self) -> Program:
        count = len(self.kernel.instructions)
        code = np.zeros(count + 1, INST)
        handlers: list[Handler | None] = [None] * (count + 1)
        for pc, instruction in enumerate(self.kernel.instructions):
            self.record = {}
            try:
                if pc in self.fusions:
                    self.fuse(self.fusions[pc])
                else:
                    handlers[pc] = self.instruction(instruction)
            except UnsupportedInstruction as error:
                where = f"{self.kernel.name[:80]}, PTX line {instruction.line}: {instruction.text[:200]}"
                raise UnsupportedInstruction(f"{error}\n  in {where}") from None
            if instruction.guard is not None:
                self.record["guard"] = self.register_slots[instruction.guard.index]
                self.record["negated"] = int(instruction.guard_negated)
            row = code[pc]
            for name, value in self.record.items():
                row[name] = value
        code[count]["op"] = OP["EXIT"]  # a body that ends without ret
        watched, watched_registers = watch_list(self.kernel)
        code["flags"][watched["pc"]] |= INST_WATCHED
        constants = np.zeros((self.next_slot - self.const_start, 32), np.uint32)
        for (bits, num_bytes), slot in self.const_values.items():
            view = constants[slot - self.const_start : slot - self.const_start + max(1, num_bytes // 4)]
            if num_bytes == 8:
                view.reshape(-1).view(np.uint64)[:] = bits
            else:
                view[:] = bits
        return Program(
            self.kernel,
            code,
            np.array(self.aux or [0], np.int32),
            handlers,
            self.next_slot,
            self.const_start,
            constants,
            self.specials,
            self.symbols,
            self.static_smem,
            self.has_dynamic,
            self.local_bytes,
            watched,
            watched_registers,
        )

    def emit(self, op: str | int, **fields: int) -> None:
        self.record = {"op": OP[op] if isinstance(op, str) else op, **fields}

    def instruction(self, ins: Instruction) -> Handler | None:
        opcode = ins.opcode
        name = f"{opcode[:3]}3{opcode[3:]}" if opcode[:4] in ("min.", "max.") and len(ins.operands) == 4 else opcode
        row = alu.TABLE.get(name)
        if opcode == "mov.b128" and self.special_move(ins):
            return None
        if row is not None and not (opcode.startswith("mov.") and self.special_move(ins)):
            self.row(name, row, ins)
            return None
        if opcode.startswith("mov."):
            return None
        direct = native_maker(opcode)
        if direct is not None and direct(self, ins, Modifiers(opcode)) is not False:
            return None
        if opcode.startswith("setp."):
            self.compare(ins)
            return None
        maker, aligned, length = handler_maker(opcode)
        handler = maker(self, ins, Modifiers(opcode, length))
        self.emit("HANDLER", flags=INST_ALIGNED if aligned else 0)
        return handler

    def row(self, name: str, row: alu.Row, ins: Instruction) -> None:
        if row.dst == "pred" and isinstance(ins.operands[0], Pair):
            pair = ins.operands[0]
            fields = {"d": self.dest(pair.first, "pred"), "f": self.dest(pair.second, "pred")}
        else:
            fields = {"d": self.dest(ins.operands[0], row.dst)}
        sources = ins.operands[1:]
        if len(sources) != len(row.srcs):
            raise UnsupportedInstruction(f"{ins.opcode} with {len(sources)} sources, expected {len(row.srcs)}")
        for field, operand, kind in zip("abce", sources, row.srcs, strict=False):
            fields[field] = self.source(operand, kind)
        self.emit(alu.OPCODES[name], **fields)

    def fuse(self, fusion: Fusion) -> None:
        """The sum of a product as one FMA; the product's own instruction stays, for its other uses."""
        name = alu.contracted(fusion.kind, fusion.ftz, fusion.sat, fusion.negate_product, fusion.negate_addend)
        operands = (self.kernel.instructions[fusion.sum].operands[0], *fusion.factors, fusion.addend)
        row = alu.TABLE[name]
        fields = {field: self.source(operand, kind) for field, operand, kind in zip("abc", operands[1:], row.srcs, strict=True)}
        self.emit(alu.OPCODES[name], d=self.dest(operands[0], row.dst), **fields)

    def compare(self, ins: Instruction) -> None:
        """setp.cmp.bool.type p|q, a, b, c: the row of setp.cmp.type, combined with predicate c. PTX ISA 9.7.6.2"""
        parts = ins.opcode.split(".")
        combine = next((p for p in parts if p in ("and", "or", "xor")), None)
        plain = ".".join(p for p in parts if p != combine)
        row = alu.TABLE.get(plain)
        if row is None or combine is None or len(ins.operands) != 4:
            raise UnsupportedInstruction(f"unknown opcode {ins.opcode}")
        simple = Instruction(plain, ins.operands[:3], None, False, ins.line, ins.text, {})
        self.row(plain, row, simple)
        other = ins.operands[3]
        negated = isinstance(other, Not)
        slot = self.source(other.operand if isinstance(other, Not) else other, "pred")
        self.record.update(imm=1 + ("and", "or", "xor").index(combine), e=slot, count=int(negated))

    # -- moves --------------------------------------------------------------------------------------------------

    def special_move(self, ins: Instruction) -> bool:
        """Packing, unpacking and clocks. PTX ISA 9.7.9.1, 9.7.9.2"""
        dst, src = ins.operands
        if isinstance(src, Special) and src.name in ("%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo"):
            wide = ins.opcode.endswith("64")
            self.emit("CLOCK", d=self.dest(dst, "u64" if wide else "u32"), count=8 if wide else 4)
            return True
        if isinstance(dst, Vector):
            self.unpack(ins.opcode, dst.items, src)
            return True
        if isinstance(src, Vector):
            self.pack(ins.opcode, dst, src.items)
            return True
        return False

    def quad(self, operand: Operand) -> int:
        """First slot of a 128-bit register: its lower half, then its upper half."""
        if not isinstance(operand, Register) or operand.type != "b128":
            raise UnsupportedInstruction(f"128-bit register expected, got {operand!r}")
        return self.register_slots[operand.index]

    def unpack(self, opcode: str, items: tuple[Operand, ...], src: Operand) -> None:
        if len(items) == 2 and opcode == "mov.b128":
            low = self.quad(src)
            fields = {"d": self.dest(items[0], "u64"), "e": self.dest(items[1], "u64"), "a": low, "b": low + 2}
            self.emit("MOVE128", **fields)
            return
        if len(items) == 2 and opcode in ("mov.b64", "mov.b32"):
            wide = opcode == "mov.b64"
            half = "u32" if wide else "u16"
            self.emit(
                "UNPACK64" if wide else "UNPACK32",
                d=self.dest(items[0], half),
                e=self.dest(items[1], half),
                a=self.source(src, "u64" if wide else "u32"),
            )
            return
        raise UnsupportedInstruction(f"{opcode} into {len(items)} registers")

    def pack(self, opcode: str, dst: Operand, items: tuple[Operand, ...]) -> None:
        if len(items) == 2 and opcode == "mov.b128":
            low = self.quad(dst)
            self.emit("MOVE128", d=low, e=low + 2, a=self.u64(items[0]), b=self.u64(items[1]))
            return
        forms = {"mov.b64": ("PACK64", "u64", "u32"), "mov.b32": ("PACK32", "u32", "u16"), "mov.b16": ("PACK16", "u16", "u16")}
        if len(items) != 2 or opcode not in forms:
            raise UnsupportedInstruction(f"{opcode} from {len(items)} registers")
        op, whole, half = forms[opcode]
        self.emit(op, d=self.dest(dst, whole), a=self.source(items[0], half), b=self.source(items[1], half))

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


def lower(kernel: Kernel, fusions: dict[int, Fusion] | None = None) -> Program:
    """Lower a parsed kernel. `fusions`: sums of products that become one FMA, by the instruction of the sum.

    Raises:
        UnsupportedInstruction: something is not modelled.
    """
    if not kernel.instructions:
        raise LaunchError(f"kernel {kernel.name} has no instructions")
    return Builder(kernel, fusions or {}).build()
