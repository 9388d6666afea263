"""Which committed results are of other kernels than the tree's: `python -m tests.device.proofs` lists them, and so does every test run.

A JSON result holds its stamp (`fa4_backend.kernel_stamp`) under "stamp", a CSV of figures beside it. Kernels may be ahead of the last run
on a GPU, so an old result is reported and fails nothing; a result without a stamp fails `tests/host/test_result_stamps.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fa4_backend.kernel_stamp import UNKNOWN, aged, stamp_path

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/device/results", "docs/data")
# Of the emulator's own programs and of other people's kernels, and cells that the timing model is compared with; each is held to what it
# proves by a test of its own.
NOT_OF_OUR_KERNELS = {
    "programs_h200.json", "pipes_h200.json", "tensor_maps_h200.json", "upstream_sm90_h200.json", "model_cells_h100.json",
    "model_cells_h200.json", "model_cells_blackwell.json",
}  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """A committed result and what it says of its making."""

    path: Path
    stamp: dict[str, Any] | None  # None: it says nothing

    @property
    def name(self) -> str:
        """Path from the root of the tree."""
        return str(self.path.relative_to(ROOT))

    @property
    def aged(self) -> list[str]:
        """Families whose kernels have changed since."""
        assert self.stamp is not None, self.name
        return aged(self.stamp)

    def describe(self) -> str:
        """One line for a report."""
        assert self.stamp is not None, self.name
        of = "kernels unknown" if self.stamp["kernels"] == UNKNOWN else f"{', '.join(self.aged)} edited since"
        return f"{self.name}: {self.stamp['date']} on {self.stamp['device']}, {of}"


def find_proofs(folders: tuple[str, ...] = FOLDERS) -> list[Proof]:
    """Every result that speaks of our kernels."""
    found = []
    for path in sorted(path for folder in folders for path in (ROOT / folder).iterdir()):
        if path.name.endswith(".stamp.json") or path.name in NOT_OF_OUR_KERNELS:
            continue
        if path.suffix == ".json":
            found.append(Proof(path, json.loads(path.read_text()).get("stamp")))
        elif path.suffix == ".csv":
            beside = stamp_path(path)
            found.append(Proof(path, json.loads(beside.read_text()) if beside.is_file() else None))
    return found


def old_proofs() -> list[str]:
    """A line for each result that is of other kernels than the tree's."""
    return [proof.describe() for proof in find_proofs() if proof.stamp is not None and proof.aged]


def main() -> None:
    """Print them; the exit status is 0 either way, since kernels may be ahead of the last run on a GPU."""
    lines = old_proofs()
    print("\n".join(lines))
    print(f"{len(lines)} of {len(find_proofs())} results are of other kernels than the tree's")


if __name__ == "__main__":
    main()
