"""Hardware counters of our kernels and of a peer's on cells of the benchmarks: what limits a cell that is behind a peer or a goal.

    python -m tests.device.read_counters --debts --json FILE
    python -m tests.device.read_counters --kinds d96,d256 --only "2 x 16K|soft cap: 8 x 4K" --variants "in use" fa3
    python -m tests.device.read_counters --debts --compile-for sm_90a        # for a machine without a compiler; needs no GPU

Every call runs once under Nsight Compute (`ncu` on PATH), all in one process, clocks left as they are, caches cold, one kernel after the
other, so that a step of both kinds shows each of its kernels alone. A matmul and a copy come first: what they reach of the tensor pipe's
and of the memory's peak is what any kernel can reach. Kernels come from the cache.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from fa4_backend.bench.batch import BatchShape, BatchTensors
from fa4_backend.bench.peers import FA3, ready
from fa4_backend.kernel_stamp import gpu_stamp
from tests.device.measure_tiles import IN_USE, INVARIANT, PROCESSES, batch_of, call_of, cells, compile_in_processes

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "SchedulerStats", "LaunchStats")
MATMUL, COPY = "matmul 8192^3", "copy 1 GiB"
ANCHORS = (MATMUL, COPY)
ANCHOR_SHARE = 0.9  # of what the matmul or the copy reaches of a peak: from there on that peak limits a kernel
FULL = 80.0  # % of its peak from which on another unit does
BUSY = 85.0  # % of the time that an SM holds a CTA on average, below which launch, first loads and uneven ends take the rest

# What is printed: a short name and the metrics that may carry it, by chip and version of ncu; the first that is there counts. All others
# go into the JSON.
SHOWN = {
    "tensor %": (r"sm__pipe_tensor_cycles_active\.avg\.pct_of_peak.*", r"sm__pipe_tensor_.*cycles_active\.avg\.pct_of_peak.*"),
    "MUFU %": (r"sm__inst_executed_pipe_xu\.avg\.pct_of_peak.*",),
    "FMA %": (r"sm__(inst_executed_)?pipe_fma_cycles_active\.avg\.pct_of_peak.*", r"sm__inst_executed_pipe_fma\.avg\.pct_of_peak.*"),
    "ALU %": (r"sm__(inst_executed_)?pipe_alu_cycles_active\.avg\.pct_of_peak.*", r"sm__inst_executed_pipe_alu\.avg\.pct_of_peak.*"),
    "issue %": (r"smsp__issue_active\.avg\.pct_of_peak.*", r"smsp__issue_active\.avg\.per_cycle_active", r"sm__inst_issued\.avg\.pct.*"),
    "L1, shared %": (r"l1tex__throughput\.avg\.pct_of_peak_sustained_active", r"l1tex__throughput\.avg\.pct_of_peak.*"),
    "L2 %": (r"lts__throughput\.avg\.pct_of_peak.*",),
    "L2 hit %": (r"lts__t_sector_hit_rate\.pct",),
    "DRAM %": (r"gpu__dram_throughput\.avg\.pct_of_peak.*", r"dram__throughput\.avg\.pct_of_peak.*"),
    "CTAs": (r"launch__grid_size",),
}  # fmt: skip
DURATION, ACTIVE, ELAPSED = r"gpu__time_duration\.(sum|avg)", r"sm__cycles_active\.avg", r"(gpc|sm|smsp)__cycles_elapsed\.max"
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
UNITS = ("MUFU %", "FMA %", "ALU %", "issue %", "L1, shared %", "L2 %", "DRAM %", "tensor %")
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}

# Cells of docs/benchmarks.md that are behind a goal or a peer: sets as in `measure_tiles`, titles, whose kernels.
DEBTS = (
    ("full", r": 2 x 16K prompts$", (IN_USE, FA3)),
    ("heads", r"64/8 .*: 2 x 16K prompts$|16/16 d64 .*: 32 x 1K prompts$", (IN_USE, FA3)),
    ("decode-grid", r": 8 x 4K$|: 1 x 16K$", (IN_USE, INVARIANT)),
    ("decode-grid", r": 1 x 1K$", (IN_USE,)),
    ("ragged", r"32/8 .*: (64 rows|31 x 1K|7 x 512)", (IN_USE, INVARIANT)),
    ("decode-heads", r"32 x 4K, 4 queries$", (IN_USE,)),
    ("one-kv-head", r"48/1 d64 .*: 8 x 4K$", (IN_USE, FA3)),
    ("mixed", r": 250 x 2K", (IN_USE, FA3)),
)


@dataclass(frozen=True)
class ProfiledCall:
    """One call of a cell's operator, or an anchor's, whose cell says what it is."""

    kinds: str
    cell: str
    variant: str

    @property
    def batch(self) -> BatchShape:
        return batch_of(self.variant, next(b for b in cells(self.kinds, "") if b.title == self.cell))


def debts() -> list[ProfiledCall]:
    """Every cell of DEBTS, our kernels first: a run that has to end early leaves out peers'."""
    found = [ProfiledCall(kinds, b.title, v) for kinds, pattern, variants in DEBTS for b in cells(kinds, pattern) for v in variants]
    return sorted(found, key=lambda call: call.variant == FA3)


