"""memcheck and racecheck over prefill, decode and mixed steps, 16-bit and FP8 K and V, in one command.

    python -m tests.device.sanitize --out FOLDER

Every head dimension, dtype, ratio, page size, mask feature and kind of scale that is fuzzed, a short batch each, in processes side by side
(`sanitize_cases`). "lanes" are the same batches through kernels in which every lane arrives for itself (`racecheck_lanes`): they must be
without a hazard, while `racecheck` may report some of kernels as they are. "plant" is a read past the end of an allocation, which the tool
has to see. Kernels are compiled first. Prints a line a process; logs and results are in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fa4_backend.arch import arch_of_capability
from fa4_backend.kernel_stamp import gpu_stamp
from tests.device.fuzz_all import compile_all
from tests.device.sanitize_cases import KINDS, KV_DTYPES, chosen_cases, plans_of

SYMBOL = "kernel_cutlass"  # stands in the symbol of every kernel that the DSL compiles, and of none of torch's
CORES = len(os.sched_getaffinity(0))
SHARDS = {"prefill": 6, "decode": 2, "mixed": 2}  # processes of a kind
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")


@dataclass(frozen=True)
class Job:
    """One process under a tool."""

    name: str
    tool: str
    arguments: tuple[str, ...]  # of the module
    module: str = "sanitize_cases"

    @property
    def command(self) -> list[str]:
        """As it is run; exit status 0 says that every batch is right and that the tool saw nothing, 9 that it saw something."""
        tool = ["compute-sanitizer", "--tool", self.tool, "--kernel-name", f"kns={SYMBOL}", "--error-exitcode", "9"]
        return [*tool, "python", "-m", f"tests.device.{self.module}", *self.arguments]

    @property
    def is_planted(self) -> bool:
        """Whether the tool has to see something."""
        return "--plant" in self.arguments

    @property
    def is_judged_by_lanes(self) -> bool:
        """Whether `racecheck` may report what no tool can follow in this kernel."""
        return self.tool == "racecheck" and not self.has_own_kernel

    @property
    def has_own_kernel(self) -> bool:
        """Whether it compiles another kernel under the real one's key."""
        return self.module == "racecheck_lanes"


def jobs() -> list[Job]:
    """All of them, the longest first."""
    found = []
    for name, module in (("racecheck lanes", "racecheck_lanes"), ("racecheck", "sanitize_cases"), ("memcheck", "sanitize_cases")):
        for kind in KINDS:
            for kv_dtype in KV_DTYPES:
                for shard in range(SHARDS[kind]):
                    arguments = ("--kind", kind, "--kv-dtype", kv_dtype, "--shard", f"{shard}/{SHARDS[kind]}")
                    found.append(Job(f"{name} {kind} {kv_dtype} {shard}", name.split()[0], arguments, module))
    plants = (
        ("schedule", ("--plant", "seqused_k", "--only", "d128 page 16")),
        ("prefill", ("--plant", "page_table", "--only", "d128 page 16")),
        ("decode", ("--plant", "page_table", "--kind", "decode", "--only", "32/8 d128 q1")),
    )
    return [*found, *(Job(f"memcheck plant {kernel}", "memcheck", arguments) for kernel, arguments in plants)]


