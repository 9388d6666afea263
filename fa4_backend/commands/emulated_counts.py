"""What `fa4 emulate` says of its runs: races, faults, notes, and instructions by the unit that executes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fa4_backend.emulator import Report

# Opcodes by the unit that executes them, for the table; the first prefix that fits counts.
UNITS = (
    ("tcgen05.mma", "tensor"), ("wgmma.mma", "tensor"), ("mma.sync", "tensor"),
    ("ex2.", "MUFU"), ("lg2.", "MUFU"), ("rcp.", "MUFU"), ("tanh.", "MUFU"),
    ("tcgen05.ld", "TMEM"), ("tcgen05.st", "TMEM"), ("cp.async", "copies"),
    ("fma.", "FMA"), ("mul.rn", "FMA"), ("add.rn", "FMA"), ("add.rm", "FMA"), ("sub.rn", "FMA"),
    ("mul.f", "FMA"), ("add.f", "FMA"), ("sub.f", "FMA"),
    ("ld.", "loads, stores"), ("st.", "loads, stores"), ("stmatrix", "loads, stores"), ("ldmatrix", "loads, stores"),
    ("mbarrier", "synchronisation"), ("bar", "synchronisation"), ("fence", "synchronisation"),
)  # fmt: skip


def collect(reports: list[Report], names: dict[str, str]) -> dict[str, Any]:
    """Races, counts and times of all schedules; kernels are counted over the first that ran them. `names`: by their names in the PTX."""
    kernels: dict[str, dict[str, Any]] = {}
    for report in reports:
        for symbol, counts in report.kernels.items():
            key = names.get(symbol, symbol)
            if key not in kernels:
                units: dict[str, int] = {}
                for opcode, number in report.opcodes(symbol).items():
                    unit = next((u for start, u in UNITS if opcode.startswith(start)), "ALU, control")
                    units[unit] = units.get(unit, 0) + number
                kernels[key] = {"ctas": counts.ctas, "instructions": int(counts.executed.sum()), "units": units}
    return {
        "races": [race for report in reports for race in report.races],
        "faults": sorted({fault for report in reports for fault in report.faults}),
        "notes": sorted({note for report in reports for note in report.notes}),
        "instructions": sum(report.instructions for report in reports),
        "seconds": round(sum(report.seconds for report in reports), 3),
        "kernels": kernels,
    }
