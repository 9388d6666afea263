"""Plant one fault at a time in a kernel's PTX and see whether the emulator finds it.

    python -m tests.emulator.fault_injection --kernel all --jobs 2 --out tests/emulator/results

A fault is caught when a run ends in an error, reports a race or another finding, or gives other output bits than the right program.
Each mutant runs with the deterministic schedule, then with a few random ones until it is caught. Faults in instructions that the case
never reaches are left out. A fault that no run shows is a survivor, unless `fault_reasons.py` knows why it changes
nothing. Right programs under 200 schedules: `right_schedules.py`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fa4_backend import emulator
from fa4_backend.kernel_stamp import make_stamp
from tests.emulator.fault_mutations import Mutant, mutants, one_statement_a_line
from tests.emulator.fault_reasons import NOT_MODELLED, NOT_TOLD, STATIC_REASONS, vacuous, why_missed
from tests.emulator.fault_targets import OWN_TARGETS, Target, load_target, planted

SHORTEST_LIMIT, LIMIT_FACTOR = 3.0, 8.0  # CPU seconds that a run may take, and times the right program's
ILLEGAL = "no legal program"
# What these order are accesses of other CTAs, and a schedule that tells is drawn once in a dozen.
AMONG_CTAS, MANY_SEEDS = re.compile(r"\batom\.|\bred\.|\bld\.acquire|\bfence\.acq_rel"), 24


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


class RaceFoundError(emulator.EmulatorError):
    """The first race of a mutant's run."""


@contextmanager
def first_race_ends_it() -> Iterator[None]:
    """Runs stop at their first race: what follows changes no verdict and takes half of the time."""
    note = emulator.Report.note

    def note_or_stop(report: emulator.Report, kind: str, text: str) -> None:
        note(report, kind, text)
        if kind == "race":
            raise RaceFoundError(text)

    with mock.patch.object(emulator.Report, "note", note_or_stop):
        yield


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
    if target.plain is not None:  # the other case has those of the lines that run as often there
        reached -= reached_lines(target, report, target.plain())
    return Right(outputs, remarks(report) | remarks(other), reached, seconds)


@functools.cache
def right_second(target: Target) -> Right:
    """What a target's second case gives without a fault."""
    target.run(None)  # loads the kernel's image
    with planted(target, one_statement_a_line(target.ptx)):
        return run_right(target)


def remarks(report: emulator.Report) -> set[str]:
    """The report's notes, without the numbers of warps."""
    return {re.sub(r"warp \d+", "warp #", note) for note in report.notes}


def verdict(target: Target, mutant: Mutant, right: Right, seeds: list[int | None]) -> tuple[str, int | None]:
    """How the fault shows ("" when it does not) and under which seed."""
    limit = max(SHORTEST_LIMIT, LIMIT_FACTOR * right.seconds)
    # Faults that the text alone shows to change nothing: one run is enough to see that it does.
    seeds = seeds[:1] if STATIC_REASONS.search(mutant.text) else seeds
    with planted(target, mutant.ptx), first_race_ends_it():
        for seed in seeds:
            try:
                with time_limit(limit):
                    outputs, report = target.run(seed)
            except RaceFoundError:
                return "race", seed
            except (emulator.UnsupportedInstruction, emulator.PtxSyntaxError):
                return ILLEGAL, seed
            except emulator.EmulatorError as error:
                return type(error).__name__, seed
            except TimeoutError:
                return "no end", seed
            if not same(outputs, right.outputs):
                return "wrong output", seed
            if remarks(report) - right.notes:
                return "finding", seed
    return "", None


def same(outputs: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in zip(outputs, right, strict=True))


def reached_lines(target: Target, report: emulator.Report, at_most: emulator.Report | None = None) -> set[int]:
    """Lines of the target's PTX that a run executed; with `at_most`, those that it executed no more often than that other run."""
    counts = report.kernels[target.kernel]
    executed = counts.executed.sum(axis=0)
    limit = None if at_most is None else at_most.kernels[target.kernel].executed.sum(axis=0)
    lines = [i.line for i in counts.program.kernel.instructions]
    return {line for k, line in enumerate(lines) if executed[k] and (limit is None or executed[k] <= limit[k])}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def judged(target: Target, mutant: Mutant, right: Right, seeds: list[int | None]) -> dict[str, Any]:
    """A fault's entry in the results: how it shows, or else why it changes nothing, or else why it is missed."""
    if len(seeds) > 1 and AMONG_CTAS.search(mutant.text):
        seeds = [None, *range(max(MANY_SEEDS, len(seeds) - 1))]
    how, seed = verdict(target, mutant, right, seeds)
    fault: dict[str, Any] = {"line": mutant.line, "text": mutant.text.strip()[:160]}
    if not how and target.second is not None:
        fault["case"] = 2
        how, seed = verdict(target.second, mutant, right_second(target.second), seeds)
    print(f"{target.name}, {mutant.name}: {how or 'survived'}", flush=True)
    fault |= {"caught": how, "seed": seed}
    if not how:
        fault["vacuous"] = vacuous(target, mutant)
        if not fault["vacuous"]:
            fault["missed"] = why_missed(target.name, mutant.kind, mutant.text)
        print(f"    {fault['vacuous'] or 'MISSED: ' + fault['missed']}", flush=True)
    return fault


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
        fault = judged(target, mutant, right, seeds)
        if fault["caught"] == ILLEGAL:
            continue
        faults.setdefault(mutant.kind, []).append(fault)
    return {"kernel": target.name, "cpu_seconds": round(cpu_seconds() - start), "classes": faults}


