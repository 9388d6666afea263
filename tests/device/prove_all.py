"""The proofs of K and V in FP8, and of 16-bit prefill with parts, in one command: `python -m tests.device.prove_all --out FOLDER`.

Fuzzed poisoned batches, bits and large pools, several processes at a time, each with a time limit. Prints the last lines of each and
writes whole logs and results to FOLDER. `--only` chooses by name. memcheck and racecheck: `tests.device.sanitize`, which needs the same
kernels.
"""

from __future__ import annotations

import argparse
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

FP8_KV = ["--kv-dtype", "fp8"]
PREFILL, DECODE, MIXED, PREFILL_BF16 = KINDS = ("prefill", "decode", "mixed", "prefill-bf16")


# Names of the problems of `--few`: about half of the kernels, every head dimension, parts, windows, score features and out in FP8.
FEW = {
    PREFILL: "d128 page 16;d128 page 64 fp16;d128 both windows;d128 soft cap;d64 ratio 3;d96;d192/128;d256 page 784",
    DECODE: "32/8 d128 q1;8/2 d128 q4  ;8/2 d128 q4 has_window_left;8/2 d128 q4 batch_invariant;9/3 d64 q1;8/2 d96;8/2 d256",
    MIXED: "mixed 32/8;mixed 8/2 d128 q4;mixed 9/3;mixed 8/2 d128 q2",
    PREFILL_BF16: "d128 page 16;d128 both windows;d64 ratio 3;d192/128;d256 page 784",
}


def runs(batches: int, seconds: float, of_kind: dict[str, str]) -> dict[str, tuple[str, list[str]]]:
    """Name -> the kind whose kernels it needs, and its module with its arguments.

    Args:
        of_kind: names of the problems of each kind; "": all.
    """

    def prefill(kind: str, *parts: str) -> list[str]:
        return ["prove_prefill", *(FP8_KV if kind == PREFILL else []), "--only", of_kind[kind], "--processes", "1", *parts]

    def decode(kind: str, *parts: str) -> list[str]:
        return ["prove_decode", *FP8_KV, "--only", of_kind[kind], "--processes", "1", *parts]

    fuzz = ["--parts", "fuzz", "--seconds", str(seconds), "--batches"]
    cases = ["--parts", "cases,pages,pool", "--repeats", "5"]
    return {
        "fuzz prefill": (PREFILL, prefill(PREFILL, *fuzz, str(batches))),
        "fuzz decode": (DECODE, decode(DECODE, *fuzz, str(batches))),
        "fuzz mixed": (MIXED, decode(MIXED, "--parts", "mixed", "--seconds", str(seconds), "--mixed-batches", str(batches))),
        # Half of its problems are those with parts.
        "fuzz prefill bf16": (PREFILL_BF16, prefill(PREFILL_BF16, *fuzz, str(2 * batches))),
        "cases prefill": (PREFILL, prefill(PREFILL, *cases)),
        "cases prefill bf16": (PREFILL_BF16, prefill(PREFILL_BF16, *cases)),
        "cases decode": (DECODE, decode(DECODE, "--parts", "lists,pool,bits,exact")),
    }


def plans_of(kind: str, arch: str, of_kind: dict[str, str], num_sms: int | None) -> list[AttentionPlan]:
    """What the processes of a kind compile."""
    setups_of = {
        PREFILL: lambda: prefill_setups(arch, FP8),
        DECODE: lambda: decode_setups(arch, FP8),
        MIXED: lambda: mixed_setups(arch, FP8),
        PREFILL_BF16: lambda: prefill_setups(arch, SAME_AS_Q),
    }
    chosen = tuple(of_kind[kind].split(";"))
    return setup_plans([setup for setup in setups_of[kind]() if setup.name.startswith(chosen)], num_sms)


def run(name: str, arguments: list[str], folder: Path, limit_s: float) -> bool:
    """One process; True where it ended well within its limit."""
    module, *rest = arguments
    stem = folder / name.replace(" ", "_")
    command = [sys.executable, "-m", f"tests.device.{module}", *rest, "--json", f"{stem}.json"]
    begin = time.perf_counter()
    with Path(f"{stem}.log").open("w") as log:
        try:
            status = str(subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, check=False).returncode)
        except subprocess.TimeoutExpired:
            status = f"no end within {limit_s:.0f} s"
    lines = Path(f"{stem}.log").read_text().splitlines()
    print(f"== {name}: exit {status}, {time.perf_counter() - begin:.0f} s: {' '.join(arguments)}")
    print("\n".join(f"   {line[:300]}" for line in lines[-6:]), flush=True)
    return status == "0"


def main() -> int:
    """Compile what all need, then run them; exit status 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("proofs"))
    parser.add_argument("--batches", type=int, default=20000, help="of each kind")
    parser.add_argument("--seconds", type=float, default=80.0, help="of fuzzed batches of a kind")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of a process")
    parser.add_argument("--at-once", type=int, default=5, help="processes on the GPU")
    parser.add_argument("--only", default="", help="names that begin so, apart by commas")
    parser.add_argument("--few", action="store_true", help="about half of the problems")
    parser.add_argument("--processes", type=int, default=15, help="that compile kernels side by side")
    parser.add_argument("--compile-only", metavar="ARCH", help="fill the cache for ARCH and stop; needs no GPU")
    options = parser.parse_args()
    of_kind, only = FEW if options.few else dict.fromkeys(KINDS, ""), tuple(options.only.split(","))
    chosen = {name: how for name, how in runs(options.batches, options.seconds, of_kind).items() if name.startswith(only)}
    begin, ends = time.perf_counter(), []
    arch, num_sms = options.compile_only, 132 if options.compile_only else None
    if not options.compile_only:
        arch = arch_of_capability(*torch.cuda.get_device_capability())
        assert arch is not None, torch.cuda.get_device_name()
        options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        for kind in KINDS:  # the first runs while the next one's kernels are compiled
            mine = {name: arguments for name, (needs, arguments) in chosen.items() if needs == kind}
            if mine:
                compile_all(plans_of(kind, arch, of_kind, num_sms), options.processes)
                print(f"{time.perf_counter() - begin:.0f} s: kernels of {kind} are there", flush=True)
            if not options.compile_only:
                ends += [pool.submit(run, name, arguments, options.out, options.limit) for name, arguments in mine.items()]
        ended = [end.result() for end in ends]
    print(f"{ended.count(False)} of {len(ended)} failed", flush=True)
    return int(not all(ended))


if __name__ == "__main__":
    raise SystemExit(main())
