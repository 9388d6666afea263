"""Timing of device work: CUDA graphs, cold L2, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from enum import StrEnum
from functools import cache

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any chip here


class Flush(StrEnum):
    """How L2 is made cold before each call.

    WRITE is what `triton.testing.do_bench` does: it leaves L2 full of dirty lines, whose writing back every kernel then pays for (an L2
    of 50 MB at 3 TB/s: up to 16 us). READ leaves clean ones, as the weights do that an engine reads between two attention layers.
    """

    WRITE = "write"
    READ = "read"


def capture(function: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of one call, as an engine replays it: launch gaps and host time are out of the figure."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def median_us(function: Callable[[], object], *, milliseconds: float = 30.0, least: int = 7, flush: Flush = Flush.WRITE) -> float:
    """Median time of one call in microseconds, L2 cold before each; about `milliseconds` of calls, `least` at least."""
    estimate = _timed(function, flush, 3)
    repeats = max(least, min(200, int(milliseconds * 1e3 / max(statistics.median(estimate), 1.0))))
    return statistics.median(_timed(function, flush, repeats))


def copy_bandwidth() -> float:
    """GB/s, bytes read plus bytes written, of an elementwise kernel over 8 GiB: the ceiling that shares are given of."""
    source = torch.empty(1 << 30, device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    return 8 * source.numel() / median_us(lambda: torch.add(source, 1, out=target)) / 1e3


@cache
def _flush_buffers() -> tuple[torch.Tensor, torch.Tensor]:
    """The large buffer, and one number to read it into."""
    return torch.zeros(FLUSH_BYTES // 4, device="cuda"), torch.zeros((), device="cuda")


def _timed(function: Callable[[], object], flush: Flush, repeats: int) -> list[float]:
    large, number = _flush_buffers()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        if flush is Flush.WRITE:
            large.zero_()
        else:
            torch.sum(large, dim=0, out=number)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]
