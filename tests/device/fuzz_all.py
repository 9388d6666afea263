"""What the proofs share: the kernels of all plans compiled side by side, and fuzzed batches over many setups within a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from fa4_backend import AttentionPlan
from fa4_backend.compile_cache import ensure_objects
from tests.support.fuzz import Fuzzer, FuzzSetup


def compile_all(plans: Iterable[AttentionPlan], processes: int) -> float:
    """Compile every kernel of `plans` side by side; returns seconds."""
    start = time.perf_counter()
    ensure_objects((key for plan in plans for key in plan.keys), jobs=processes)
    return time.perf_counter() - start


def setup_plans(setups: Iterable[FuzzSetup], num_sms: int | None = None) -> list[AttentionPlan]:
    """Plans of setups for a GPU of `num_sms` SMs; None: the one present."""
    num_sms = num_sms or torch.cuda.get_device_properties(0).multi_processor_count
    return [setup.plan(num_sms) for setup in setups]


def fuzz_all(
    setups: list[FuzzSetup], batches: int, seconds: float = math.inf, seed: int = 0, *, has_graphs: bool = True, shard: str = "0/1"
) -> list[dict[str, Any]]:
    """`batches` fuzzed batches, the same number for each setup, or as many as begin within `seconds`; a line and a dict a setup.

    Args:
        shard: "i/n": of the setups every n-th from the i-th on, and their share of the batches; for n processes side by side.
    """
    first, step = map(int, shard.split("/"))
    chosen = setups[first::step]
    each = max(1, -(-batches // max(1, len(setups))))
    begin, results = time.perf_counter(), []
    for index, setup in enumerate(chosen):
        left = (seconds - (time.perf_counter() - begin)) / (len(chosen) - index) if seconds < math.inf else math.inf
        fuzzer = Fuzzer(setup, "cuda", seed + index, has_graphs=has_graphs)
        results.append(asdict(fuzzer.run(each, left)))
        print(f"{time.perf_counter() - begin:.0f} s, {sum(r['batches'] for r in results)} batches, fuzz", results[-1], flush=True)
        del fuzzer
        torch.cuda.empty_cache()
    return results
