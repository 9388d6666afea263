"""This tree beside another checkout of it, in one process on one GPU: the same batches, captured, timed in turns.

    python -m tests.device.compare_versions --other FOLDER [--json FILE]

FOLDER holds the other checkout's `fa4_backend`. It is imported under a name of its own, so that neither knows the other. Kernels of both
come from the cache on disk, or are compiled by several processes first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fa4_backend.bench.batch import BatchTensors
from fa4_backend.bench.decode_batches import issue_batches, ragged_batches
from fa4_backend.bench.prefill_batches import named_batches
from fa4_backend.bench.timing import Flush, capture, median_us
from fa4_backend.kernel_stamp import gpu_stamp

OTHER = "fa4_other"  # the other checkout's package
ROUNDS = 5


def borrow(checkout: Path, folder: Path) -> None:
    """Copy a checkout's package to `folder`, renamed, and make it importable."""
    target = folder / OTHER
    shutil.copytree(checkout / "fa4_backend", target, ignore=shutil.ignore_patterns("__pycache__"))
    for path in target.rglob("*.py"):
        path.write_text(path.read_text().replace("fa4_backend", OTHER))
    sys.path.insert(0, str(folder))


def cases() -> Iterator[tuple[str, str, Any, dict[str, bool]]]:
    """(kind, name, batch, modes) of what is timed."""
    grid = [b for b in issue_batches()["grid"] if "16K" not in b.name or b.name.startswith("1 ")]
    heads = [b for b in issue_batches()["heads"] if "4 queries" in b.name or b.num_kv_heads == 2 or b.head_dim == 64]
    mixed = issue_batches()["mixed"]
    for batch in [*grid, *heads, *ragged_batches(), *mixed]:
        yield "decode", batch.label, batch, {}
    for batch in [*grid[:2], *ragged_batches()[2:]]:
        yield "decode", f"{batch.label}, invariant", batch, {"batch_invariant": True}
    sets = named_batches()
    for batch in [b for name in ("prefix", "whole", "chunked", "heads") for b in sets[name]]:
        yield "prefill", batch.label, batch, {}


def call_of(package: str, kind: str, batch: Any, tensors: Any, modes: dict[str, bool]) -> Callable[[], object]:
    """One version's operator on a batch."""
    bench = importlib.import_module(f"{package}.bench.{kind}")
    return bench.ours(batch, tensors) if kind == "prefill" else bench.Ours.make(batch, tensors, **modes).call


def warm(job: tuple[str, str, str]) -> None:
    """Compile a case's kernels of one version in a process of its own."""
    package, folder, name = job
    sys.path.insert(0, folder)
    kind, _, batch, modes = next(case for case in cases() if case[1] == name)
    tensors = BatchTensors.make(small(batch))
    call_of(package, kind, small(batch), tensors, modes)


def small(batch: Any) -> Any:
    """The same kernels, little memory."""
    if hasattr(batch, "kv_lens"):
        return replace(batch, kv_lens=(64,) * len(batch.kv_lens), query_lens=tuple(min(n, 8) for n in batch.query_lens))
    return batch


def main() -> int:
    """Exit status 1 when a case is slower than 0.99 of the other version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose name or kind contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        borrow(options.other, Path(folder))
        chosen = [case for case in cases() if options.only in case[1] or options.only in case[0]]
        with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=torch.multiprocessing.get_context("spawn")) as pool:
            list(pool.map(warm, [(package, folder, case[1]) for case in chosen for package in ("fa4_backend", OTHER)]))
        torch.manual_seed(0)
        for kind, name, batch, modes in chosen:
            tensors = BatchTensors.make(batch)
            calls, results = {}, {}
            for package in ("fa4_backend", OTHER):
                call = call_of(package, kind, batch, tensors, modes)
                call()
                torch.cuda.synchronize()
                results[package] = tensors.out.float().clone()
                calls[package] = (capture(call), call)
            difference = (results["fa4_backend"] - results[OTHER]).abs().max().item()
            us: dict[str, list[float]] = {package: [] for package in calls}
            for turn in range(ROUNDS):
                for package in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                    us[package].append(median_us(calls[package][0], milliseconds=8.0, flush=Flush.READ))
            ours, other = (statistics.median(us[package]) for package in ("fa4_backend", OTHER))
            rows.append(
                {"case": name, "us": round(ours, 2), "other_us": round(other, 2), "ratio": round(other / ours, 3), "difference": difference}
            )
            print(f"{name}: {ours:.1f} us, other {other:.1f} us, {other / ours:.3f}, difference {difference:.1e}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"stamp": gpu_stamp(), "rows": rows}, indent=1) + "\n")
    slow = [row["case"] for row in rows if row["ratio"] < 0.99]
    print(f"{len(rows)} cases, {len(slow)} slower: {slow}")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
