"""A plugin that plants an error into ours: softmax scales too large, by 5 % unless the environment says how much. For controls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ERROR = "FA4_TEST_PLANTED_SCALE"  # environment variable: times the right scale


def plant(folder: Path) -> str:
    """A PYTHONPATH with the metadata of a distribution whose plugin is `register`."""
    metadata = folder / "planted-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nplanted = tests.engine_sglang.planted:register\n")
    return f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def register() -> None:
    """Wrap our operator where the adapter calls it."""
    from fa4_integration.sglang_backend import backend

    operator, error = backend.paged_attention, float(os.environ.get(ERROR, "1.05"))

    def wrong(*args: Any, softmax_scale: float, **kwargs: Any) -> Any:
        return operator(*args, softmax_scale=error * softmax_scale, **kwargs)

    backend.paged_attention = wrong  # type: ignore[assignment]
