"""The proofs of K and V in FP8, and of 16-bit prefill with parts, in one command: `python -m tests.device.prove_all --out FOLDER`.

Fuzzed poisoned batches, bits, large pools, memcheck and racecheck, several processes at a time, each with a time limit. Prints the last
lines of each and writes whole logs and results to FOLDER. `--only` chooses by name.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fa4_backend import AttentionPlan
from fa4_backend.arch import arch_of_capability
from fa4_backend.problem import FP8, SAME_AS_Q
from tests.device.fuzz_all import compile_all, setup_plans
from tests.device.prove_decode import mixed_setups
from tests.device.prove_decode import setups as decode_setups
from tests.support.fuzz_setups import prefill_setups

ONCE = ["--parts", "cases", "--repeats", "1", "--processes", "1"]
EAGER = ["--eager", "--processes", "1"]
FP8_KV = ["--kv-dtype", "fp8"]
PREFILL, DECODE, MIXED, PREFILL_BF16 = KINDS = ("prefill", "decode", "mixed", "prefill-bf16")


def runs(batches: int, seconds: float) -> dict[str, tuple[str, list[str]]]:
    """Name -> the kind whose kernels it needs, and its arguments; those of a sanitizer begin with its tool."""
    of_kind = ["--seconds", str(seconds), "--processes", "1"]
    fuzz = ["--batches", str(batches), *of_kind]
    mixed = ["--parts", "mixed", "--mixed-batches", str(batches), *of_kind]
    cases = ["--parts", "cases,pages,pool", "--repeats", "5", "--processes", "1"]
    out: dict[str, tuple[str, list[str]]] = {
        "fuzz prefill": (PREFILL, ["prove_prefill", *FP8_KV, "--parts", "fuzz", *fuzz]),
        "fuzz decode": (DECODE, ["prove_decode", *FP8_KV, "--parts", "fuzz", *fuzz]),
        "fuzz mixed": (MIXED, ["prove_decode", *FP8_KV, *mixed]),
        # Half of its problems are those with parts.
        "fuzz prefill bf16": (PREFILL_BF16, ["prove_prefill", "--parts", "fuzz", "--batches", str(2 * batches), *of_kind]),
        "cases prefill": (PREFILL, ["prove_prefill", *FP8_KV, *cases]),
        "cases prefill bf16": (PREFILL_BF16, ["prove_prefill", *cases]),
        "cases decode": (DECODE, ["prove_decode", *FP8_KV, "--parts", "lists,pool,bits,exact", "--processes", "1"]),
        "memcheck prefill": (PREFILL, ["memcheck", "prove_prefill", *FP8_KV, *ONCE]),
        "memcheck decode": (DECODE, ["memcheck", "prove_decode", *FP8_KV, "--parts", "fuzz", "--batches", "34", *EAGER]),
        "memcheck mixed": (MIXED, ["memcheck", "prove_decode", *FP8_KV, "--parts", "mixed", "--mixed-batches", "14", *EAGER]),
        "racecheck prefill bf16": (PREFILL_BF16, ["racecheck", "prove_prefill", *ONCE, "--only", "d128 page 16"]),
        "racecheck decode": (DECODE, ["racecheck", "prove_decode", *FP8_KV, "--parts", "fuzz", "--batches", "34", *EAGER]),
    }
    for only in ("d128 page 16", "d64 ratio 3", "d192/128", "d256 page 16"):
        out[f"racecheck prefill {only}"] = (PREFILL, ["racecheck", "prove_prefill", *FP8_KV, *ONCE, "--only", only])
    for only in ("mixed 9/3", "mixed 8/2 d128 q2"):
        arguments = ["--parts", "mixed", "--mixed-batches", "2", "--only", only, *EAGER]
        out[f"racecheck {only}"] = (MIXED, ["racecheck", "prove_decode", *FP8_KV, *arguments])
    return out


def plans_of(kind: str, arch: str) -> list[AttentionPlan]:
    """What the processes of a kind compile."""
    setups_of = {
        PREFILL: lambda: prefill_setups(arch, FP8),
        DECODE: lambda: decode_setups(arch, FP8),
        MIXED: lambda: mixed_setups(arch, FP8),
        PREFILL_BF16: lambda: prefill_setups(arch, SAME_AS_Q),
    }
    return setup_plans(setups_of[kind]())


def run(name: str, arguments: list[str], folder: Path, limit_s: float) -> bool:
    """One process; True where it ended well within its limit."""
    tool = arguments[0] if not arguments[0].startswith("prove_") else None
    module, *rest = arguments[1:] if tool else arguments
    stem = folder / name.replace(" ", "_")
    command = [sys.executable, "-m", f"tests.device.{module}", *rest]
    if tool:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
    else:
        command += ["--json", f"{stem}.json"]
    begin = time.perf_counter()
    with Path(f"{stem}.log").open("w") as log:
        try:
            status = str(subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, check=False).returncode)
        except subprocess.TimeoutExpired:
            status = f"no end within {limit_s:.0f} s"
    lines = Path(f"{stem}.log").read_text().splitlines()
    print(f"== {name}: exit {status}, {time.perf_counter() - begin:.0f} s: {' '.join(arguments)}")
    print("\n".join(f"   {line[:300]}" for line in lines[-6 if not tool else -2 :]), flush=True)
    return status == "0"


def main() -> int:
    """Compile what all need, then run them; exit status 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=20000, help="of each kind")
    parser.add_argument("--seconds", type=float, default=80.0, help="of fuzzed batches of a kind")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of a process")
    parser.add_argument("--at-once", type=int, default=5, help="processes on the GPU")
    parser.add_argument("--only", default="", help="names that begin so, apart by commas")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    arch = arch_of_capability(*torch.cuda.get_device_capability())
    assert arch is not None, torch.cuda.get_device_name()
    only = tuple(options.only.split(","))
    chosen = {name: how for name, how in runs(options.batches, options.seconds).items() if name.startswith(only)}
    if shutil.which("compute-sanitizer") is None:
        print("no compute-sanitizer on the path: memcheck and racecheck will fail")
    begin, ends = time.perf_counter(), []
    with ThreadPoolExecutor(options.at_once) as pool:
        for kind in KINDS:  # the first runs while the next one's kernels are compiled
            of_kind = {name: arguments for name, (needs, arguments) in chosen.items() if needs == kind}
            if of_kind:
                compile_all(plans_of(kind, arch), 15)
                print(f"{time.perf_counter() - begin:.0f} s: kernels of {kind} are there", flush=True)
            ends += [pool.submit(run, name, arguments, options.out, options.limit) for name, arguments in of_kind.items()]
        ended = [end.result() for end in ends]
    print(f"{ended.count(False)} of {len(ended)} failed", flush=True)
    return int(not all(ended))


if __name__ == "__main__":
    raise SystemExit(main())
