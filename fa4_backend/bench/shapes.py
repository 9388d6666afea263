"""`fa4 bench shapes`: the shapes where kernels have cliffs, ours beside every peer installed, in one run and in turns, L2 clean.

A figure is the median over rounds that go through the kernels forwards and backwards. Its roofline is the longer of two times that no
kernel can be shorter than: the bytes it must move at a copy's bandwidth, and its operations at a matmul's rate, both measured in the run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Protocol

import torch

from fa4_backend.bench import ours
from fa4_backend.bench.batch import E4M3_PROMPT_ERROR, PROMPT_ERROR, BatchShape, BatchTensors
from fa4_backend.bench.figures import Cell, write_overview
from fa4_backend.bench.ours import Ours, asked, gpu_arch
from fa4_backend.bench.peers import WIDE, Call, installed, prepare, ready
from fa4_backend.bench.shape_cells import Kind
from fa4_backend.bench.timing import Flush, capture, cold_in_turns, copy_bandwidth, matmul_tflop_per_s
from fa4_backend.problem import FP8

OURS = "fa4"
ROUNDS = 6
FEWEST_ROUNDS = 2  # forwards and backwards once
MEMORY, TENSOR = "memory", "tensor cores"


class Work(Protocol):
    """The least that any kernel does for a batch."""

    @property
    def moved_bytes(self) -> int: ...

    @property
    def flops(self) -> float: ...


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches in this run."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float

    @classmethod
    def measure(cls) -> Ceilings:
        """Of the GPU present, as it is now."""
        return cls(copy_bandwidth(), matmul_tflop_per_s())

    def least_us(self, batch: Work) -> tuple[str, float]:
        """Which ceiling is the lower one for a batch, and the time that it allows, in microseconds."""
        memory, tensor = batch.moved_bytes / self.copy_gb_per_s / 1e3, batch.flops / self.matmul_tflop_per_s / 1e6
        return (MEMORY, memory) if memory > tensor else (TENSOR, tensor)


@dataclass(frozen=True)
class Timing:
    """One kernel on one batch."""

    kind: str
    batch: str
    kernel: str
    us: float
    gb_per_s: float  # bytes of K, V, q and out over time
    tflop_per_s: float  # of the keys that are seen and no others
    bound_by: str  # which ceiling is the lower one
    share_of_roofline: float
    ratio_to_best_peer: float | None  # best peer's time over this kernel's; above 1: this kernel is faster
    error: float  # the largest on the rows that are checked


def run(kinds: Mapping[str, Kind], *, peers: list[str] | None = None, seconds: float | None = None) -> Iterator[list[Timing]]:
    """Time every kernel on every cell; yields one list a cell, ours first.

    Args:
        seconds: how long it may take, compilation included. A run that falls behind takes fewer rounds; cells that are left when the
            time has passed are not timed and named on stderr. Kinds take turns then, so that each has had some.

    Raises:
        RuntimeError: our kernel is wrong on a cell.
    """
    begin = time.monotonic()
    compile_all(kinds)
    ceilings = Ceilings.measure()
    torch.manual_seed(0)
    cells = in_order(kinds, by_turns=seconds is not None)
    began = time.monotonic()
    for done, (name, batch) in enumerate(cells):
        rounds = ROUNDS
        if seconds is not None:
            now, end = time.monotonic(), begin + seconds
            if now >= end:
                left = ", ".join(cell.title for _, cell in cells[done:])
                print(f"{seconds:g} s have passed; not timed: {left}", file=sys.stderr, flush=True)
                return
            is_late = (now - began) * len(cells) > (end - began) * done
            rounds = FEWEST_ROUNDS if is_late else ROUNDS
        us, errors = _time(batch, installed(batch.kv_dtype) if peers is None else peers, rounds)
        yield judge(name, batch, us, errors, ceilings)


def in_order(kinds: Mapping[str, Kind], *, by_turns: bool) -> list[tuple[str, BatchShape]]:
    """Every cell and its kind's name: one kind after the other, or the first of each, the second of each, ..."""
    lists = [[(name, batch) for batch in kind.batches] for name, kind in kinds.items()]
    return list(chain(*lists)) if not by_turns else [cell for row in zip_longest(*lists) for cell in row if cell is not None]


