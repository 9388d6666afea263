"""Right programs under many random schedules raise no alarm: no race, no finding, and the bits of the deterministic schedule.

    python -m tests.emulator.right_schedules --jobs 2 --out tests/emulator/results/right_schedules.json      (about 40 minutes of CPU)
    python -m tests.emulator.right_schedules --kernel sm90_mla --seeds 20

The programs are those that faults are planted in (`fault_targets.py`): every kernel family on both chips, and steps of both kinds with
programmatic launch. Exits with 1 when there was an alarm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fa4_backend.emulator import EmulatorError
from fa4_backend.kernel_stamp import make_stamp
from tests.emulator.fault_injection import Right, cpu_seconds, remarks, run_right, same
from tests.emulator.fault_targets import OWN_TARGETS, Target


def alarm_of(target: Target, right: Right, seed: int) -> str:
    """What the right program is accused of under one schedule; "" for nothing."""
    try:
        outputs, report = target.run(seed)
    except EmulatorError as error:
        return f"seed {seed}: {type(error).__name__}: {error}"
    new = report.races + sorted(remarks(report) - right.notes)
    if new:
        return f"seed {seed}: {new[0]}"
    return "" if same(outputs, right.outputs) else f"seed {seed}: other output bits than the deterministic schedule"


def alarms_of(target: Target, seeds: Iterable[int]) -> list[str]:
    """What the right program is accused of over these schedules."""
    right = run_right(target)
    return [alarm for seed in seeds if (alarm := alarm_of(target, right, seed))]


def run_share(name: str, seeds: range) -> dict[str, Any]:
    """Some of one program's seeds; in a process of its own."""
    torch.set_num_threads(1)
    start, target = cpu_seconds(), OWN_TARGETS[name]()
    alarms = alarms_of(target, seeds)
    print(f"{target.name}: {len(seeds)} seeds, {len(alarms)} alarms", flush=True)
    return {
        "program": target.name,
        "stamp": make_stamp("emulator", target.families),
        "seeds": len(seeds),
        "alarms": alarms,
        "cpu_seconds": round(cpu_seconds() - start),
    }


def merged(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """One program's result from those of its shares."""
    return shares[0] | {
        "seeds": sum(share["seeds"] for share in shares),
        "alarms": [alarm for share in shares for alarm in share["alarms"]],
        "cpu_seconds": sum(share["cpu_seconds"] for share in shares),
    }


def main() -> int:
    """Run the programs, and put what each gave into the file as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="all", help=f"{', '.join(OWN_TARGETS)}, several with commas, or all")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--out", type=Path, help="file of all results; those of programs that do not run stay")
    options = parser.parse_args()
    shares = max(4, options.jobs // 2)  # of a program's seeds: they end at different times, and small ones keep all processes busy
    names = list(OWN_TARGETS) if options.kernel == "all" else options.kernel.split(",")
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    is_right = True
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        tasks = {name: [pool.submit(run_share, name, range(i, options.seeds, shares)) for i in range(shares)] for name in names}
        for name, running in tasks.items():
            found[name] = result = merged([task.result() for task in running])
            is_right &= not result["alarms"]
            print(
                f"{result['program']}: {result['seeds']} random schedules, {len(result['alarms'])} alarms, {result['cpu_seconds']} s of CPU"
            )
            print("\n".join(result["alarms"][:10]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(not is_right)


if __name__ == "__main__":
    raise SystemExit(main())
