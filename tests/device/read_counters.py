"""Hardware counters of our kernels on cells of `fa4 bench shapes` and `fa4 bench prefill`: what limits a cell that a peer wins.

    python -m tests.device.read_counters --kinds d96,d256 --only "2 x 16K|soft cap: 8 x 4K" --json FILE

A cell runs once under Nsight Compute (`ncu` on PATH) in a process of its own, clocks left as they are, caches cold, one kernel after the
other, so that a step of both kinds shows each of its kernels alone. Cells follow each other: counters of two cells at once would be
nobody's. Kernels come from the cache.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fa4_backend.bench import dense_peers
from fa4_backend.bench.batch import BatchShape, BatchTensors
from fa4_backend.bench.prefill_batches import PrefillBatch
from fa4_backend.kernel_stamp import gpu_stamp
from tests.device.measure_tiles import IN_USE, call_of, cells

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "SchedulerStats", "LaunchStats")
# What is printed: a short name and the metrics that may carry it, by chip and version of ncu; the first that is there counts. All others
# go into the JSON.
SHOWN = {
    "us": (r"gpu__time_duration\.(sum|avg)",),
    "tensor %": (r"sm__pipe_tensor_cycles_active\.avg\.pct_of_peak.*", r"sm__pipe_tensor_.*cycles_active\.avg\.pct_of_peak.*"),
    "MUFU %": (r"sm__inst_executed_pipe_xu\.avg\.pct_of_peak.*",),
    "FMA %": (r"sm__(inst_executed_)?pipe_fma_cycles_active\.avg\.pct_of_peak.*", r"sm__inst_executed_pipe_fma\.avg\.pct_of_peak.*"),
    "ALU %": (r"sm__(inst_executed_)?pipe_alu_cycles_active\.avg\.pct_of_peak.*", r"sm__inst_executed_pipe_alu\.avg\.pct_of_peak.*"),
    "issue %": (r"smsp__issue_active\.avg\.pct_of_peak.*", r"smsp__issue_active\.avg\.per_cycle_active", r"sm__inst_issued\.avg\.pct.*"),
    "L1, shared %": (r"l1tex__throughput\.avg\.pct_of_peak_sustained_active", r"l1tex__throughput\.avg\.pct_of_peak.*"),
    "L2 %": (r"lts__throughput\.avg\.pct_of_peak.*",),
    "DRAM %": (r"gpu__dram_throughput\.avg\.pct_of_peak.*", r"dram__throughput\.avg\.pct_of_peak.*"),
}  # fmt: skip
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")


def run_of(variant: str, batch: BatchShape) -> Callable[[], object]:
    """A variant's call.

    Raises:
        ValueError: flash-attn-4's dense kernel takes whole prompts only.
    """
    tensors = BatchTensors.make(batch)
    if variant != dense_peers.FLASH_ATTN_4:
        return call_of(variant, batch, tensors)
    assert isinstance(batch, PrefillBatch), batch
    call = dense_peers.prepare(variant, batch, tensors)
    if call is None:
        raise ValueError(f"expected whole prompts under a plain mask for {variant}, got {batch.title}")
    return call


def run_cell(kind_names: str, title: str, variant: str) -> None:
    """The cell once for the profiler, and once before it."""
    batch = next(b for b in cells(kind_names, "") if b.title == title)
    torch.manual_seed(0)
    call = run_of(variant, batch)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def counters(kind_names: str, title: str, variant: str, seconds: float) -> list[dict[str, str]]:
    """Metric -> value for each kernel of a cell's call.

    Raises:
        RuntimeError: ncu failed or saw no kernel; with what it printed.
    """
    sections = [part for name in SECTIONS for part in ("--section", name)]
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", *sections, sys.executable, "-m"]
    command += ["tests.device.read_counters", "--kinds", kind_names, "--run", title, "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    lines = done.stdout.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if done.returncode or begin is None:
        raise RuntimeError(f"{title}: expected counters from ncu, got status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    rows = list(csv.DictReader(lines[begin:]))
    return [row for row in rows if row["ID"]]  # the first row holds units


def shown(row: dict[str, str]) -> dict[str, str]:
    """The named counters of a kernel, and its three longest stalls in warps an issue."""
    found = {}
    for name, patterns in SHOWN.items():
        metric = next((m for p in patterns for m in row if re.fullmatch(p, m)), None)
        found[name] = row[metric] if metric else "none"
    stalls = {m.group(1): float(row[m.group(0)].replace(",", "") or 0) for m in map(STALL.fullmatch, row) if m}
    longest = sorted(stalls, key=lambda name: -stalls[name])[:3]
    return found | {"stalls": ", ".join(f"{name} {stalls[name]:.2f}" for name in longest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", required=True, help="as in `measure_tiles`")
    parser.add_argument("--only", default="", help="cells whose title matches this regular expression")
    parser.add_argument("--variant", default=IN_USE, help='fields of TileShape, "fa3" or "fa4-sm90 dense"')
    parser.add_argument("--seconds", type=float, default=60.0, help="that a cell may take")
    parser.add_argument("--run", help="one cell, by its title, in this process: what ncu watches")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.run:
        run_cell(options.kinds, options.run, options.variant)
        return
    rows = []
    for batch in cells(options.kinds, options.only):
        try:
            kernels = counters(options.kinds, batch.title, options.variant, options.seconds)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{batch.title}: {error}", flush=True)
            continue
        for kernel in kernels:
            named = shown(kernel)
            rows.append({"cell": batch.title, "kernel": kernel.get("Kernel Name", "")[:60], "shown": named, "all": kernel})
            print(f"{batch.title}, {kernel.get('Kernel Name', '')[:40]}: " + ", ".join(f"{k} {v}" for k, v in named.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"stamp": gpu_stamp(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
