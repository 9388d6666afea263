"""What a result on file was made by: the sources of the kernels, the device and the day. An edit of a kernel ages the results that used it.

A family's fingerprint covers its own folder, the one that it lies in and what all kernels share, so that an edit of `kernels/sm100` leaves
Hopper's results alone.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fa4_backend.compile_cache import fingerprinted_files
from fa4_backend.kernels.families import CONVERTED, PREFILL

PACKAGE = Path(__file__).parent
KERNELS = PACKAGE / "kernels"
FAMILIES = ("schedule", "decode", "mla_decode", "mla_decode/sm100", "sm90", "sm100", "convert_kv")  # folders of `kernels`
# Change no instruction that a GPU runs: the CPU's kernel, and what is noted of a compiled one.
NOT_ON_A_GPU = ("kernels/torch_reference.py", "kernel_facts.py")
UNKNOWN = "unknown"  # in place of fingerprints: made before results had any
DIGITS = 16


def families_of(arch: str) -> tuple[str, str, str]:
    """The families that serve an arch: schedule, decode and its prefill kernel's."""
    return ("schedule", "decode", PREFILL[arch].__module__.split(".")[2])


def all_families_of(arch: str) -> tuple[str, ...]:
    """The same, and the conversion of FP8 K and V where steps may have one before the prefill kernel."""
    return (*families_of(arch), *(("convert_kv",) if arch in CONVERTED else ()))


def sources(family: str) -> list[Path]:
    """The files whose edit ages a family's results."""
    own = KERNELS / family
    others = tuple(folder for other in FAMILIES if (folder := KERNELS / other) != own and folder not in own.parents)
    return [
        path
        for path in fingerprinted_files()
        if not any(folder in path.parents for folder in others) and str(path.relative_to(PACKAGE)) not in NOT_ON_A_GPU
    ]


def fingerprints(families: Iterable[str] = FAMILIES) -> dict[str, str]:
    """family -> digest of the names and contents of its sources."""
    found = {}
    for family in families:
        digest = hashlib.sha256()
        for path in sources(family):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(PACKAGE)} {len(content)}\n".encode() + content)
        found[family] = digest.hexdigest()[:DIGITS]
    return found


def make_stamp(device: str, families: Iterable[str]) -> dict[str, Any]:
    """What a result says of its making; `families` are those whose kernels it speaks of."""
    return {"date": datetime.date.today().isoformat(), "device": device, "kernels": fingerprints(families)}


def gpu_stamp(families: Iterable[str] | None = None) -> dict[str, Any]:
    """The stamp of a result of the GPU present, of all its families or of those given.

    Raises:
        KeyError: no kernels are for this GPU.
    """
    import torch

    from fa4_backend.arch import arch_of_capability

    arch = arch_of_capability(*torch.cuda.get_device_capability()) or ""
    return make_stamp(torch.cuda.get_device_name(), all_families_of(arch) if families is None else families)


def stamp_path(figures: Path) -> Path:
    """Where the stamp of a file of figures lies that has no room for one, a CSV: beside it."""
    return figures.with_name(figures.name + ".stamp.json")


def write_stamp(figures: Path, stamp: dict[str, Any]) -> None:
    """Put a stamp beside a file of figures."""
    stamp_path(figures).write_text(json.dumps(stamp, indent=1) + "\n")


def aged(stamp: dict[str, Any]) -> list[str]:
    """Families whose kernels have changed since a result was made; all that it can speak of where that is unknown."""
    made_by = stamp["kernels"]
    if made_by == UNKNOWN:
        return list(FAMILIES)
    current = fingerprints(made_by)
    return [family for family in made_by if made_by[family] != current[family]]
