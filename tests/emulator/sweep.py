"""Faults, races of every Blackwell key, right programs under 200 schedules: all of it, over all cores, in one pool.

    python -m tests.emulator.sweep --jobs 32 --seconds 550 --out build/sweep
    python -m tests.emulator.sweep --jobs 32 --parts races --out build/sweep      (a run into the same folder does what is left)
    python -m tests.emulator.sweep --jobs 32 --parts again --out build/sweep      (judge once more what no run there showed)
    python -m tests.emulator.sweep --collect build/sweep      (writes tests/emulator/results and docs/data)

Every verdict is a line of <out>/lines as soon as it is known, so that a run that is cut short keeps what it has. Parts: `faults`
(`fault_injection.py`), `races` (`scripts/*_races.py`), `schedules` (`right_schedules.py`), `more`, all faults of the kernels of which
`faults` plants a sample, and `again`: faults that no run of the folder showed, after a case or a reason was added. On 32 cores of a
server all but `more` take some seven minutes, kernels compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fa4_backend import emulator, envs
from fa4_backend.kernel_stamp import make_stamp
from tests.emulator import fault_injection as fi
from tests.emulator.fault_mutations import Mutant, mutants, one_statement_a_line
from tests.emulator.fault_reasons import NOT_TOLD, why_missed
from tests.emulator.fault_targets import OWN_TARGETS, SAMPLE, WHOLE, Target, planted
from tests.emulator.right_schedules import alarm_of
from tests.emulator.worker_pool import Task, run_tasks
from tests.support.seeded_runs import SeededCase, fault_of

RACES = {"sm100_races": "scripts.sm100_races", "decode_races": "scripts.decode_races", "mla_sm100_races": "scripts.mla_sm100_races"}
PARTS = ("faults", "races", "schedules", "more")  # and "again"
RESULTS, DATA = Path(__file__).parent / "results", Path(__file__).parents[2] / "docs/data"
RACE_SEEDS = 100
SHARES = {True: 40, False: 10}  # tasks of a kernel's whole list of faults, and of a sample


@functools.cache
def prepared(name: str) -> tuple[Target, str, fi.Right]:
    """A target, its text with one statement a line, and what the program gives without a fault."""
    target = OWN_TARGETS[name]()
    target.run(None)  # loads the kernel's image
    split = one_statement_a_line(target.ptx)
    with planted(target, split):
        return target, split, fi.run_right(target)


@functools.cache
def race_case(script: str, name: str) -> tuple[SeededCase, str, list[torch.Tensor] | None]:
    """A case of races, what is wrong with its deterministic run, and that run's tensors."""
    case = importlib.import_module(RACES[script]).SEEDED[name]
    return case, *fault_of(case, None, None)


