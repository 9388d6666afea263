"""A case under many random schedules: no race, no error, a result within the budget, the deterministic schedule's bits."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fa4_backend.emulator import EmulatorError
from fa4_backend.kernel_stamp import make_stamp


@dataclass(frozen=True)
class SeededCase:
    """`run(seed)` gives the tensors whose bits are compared; it raises `AssertionError` or `EmulatorError` where a run is not right."""

    run: Callable[[int | None], list[torch.Tensor]]
    families: tuple[str, ...]  # of `kernel_stamp.FAMILIES`, of which its kernels are
    key: str = ""  # name of the compile key, where the case has one


def fault_of(case: SeededCase, seed: int | None, want: list[torch.Tensor] | None) -> tuple[str, list[torch.Tensor] | None]:
    """What is wrong under one schedule, "" for nothing, and the tensors."""
    try:
        bits = [tensor.clone() for tensor in case.run(seed)]
    except (AssertionError, EmulatorError) as error:
        return f"seed {seed}: {type(error).__name__}: {error}"[:400], None
    if want is not None and not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(bits, want, strict=True)):
        return f"seed {seed}: other bits than the deterministic schedule's", bits
    return "", bits


def run_seeds(case: SeededCase, seeds: Iterable[int]) -> dict[str, Any]:
    """One case: how many schedules, what went wrong in which, CPU seconds."""
    started = time.process_time()
    fault, want = fault_of(case, None, None)
    faults, count = [fault], 0
    for seed in seeds:
        faults.append(fault_of(case, seed, want)[0])
        count += 1
    return {"key": case.key, "seeds": count, "failures": [f for f in faults if f], "cpu_seconds": round(time.process_time() - started, 1)}


def main(cases: Mapping[str, SeededCase]) -> int:
    """Command line of a table of cases: prints the results as JSON; 1 when a schedule went wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", type=int, nargs="?", default=100)
    parser.add_argument("names", nargs="*", help=f"cases; all when left out: {', '.join(cases)}")
    options = parser.parse_args()
    results = {}
    for name in options.names or cases:
        results[name] = run_seeds(cases[name], range(options.seeds))
        print(name, results[name], file=sys.stderr, flush=True)
    families = dict.fromkeys(family for name in results for family in cases[name].families)
    print(json.dumps({"stamp": make_stamp("emulator", families), **results}, indent=1))
    return int(any(result["failures"] for result in results.values()))