def judge(kind: str, batch: BatchShape, us: Mapping[str, float], errors: Mapping[str, float], ceilings: Ceilings) -> list[Timing]:
    """What times of a cell say. us, errors: by kernel."""
    best = min((taken for name, taken in us.items() if name != OURS), default=None)
    timings = []
    for name, taken in us.items():
        moves = replace(batch, kv_dtype="bfloat16") if name == WIDE else batch
        bound_by, least = ceilings.least_us(moves)
        timings.append(Timing(
            kind, batch.title, name, taken, moves.moved_bytes / taken / 1e3, batch.flops / taken / 1e6, bound_by, least / taken,
            None if best is None else best / taken, errors[name],
        ))  # fmt: skip
    return timings


def _time(batch: BatchShape, peers: list[str], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds and largest error of each kernel that serves the batch."""
    tensors = BatchTensors.make(batch)
    makers = {OURS: lambda: Ours.make(batch, tensors).call} | {peer: partial(prepare, peer, batch, tensors) for peer in peers}
    replays: dict[str, Call] = {}
    errors: dict[str, float] = {}
    kept: list[Call] = []  # a graph holds addresses, not tensors: what a call reads must outlive its replays
    for name, maker in makers.items():
        tensors.out.fill_(float("nan"))
        call = ready(name, batch.label, maker, must_run=name == OURS)
        if call is None:
            continue
        errors[name] = tensors.worst_error(batch, name, must_hold=name == OURS)
        # Peers with K and V in FP8 may take q and weights in e4m3 too.
        bound = PROMPT_ERROR if batch.kv_dtype != FP8 else E4M3_PROMPT_ERROR
        if not errors[name] <= bound:
            print(f"{batch.label}: {name} is wrong by {errors[name]} and not timed", file=sys.stderr, flush=True)
            continue
        kept.append(call)
        replays[name] = capture(call)
    return cold_in_turns(replays, rounds, Flush.READ), errors


def compile_all(kinds: Mapping[str, Kind], arch: str | None = None) -> int:
    """Compile what the cells need for `arch`, by default that of the GPU present; how many kernels that are."""
    return ours.compile_all(asked(batch, arch or gpu_arch()) for kind in kinds.values() for batch in kind.batches)


def format_line(timings: list[Timing]) -> str:
    """One cell on one line."""
    parts = [f"{t.kernel} {t.us:.1f} us" for t in timings]
    own = timings[0]
    ending = "" if own.ratio_to_best_peer is None else f" | {own.ratio_to_best_peer:.2f}x best peer"
    return f"{own.kind} | {own.batch} | {', '.join(parts)} | {100 * own.share_of_roofline:.0f}% of {own.bound_by}{ending}"


def summary(timings: list[Timing]) -> str:
    """Our cells, those furthest behind first; cells without a peer last."""
    own = sorted((t for t in timings if t.kernel == OURS), key=lambda t: math.inf if t.ratio_to_best_peer is None else t.ratio_to_best_peer)
    lines = [f"{'ratio':>5}  {'fa4 us':>8}  {'best us':>8}  roofline  cell"]
    for t in own:
        ratio = "" if t.ratio_to_best_peer is None else f"{t.ratio_to_best_peer:.2f}"
        peer = "" if t.ratio_to_best_peer is None else f"{t.us * t.ratio_to_best_peer:.1f}"
        lines.append(f"{ratio:>5}  {t.us:8.1f}  {peer:>8}  {100 * t.share_of_roofline:6.0f} %  {t.kind}: {t.batch}")
    behind = sum(round(t.ratio_to_best_peer, 2) < 1 for t in own if t.ratio_to_best_peer is not None)
    return "\n".join([*lines, f"{len(own)} cells, {behind} below 1.00"])


def write_plot(path: Path, timings: list[Timing]) -> None:
    """Best peer over ours, and our share of the roofline."""
    # Kinds stand together, whatever the order in which they were timed.
    order = list(dict.fromkeys(t.kind for t in timings))
    own = sorted((t for t in timings if t.kernel == OURS), key=lambda t: order.index(t.kind))
    write_overview(path, [Cell(t.kind, t.batch, t.ratio_to_best_peer, t.share_of_roofline) for t in own], ceiling="roofline")
