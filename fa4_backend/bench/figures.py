"""A benchmark's figures on file: a CSV with the stamp of the kernels beside it, and a plot."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from fa4_backend.kernel_stamp import gpu_stamp, write_stamp

AHEAD, BEHIND, SHARE = "#3b7d4f", "#b8432f", "#6b7f99"  # bars: not slower than the best peer, slower, share of the ceiling
LARGEST_RATIO = 2.0  # where the axis ends; a longer bar is cut there and its number says what it is


class Cell(NamedTuple):
    """One batch of a plot."""

    kind: str  # batches of a kind stand together under its name; "": no names
    batch: str
    ratio: float | None  # best peer's time over ours; None: no peer ran
    share: float  # of the ceiling


def write_csv(path: Path, timings: Sequence[Any], families: Iterable[str] | None = None) -> None:
    """All figures, one kernel and batch a line. `families`: of kernels that were timed; default: all of the GPU's."""
    stamp = gpu_stamp(families)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[f.name for f in fields(timings[0])])
        writer.writeheader()
        writer.writerows(asdict(t) for t in timings)
    write_stamp(path, stamp)


def write_overview(path: Path, cells: Sequence[Cell], *, ceiling: str) -> None:
    """Two bars a cell: the best peer's time over ours, green from 1.00 on and red below, and beside it our share of the ceiling."""
    from matplotlib.figure import Figure

    places = _places(cells)
    figure = Figure(figsize=(10, 0.22 * (places[-1] + 1) + 1.0))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (1.6, 1)})
    for place, cell in zip(places, cells, strict=True):
        ratio = cell.ratio or 0.0
        left.barh(place, min(ratio, LARGEST_RATIO), 0.8, color=AHEAD if round(ratio, 2) >= 1 else BEHIND)
        words = "no peer" if cell.ratio is None else f"{ratio:.2f}"
        left.text(min(ratio, LARGEST_RATIO) + 0.02, place, words, va="center", fontsize=7)
        share = min(cell.share, 1.0)
        right.barh(place, share, 0.8, color=SHARE)
        right.text(share + 0.01, place, f"{100 * cell.share:.0f} %", va="center", fontsize=7)
    for at, (place, cell) in enumerate(zip(places, cells, strict=True)):
        if cell.kind and (at == 0 or cells[at - 1].kind != cell.kind):
            left.text(0, place - 1, cell.kind, va="center", fontsize=8, fontweight="bold")
    left.set_yticks(places, [cell.batch for cell in cells], fontsize=7)
    left.set_ylim(places[-1] + 0.6, -1.6 if cells[0].kind else -0.6)
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xlim(0, LARGEST_RATIO + 0.2)
    left.set_xlabel("best peer's time over ours (above 1: ours is faster)", fontsize=8)
    right.axvline(1.0, color="black", linewidth=0.8)
    right.set_xlim(0, 1.15)
    right.set_xlabel(f"share of the {ceiling}", fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _places(cells: Sequence[Cell]) -> list[float]:
    """Where each cell's bar lies; two lines are left for the name of a kind."""
    places: list[float] = []
    for at, cell in enumerate(cells):
        begins_kind = at > 0 and cells[at - 1].kind != cell.kind
        places.append(0.0 if at == 0 else places[-1] + (2.2 if begins_kind else 1.0))
    return places
