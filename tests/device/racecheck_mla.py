"""Are `racecheck`'s hazards in latent decode false alarms? The batches of `prove_mla --parts small` with kernels that say their order
otherwise.

    python -m tests.device.racecheck_mla --compile-only
    compute-sanitizer --tool racecheck --kernel-name kns=kernel_cutlass --print-limit 999 python -m tests.device.racecheck_mla --forms lanes

Two forms order accesses in the kernel as it is, and `racecheck` follows neither for all threads:

* one lane arrives at an mbarrier for its warp, behind `bar.warp.sync`. With `--forms lanes` every lane arrives for itself, and barriers
  count 32 times as many;
* the two consumer warpgroups meet at one named barrier from two places of the code. With `--forms meetings` they meet at an mbarrier.

All else is the same code, so hazards that a form's replacement ends are of that form alone. `--forms none` is the kernel as it is.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.edges import AT_BARRIER, MBARRIER_BYTES, EdgeBarriers, Party, PipelineEdge, Signal
from fa4_backend.kernels.mla_decode.consumer_warpgroup import ConsumerWarpgroup
from fa4_backend.kernels.mla_decode.convert_warps import ConvertWarps
from fa4_backend.kernels.mla_decode.load_warp import LoadWarp
from fa4_backend.kernels.mla_decode.merge import Merge
from fa4_backend.kernels.mla_decode.narrow_warps import NarrowWarps
from fa4_backend.kernels.mla_decode.storage import SIDE_WARPS, SIDES, MlaStorage, SharedTensors
from tests.device import prove_mla
from tests.device.compiling import compile_lacking, use_own_cache
from tests.device.racecheck_lanes import LANES, all_lanes

FORMS = ("lanes", "meetings")
ENTRY_EDGE, MEETING_EDGE = "entry_load_to_consumers", "meeting_consumers_to_consumers"
EDGES = MlaStorage.edges.fget  # type: ignore[attr-defined]
LOAD_QUERY = LoadWarp._load_query
ALLOCATE = MlaStorage.allocate


class Meeting(NamedTuple):
    """Where the consumers of the kernel that is being traced meet."""

    barrier: cute.Pointer
    phase: cute.Tensor  # (1,) int32


MEETINGS: list[Meeting] = []


def edges(forms: tuple[str, ...], storage: MlaStorage) -> EdgeBarriers:
    """The kernel's pipelines with the counts of these forms."""
    every = list(EDGES(storage).edges.values())
    if "lanes" in forms:
        every = [replace(edge, full_by=all_lanes(edge.full_by), empty_by=all_lanes(edge.empty_by)) for edge in every]
        # The entry's ints are written by lanes of the load warp, of which one announces Q's bytes.
        others = Party("other lanes", Signal.LANES, lanes=LANES - 1)
        every = [replace(edge, full_by=(*edge.full_by, others)) if edge.name == ENTRY_EDGE else edge for edge in every]
    if "meetings" in forms:
        consumers = Party("consumers", Signal.WARPS, SIDES * SIDE_WARPS * LANES)
        every.append(PipelineEdge(MEETING_EDGE, 1, (consumers,), drained_by=AT_BARRIER))
    return EdgeBarriers(tuple(every), 0)


def arrive(_: Any, barrier: cute.Pointer, *__: Any) -> None:
    """One arrival of each lane, at the barrier of its own CTA."""
    cute.arch.mbarrier_arrive(barrier)


def hand_on(_: ConvertWarps, full: cute.Pointer) -> None:
    """A part that is converted, of each lane."""
    ptx.fence_proxy_async_shared()
    cute.arch.mbarrier_arrive(full)


def release_converted(_: ConsumerWarpgroup, shared: SharedTensors, group: int, kv: Any) -> None:
    """A group of a converted tile, of each lane."""
    cute.arch.mbarrier_arrive(shared.barriers.kv_empty[group] + kv.slot)


@cute.jit
def load_query(self: Any, descriptors: Any, entry: Any, shared: Any):
    """The entry's ints, of each lane but the one that announces Q."""
    if cute.arch.lane_idx() > 0:
        cute.arch.mbarrier_arrive(shared.barriers.q_full)
    LOAD_QUERY(self, descriptors, entry, shared)


def allocate(self: MlaStorage) -> SharedTensors:
    """Shared memory with a place to meet."""
    shared, phase = ALLOCATE(self), cute.make_rmem_tensor(1, Int32)
    phase.fill(0)
    MEETINGS.append(Meeting(shared.barriers.kv_full[0] + self.edges.full_offset(MEETING_EDGE) // MBARRIER_BYTES, phase))
    return shared


def meet(_: Merge) -> None:
    """All consumers, by an mbarrier."""
    barrier, phase = MEETINGS[-1]
    cute.arch.mbarrier_arrive(barrier)
    cute.arch.mbarrier_wait(barrier, phase[0])
    phase[0] = phase[0] ^ 1


def change_kernels(forms: tuple[str, ...]) -> None:
    """Let this process compile and run those kernels; their objects go to a cache of their own."""
    use_own_cache(f"racecheck-{'-'.join(forms)}", Path(__file__))
    MlaStorage.edges = property(partial(edges, forms))  # type: ignore[assignment, arg-type]
    if "lanes" in forms:
        ConsumerWarpgroup._arrive = NarrowWarps._arrive = arrive  # type: ignore[method-assign, assignment]
        ConsumerWarpgroup._release_converted = release_converted  # type: ignore[method-assign, assignment]
        ConvertWarps._hand_on = hand_on  # type: ignore[method-assign, assignment]
        LoadWarp._load_query = load_query  # type: ignore[method-assign]
    if "meetings" in forms:
        Merge.meet = meet  # type: ignore[method-assign]
        MlaStorage.allocate = allocate  # type: ignore[method-assign]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=",".join(FORMS), help="that are said otherwise: lanes, meetings, both, or none")
    parser.add_argument("--first", type=int, default=0, help="number of the first batch")
    parser.add_argument("--seconds", type=float, default=45.0, help="after which no batch starts")
    parser.add_argument("--compile-only", action="store_true", help="compile the kernels, and do no more; needs no GPU")
    args = parser.parse_args()
    forms = () if args.forms == "none" else tuple(args.forms.split(","))
    assert set(forms) <= set(FORMS), f"--forms: expected {', '.join(FORMS)} or none, got {args.forms}"
    if forms:
        change_kernels(forms)
    compile_lacking(prove_mla.small_keys(), partial(change_kernels, forms) if forms else None)
    if not args.compile_only:
        print(prove_mla.small(args.first, args.seconds), flush=True)


if __name__ == "__main__":
    main()
