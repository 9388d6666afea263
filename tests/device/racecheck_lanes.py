"""Are `racecheck`'s hazards in FP8 prefill false alarms? Its cases with a kernel in which every lane arrives for itself.

    compute-sanitizer --tool racecheck python -m tests.device.racecheck_lanes [arguments of prove_prefill]

In the kernel as it is, one lane arrives for a warp behind `bar.warp.sync`, which orders the accesses of all lanes before it. `racecheck`
does not follow that. Here convert and consumer warps arrive lane by lane, and barriers count 32 times as many; all else is the same code.
If there is no hazard here, those of `python -m tests.device.prove_prefill` under the same tool are of that form alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from typing import Any

import cutlass.cute as cute

from fa4_backend.kernels.common.edges import Party, PipelineEdge, Signal
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.sm90 import storage, warp_roles
from fa4_backend.kernels.sm90.consumer_warpgroup import ConsumerWarpgroup
from fa4_backend.kernels.sm90.convert_warps import ConvertWarps

LANES = 32
DEFAULT = ["--kv-dtype", "fp8", "--only", "d128 page 16", "--parts", "cases", "--repeats", "1", "--processes", "1"]


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
    """Change the kernel that this process compiles; its objects go to a cache of their own."""
    os.environ["FA4_BACKEND_CACHE_DIR"] = tempfile.mkdtemp()
    storage.pipeline_edges = edges
    ConvertWarps._arrive = arrive  # type: ignore[method-assign]
    ConsumerWarpgroup._release = arrive  # type: ignore[method-assign]


def main() -> None:
    """`prove_prefill` with that kernel."""
    let_all_lanes_arrive()
    from tests.device import prove_prefill

    sys.argv = [sys.argv[0], *(sys.argv[1:] or DEFAULT)]
    prove_prefill.main()


if __name__ == "__main__":
    main()
