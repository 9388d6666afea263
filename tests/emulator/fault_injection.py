"""Plant one fault at a time in a kernel's PTX and see whether the emulator finds it.

    python -m tests.emulator.fault_injection --kernel all --jobs 2 --clean-seeds 200 --out tests/emulator/results
    python -m tests.emulator.fault_injection --kernel sm90_prefill --clean-seeds 200 --only-clean

A fault is caught when a run ends in an error, reports a race or another finding, or gives other output bits than the right program.
Each mutant runs with the deterministic schedule, then with a few random ones until it is caught. Faults in instructions that the case
never reaches are left out. A fault that no run shows is a survivor, unless `fault_reasons.py` knows why it changes
nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fa4_backend import emulator
from tests.emulator.fault_mutations import Mutant, mutants, one_statement_a_line
from tests.emulator.fault_reasons import NOT_MODELLED, vacuous, why_missed
from tests.emulator.fault_targets import OWN_TARGETS, Target, load_target, planted

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
    reached = reached_lines(target, report)
    if target.plain is not None:  # the other case has those of the lines that both reach
        reached -= reached_lines(target, target.plain())
    return Right(outputs, remarks(report) | remarks(other), reached, seconds)


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


def reached_lines(target: Target, report: emulator.Report) -> set[int]:
    """Lines of the target's PTX that a run executed."""
    counts = report.kernels[target.kernel]
    executed = counts.executed.sum(axis=0)
    return {i.line for i, n in zip(counts.program.kernel.instructions, executed, strict=False) if n}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def inject(
    target: Target, seeds: list[int | None], pick: Callable[[Mutant], bool] = lambda _: True, share: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Run every mutant, or the `share`: (i, n): every n-th from the i-th on; returns the verdicts by class."""
    start = cpu_seconds()
    target.run(None)  # loads the kernel's image
    split = one_statement_a_line(target.ptx)
    with planted(target, split):
        right = run_right(target)
    faults: dict[str, list[dict[str, Any]]] = {}
    for mutant in itertools.islice(filter(pick, mutants(split, right.reached, target.sample)), share[0], None, share[1]):
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


def clean_runs(target: Target, seeds: Iterable[int]) -> list[str]:
    """Alarms on the right program over random schedules."""
    right = run_right(target)
    alarms: list[str] = []
    for seed in seeds:
        outputs, report = target.run(seed)
        new = remarks(report) - right.notes
        if report.races or new:
            alarms.append(f"seed {seed}: {(report.races + sorted(new))[0]}")
        if not same(outputs, right.outputs):
            alarms.append(f"seed {seed}: other output bits than the deterministic schedule")
    return alarms


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One kernel's result from those of its shares."""
    classes: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for kind, faults in result["classes"].items():
            classes.setdefault(kind, []).extend(faults)
    for faults in classes.values():
        faults.sort(key=lambda fault: fault["line"])
    total = {
        "kernel": results[0]["kernel"],
        "cpu_seconds": sum(result["cpu_seconds"] for result in results),
        "classes": dict(sorted(classes.items())),
    }
    if any(result["clean_seeds"] for result in results):
        total["clean_seeds"] = sum(result["clean_seeds"] for result in results)
        total["false_alarms"] = [alarm for result in results for alarm in result["false_alarms"]]
    return total


def run_share(name: str, folder: Path, seeds: int, clean_seeds: int, kind: str | None, share: tuple[int, int]) -> dict[str, Any]:
    """A share of one kernel's faults and of its right schedules; in a process of its own."""
    torch.set_num_threads(1)
    target = load_target(name, folder)
    start = cpu_seconds()
    result: dict[str, Any] = {"kernel": target.name, "classes": {}}
    if seeds >= 0:
        result = inject(target, [None, *range(seeds)], lambda m: kind in (None, m.kind), share)
    clean = range(share[0], clean_seeds, share[1])
    alarms = clean_runs(target, clean) if clean else []
    return result | {"clean_seeds": len(clean), "false_alarms": alarms, "cpu_seconds": round(cpu_seconds() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", required=True, help=f"{', '.join(OWN_TARGETS)}, upstream_<case>, several with commas, or all (ours)")
    parser.add_argument("--folder", type=Path, default=Path("upstream_objects"))
    parser.add_argument("--seeds", type=int, default=6, help="random schedules after the deterministic one")
    parser.add_argument("--clean-seeds", type=int, default=0)
    parser.add_argument("--only-clean", action="store_true")
    parser.add_argument("--kind", help="only this class")
    parser.add_argument("--share", default="0/1", help="i/n: only every n-th fault and schedule, from the i-th on")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--out", type=Path, help="folder for faults_<kernel>.json")
    options = parser.parse_args()
    first, step = (int(part) for part in options.share.split("/"))
    names = list(OWN_TARGETS) if options.kernel == "all" else options.kernel.split(",")
    # Shares of a kernel end at different times: many small ones keep all processes busy.
    pieces = 1 if options.jobs == 1 else 4
    shares = [(name, (first + step * piece, step * pieces)) for name in names for piece in range(pieces)]
    seeds = -1 if options.only_clean else options.seeds
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(run_share, name, options.folder, seeds, options.clean_seeds, options.kind, share) for name, share in shares]
        results = [task.result() for task in tasks]
    for name in names:
        result = merged([result for (of, _), result in zip(shares, results, strict=True) if of == name])
        print("\n".join(summary(result)))
        if "clean_seeds" in result:
            print(f"{result['clean_seeds']} random schedules of the right program: {len(result['false_alarms'])} alarms")
            print("\n".join(result["false_alarms"][:10]))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"faults_{name}.json").write_text(json.dumps(result).replace('{"line"', '\n{"line"') + "\n")


if __name__ == "__main__":
    main()