def anchor(name: str) -> Callable[[], object]:
    """The call of a matmul or of a copy that every kernel is measured by."""
    if name == MATMUL:
        a, b, product = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        return lambda: torch.mm(a, b, out=product)
    source, target = (torch.empty(1 << 28, device="cuda", dtype=torch.int32) for _ in range(2))
    return lambda: torch.add(source, 1, out=target)


def run_calls(calls: list[ProfiledCall], place: Path, seconds: float) -> None:
    """What ncu watches: each call once before the profiler looks and once while it does, behind a small kernel that marks where it begins.

    Args:
        place: gets the calls that were made, as JSON. A peer that refuses a cell is said and left out, and so is what is left when
            `seconds` have passed.
    """
    begin, made = time.monotonic(), []
    mark = torch.ones(2, 2, device="cuda")
    for profiled in calls:
        if time.monotonic() - begin > seconds:
            print(f"{seconds:g} s have passed: {profiled.cell}, {profiled.variant} left out", file=sys.stderr, flush=True)
            continue
        if profiled.cell in ANCHORS:
            call: Callable[[], object] | None = anchor(profiled.cell)
        else:
            torch.manual_seed(0)
            batch = profiled.batch
            make = partial(call_of, profiled.variant, batch, BatchTensors.make(batch))
            call = ready(profiled.variant, batch.label, make, must_run=profiled.variant != FA3)
        if call is None:
            continue
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        mark.tril_()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        made.append(asdict(profiled))
        del call
        torch.cuda.empty_cache()  # the profiler saves and restores what is allocated
    place.write_text(json.dumps(made))


