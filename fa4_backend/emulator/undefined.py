"""Registers that are read before they are written.

Which reads could come before every write is told from the text, by data flow over the instructions. Compiled kernels have none or a few, so
only the registers of these are watched while a kernel runs, lane by lane (`native/undefined.c`), and nothing else pays for it.

A copy (`mov`) of such a register is no finding, since compilers emit it for values that nothing uses: its result is not written either.
`selp` may choose between a written and an unwritten one. The accumulators of a `wgmma` count as written by it, since a first product
does not read them. Everything else is a finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fa4_backend.emulator.syntax import Address, Instruction, Kernel, Not, Operand, Pair, Register, Vector

READ, GUARD, WRITE, COPY = range(4)
# `register` and `source` count the watched registers; a READ counts for the lanes that run, a GUARD for all active ones.
WATCHED = np.dtype([(name, np.uint32) for name in ("pc", "kind", "register", "source")])
# Instructions whose first operand is no result, besides those where it is an address.
NO_RESULT = ("bra", "brx", "bar", "barrier", "ret", "exit", "setmaxnreg", "nanosleep", "griddepcontrol", "fence", "membar", "trap")


class Effect(NamedTuple):
    """What an instruction does to registers, as sets of bits by register index."""

    reads: int
    writes: int
    copied: int  # the source of a copy, else 0
    guard: int


def registers_in(operand: Operand | None) -> Iterator[Register]:
    """Registers that an operand names."""
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_in(item)
    elif isinstance(operand, Pair):
        yield from registers_in(operand.first)
        yield from registers_in(operand.second)
    elif isinstance(operand, Not):
        yield from registers_in(operand.operand)
    elif isinstance(operand, Address):
        for item in (operand.base, *operand.coords, *operand.extra):
            yield from registers_in(item)


def results(instruction: Instruction) -> tuple[Operand, ...]:
    """Operands that the instruction writes."""
    if instruction.opcode.startswith("tcgen05.ld.red."):
        return instruction.operands[:2]  # the values, and the largest or smallest of each thread's
    first = instruction.operands[:1]
    base = instruction.opcode.split(".", 1)[0]
    without = (base in NO_RESULT and ".red." not in instruction.opcode) or instruction.opcode.startswith("tcgen05.dealloc")
    return () if not first or isinstance(first[0], Address) or without else first


def _bits(operands: tuple[Operand, ...]) -> int:
    bits = 0
    for operand in operands:
        for register in registers_in(operand):
            bits |= 1 << register.index
    return bits


def effect(instruction: Instruction) -> Effect:
    """What an instruction does to registers."""
    written = results(instruction)
    sources = instruction.operands[len(written) :]
    guard = 0 if instruction.guard is None else 1 << instruction.guard.index
    if instruction.opcode.startswith("mov.") and isinstance(written[0], Register) and isinstance(sources[0], Register):
        return Effect(0, _bits(written), _bits(sources), guard)
    chosen = sources[2:] if instruction.opcode.startswith("selp.") else sources
    return Effect(_bits(chosen), _bits(written), 0, guard)


def successors(kernel: Kernel, pc: int) -> list[int]:
    """Instructions that may follow."""
    instruction = kernel.instructions[pc]
    base = instruction.opcode.split(".", 1)[0]
    after = [pc + 1] if pc + 1 < len(kernel.instructions) else []
    if base == "bra":
        targets = [instruction.labels[instruction.operands[0].name]]  # type: ignore[union-attr]
    elif base == "brx":
        targets = [instruction.labels[name] for name in kernel.branch_tables[instruction.operands[1].name]]  # type: ignore[union-attr]
    elif base in ("ret", "exit"):
        targets = []
    else:
        return after
    return targets if instruction.guard is None else targets + after


def maybe_unwritten(kernel: Kernel, effects: list[Effect]) -> list[int | None]:
    """Registers that may not be written when each instruction starts; None for one that is never reached."""
    count = len(effects)
    everything = 0
    for one in effects:
        everything |= one.reads | one.writes | one.copied | one.guard
    before: list[int | None] = [None] * count
    before[0] = everything
    work = [0]
    while work:
        pc = work.pop()
        unwritten = before[pc]
        assert unwritten is not None
        one = effects[pc]
        if not (one.copied & unwritten or one.guard):
            unwritten &= ~one.writes
        elif one.copied & unwritten:
            unwritten |= one.writes
        for target in successors(kernel, pc):
            known = before[target]
            if known is None or unwritten & ~known:
                before[target] = unwritten | (known or 0)
                work.append(target)
    return before


def watch_list(kernel: Kernel) -> tuple[np.ndarray, list[int]]:
    """(entries of WATCHED, sorted by instruction, the registers watched): what the native loop has to follow."""
    effects = [effect(instruction) for instruction in kernel.instructions]
    before = maybe_unwritten(kernel, effects)
    watched = 0
    for one, unwritten in zip(effects, before, strict=True):
        watched |= (one.reads | one.guard) & (unwritten or 0)
    # What is copied into a watched register is watched too.
    while more := _sources(effects, watched) & ~watched:
        watched |= more
    registers = _indices(watched)
    number = {register: i for i, register in enumerate(registers)}
    entries = []
    for pc, one in enumerate(effects):
        if not watched or before[pc] is None:
            continue
        entries += [(pc, READ, number[r], 0) for r in _indices(one.reads & watched)]
        entries += [(pc, GUARD, number[r], 0) for r in _indices(one.guard & watched)]
        for r in _indices(one.writes & watched):
            entries.append((pc, COPY, number[r], number[_indices(one.copied)[0]]) if one.copied else (pc, WRITE, number[r], 0))
    return np.array(entries, WATCHED), registers


def _sources(effects: list[Effect], watched: int) -> int:
    sources = 0
    for one in effects:
        if one.writes & watched:
            sources |= one.copied
    return sources


def _indices(bits: int) -> list[int]:
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found
