"""Loops in a disassembly, and loads that an arrival at an mbarrier overtakes."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
_LABEL = re.compile(r"^(\.L_\w+):", re.MULTILINE)


def product_loops(sass: str, num_products: int, opcode: str = "HGMMA") -> list[list[str]]:
    """Bodies of the loops that hold `num_products` wgmma (HGMMA) or mma.sync (HMMA), in order: over KV blocks, both products in each.

    A backward branch closes a loop. ptxas moves the retries of barrier waits behind the kernel's end, and their branches back span
    everything between, EXIT included; so what holds an EXIT is no loop, and what overlaps a shorter loop is not innermost.
    """
    lines = sass.splitlines()
    labels, addresses, texts, jumps = {}, [], [], []
    pending: list[str] = []
    for line in lines:
        if label := _LABEL.match(line):
            pending.append(label.group(1))
        elif instruction := _INSTRUCTION.search(line):
            address, text = int(instruction.group(1), 16), instruction.group(2).strip()
            labels |= dict.fromkeys(pending, address)
            pending = []
            addresses.append(address)
            texts.append(text)
            if target := re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", text):
                jumps.append((address, target.group(1)))
    if pending:  # a label behind the last instruction
        labels |= dict.fromkeys(pending, addresses[-1] + 1)
    spans = sorted(((labels[to], at) for at, to in jumps if labels.get(to, at + 1) <= at), key=lambda span: span[1] - span[0])
    taken: list[tuple[int, int]] = []
    for begin, end in spans:
        body = [text for address, text in zip(addresses, texts, strict=True) if begin <= address <= end]
        if any(re.search(r"\bEXIT\b", text) for text in body):
            continue
        if sum(opcode in text for text in body) == num_products and all(end < b or e < begin for b, e in taken):
            taken.append((begin, end))
    return [[text for address, text in zip(addresses, texts, strict=True) if b <= address <= e] for b, e in sorted(taken)]


def loads_in_flight_at_arrivals(sass: str) -> tuple[int, list[str]]:
    """Arrivals at mbarriers in a disassembly, and those that come while an ldmatrix may not have delivered.

    It has when an instruction reads one of its four registers. Address order is taken for program order: branches here only skip
    ahead, or close a loop whose body uses all it loads.
    """
    arrivals, faults = 0, []
    in_flight: dict[int, str] = {}  # first register of an ldmatrix -> its address
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass):
        opcode, _, operands = re.sub(r"^@!?U?P\d+\s+", "", text.strip()).partition(" ")
        destination, _, sources = operands.partition(",")
        read = {int(number) for number in re.findall(r"\bR(\d+)\b", sources)}
        in_flight = {first: where for first, where in in_flight.items() if not read & set(range(first, first + 4))}
        if opcode.startswith("LDSM"):
            in_flight[int(destination.strip().removeprefix("R"))] = address
        if opcode.startswith("SYNCS.ARRIVE"):
            arrivals += 1
            if in_flight:
                faults.append(f"{address}: {text.strip()} overtakes the ldmatrix at {', '.join(in_flight.values())}")
    return arrivals, faults
