"""Are `racecheck`'s hazards in FP8 prefill false alarms? Its batches with a kernel in which every lane arrives for itself.

    python -m tests.device.sanitize --only "racecheck lanes,racecheck prefill fp8"

In the kernel as it is, one lane arrives for a warp behind `bar.warp.sync`, which orders the accesses of all lanes before it. `racecheck`
does not follow that. Here convert and consumer warps arrive lane by lane, and barriers count 32 times as many; all else is the same code.
If there is no hazard here, those of the kernel as it is are of that form alone. Arguments are those of `sanitize_cases`; objects come from
and go to `--cache`, since the kernel has the key of the real one.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cutlass.cute as cute

from fa4_backend.kernels.common.edges import Party, PipelineEdge, Signal
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.sm90 import storage, warp_roles
from fa4_backend.kernels.sm90.consumer_warpgroup import ConsumerWarpgroup
from fa4_backend.kernels.sm90.convert_warps import ConvertWarps
from tests.device import sanitize_cases

LANES = 32


def all_lanes(parties: tuple[Party, ...]) -> tuple[Party, ...]:
    """Warps' arrivals counted lane by lane."""
    return tuple(replace(x, warps=x.warps * LANES) if x.signal is Signal.WARPS else x for x in parties)


def edges(config: PrefillConfig) -> tuple[PipelineEdge, ...]:
    """The kernel's pipelines with those counts."""
    assert config.has_kv_scales, f"expected FP8 K and V, got {config.kv_dtype}"
    return tuple(
        replace(edge, full_by=all_lanes(edge.full_by), empty_by=all_lanes(edge.empty_by)) for edge in warp_roles.pipeline_edges(config)
    )


def arrive(_: Any, barrier: cute.Pointer) -> None:
    """One arrival of each lane."""
    cute.arch.mbarrier_arrive(barrier)


def let_all_lanes_arrive() -> None:
    """Change the kernel that this process compiles."""
    storage.pipeline_edges = edges
    ConvertWarps._arrive = arrive  # type: ignore[method-assign]
    ConsumerWarpgroup._release = arrive  # type: ignore[method-assign]


def main() -> int:
    """`sanitize_cases` with that kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of these objects alone")
    options, rest = parser.parse_known_args()
    options.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["FA4_BACKEND_CACHE_DIR"] = str(options.cache.resolve())
    let_all_lanes_arrive()
    sys.argv = [sys.argv[0], *rest]
    return sanitize_cases.main()


if __name__ == "__main__":
    raise SystemExit(main())
