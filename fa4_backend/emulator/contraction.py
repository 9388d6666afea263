"""Products and sums that the compiler may make one FMA.

PTX ISA 9.0, 9.7.3.3 to 9.7.3.5 (and 9.7.4 for half types): "mul/add and mul/sub sequences with no rounding modifiers may be optimized to
use fused-multiply-add instructions on the target device". ptxas does so where it sees fit, once for each use of a product. A kernel has to
be right either way, so a session chooses:

| contraction | what is fused |
|---|---|
| "never" | nothing: PTX as it stands |
| "always" | every sum of a product; where both sides are products, the later one |
| an integer | a seed: each sum by itself, with either side |

An FMA keeps its product exact. So `a * b - c`, where `c` holds the rounded value of the same product, is 0 without contraction and the
rounding error with it; `cancelling` lists the places where that can be.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass

from fa4_backend.emulator.syntax import Immediate, Instruction, Kernel, Operand, Register
from fa4_backend.emulator.undefined import registers_in, results, successors

Contraction = str | int
NEVER, ALWAYS = "never", "always"

_TYPES = r"(f32x2|f32|f64|f16x2|f16|bf16x2|bf16)"
_SUM = re.compile(r"(add|sub)((?:\.ftz)?)((?:\.sat)?)\." + _TYPES)
_PRODUCT = re.compile(r"mul((?:\.ftz)?)\." + _TYPES)
_ANY_PRODUCT = re.compile(r"mul(?:\.rn|\.rz|\.rm|\.rp)?(?:\.ftz)?\." + _TYPES)
_COPY = re.compile(r"mov\.(f32|f64|b16|b32|b64|u16|u32|u64|s32|s64)")
_NEGATION = re.compile(r"neg(?:\.ftz)?\." + _TYPES)
_CHOICE = re.compile(r"(selp|min|max)\.")  # results that are one of the sources


@dataclass(frozen=True, slots=True)
class Fusion:
    """A product and a sum that may be one FMA: `sum` becomes (+-) factors[0] * factors[1] (+-) addend."""

    product: int  # instruction of the product
    sum: int  # instruction of the sum or difference
    factors: tuple[Operand, Operand]
    addend: Operand
    negate_product: bool
    negate_addend: bool
    kind: str  # type of the numbers
    ftz: bool
    sat: bool


def check_contraction(contraction: Contraction) -> Contraction:
    """The choice itself.

    Raises:
        ValueError: it is neither "never", "always" nor a seed.
    """
    if contraction not in (NEVER, ALWAYS) and (not isinstance(contraction, int) or isinstance(contraction, bool)):
        raise ValueError(f'contraction: expected "{NEVER}", "{ALWAYS}" or an integer seed, got {contraction!r}')
    return contraction


def choose(kernel: Kernel, contraction: Contraction) -> dict[int, Fusion]:
    """What is fused, by the instruction of the sum."""
    if check_contraction(contraction) == NEVER:
        return {}
    sides: dict[int, list[Fusion]] = {}
    for fusion in contractable(kernel):
        sides.setdefault(fusion.sum, []).append(fusion)
    if contraction == ALWAYS:
        return {pc: max(some, key=lambda fusion: fusion.product) for pc, some in sides.items()}
    drawn = {pc: random.Random(f"{contraction}/{kernel.name}/{pc}").choice([None, *some]) for pc, some in sides.items()}
    return {pc: fusion for pc, fusion in drawn.items() if fusion is not None}


def contractable(kernel: Kernel) -> list[Fusion]:
    """Every product and sum of a kernel that may be fused, in the order of the sums."""
    flow = _Flow(kernel)
    found = []
    for pc, instruction in enumerate(kernel.instructions):
        match = _SUM.fullmatch(instruction.opcode)
        if match is None:
            continue
        operation, ftz, sat, kind = match.groups()
        left, right = instruction.operands[1:]
        for side, other, is_second in ((left, right, False), (right, left, True)):
            source = flow.product_behind(pc, side, ftz, kind)
            if source is None:
                continue
            product, negated = source
            subtracted = operation == "sub" and is_second
            a, b = kernel.instructions[product].operands[1:]
            addend_subtracted = operation == "sub" and not is_second
            found.append(Fusion(product, pc, (a, b), other, negated != subtracted, addend_subtracted, kind, bool(ftz), bool(sat)))
    return found


def cancelling(kernel: Kernel) -> list[Fusion]:
    """Contractable differences whose addend may be the rounded value of the same product.

    That is an addend that holds, through copies and choices, the result of the same instruction (of an earlier turn of a loop) or of a
    product that shares a factor. The lint says where to look, not that the two values meet.
    """
    flow = _Flow(kernel)
    return [fusion for fusion in contractable(kernel) if flow.may_cancel(fusion)]


def describe(kernel: Kernel, fusion: Fusion) -> str:
    """Both instructions with their lines."""
    first, second = kernel.instructions[fusion.product], kernel.instructions[fusion.sum]
    return f"line {first.line}: {first.text} | line {second.line}: {second.text}"


class _Flow:
    """Definitions of a kernel's registers and the paths between instructions."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.definitions: dict[int, list[int]] = {}
        for pc, instruction in enumerate(kernel.instructions):
            for register in {r.index for operand in results(instruction) for r in registers_in(operand)}:
                self.definitions.setdefault(register, []).append(pc)

    @functools.cached_property
    def after(self) -> list[list[int]]:
        """Instructions that may follow each instruction."""
        return [successors(self.kernel, pc) for pc in range(len(self.kernel.instructions))]

    @functools.cached_property
    def before(self) -> list[list[int]]:
        """Instructions that may precede each instruction."""
        before: list[list[int]] = [[] for _ in self.after]
        for pc, targets in enumerate(self.after):
            for target in targets:
                before[target].append(pc)
        return before

    def product_behind(self, pc: int, operand: Operand, ftz: str, kind: str) -> tuple[int, bool] | None:
        """The product that an operand of the sum at `pc` holds, through copies and negations, and whether it is negated.

        None: there is none, it flushes otherwise than the sum, or its factors may have changed on the way.
        """
        negated, at = False, pc
        links = []
        while isinstance(operand, Register):
            known = self.definitions.get(operand.index, [])
            if len(known) != 1:
                return None
            links.append((known[0], at))
            at = known[0]
            instruction = self.kernel.instructions[at]
            if not self.same_guard(instruction, pc):
                return None
            if _PRODUCT.fullmatch(instruction.opcode):
                match = _PRODUCT.fullmatch(instruction.opcode)
                assert match
                if match.group(1) != ftz or match.group(2) != kind:
                    return None
                factors = {r.index for source in instruction.operands[1:] for r in registers_in(source)}
                return (at, negated) if all(self.unchanged(start, end, factors) for start, end in links) else None
            if _NEGATION.fullmatch(instruction.opcode):
                negated = not negated
            elif not _COPY.fullmatch(instruction.opcode):
                return None
            operand = instruction.operands[1]
        return None

    def same_guard(self, instruction: Instruction, pc: int) -> bool:
        """The instruction has no guard, or that of the one at `pc`."""
        other = self.kernel.instructions[pc]
        return instruction.guard is None or (instruction.guard == other.guard and instruction.guard_negated == other.guard_negated)

    def unchanged(self, start: int, end: int, registers: set[int]) -> bool:
        """No way from `start` to `end` that does not come by `start` again writes one of the registers."""
        writers = {pc for register in registers for pc in self.definitions.get(register, ())} - {start, end}
        if start < end and self._straight(start, end):
            return not any(start < pc < end for pc in writers)
        if not writers:
            return True
        forward = self._reach(start, start, self.after)
        return not writers & forward & self._reach(end, start, self.before)

    def _straight(self, start: int, end: int) -> bool:
        """Control runs from `start` to `end` without a branch or a label."""
        return all(self.after[pc] == [pc + 1] and (pc == start or self.before[pc] == [pc - 1]) for pc in range(start, end)) and (
            self.before[end] == [end - 1]
        )

    def _reach(self, start: int, stop: int, edges: list[list[int]]) -> set[int]:
        """Instructions that can be reached, not past `stop`."""
        seen: set[int] = set()
        work = list(edges[start])
        while work:
            pc = work.pop()
            if pc not in seen and pc != stop:
                seen.add(pc)
                work += edges[pc]
        return seen

    def may_cancel(self, fusion: Fusion) -> bool:
        """The addend may hold, with the other sign, the result of this product or of one that shares a factor."""
        shared = {self.root(factor) for factor in fusion.factors}
        for pc, negated in self.origins(fusion.addend):
            instruction = self.kernel.instructions[pc]
            if (negated != fusion.negate_addend) == fusion.negate_product:
                continue
            if pc == fusion.product:
                return True
            if _ANY_PRODUCT.fullmatch(instruction.opcode) and shared & {self.root(factor) for factor in instruction.operands[1:]}:
                return True
        return False

    def origins(self, operand: Operand) -> set[tuple[int, bool]]:
        """Instructions whose result the operand may hold, behind copies, negations and choices, and whether it is negated."""
        found: set[tuple[int, bool]] = set()
        seen: set[tuple[int, bool]] = set()
        work = [(operand, False)]
        while work:
            item, negated = work.pop()
            if not isinstance(item, Register) or (item.index, negated) in seen:
                continue
            seen.add((item.index, negated))
            for pc in self.definitions.get(item.index, ()):
                instruction = self.kernel.instructions[pc]
                if _COPY.fullmatch(instruction.opcode):
                    work.append((instruction.operands[1], negated))
                elif _NEGATION.fullmatch(instruction.opcode):
                    work.append((instruction.operands[1], not negated))
                elif _CHOICE.match(instruction.opcode):
                    work += [(choice, negated) for choice in instruction.operands[1:]]
                else:
                    found.add((pc, negated))
        return found

    def root(self, operand: Operand) -> Operand:
        """The register or constant behind copies."""
        while isinstance(operand, Register):
            known = self.definitions.get(operand.index, [])
            if len(known) != 1 or not _COPY.fullmatch(self.kernel.instructions[known[0]].opcode):
                return operand
            source = self.kernel.instructions[known[0]].operands[1]
            if not isinstance(source, Register | Immediate):
                return operand
            operand = source
        return operand
