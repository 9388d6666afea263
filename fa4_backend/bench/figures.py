"""A benchmark's figures on file: a CSV with the stamp of the kernels beside it, and a plot."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fa4_backend.kernel_stamp import gpu_stamp, write_stamp


def write_csv(path: Path, timings: Sequence[Any], families: Iterable[str] | None = None) -> None:
    """All figures, one kernel and batch a line. `families`: of kernels that were timed; default: all of the GPU's."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[f.name for f in fields(timings[0])])
        writer.writeheader()
        writer.writerows(asdict(t) for t in timings)
    write_stamp(path, gpu_stamp(families))


def write_bars(path: Path, values: Mapping[tuple[str, str], float], *, label: str, largest: float | None = None) -> None:
    """A group of bars a batch. values: (batch, kernel) -> length; no bar where there is none."""
    import matplotlib.pyplot as plt

    batches, kernels = (list(dict.fromkeys(names)) for names in zip(*values, strict=True))
    figure, axes = plt.subplots(figsize=(10, 0.5 * len(batches) + 1.5))
    height = 0.8 / len(kernels)
    for i, kernel in enumerate(kernels):
        at = [row + i * height for row in range(len(batches))]
        axes.barh(at, [values.get((batch, kernel), 0.0) for batch in batches], height, label=kernel)
    axes.set_yticks([row + 0.4 for row in range(len(batches))], batches, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0, largest)
    axes.set_xlabel(label)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