def ended(command: list[str], log: Path, environment: dict[str, str], limit_s: float) -> str:
    """How a process ended that wrote to `log`: "exit 0" and the like. At its limit its whole group is killed: the tool leaves a child."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            return f"exit {process.wait(limit_s)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"no end within {limit_s:.0f} s"


def run(job: Job, gpu: int, folder: Path, limit_s: float) -> dict[str, Any]:
    """One process on one of the visible GPUs, to its end or its limit."""
    stem = folder / re.sub(r"\W+", "_", job.name)
    log, of_run = Path(f"{stem}.log"), [] if job.is_planted else ["--json", f"{stem}.json"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": visible[gpu] if visible[0] else str(gpu)}
    begin = time.perf_counter()
    how = ended([*job.command, *of_run], log, environment, limit_s)
    seen = SUMMARY.findall(log.read_text())
    batches = json.loads(Path(f"{stem}.json").read_text()) if Path(f"{stem}.json").exists() else []
    row: dict[str, Any] = {
        "name": job.name, "command": shlex.join(job.command), "batches": len(batches), "wrong": [b for b in batches if not b["ok"]],
        "summary": seen[-1] if seen else "none", "ended": how, "seconds": round(time.perf_counter() - begin),
    }  # fmt: skip
    row["ok"] = is_as_it_has_to_be(job, row)
    print(f"{'ok ' if row['ok'] else 'BAD'} {job.name}: {row['batches']} batches, {row['summary']}, {how}, {row['seconds']} s", flush=True)
    return row


def is_as_it_has_to_be(job: Job, row: dict[str, Any]) -> bool:
    """Right batches and nothing seen; of a planted fault, that it was seen. What is seen of kernels as they are, their lanes judge."""
    sees_nothing = "SUMMARY: 0 " in row["summary"]
    if job.is_planted:
        return "SUMMARY" in row["summary"] and not sees_nothing
    has_ended = row["ended"] == "exit 0" or (row["ended"] == "exit 9" and job.is_judged_by_lanes and "SUMMARY" in row["summary"])
    return has_ended and row["batches"] > 0 and not row["wrong"] and (sees_nothing or job.is_judged_by_lanes)


def main() -> int:
    """Compile, then run the chosen jobs; exit status 1 when one was not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sanitized"))
    parser.add_argument("--only", default="", help="jobs whose name begins so, and planted faults; several apart by commas")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of a process")
    parser.add_argument("--at-once", type=int, default=CORES, help="processes on all visible GPUs, which take turns; they judge on the CPU")
    parser.add_argument("--processes", type=int, default=CORES, help="that compile kernels side by side")
    parser.add_argument("--compile-only", metavar="ARCH", help="fill the cache for ARCH and stop; needs no GPU")
    options = parser.parse_args()
    only = tuple(options.only.split(","))
    # What the tools do not watch they find clean: the planted faults are part of every run.
    begin, chosen = time.perf_counter(), [job for job in jobs() if job.is_planted or job.name.startswith(only)]
    arch = options.compile_only or arch_of_capability(*torch.cuda.get_device_capability())
    assert arch is not None, torch.cuda.get_device_name()
    kinds = [
        (kind, kv_dtype)
        for kind in KINDS
        for kv_dtype in KV_DTYPES
        if any(f" {kind} {kv_dtype} " in job.name for job in chosen if not job.has_own_kernel)
    ]
    plans = [plan for kind, kv_dtype in kinds for plan in plans_of(chosen_cases(kind, arch, kv_dtype))]
    compile_all(plans, options.processes)
    of_lanes = {" ".join(job.name.split()[2:4]) for job in chosen if job.has_own_kernel}
    if of_lanes:
        command = [sys.executable, "-m", "tests.device.racecheck_lanes", "--compile-for", arch, "--batches", ",".join(sorted(of_lanes))]
        subprocess.run([*command, "--processes", str(options.processes)], check=True)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    if options.compile_only:
        return 0
    assert shutil.which("compute-sanitizer"), "expected compute-sanitizer on the path"
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        gpus = [index % torch.cuda.device_count() for index in range(len(chosen))]
        rows = list(pool.map(lambda job, gpu: run(job, gpu, options.out, options.limit), chosen, gpus))
    (options.out / "sanitizer.json").write_text(json.dumps({"stamp": gpu_stamp(), "runs": rows}, indent=1) + "\n")
    print(f"{sum(not row['ok'] for row in rows)} of {len(rows)} not as they have to be; {time.perf_counter() - begin:.0f} s", flush=True)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
