"""Plant one fault at a time in a kernel's PTX and see whether the emulator finds it.

    python -m tests.emulator.fault_injection --kernel sm100_prefill --out tests/emulator/results/faults_sm100_prefill.json
    python -m tests.emulator.fault_injection --kernel sm90_prefill --clean-seeds 200 --only-clean

A fault is caught when a run ends in an error, reports a race or another finding, or gives other output bits than the right program.
Each mutant runs with the deterministic schedule, then with a few random ones until it is caught. Faults in instructions that the case
never reaches are left out. A fault that no run shows is a survivor, unless `fault_reasons.py` knows why it changes
nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fa4_backend import emulator
from tests.emulator.fault_mutations import Mutant, mutants, one_statement_a_line
from tests.emulator.fault_reasons import NOT_MODELLED, vacuous, why_missed
from tests.emulator.fault_targets import Target, load_target, planted

SHORTEST_LIMIT, LIMIT_FACTOR = 3.0, 8.0  # CPU seconds that a run may take, and times the right program's
ILLEGAL = "no legal program"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` after so many seconds of CPU time."""

    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


@dataclass(frozen=True)
class Right:
    """What the program without a fault gives."""

    outputs: list[torch.Tensor]
    notes: set[str]  # its own remarks, such as a named barrier that ends half full
    reached: set[int]  # lines of the PTX
    seconds: float = SHORTEST_LIMIT  # of CPU time, of the longer run


def run_right(target: Target) -> Right:
    """Raises `AssertionError` when the right program races."""
    times = [cpu_seconds()]
    outputs, report = target.run(None)
    times.append(cpu_seconds())
    _, other = target.run(0)
    times.append(cpu_seconds())
    assert not report.races and not other.races, report.races + other.races
    seconds = max(times[1] - times[0], times[2] - times[1])
    return Right(outputs, remarks(report) | remarks(other), reached_lines(report), seconds)


def remarks(report: emulator.Report) -> set[str]:
    """The report's notes, without the numbers of warps."""
    return {re.sub(r"warp \d+", "warp #", note) for note in report.notes}


def verdict(target: Target, mutant: Mutant, right: Right, seeds: list[int | None]) -> tuple[str, int | None]:
    """How the fault shows ("" when it does not) and under which seed."""
    limit = max(SHORTEST_LIMIT, LIMIT_FACTOR * right.seconds)
    with planted(target, mutant.ptx):
        for seed in seeds:
            try:
                with time_limit(limit):
                    outputs, report = target.run(seed)
            except (emulator.UnsupportedInstruction, emulator.PtxSyntaxError):
                return ILLEGAL, seed
            except emulator.EmulatorError as error:
                return type(error).__name__, seed
            except TimeoutError:
                return "no end", seed
            if report.races:
                return "race", seed
            if not same(outputs, right.outputs):
                return "wrong output", seed
            if remarks(report) - right.notes:
                return "finding", seed
    return "", None


def same(outputs: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in zip(outputs, right, strict=True))


def reached_lines(report: emulator.Report) -> set[int]:
    """Lines of the PTX that a run executed."""
    lines: set[int] = set()
    for counts in report.kernels.values():
        executed = counts.executed.sum(axis=0)
        lines |= {i.line for i, n in zip(counts.program.kernel.instructions, executed, strict=False) if n}
    return lines


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def inject(target: Target, seeds: list[int | None], pick: Callable[[Mutant], bool] = lambda _: True) -> dict[str, Any]:
    """Run every mutant; returns the verdicts by class."""
    start = cpu_seconds()
    target.run(None)  # loads the kernel's image
    split = one_statement_a_line(target.ptx)
    with planted(target, split):
        right = run_right(target)
    faults: dict[str, list[dict[str, Any]]] = {}
    for mutant in filter(pick, mutants(split, right.reached)):
        how, seed = verdict(target, mutant, right, seeds)
        if how == ILLEGAL:
            continue
        print(f"{mutant.name}: {how or 'survived'}", flush=True)
        fault = {"line": mutant.line, "text": mutant.text.strip()[:160], "caught": how, "seed": seed}
        if not how:
            fault["vacuous"] = vacuous(target, mutant)
            if not fault["vacuous"]:
                fault["missed"] = why_missed(target, mutant)
            print(f"    {fault['vacuous'] or 'MISSED: ' + fault['missed']}", flush=True)
        faults.setdefault(mutant.kind, []).append(fault)
    return {"kernel": target.name, "cpu_seconds": round(cpu_seconds() - start), "classes": faults}


def summary(result: dict[str, Any]) -> list[str]:
    """A table of the score, then the survivors. Faults in what the emulator does not model are counted apart, and named."""
    rows, survivors = [], []
    total = caught = unseen = 0
    for kind, faults in result["classes"].items():
        counted = [f for f in faults if f["caught"] or not f["vacuous"]]
        beyond = sum(f.get("vacuous", "").startswith(NOT_MODELLED) for f in faults)
        ways = Counter(f["caught"] or "survived" for f in counted)
        good = sum(bool(f["caught"]) for f in counted)
        total, caught, unseen = total + len(counted), caught + good, unseen + beyond
        rest = f"{len(faults) - len(counted) - beyond} vacuous, {beyond} not modelled"
        rows.append(f"{kind:20} {good:4} of {len(counted):4}   {dict(ways)}   {rest}")
        survivors += [
            f"  {kind} @{f['line']}: {f['text']}  [{f['vacuous'] or 'MISSED: ' + f['missed']}]" for f in faults if not f["caught"]
        ]
    score = f"{caught} of {total} caught ({100 * caught / max(total, 1):.1f} %); with what is not modelled {caught} of {total + unseen}"
    return [f"{result['kernel']}: {score}; {result['cpu_seconds']} s of CPU", *rows, *survivors]


def clean_runs(target: Target, count: int) -> list[str]:
    """Alarms on the right program over `count` random schedules."""
    right = run_right(target)
    alarms: list[str] = []
    for seed in range(count):
        outputs, report = target.run(seed)
        new = remarks(report) - right.notes
        if report.races or new:
            alarms.append(f"seed {seed}: {(report.races + sorted(new))[0]}")
        if not same(outputs, right.outputs):
            alarms.append(f"seed {seed}: other output bits than the deterministic schedule")
    return alarms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kernel", required=True, help="sm100_prefill, sm100_pair, sm100_fp8, sm100_mla, sm90_prefill, sm90_decode, or upstream_<case>"
    )
    parser.add_argument("--folder", type=Path, default=Path("upstream_objects"))
    parser.add_argument("--seeds", type=int, default=12, help="random schedules after the deterministic one")
    parser.add_argument("--clean-seeds", type=int, default=0)
    parser.add_argument("--only-clean", action="store_true")
    parser.add_argument("--kind", help="only this class")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    target = load_target(options.kernel, options.folder)
    result: dict[str, Any] = {"kernel": target.name}
    if not options.only_clean:
        result = inject(target, [None, *range(options.seeds)], lambda m: options.kind in (None, m.kind))
        print("\n".join(summary(result)))
    if options.clean_seeds:
        result |= {"clean_seeds": options.clean_seeds, "false_alarms": clean_runs(target, options.clean_seeds)}
        print(f"{options.clean_seeds} random schedules of the right program: {len(result['false_alarms'])} alarms")
        print("\n".join(result["false_alarms"][:10]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result).replace('{"line"', '\n{"line"') + "\n")


if __name__ == "__main__":
    main()
