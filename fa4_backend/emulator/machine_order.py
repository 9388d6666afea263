"""Where ptxas put a warpgroup's arithmetic: before or behind the wait for the second product.

PTX says in which order a consumer of `wgmma` waits and computes, but ptxas may move arithmetic across a wait that it does not depend on.
It does: of a block's 66 special functions it leaves 1 to 12 before the wait for P V, whatever the source says. The shares are read from the
machine code's shortest loop of products (the one without a mask), and the steps of a recording are changed to them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fa4_backend.emulator.issue_stalls import loops, parse

if TYPE_CHECKING:
    from fa4_backend.emulator.recorded_step import Step


class Early(NamedTuple):
    """Of what follows a block's first wait for products: the share that the machine code has before the second."""

    instructions: float
    special_functions: float


def early_shares(sass: str) -> Early | None:
    """Of the shortest loop with two waits for warpgroup products; None where there is none."""
    instructions, labels = parse(sass)
    for begin, end in loops(instructions, labels):
        body = [text for text, _ in instructions[begin : end + 1]]
        waits = [i for i, text in enumerate(body) if "WARPGROUP.DEPBAR" in text]
        if len(waits) != 2 or not any("HGMMA" in text for text in body):
            continue
        parts = body[waits[0] + 1 : waits[1]], body[waits[1] + 1 :]
        special = [sum(bool(re.search(r"\bMUFU\b", text)) for text in part) for part in parts]
        return Early(len(parts[0]) / (len(parts[0]) + len(parts[1])), special[0] / max(1, sum(special)))
    return None


def reorder(steps: list[Step], early: Early, special_function_pipe: int) -> None:
    """Move work of one warp from before its second wait of each block to behind it, so that `early` holds."""
    waits = [i for i, step in enumerate(steps) if step.kind == "wait" and step.edges[0][0] < 0]
    at = 0
    while at + 1 < len(waits):
        first, second = waits[at], waits[at + 1]
        at += 1
        if any(step.kind == "wgmma" for step in steps[first + 1 : second]):
            continue  # the second wait is of the next block
        at += 1
        end = next((i for i in range(second + 1, len(steps)) if steps[i].kind in ("wgmma", "end")), len(steps) - 1)
        before, behind = (
            sum((step.work for step in part), np.zeros(len(steps[0].work)))
            for part in (steps[first + 1 : second + 1], steps[second + 1 : end + 1])
        )
        share = np.full(len(before), early.instructions)
        share[special_function_pipe] = early.special_functions
        kept = np.where(before > 0, np.minimum(1.0, share * (before + behind) / np.maximum(before, 1e-9)), 1.0)
        for step in steps[first + 1 : second + 1]:
            step.work = step.work * kept
        steps[second + 1].work = steps[second + 1].work + before * (1 - kept)
