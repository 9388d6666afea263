"""Every proof of prefill, decode and mixed steps, 16-bit and FP8 K and V, in one command: `python -m tests.device.prove_all --out FOLDER`.

Fuzzed poisoned batches, bits and large pools, several processes at a time over all GPUs, each with a time limit. Prints the last lines of
each; FOLDER gets whole logs, a result of each process, and of all fuzzed batches what `results/fuzz_h200.json` has. `--only` chooses by
name. memcheck and racecheck: `tests.device.sanitize`, which needs the same kernels; MLA: `tests.device.prove_mla`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fa4_backend.arch import arch_of_capability
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.problem import FP8
from tests.device.fuzz_all import compile_all, setup_plans
from tests.device.prove_decode import mixed_setups
from tests.device.prove_decode import setups as decode_setups
from tests.support.fuzz import FuzzSetup
from tests.support.fuzz_setups import prefill_setups


@dataclass(frozen=True)
class Kind:
    """One kind of fuzzed batches: the module that draws them, and how it is told to."""

    name: str
    module: str
    part: str
    batches: str  # its option
    setups_of: Callable[[str, str], list[FuzzSetup]]
    kv_dtype: str  # as the option of `module` has it
    dtype: str  # as a problem has it
    cases: str  # parts that are no fuzz
    shards: int  # processes that share its fuzzed batches: as many as make all kinds take about as long

    def setups(self, arch: str) -> list[FuzzSetup]:
        """Problems that it fuzzes."""
        return self.setups_of(arch, self.dtype)

    def arguments(self, parts: str) -> list[str]:
        """Of its module."""
        return [self.module, "--kv-dtype", self.kv_dtype, "--processes", "1", "--parts", parts]


PREFILL_CASES, DECODE_CASES = "cases,pages,pool,alone", "lists,pool,bits,exact"
KINDS = (
    Kind("prefill", "prove_prefill", "fuzz", "--batches", prefill_setups, "auto", "auto", PREFILL_CASES, 6),
    Kind("prefill, K and V in FP8", "prove_prefill", "fuzz", "--batches", prefill_setups, "fp8", FP8, PREFILL_CASES, 6),
    Kind("decode", "prove_decode", "fuzz", "--batches", decode_setups, "bf16", "bfloat16", DECODE_CASES, 2),
    Kind("decode, K and V in FP8", "prove_decode", "fuzz", "--batches", decode_setups, "fp8", FP8, DECODE_CASES, 2),
    Kind("mixed steps", "prove_decode", "mixed", "--mixed-batches", mixed_setups, "bf16", "bfloat16", "", 3),
    Kind("mixed steps, K and V in FP8", "prove_decode", "mixed", "--mixed-batches", mixed_setups, "fp8", FP8, "", 3),
)


@dataclass(frozen=True)
class Job:
    """A process: its name, what `python -m tests.device.` runs, and the kind whose fuzzed batches it draws."""

    name: str
    arguments: list[str]
    fuzzes: Kind | None = None


def jobs_of(kind: Kind, options: argparse.Namespace) -> list[Job]:
    """Shards of fuzzed batches, and the cases."""
    fuzz = [*kind.arguments(kind.part), "--seconds", str(options.seconds), "--seed", str(options.seed), kind.batches, str(options.batches)]
    jobs = [Job(f"fuzz {kind.name} {i}", [*fuzz, "--shard", f"{i}/{kind.shards}"], kind) for i in range(kind.shards)]
    return jobs + [Job(f"cases {kind.name}", kind.arguments(kind.cases))] * bool(kind.cases)


def run(job: Job, gpu: int, folder: Path, limit_s: float) -> bool:
    """One process; True where it ended well within its limit."""
    module, *rest = job.arguments
    stem = stem_of(job, folder)
    command = [sys.executable, "-m", f"tests.device.{module}", *rest, "--json", f"{stem}.json"]
    begin = time.perf_counter()
    with Path(f"{stem}.log").open("w") as log:
        try:
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
            ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, check=False, env=environment)
            status = str(ended.returncode)
        except subprocess.TimeoutExpired:
            status = f"no end within {limit_s:.0f} s"
    lines = Path(f"{stem}.log").read_text().splitlines()
    print(f"== {job.name}: exit {status}, {time.perf_counter() - begin:.0f} s: {' '.join(job.arguments)}")
    print("\n".join(f"   {line[:200]}" for line in lines[-3:]), flush=True)
    return status == "0"


def stem_of(job: Job, folder: Path) -> Path:
    """Path of a process's log and result, without what follows the dot."""
    return folder / job.name.replace(",", "").replace(" ", "_")


def problems_of(seen: list[dict[str, Any]] | dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Fuzzed problems of a process; of decode's that failed only why is known."""
    if isinstance(seen, list):
        return seen
    return seen["setups"] if seen["ok"] else [{"name": name, "batches": 0, "failures": 1, "why": seen["why"]}]


def collect(jobs: list[Job], folder: Path) -> dict[str, Any]:
    """Fuzzed batches of each kind together, of the processes that left a result."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        result = Path(f"{stem_of(job, folder)}.json")
        if job.fuzzes and result.exists():
            parts.setdefault(job.fuzzes.name, []).extend(problems_of(json.loads(result.read_text())[job.fuzzes.part], job.name))
    return {"stamp": gpu_stamp(), "parts": parts}


def main() -> int:
    """Compile what all need, then run them; exit status 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("proofs"))
    parser.add_argument("--batches", type=int, default=20000, help="of each kind")
    parser.add_argument("--seconds", type=float, default=200.0, help="of fuzzed batches of a process")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=25, help="processes on all GPUs")
    parser.add_argument("--only", default="", help="names that begin so, apart by semicolons: 'fuzz', 'fuzz mixed steps', 'cases'")
    parser.add_argument("--processes", type=int, default=15, help="that compile kernels side by side")
    parser.add_argument("--compile-only", metavar="ARCH", help="fill the cache for ARCH and stop; needs no GPU")
    options = parser.parse_args()
    begin, only = time.perf_counter(), tuple(options.only.split(";"))
    chosen = {kind: [job for job in jobs_of(kind, options) if job.name.startswith(only)] for kind in KINDS}
    kinds = [kind for kind, jobs in chosen.items() if jobs]
    arch, num_sms = options.compile_only, 132 if options.compile_only else None
    if not options.compile_only:
        arch = arch_of_capability(*torch.cuda.get_device_capability())
        assert arch is not None, torch.cuda.get_device_name()
    compile_all(setup_plans([setup for kind in kinds for setup in kind.setups(arch)], num_sms), options.processes)
    print(f"{time.perf_counter() - begin:.0f} s: kernels of {', '.join(kind.name for kind in kinds)} are there", flush=True)
    if options.compile_only:
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    # In turns: a shard of each kind, so that a call that is cut short has some of each.
    jobs = [job for turn in itertools.zip_longest(*chosen.values()) for job in turn if job]
    with ThreadPoolExecutor(options.at_once) as pool:
        gpus = itertools.cycle(range(torch.cuda.device_count()))
        ended = list(pool.map(lambda job, gpu: run(job, gpu, options.out, options.limit), jobs, gpus))
    seen = collect(jobs, options.out)
    (options.out / "fuzz.json").write_text(json.dumps(seen, indent=1) + "\n")
    for name, problems in seen["parts"].items():
        print(f"{name}: {sum(p['batches'] for p in problems)} batches, {sum(p['failures'] for p in problems)} failures")
    print(f"{ended.count(False)} of {len(ended)} processes failed", flush=True)
    return int(not all(ended))


if __name__ == "__main__":
    raise SystemExit(main())
