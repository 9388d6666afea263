"""Are `racecheck`'s hazards in prefill and in decode false alarms? Batches of `sanitize_cases` by kernels whose lanes all arrive.

    python -m tests.device.sanitize --only "racecheck lanes"

In the kernels as they are, one lane arrives for a warp behind `bar.warp.sync`, which orders the accesses of all lanes before it.
`racecheck` does not follow that where ptxas, which sees that a warp has not diverged, leaves a no-operation of it. Here convert and
consumer warps of prefill, its warp that loads V, and consumer warps of decode arrive lane by lane, and barriers count 32 times as many;
all else is the same code. If there is no hazard here, those of the kernels as they are are of that form alone. Arguments are those of
`sanitize_cases`; objects are in a cache of their own, since the kernels have the keys of the real ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cutlass.cute as cute
from cutlass import Int32

from fa4_backend import envs
from fa4_backend.kernels.common.edges import EdgeBarriers, Party, PipelineEdge, Signal
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.ring import RingPosition
from fa4_backend.kernels.decode import consumer_warps
from fa4_backend.kernels.decode.storage import DecodeStorage
from fa4_backend.kernels.sm90 import storage, warp_roles
from fa4_backend.kernels.sm90.consumer_warpgroup import ConsumerWarpgroup
from fa4_backend.kernels.sm90.convert_warps import ConvertWarps
from fa4_backend.kernels.sm90.load_warp import LoadWarp
from fa4_backend.kernels.sm90.storage import Barriers
from fa4_backend.kernels.sm90.tile_numbers import TAKEN_TILE
from tests.device import sanitize_cases
from tests.device.compiling import compile_lacking, use_own_cache
from tests.device.sanitize_cases import chosen_cases

LANES = 32
DECODE_EDGES = DecodeStorage.edges.fget  # type: ignore[attr-defined]
PREFILL_EDGES = warp_roles.pipeline_edges
OF_ONE_LANE = "tile_k_to_v"  # filled by the lane that arrives
# What decode's consumers say of their arrivals, and what they say here.
ONE_LANE = {
    """                    if lane == 0:
                        cute.arch.mbarrier_arrive(shared.kv_empty + slot)
""": """                    cute.arch.mbarrier_arrive(shared.kv_empty + slot)
""",
    """            if lane == 0:
                cute.arch.mbarrier_arrive(shared.entry_empty + stage)
""": """            cute.arch.mbarrier_arrive(shared.entry_empty + stage)
""",
}


def all_lanes(parties: tuple[Party, ...]) -> tuple[Party, ...]:
    """Warps' arrivals counted lane by lane."""
    return tuple(replace(x, warps=x.warps * LANES) if x.signal is Signal.WARPS else x for x in parties)


def of_lanes(edges: tuple[PipelineEdge, ...]) -> tuple[PipelineEdge, ...]:
    """Pipelines with those counts."""
    return tuple(replace(edge, full_by=all_lanes(edge.full_by), empty_by=all_lanes(edge.empty_by)) for edge in edges)


def prefill_edges(config: PrefillConfig) -> tuple[PipelineEdge, ...]:
    """Of the prefill kernel."""
    edges = PREFILL_EDGES(config)
    pairs = zip(edges, of_lanes(edges), strict=True)
    return tuple(replace(lanes, full_by=edge.full_by) if edge.name == OF_ONE_LANE else lanes for edge, lanes in pairs)


def decode_edges(of: DecodeStorage) -> EdgeBarriers:
    """Of the decode kernel."""
    return EdgeBarriers(of_lanes(tuple(DECODE_EDGES(of).edges.values())), 0)


def arrive(_: Any, barrier: cute.Pointer) -> None:
    """One arrival of each lane."""
    cute.arch.mbarrier_arrive(barrier)


def hear_tile(_: LoadWarp, feed: RingPosition, barriers: Barriers, sWork: cute.Tensor) -> Int32:
    """The tile that the other load warp took, read by each lane."""
    cute.arch.mbarrier_wait(barriers.tile_full + feed.slot, feed.phase)
    tile_idx = sWork[TAKEN_TILE, feed.slot]
    cute.arch.mbarrier_arrive(barriers.tile_empty + feed.slot)
    return tile_idx


def changed(module: ModuleType, changes: dict[str, str]) -> ModuleType:
    """A copy of a module, kept in the cache, whose source says something else: each of `changes` once."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    for old, new in changes.items():
        assert source.count(old) == 1, f"{module.__name__}: expected once, found {source.count(old)} times: {old!r}"
        source = source.replace(old, new)
    path = envs.cache_dir() / f"{module.__name__.rsplit('.', 1)[-1]}_changed.py"
    own = path.with_suffix(f".{os.getpid()}")  # processes side by side write the same
    own.write_text(source)
    own.replace(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = copy
    spec.loader.exec_module(copy)
    return copy


def change_kernels() -> None:
    """Let this process compile and run those kernels; their objects go to a cache of their own."""
    use_own_cache("racecheck-lanes", Path(__file__))
    envs.cache_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
    storage.pipeline_edges = prefill_edges
    ConvertWarps._arrive = arrive  # type: ignore[method-assign]
    ConsumerWarpgroup._release = arrive  # type: ignore[method-assign, assignment]
    LoadWarp._hear_tile = hear_tile  # type: ignore[method-assign]
    DecodeStorage.edges = property(decode_edges)  # type: ignore[assignment, method-assign]
    run: Callable[..., None] = changed(consumer_warps, ONE_LANE).ConsumerWarps.run
    consumer_warps.ConsumerWarps.run = run  # type: ignore[method-assign]


def main() -> int:
    """`sanitize_cases` with those kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-for", metavar="ARCH", help="compile for ARCH and stop; needs no GPU")
    parser.add_argument("--batches", help='with --compile-for, of which: "prefill auto,mixed fp8"; default: all')
    parser.add_argument("--processes", type=int, help="that compile side by side; default: as many as there are cores")
    options, rest = parser.parse_known_args()
    change_kernels()
    if options.compile_for:
        every = [f"{kind} {kv_dtype}" for kind in sanitize_cases.KINDS for kv_dtype in sanitize_cases.KV_DTYPES]
        chosen = [name.split() for name in (options.batches.split(",") if options.batches else every)]
        plans = [x for kind, kv_dtype in chosen for x in sanitize_cases.plans_of(chosen_cases(kind, options.compile_for, kv_dtype))]
        compile_lacking((key for plan in plans for key in plan.keys), change_kernels, options.processes)
        return 0
    sys.argv = [sys.argv[0], *rest]
    return sanitize_cases.main()


if __name__ == "__main__":
    raise SystemExit(main())
