"""One step of a warp's recording: what it worked, and the event that followed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Step:
    """Work of a warp, then one event. `edges`: (number of a barrier, its phase) that the event arrives on, or the one it waits for."""

    kind: str  # arrive, wait, mma, wgmma, commit, wgmma commit, copy, store, end
    work: np.ndarray  # cycles of PIPES
    port: int  # bytes of shared memory that the warp's own instructions read and write
    edges: list[tuple[int, int]] = field(default_factory=list)
    flops: dict[int, int] = field(default_factory=dict)  # by CTA of the cluster
    smem_bytes: dict[int, int] = field(default_factory=dict)
    lags: dict[str, int] = field(default_factory=dict)  # waits by scoreboard in the work, by the name that `timing.Timing` has for each
    is_remote: bool = False  # an arrival at a barrier of another CTA
    is_ts: bool = False  # a product whose A is in tensor memory or registers
