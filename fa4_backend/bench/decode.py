"""`fa4 bench decode`: ours and every peer installed, on the same batches in the same run; CUDA graphs, cold L2, medians."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fa4_backend.bench import ours
from fa4_backend.bench.batch import BatchTensors
from fa4_backend.bench.decode_batches import DecodeBatch
from fa4_backend.bench.figures import Cell, write_overview
from fa4_backend.bench.ours import Ours, asked, gpu_arch
from fa4_backend.bench.peers import INVARIANT, WIDE, installed, prepare, ready
from fa4_backend.bench.timing import Flush, capture, copy_bandwidth, median_us
from fa4_backend.problem import FP8

# Name -> flags of its problem.
OURS: dict[str, dict[str, bool]] = {
    "fa4": {},
    "fa4 invariant": {"batch_invariant": True},
    "fa4 exact": {"batch_invariant": True, "exact": True},
}


@dataclass(frozen=True)
class Timing:
    """One kernel on one batch."""

    batch: str
    kernel: str
    us: float
    gb_per_s: float  # bytes of K and V over time
    share_of_copy: float  # of the bandwidth an elementwise copy reaches on the same machine
    ratio_to_best_peer: float | None  # best peer's time over ours; above 1: ours is faster
    error: float  # the largest on the rows that are checked


def run(
    batches: list[DecodeBatch], *, peers: list[str] | None = None, milliseconds: float = 30.0, flush: Flush = Flush.WRITE
) -> Iterator[list[Timing]]:
    """Time every kernel on every batch; yields one list a batch.

    Raises:
        RuntimeError: a kernel of ours is wrong on a batch.
    """
    compile_all(batches)
    copy = copy_bandwidth()
    torch.manual_seed(0)
    for batch in batches:
        tensors = BatchTensors.make(batch)
        calls = {name: Ours.make(batch, tensors, **flags).call for name, flags in OURS.items()}
        chosen = [*installed(batch.kv_dtype), *([] if batch.kv_dtype == FP8 else [INVARIANT])] if peers is None else peers
        calls |= {peer: call for peer in chosen if (call := ready(peer, batch.label, partial(prepare, peer, batch, tensors))) is not None}
        measured: dict[str, tuple[float, float]] = {}
        for name, call in calls.items():
            tensors.out.fill_(float("nan"))
            call()
            error = tensors.worst_error(batch, name, must_hold=name in OURS)
            measured[name] = (median_us(capture(call), milliseconds=milliseconds, flush=flush), error)
        best = min((us for name, (us, _) in measured.items() if name not in OURS), default=None)
        timings = []
        for name, (us, error) in measured.items():
            num_bytes = replace(batch, kv_dtype="bfloat16").kv_bytes if name == WIDE else batch.kv_bytes
            rate = num_bytes / us / 1e3
            ratio = None if best is None else best / us
            timings.append(Timing(batch.label, name, us, rate, rate / copy, ratio, error))
        yield timings


def compile_all(batches: list[DecodeBatch], arch: str | None = None) -> int:
    """Compile what the batches need for `arch`, by default that of the GPU present; how many kernels that are."""
    return ours.compile_all(asked(batch, arch or gpu_arch(), **flags) for batch in batches for flags in OURS.values())


def format_line(timings: list[Timing]) -> str:
    """One batch on one line."""
    parts = [f"{t.kernel} {t.us:.1f} us {t.gb_per_s:.0f} GB/s {100 * t.share_of_copy:.0f}%" for t in timings]
    ratio = timings[0].ratio_to_best_peer
    ending = "" if ratio is None else f" | {ratio:.2f}x best peer"
    return f"{timings[0].batch} | {' | '.join(parts)}{ending}"


def write_plot(path: Path, timings: list[Timing]) -> None:
    """Best peer over ours, and the share of the copy's bandwidth."""
    own = [t for t in timings if t.kernel == "fa4"]
    write_overview(path, [Cell("", t.batch, t.ratio_to_best_peer, t.share_of_copy) for t in own], ceiling="copy's bandwidth (K and V only)")
