"""What ptxas made of the arithmetic between a warpgroup's products: instructions by unit, in the machine code and in the PTX.

PTX counts are not machine code's: ptxas turns address arithmetic into uniform instructions, joins a negation and a product, and adds
copies of registers. In the loops of flash-attn-4's Hopper kernels it issues an eighth fewer instructions than the PTX has, in ours an
eighth more. Counters of an H200 (ncu) agree with the machine code's loops within 4 %. So a consumer's steps are scaled, unit by unit, by
what the shortest loop of products (the one without a mask) takes in either text.
"""

from __future__ import annotations

import re

import numpy as np

from fa4_backend.emulator.issue_stalls import loops, parse
from fa4_backend.emulator.syntax import Kernel
from fa4_backend.emulator.undefined import successors

MUFU, FMA, ALU = 8, 1, 2  # cycles of an instruction of a warp on its scheduler's part of the unit, sm_90a (see `recording.py`)
FMA_OPCODES = {"FFMA", "FADD", "FMUL", "IMAD", "HADD2", "HFMA2", "HMUL2"}
ISSUE_ONLY = {
    "BAR", "BRA", "BSSY", "BSYNC", "DEPBAR", "ELECT", "HGMMA", "LDC", "LDL", "LDS", "MOV", "NANOSLEEP", "NOP", "QGMMA", "R2UR", "S2R",
    "S2UR", "SHFL", "STL", "STS", "SYNCS", "VOTE", "WARPGROUP", "WARPSYNC", "YIELD",
}  # fmt: skip
WAITS = 2  # for products in a block: of Q K, and of P V


def opcode_of(text: str) -> str:
    """The first word of an instruction behind its guard, without modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def machine_cycles(opcode: str) -> tuple[int, ...]:
    """Cycles of each of `recording.PIPES` that an instruction of the machine code takes; uniform instructions only issue."""
    if opcode == "MUFU":
        return (1, MUFU, 0, 0, 0)
    if opcode in FMA_OPCODES:
        return (1, 0, FMA, 0, 0)
    return (1, 0, 0, 0 if opcode in ISSUE_ONLY or opcode.startswith("U") else ALU, 0)


def machine_block(sass: str) -> tuple[np.ndarray, float] | None:
    """(cycles by pipe, stall cycles an instruction) of the shortest loop with two waits for products; None where there is none."""
    instructions, labels = parse(sass)
    for begin, end in loops(instructions, labels):
        body = instructions[begin : end + 1]
        if sum("WARPGROUP.DEPBAR" in text for text, _ in body) == WAITS and any("HGMMA" in text for text, _ in body):
            cycles = np.sum([machine_cycles(opcode_of(text)) for text, _ in body], axis=0, dtype=float)
            return cycles, sum(stall for _, stall in body) / len(body)
    return None


def ptx_block(kernel: Kernel, cycles: np.ndarray, executed: np.ndarray) -> np.ndarray | None:
    """Cycles by pipe of one round of the same loop in the PTX, as it was run; None where it was not.

    Args:
        cycles: of each instruction, (instructions, pipes).
        executed: how often warps ran each instruction. What a round branches over counts as seldom as it was run, and the machine code's
            loop holds it in full: a block whose rescaling was left out is taken for one with it.
    """
    opcodes = [instruction.opcode for instruction in kernel.instructions]
    branches = [pc for pc, opcode in enumerate(opcodes) if opcode.startswith("bra")]
    spans = sorted((pc - after, after, pc) for pc in branches for after in successors(kernel, pc) if after <= pc)
    for _, begin, end in spans:
        body = opcodes[begin : end + 1]
        is_block = sum(o.startswith("wgmma.wait_group") for o in body) == WAITS and any(o.startswith("wgmma.mma_async") for o in body)
        if is_block and executed[end]:
            inside = slice(begin, end + 1)
            return np.asarray((executed[inside, None] * cycles[inside]).sum(axis=0) / executed[end], float)
    return None


def unit_scales(machine: np.ndarray, ptx: np.ndarray) -> np.ndarray:
    """By how much the work of each pipe differs; 1 where the PTX has none."""
    return np.where(ptx > 0, machine / np.maximum(ptx, 1), 1.0)
