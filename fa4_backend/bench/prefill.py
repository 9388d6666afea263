"""`fa4 bench prefill`: ours and every peer installed, on the same batches in the same run.

A prefill kernel runs at the board's power limit, so the clock follows what ran just before. Kernels are therefore timed in turns, forwards
and backwards, and a figure is the median over the rounds; compare figures of one run only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fa4_backend.bench import dense_peers
from fa4_backend.bench import ours as own_calls
from fa4_backend.bench.batch import BatchTensors
from fa4_backend.bench.figures import Cell, write_overview
from fa4_backend.bench.ours import Ours, asked, gpu_arch
from fa4_backend.bench.peers import PAGED, Call, installed, prepare, ready
from fa4_backend.bench.prefill_batches import PrefillBatch
from fa4_backend.bench.timing import capture, in_turns, matmul_tflop_per_s
from fa4_backend.problem import FP8, RAGGED

OURS = "fa4"
OURS_WIDE = "fa4 bf16"  # beside FP8 K and V: our kernel of the same values in bf16


@dataclass(frozen=True)
class Timing:
    """One kernel on one batch."""

    batch: str
    kernel: str
    us: float
    tflop_per_s: float
    share_of_matmul: float  # of an 8192^3 bf16 matmul in the same run
    ratio_to_best_peer: (
        float | None
    )  # time of the best peer that reads K and V as ours does over this kernel's; above 1: this kernel is faster
    error: float


def ours(batch: PrefillBatch, t: BatchTensors) -> Call:
    """Our operator on one batch."""
    return Ours.make(batch, t).call


def _in_bf16(batch: PrefillBatch) -> PrefillBatch:
    return replace(batch, kv_dtype="bfloat16", q_dtype="bfloat16")


def _ours_in_bf16(batch: PrefillBatch, t: BatchTensors) -> Call:
    return ours(_in_bf16(batch), t.in_bf16())


def _peer(name: str, batch: PrefillBatch, t: BatchTensors) -> Call | None:
    return dense_peers.prepare(name, batch, t) if name in dense_peers.DENSE else prepare(name, batch, t)


def _installed(batch: PrefillBatch) -> list[str]:
    if batch.kv_source == RAGGED:
        return dense_peers.installed_ragged(batch.kv_dtype)
    return [*installed(batch.kv_dtype), *dense_peers.installed(batch.kv_dtype)]


def run(batches: list[PrefillBatch], *, peers: list[str] | None = None, rounds: int = 8) -> Iterator[list[Timing]]:
    """Time every kernel on every batch; yields one list a batch, ours first; with FP8 K and V also ours on the same values in bf16.

    Raises:
        RuntimeError: a kernel of ours is wrong on a batch.
    """
    compile_all(batches)
    matmul = matmul_tflop_per_s()
    torch.manual_seed(0)
    for batch in batches:
        tensors = BatchTensors.make(batch)
        replays, errors = {}, {}
        kept: list[object] = []  # a graph holds addresses, not tensors: what a call reads and writes must outlive its replays
        makers: dict[str, Callable[[PrefillBatch, BatchTensors], Call | None]] = {OURS: ours}
        if batch.kv_dtype == FP8:
            makers[OURS_WIDE] = _ours_in_bf16
        chosen = _installed(batch) if peers is None else peers
        makers |= {name: partial(_peer, name) for name in chosen}
        for name, maker in makers.items():
            tensors.out = torch.full_like(tensors.out, float("nan"))
            call = ready(name, batch.label, partial(maker, batch, tensors), must_run=name in (OURS, OURS_WIDE))
            if call is None:
                continue
            errors[name] = tensors.worst_error(batch, name, must_hold=name in (OURS, OURS_WIDE))
            kept += [call, tensors.out]
            replays[name] = capture(call)
            kept.append(tensors.out)
        us = in_turns(replays, rounds)
        best = min((us[name] for name in us if name in (*PAGED, dense_peers.FA3_VARLEN)), default=None)
        rates = {name: batch.flops / time / 1e6 for name, time in us.items()}
        yield [
            Timing(batch.label, name, us[name], rates[name], rates[name] / matmul, None if best is None else best / us[name], errors[name])
            for name in us
        ]


def compile_all(batches: list[PrefillBatch], arch: str | None = None) -> int:
    """Compile what the batches need for `arch`, by default that of the GPU present; how many kernels that are."""
    every = [*batches, *(_in_bf16(batch) for batch in batches if batch.kv_dtype == FP8)]
    return own_calls.compile_all(asked(batch, arch or gpu_arch()) for batch in every)


def format_line(timings: list[Timing]) -> str:
    """One batch on one line."""
    parts = [f"{t.kernel} {t.us:.0f} us {t.tflop_per_s:.0f} TFLOP/s {100 * t.share_of_matmul:.0f}%" for t in timings]
    ratio = timings[0].ratio_to_best_peer
    ending = "" if ratio is None else f" | {ratio:.2f}x best peer of its kind"
    return f"{timings[0].batch} | {' | '.join(parts)}{ending}"


def write_plot(path: Path, timings: list[Timing]) -> None:
    """Best paged peer over ours, and the share of the matmul."""
    own = [t for t in timings if t.kernel == OURS]
    write_overview(path, [Cell("", t.batch, t.ratio_to_best_peer, t.share_of_matmul) for t in own], ceiling="matmul's TFLOP/s")
