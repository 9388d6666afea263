"""Products in PTX that ptxas may fuse into the sum or difference that uses them."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.+);", re.MULTILINE)
_REGISTER = re.compile(r"%\w+")
_MODIFIER = re.compile(r"\.r[nzmp]\b")
_PASSES_ON = ("mov.", "neg.", "selp.")  # what ptxas may look through


def contractible(ptx: str) -> list[str]:
    """Pairs "product -> sum" of the kernels in a PTX text.

    PTX ISA, "mul" and "add": without a rounding modifier both round to nearest "and may be optimized aggressively", with one they are
    never contracted. Moves, negations and selects between the two are looked through; of a register with several writers the one
    before in the text counts, since no product can be fused into a sum of the loop's next pass.
    """
    pairs: list[str] = []
    products: dict[str, set[str]] = {}  # register -> products that it may hold
    for opcode, operands in _INSTRUCTION.findall(ptx):
        registers = _REGISTER.findall(operands)
        if not registers or opcode.startswith(("st.", "bra")):
            continue
        target, sources = registers[0], registers[1:]
        read = set().union(*(products.get(source, set()) for source in sources))
        is_open = ".f32" in opcode and not _MODIFIER.search(opcode)
        if is_open and opcode.startswith(("add", "sub")):
            pairs += [f"{product} -> {opcode} {operands}" for product in sorted(read)]
        if is_open and opcode.startswith("mul"):
            products[target] = {f"{opcode} {operands}"}
        elif opcode.startswith(_PASSES_ON):
            products[target] = read
        else:
            products.pop(target, None)
    return pairs