def keep(out: str, line: dict[str, Any]) -> None:
    """Append a line to this process's file."""
    with open(f"{out}/lines/{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def act(out: str, part: str, *arguments: Any) -> None:
    """One task; its verdicts go to the file."""
    torch.set_num_threads(1)
    emulator.install()  # before the compiler is imported
    # Some cases import it before they compile: see `compile.trace_and_compile` for what it does where it has to ask for the arch.
    envs.set_default("CUTE_DSL_ARCH", "sm_100a")
    lines = {"faults": fault_lines, "more": fault_lines, "again": again_lines, "schedules": schedule_lines, "races": race_lines}
    for line in lines[part](*arguments):
        keep(out, line)


def fault_lines(name: str, sample: int | None, seeds: int, share: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """A share of one kernel's faults."""
    begin = fi.cpu_seconds()
    target, split, right = prepared(name)
    first = {"what": "fault", "program": name, "sample": sample, "seeds": seeds}
    for mutant in itertools.islice(mutants(split, right.reached, sample), share[0], None, share[1]):
        fault = fi.judged(target, mutant, right, [None, *range(seeds)])
        end = fi.cpu_seconds()
        yield first | {"kind": mutant.kind, "digest": digest_of(mutant), "fault": fault, "cpu": round(end - begin, 2)}
        begin = end
    yield first | {"what": "share", "share": share, "stamp": make_stamp("emulator", target.families), "kernel": target.name}


def digest_of(mutant: Mutant) -> str:
    """Names a fault."""
    return hashlib.sha256(mutant.ptx.encode()).hexdigest()[:12]


def again_lines(name: str, sample: int | None, seeds: int, kind: str, was: dict[str, Any], digest: str) -> Iterator[dict[str, Any]]:
    """One fault once more; `was`: its first verdict, which says where it is."""
    begin = fi.cpu_seconds()
    target, split, right = prepared(name)
    # By its place: names of kernels, which the digest covers, hold addresses of the process that compiled them.
    found = (m for m in mutants(split, right.reached, sample) if (m.kind, m.line) == (kind, was["line"]))
    mutant = next((m for m in found if m.text.strip()[:160] == was["text"]), None)
    if mutant is None:
        raise ValueError(f"{name}: expected {kind} at line {was['line']}: {was['text']}")
    fault = fi.judged(target, mutant, right, [None, *range(seeds)])
    line = {"what": "fault", "again": True, "program": name, "sample": sample, "seeds": seeds, "kind": kind, "digest": digest}
    yield line | {"fault": fault, "cpu": round(fi.cpu_seconds() - begin, 2)}


def is_silent(line: dict[str, Any]) -> bool:
    """A fault that no run showed and that is not proven to change nothing."""
    if line["what"] != "fault" or line["fault"]["caught"]:
        return False
    why = line["fault"]["vacuous"]
    return not why or why.startswith(NOT_TOLD)


def schedule_lines(name: str, seeds: range) -> Iterator[dict[str, Any]]:
    """Some seeds of a right program."""
    begin = fi.cpu_seconds()
    target, _, right = prepared(name)
    stamp = make_stamp("emulator", target.families)
    for seed in seeds:
        alarm = alarm_of(target, right, seed)
        end = fi.cpu_seconds()
        yield {
            "what": "schedule", "program": name, "title": target.name, "stamp": stamp, "seed": seed, "alarm": alarm,
            "cpu": round(end - begin, 2),
        }  # fmt: skip
        begin = end


def race_lines(script: str, name: str, seeds: range) -> Iterator[dict[str, Any]]:
    """Some seeds of one case of races; -1 is the deterministic schedule."""
    begin = fi.cpu_seconds()
    case, failure, want = race_case(script, name)
    first = {"what": "race", "script": script, "case": name, "key": case.key, "stamp": make_stamp("emulator", case.families)}
    for seed in (-1, *seeds):
        if seed >= 0:
            failure, _ = fault_of(case, seed, want)
        end = fi.cpu_seconds()
        yield first | {"seed": seed, "failure": failure, "cpu": round(end - begin, 2)}
        begin = end


def make_tasks(
    out: str, parts: list[str], only: str, fault_seeds: int, seeds: int, lines: list[dict[str, Any]], kind: str = ""
) -> list[Task]:
    """The whole list. First a small task of every program with faults, by which its kernels are compiled; then the faults; then some seeds
    of every right program and every case of races, and then the others, so that a run that is cut short has looked at all."""
    tasks = []
    if "races" in parts:
        chunks = [range(i, min(i + 25, RACE_SEEDS)) for i in range(0, RACE_SEEDS, 25)]
        for script, module in RACES.items():
            for name in importlib.import_module(module).SEEDED:
                tasks += [
                    Task(f"{script} {name}", 5 if i else 3, 8.0, (out, "races", script, name, chunk)) for i, chunk in enumerate(chunks)
                ]
    for name in OWN_TARGETS:
        if "schedules" in parts:
            chunks = [range(i, min(i + 8, seeds)) for i in range(0, seeds, 8)]
            tasks += [Task(name, 4 if i >= 8 else 2, 12.0, (out, "schedules", name, chunk)) for i, chunk in enumerate(chunks)]
        for part in ("faults", "more"):
            if part not in parts or (part == "more" and name in WHOLE):
                continue
            sample = SAMPLE if part == "faults" and name not in WHOLE else None
            shares = SHARES[sample is None]
            arguments = [(out, part, name, sample, fault_seeds, (i, shares)) for i in range(shares)]
            tasks += [Task(name, 6 if part == "more" else int(i > 0), 12.0, a) for i, a in enumerate(arguments)]
    for line in latest_faults(lines) if "again" in parts else []:
        if is_silent(line) and kind in line["kind"]:
            which = (line[key] for key in ("program", "sample", "seeds", "kind", "fault", "digest"))
            tasks.append(Task(line["program"], 1, 40.0, (out, "again", *which)))
    return [task for task in tasks if only in task.group]


def is_done(task: Task, lines: list[dict[str, Any]]) -> bool:
    """Whether an earlier run into the same folder has all of a task's verdicts."""
    _, part, *arguments = task.arguments
    if part == "again":
        return False  # what was judged so is not silent, or will be looked at again
    if part in ("faults", "more"):
        name, sample, seeds, share = arguments
        want = {"what": "share", "program": name, "sample": sample, "seeds": seeds, "share": list(share)}
        return any(want.items() <= line.items() for line in lines)
    names = {"what": "schedule", "program": arguments[0]}
    if part == "races":
        names = {"what": "race", "script": arguments[0], "case": arguments[1]}
    return set(arguments[-1]) <= {line["seed"] for line in lines if names.items() <= line.items()}


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All verdicts of a run; a line that was cut is left out."""
    found = []
    for path in sorted((folder / "lines").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def latest_faults(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a fault: that of the last time it was judged."""
    faults = sorted((line for line in lines if line["what"] == "fault"), key=lambda line: line.get("again", False))
    return list({(line["program"], line["digest"]): line for line in faults}.values())


def collect_faults(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """program -> its result, as `fault_injection` writes it; `shares` says how much of the list was run."""
    results = {}
    for name in dict.fromkeys(line["program"] for line in lines if line["what"] == "share"):
        own = [line for line in lines if line.get("program") == name]
        ends = [line for line in own if line["what"] == "share"]
        # A whole list in parts is worth more than the sample.
        sample = None if any(line["sample"] is None for line in ends) else ends[0]["sample"]
        ends = [line for line in ends if line["sample"] == sample]
        faults = latest_faults(own)
        classes: dict[str, list[dict[str, Any]]] = {}
        for line in faults:
            fault = line["fault"]
            if not fault["caught"] and not fault["vacuous"]:  # reasons may have been found since
                fault["missed"] = why_missed(ends[0]["kernel"], line["kind"], fault["text"])
            if fault["caught"] != fi.ILLEGAL:
                classes.setdefault(line["kind"], []).append(fault)
        for some in classes.values():
            some.sort(key=lambda fault: fault["line"])
        results[name] = {
            "kernel": ends[0]["kernel"], "stamp": ends[0]["stamp"], "seeds": ends[0]["seeds"], "sample": sample,
            "shares": [len(ends), ends[0]["share"][1]], "cpu_seconds": round(sum(line["cpu"] for line in faults)),
            "classes": dict(sorted(classes.items())),
        }  # fmt: skip
    return results


def once_a_seed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of seeds, the last of those that were run more than once."""
    return list(
        {
            (line["what"], line.get("program"), line.get("script"), line.get("case"), line["seed"]): line
            for line in lines
            if "seed" in line
        }.values()
    )


def collect_schedules(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """program -> its result, as `right_schedules` writes it."""
    results: dict[str, dict[str, Any]] = {}
    for line in once_a_seed(lines):
        if line["what"] == "schedule":
            start = {"program": line["title"], "stamp": line["stamp"], "seeds": 0, "alarms": [], "cpu_seconds": 0.0}
            result = results.setdefault(line["program"], start)
            result["seeds"] += 1
            result["alarms"] += [line["alarm"]] if line["alarm"] else []
            result["cpu_seconds"] = round(result["cpu_seconds"] + line["cpu"], 1)
    return results


def collect_races(lines: list[dict[str, Any]], script: str) -> dict[str, Any]:
    """A file of races, as the script prints it."""
    results: dict[str, Any] = {}
    stamp: dict[str, Any] = {}
    for line in once_a_seed(lines):
        if line["what"] == "race" and line["script"] == script:
            stamp = line["stamp"] | {"kernels": stamp.get("kernels", {}) | line["stamp"]["kernels"]}
            result = results.setdefault(line["case"], {"key": line["key"], "seeds": 0, "failures": [], "cpu_seconds": 0.0})
            result["seeds"] += line["seed"] >= 0
            result["failures"] += [line["failure"]] if line["failure"] else []
            result["cpu_seconds"] = round(result["cpu_seconds"] + line["cpu"], 1)
    if not results:
        return {}
    cases = importlib.import_module(RACES[script]).SEEDED
    return {"stamp": stamp, **{name: results[name] for name in cases if name in results}}


def collect(folder: Path, results: Path, data: Path) -> None:
    """Write the files and print a line for each."""
    lines = read_lines(folder)
    for name, result in collect_faults(lines).items():
        print(f"shares {result['shares']}", *fi.summary(result)[:1])
        (results / f"faults_{name}.json").write_text(json.dumps(result).replace('{"line"', '\n{"line"') + "\n")
    schedules = collect_schedules(lines)
    for result in schedules.values():
        print(
            f"{result['program']}: {result['seeds']} seeds, {len(result['alarms'])} alarms, {result['cpu_seconds']} s",
            *result["alarms"][:2],
        )
    if schedules:
        (results / "right_schedules.json").write_text(json.dumps(schedules, indent=1) + "\n")
    for script in RACES:
        if found := collect_races(lines, script):
            rows = [row for name, row in found.items() if name != "stamp"]
            seeds, cpu = (sum(row[key] for row in rows) for key in ("seeds", "cpu_seconds"))
            bad = [row for row in rows if row["failures"]]
            print(f"{script}: {len(rows)} cases, {seeds} seeds, {cpu:.0f} s, {len(bad)} with failures", *bad[:3])
            (data / f"{script}.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Run the parts, or collect what a run left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", default="", help="part of the name of a program or case")
    parser.add_argument("--kind", default="", help="again: part of the name of a kind of fault")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=36000.0, help="what is under way then is given up")
    parser.add_argument("--fault-seeds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=200, help="of a right program")
    parser.add_argument("--out", type=Path, help="folder for lines of verdicts and workers' output")
    parser.add_argument("--collect", type=Path, help="write the files on record from such a folder")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect, RESULTS, DATA)
        return
    begin = time.monotonic()
    for folder in ("lines", "logs"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    out = str(options.out.resolve())
    emulator.install()  # built here, so that no worker waits for another's build
    print(f"the emulator is built after {time.monotonic() - begin:.0f} s", flush=True)
    lines = read_lines(options.out)
    tasks = make_tasks(out, options.parts.split(","), options.only, options.fault_seeds, options.seeds, lines, options.kind)
    tasks = [task for task in tasks if not is_done(task, lines)]
    print(f"{len(tasks)} tasks after {time.monotonic() - begin:.0f} s", flush=True)
    seconds = options.seconds - (time.monotonic() - begin)
    problems = run_tasks(tasks, act, options.jobs, seconds, [f"{out}/logs/{number}.log" for number in range(options.jobs)])
    (options.out / "problems.txt").write_text("\n".join(problems) + "\n")
    print(f"{time.monotonic() - begin:.0f} s, {len(problems)} tasks without an end", flush=True)


if __name__ == "__main__":
    main()