def summary(result: dict[str, Any]) -> list[str]:
    """A table of the score, then the survivors. Faults in what the emulator does not model are counted apart, and named."""
    rows, survivors = [], []
    total = caught = unseen = untold = 0
    for kind, faults in result["classes"].items():
        counted = [f for f in faults if f["caught"] or not f["vacuous"]]
        beyond = sum(f.get("vacuous", "").startswith(NOT_MODELLED) for f in faults)
        ways = Counter(f["caught"] or "survived" for f in counted)
        good = sum(bool(f["caught"]) for f in counted)
        values = sum(f.get("vacuous", "").startswith(NOT_TOLD) for f in faults)
        total, caught, unseen, untold = total + len(counted), caught + good, unseen + beyond, untold + values
        rest = f"{len(faults) - len(counted) - beyond - values} vacuous, {beyond} not modelled, {values} not told by the case"
        rows.append(f"{kind:20} {good:4} of {len(counted):4}   {dict(ways)}   {rest}")
        survivors += [
            f"  {kind} @{f['line']}: {f['text']}  [{f['vacuous'] or 'MISSED: ' + f['missed']}]" for f in faults if not f["caught"]
        ]
    score = f"{caught} of {total} caught ({100 * caught / max(total, 1):.1f} %); with what is not modelled {caught} of {total + unseen}, \
with what the case does not tell {caught} of {total + unseen + untold}"
    return [f"{result['kernel']}: {score}; {result['cpu_seconds']} s of CPU", *rows, *survivors]


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One kernel's result from those of its shares."""
    classes: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for kind, faults in result["classes"].items():
            classes.setdefault(kind, []).extend(faults)
    for faults in classes.values():
        faults.sort(key=lambda fault: fault["line"])
    return results[0] | {"cpu_seconds": sum(result["cpu_seconds"] for result in results), "classes": dict(sorted(classes.items()))}


def run_share(name: str, folder: Path, seeds: int, kind: str | None, share: tuple[int, int]) -> dict[str, Any]:
    """A share of one kernel's faults; in a process of its own."""
    torch.set_num_threads(1)
    target = load_target(name, folder)
    result = inject(target, [None, *range(seeds)], lambda m: kind in (None, m.kind), share)
    return {"kernel": result["kernel"], "stamp": make_stamp("emulator", target.families), "seeds": seeds} | result


def main() -> None:
    """Plant the faults, print a table a kernel and keep it in a file as soon as its last share has ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", required=True, help=f"{', '.join(OWN_TARGETS)}, upstream_<case>, several with commas, or all (ours)")
    parser.add_argument("--folder", type=Path, default=Path("upstream_objects"))
    parser.add_argument("--seeds", type=int, default=6, help="random schedules after the deterministic one")
    parser.add_argument("--kind", help="only this class")
    parser.add_argument("--share", default="0/1", help="i/n: only every n-th fault, from the i-th on")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--out", type=Path, help="folder for faults_<kernel>.json")
    options = parser.parse_args()
    first, step = (int(part) for part in options.share.split("/"))
    names = list(OWN_TARGETS) if options.kernel == "all" else options.kernel.split(",")
    # Shares of a kernel end at different times: many small ones keep all processes busy.
    pieces = 1 if options.jobs == 1 else max(4, options.jobs // 2)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        tasks = {
            name: [
                pool.submit(run_share, name, options.folder, options.seeds, options.kind, (first + step * piece, step * pieces))
                for piece in range(pieces)
            ]
            for name in names
        }
        for name, shares in tasks.items():
            result = merged([task.result() for task in shares])
            print("\n".join(summary(result)), flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"faults_{name}.json").write_text(json.dumps(result).replace('{"line"', '\n{"line"') + "\n")


if __name__ == "__main__":
    main()
