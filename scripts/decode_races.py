"""Races of the decode kernel under random schedules on Blackwell's arch: the cases of its tests and a step of both kinds, many seeds each.

    python -m scripts.decode_races [seeds [name ...]] > docs/data/decode_races.json

A seed draws the order in which CTAs start, when warps run and when copies finish. A run counts as right when it has no race, no misuse of a
barrier, no deadlock, and the output is within the error budget with bits equal to the deterministic schedule's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fa4_backend.problem import FP8
from tests.emulated import test_decode, test_decode_fp8, test_mixed
from tests.support.emulated_decode import run_decode
from tests.support.emulated_mixed import run_mixed
from tests.support.seeded_runs import SeededCase, main

ARCH = "emulated-sm_100a"
STEP = replace(test_mixed.CASE, arch=ARCH)
# CTAs that arrive last for two rows, each cut into more slots than fit at once, are among these.
RUNS: dict[str, Callable[..., Any]] = {
    **{name: partial(run_decode, replace(case, arch=ARCH)) for name, case in test_decode.CASES.items()},
    **{f"FP8, {name}": partial(run_decode, replace(case, arch=ARCH)) for name, case in test_decode_fp8.CASES.items()},
    "two rows over 15 CTAs": partial(run_decode, replace(test_decode.TWO_ROWS, arch=ARCH), num_ctas=15),
    "decode beside prefill": partial(run_mixed, STEP),
    "decode beside prefill, FP8 K and V": partial(run_mixed, replace(STEP, kv_dtype=FP8)),
}


def seeded(run: Callable[..., Any]) -> SeededCase:
    """A run of a decode kernel, or of a step of both kinds."""

    def run_one(seed: int | None) -> list[torch.Tensor]:
        done = run(seed=seed)
        done.check()
        rows, a = done.built.total_q, done.built.arguments
        return [a.out[:rows], a.lse[:, :rows]]

    return SeededCase(run_one, ("schedule", "decode", "sm100") if run.func is run_mixed else ("schedule", "decode"))  # type: ignore[attr-defined]


SEEDED = {name: seeded(run) for name, run in RUNS.items()}

if __name__ == "__main__":
    raise SystemExit(main(SEEDED))