def profile(calls: list[ProfiledCall], seconds: float) -> Iterator[tuple[ProfiledCall, list[dict[str, str]]]]:
    """Each call that was made and metric -> value of each of its kernels, times in microseconds.

    Raises:
        RuntimeError: ncu failed or saw other calls than were made; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked_for, place = Path(folder) / "calls", Path(folder) / "made"
        asked_for.write_text(json.dumps([asdict(call) for call in calls]))
        sections = [part for name in SECTIONS for part in ("--section", name)]
        command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", *sections]
        command += [sys.executable, "-m", "tests.device.read_counters", "--run", folder, "--seconds", str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * seconds + 60, check=False)
        print(done.stderr[-2000:], file=sys.stderr, flush=True)
        if done.returncode or not place.exists():
            raise RuntimeError(f"expected counters from ncu, got status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        made = [ProfiledCall(**call) for call in json.loads(place.read_text())]
    yield from zip(made, kernels_of_calls(done.stdout, len(made)), strict=True)


def kernels_of_calls(output: str, num_calls: int) -> list[list[dict[str, str]]]:
    """ncu's table of raw metrics, by the calls that the marking kernel divides it into: that is the first kernel of the table.

    Raises:
        RuntimeError: there is no table, or it has other than `num_calls` calls.
    """
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise RuntimeError(f"expected a table of metrics from ncu, got {output[-2000:]!r}")
    units, *rows = csv.DictReader(lines[begin:])  # the first row holds units
    calls: list[list[dict[str, str]]] = []
    for row in rows:
        if row["Kernel Name"] == rows[0]["Kernel Name"]:
            calls.append([])
            continue
        scaled = {name: str(float(value.replace(",", "")) * MICROSECONDS[units[name]]) for name, value in row.items() if is_duration(name)}
        calls[-1].append(row | scaled)
    if len(calls) != num_calls:
        raise RuntimeError(f"calls in ncu's table: expected {num_calls}, got {len(calls)}")
    return calls


def is_duration(metric: str) -> bool:
    return re.fullmatch(DURATION, metric) is not None


def value_of(row: dict[str, str], *patterns: str) -> float | None:
    """The number of the first metric that matches; None where there is none."""
    metric = next((m for p in patterns for m in row if re.fullmatch(p, m) and row[m]), None)
    try:
        return None if metric is None else float(row[metric].replace(",", ""))
    except ValueError:  # "n/a"
        return None


def shown(row: dict[str, str]) -> dict[str, float | str | None]:
    """The named counters of a kernel, and its three longest stalls in warps an issue."""
    found: dict[str, float | str | None] = {"us": value_of(row, DURATION)}
    found |= {name: value_of(row, *patterns) for name, patterns in SHOWN.items()}
    active, elapsed = value_of(row, ACTIVE), value_of(row, ELAPSED)
    found["SMs busy %"] = 100 * active / elapsed if active is not None and elapsed else None
    found["GHz"] = elapsed / found["us"] / 1e3 if elapsed and isinstance(found["us"], float) else None
    stalls = {m.group(1): value_of(row, m.group(0)) or 0.0 for m in map(STALL.fullmatch, row) if m and m.group(1) != "selected"}
    longest = sorted(stalls, key=lambda name: -stalls[name])[:3]
    return found | {"stalls": ", ".join(f"{name} {stalls[name]:.2f}" for name in longest)}


def limit_of(counters: dict[str, float | str | None], ceilings: dict[str, float]) -> str:
    """Which unit limits a kernel, by its counters.

    Args:
        ceilings: what the anchors reached: "tensor %" and "DRAM %"; of a unit without a ceiling FULL counts.
    """
    shares = {name: value for name in UNITS if isinstance(value := counters.get(name), float)}
    full = {name: ANCHOR_SHARE * ceilings[name] if name in ceilings else FULL for name in shares}
    limits = [name for name in shares if shares[name] >= full[name]]
    if limits:
        return " and ".join(name.removesuffix(" %") for name in sorted(limits, key=lambda name: full[name] / shares[name]))
    busy = counters.get("SMs busy %")
    if isinstance(busy, float) and busy < BUSY:
        return f"no unit; SMs hold a CTA {busy:.0f} % of the time: launch, uneven ends"
    return f"no unit; latency: {counters['stalls']}"


def table(rows: list[dict[str, object]]) -> str:
    """The kernels as lines of a Markdown table."""
    names = ["us", "tensor %", "issue %", "MUFU %", "ALU %", "L1, shared %", "L2 %", "L2 hit %", "DRAM %", "SMs busy %", "GHz", "CTAs"]
    lines = ["| cell | whose | kernel | " + " | ".join(names) + " | limit |", "|---|---|---|" + "---:|" * len(names) + "---|"]
    for row in rows:
        counters = row["shown"]
        assert isinstance(counters, dict)
        numbers = [f"{value:.4g}" if isinstance(value := counters[name], float) else "" for name in names]
        lines.append(f"| {row['cell']} | {row['variant']} | {row['kernel']} | {' | '.join(numbers)} | {row['limit']} |")
    return "\n".join(lines)


def short_name(kernel: str) -> str:
    """What tells a kernel from the others of its call."""
    ours = re.match(r"kernel_cutlass.*?(Decode|Prefill|Convert)Kernel", kernel)
    return ours.group(1).lower() if ours else re.sub(r"^void |[<(].*", "", kernel)[:28]


def report(calls: list[ProfiledCall], seconds: float) -> list[dict[str, object]]:
    """Profile the anchors and `calls`, and print the table; a row a kernel."""
    rows: list[dict[str, object]] = []
    ceilings: dict[str, float] = {}
    for call, kernels in profile([*(ProfiledCall("", name, "") for name in ANCHORS), *calls], seconds):
        for kernel in kernels:
            counters = shown(kernel)
            name = kernel.get("Kernel Name", "")
            if call.cell in ANCHORS:
                reached = "tensor %" if call.cell == MATMUL else "DRAM %"
                if isinstance(value := counters[reached], float):
                    ceilings[reached] = max(ceilings.get(reached, 0.0), value)
            row = {"cell": call.cell, "variant": call.variant, "kernel": short_name(name), "full_name": name, "shown": counters}
            rows.append(row | {"limit": limit_of(counters, ceilings), "all": kernel})
    print(table(rows), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", help="as in `measure_tiles`")
    parser.add_argument("--only", default="", help="cells whose title matches this regular expression")
    parser.add_argument("--variants", nargs="*", default=[IN_USE], help='as in `measure_tiles`, or "fa3"')
    parser.add_argument("--debts", action="store_true", help="the cells of docs/benchmarks.md that are behind a goal or a peer")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no other call is profiled")
    parser.add_argument("--run", type=Path, help="make the calls of this folder in this process: what ncu watches")
    parser.add_argument("--compile-for", default="", help="compile for this arch and profile nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.run:
        calls = [ProfiledCall(**call) for call in json.loads((options.run / "calls").read_text())]
        run_calls(calls, options.run / "made", options.seconds)
        return
    if options.debts == bool(options.kinds):
        parser.error("expected one of --kinds and --debts")
    chosen = [] if options.debts else cells(options.kinds, options.only)
    calls = debts() if options.debts else [ProfiledCall(options.kinds, b.title, v) for b in chosen for v in options.variants]
    if options.compile_for:
        compile_in_processes([("", c.variant, options.compile_for, c.kinds, c.cell, 132) for c in calls if c.variant != FA3], PROCESSES)
        return
    rows = report(calls, options.seconds)
    if options.json:
        options.json.write_text(json.dumps({"stamp": gpu_stamp(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
