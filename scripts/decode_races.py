"""Races of the decode kernel under random schedules on Blackwell's arch: the cases of its tests and a step of both kinds, many seeds each.

    python -m scripts.decode_races [seeds] > docs/data/decode_races.json

A seed draws the order in which CTAs start, when warps run and when copies finish. A run counts as right when it has no race, no misuse of a
barrier, no deadlock, and the output is within the error budget with bits equal to the deterministic schedule's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fa4_backend.kernel_stamp import make_stamp
from tests.emulated import test_decode, test_mixed
from tests.support.emulated_decode import run_decode
from tests.support.emulated_mixed import run_mixed

ARCH = "emulated-sm_100a"
# CTAs that arrive last for two rows, each cut into more slots than fit at once, are among these.
RUNS: dict[str, Callable[..., Any]] = {
    **{name: partial(run_decode, case) for name, case in test_decode.CASES.items()},  # on Blackwell but for d256, which is Hopper's
    "two rows over 15 CTAs": partial(run_decode, replace(test_decode.TWO_ROWS, arch=ARCH), num_ctas=15),
    "decode beside prefill": partial(run_mixed, replace(test_mixed.CASE, arch=ARCH)),
}


def run_case(run: Callable[..., Any], seeds: int) -> dict[str, object]:
    """One case under all seeds."""
    started = time.process_time()
    first = run(seed=None)
    first.check()
    rows = first.built.total_q
    out, lse = first.built.arguments.out[:rows], first.built.arguments.lse[:, :rows]
    different = 0
    for seed in range(seeds):
        done = run(seed=seed)
        done.check()  # a race is an error there
        a = done.built.arguments
        different += not (torch.equal(a.out[:rows], out) and torch.equal(a.lse[:, :rows], lse))
    return {"seeds": seeds, "races": 0, "runs with other bits": different, "cpu_seconds": round(time.process_time() - started, 1)}


def main() -> int:
    """Print the results as JSON; exit 1 when a run had other bits, and at once when one had a race."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    results = {}
    for name, run in RUNS.items():
        results[name] = run_case(run, seeds)
        print(name, results[name], file=sys.stderr, flush=True)
    json.dump({"stamp": make_stamp("emulator", ("schedule", "decode")), **results}, sys.stdout, indent=1)
    print()
    return int(any(r["runs with other bits"] for r in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
