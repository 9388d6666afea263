"""From a parsed kernel to a `Program`: every operand becomes a slot (`builder.py`), every instruction a record or a handler."""

from __future__ import annotations

import numpy as np

from fa4_backend.emulator import alu
from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.contraction import Fusion
from fa4_backend.emulator.errors import LaunchError, UnsupportedInstruction
from fa4_backend.emulator.lowered_program import INST, INST_ALIGNED, INST_WATCHED, Program
from fa4_backend.emulator.native_core import OP
from fa4_backend.emulator.opcodes import Handler, Modifiers, handler_maker, native_maker
from fa4_backend.emulator.syntax import Instruction, Kernel, Not, Operand, Pair, Special, Vector
from fa4_backend.emulator.undefined import watch_list


class Lowering(Builder):
    """Turns a kernel's instructions into records and handlers: its own, and those of the makers that are registered."""

    def __init__(self, kernel: Kernel, fusions: dict[int, Fusion]) -> None:
        super().__init__(kernel)
        self.fusions = fusions

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


def lower(kernel: Kernel, fusions: dict[int, Fusion] | None = None) -> Program:
    """Lower a parsed kernel. `fusions`: sums of products that become one FMA, by the instruction of the sum.

    Raises:
        UnsupportedInstruction: something is not modelled.
    """
    if not kernel.instructions:
        raise LaunchError(f"kernel {kernel.name} has no instructions")
    return Lowering(kernel, fusions or {}).build()
