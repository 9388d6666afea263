"""Timing of device work: CUDA graphs, cold L2, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from functools import cache

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any chip here
ROUND_US = 5000.0  # device time of one kernel in one round of turns


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
    estimate = _cold(function, flush, 3)
    repeats = max(least, min(200, int(milliseconds * 1e3 / max(statistics.median(estimate), 1.0))))
    return statistics.median(_cold(function, flush, repeats))


def in_turns(replays: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of one call of each, in microseconds, back to back; order reversed every second round.

    A long kernel runs at the board's power limit, so the clock follows what ran just before: hence the turns.
    """
    times: dict[str, list[float]] = {name: [] for name in replays}
    repeats = {name: max(1, round(ROUND_US / _warm(call, 2))) for name, call in replays.items()}
    for name, call in _turns(replays, rounds):
        times[name].append(_warm(call, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def cold_in_turns(replays: Mapping[str, Callable[[], object]], rounds: int, flush: Flush) -> dict[str, float]:
    """The same with L2 cold before each call; a round of a kernel is about ROUND_US, 20 calls at most."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    repeats = {name: max(1, min(20, round(ROUND_US / statistics.median(_cold(call, flush, 3))))) for name, call in replays.items()}
    for name, call in _turns(replays, rounds):
        times[name] += _cold(call, flush, repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth() -> float:
    """GB/s, bytes read plus bytes written, of an elementwise kernel over 8 GiB: the ceiling that shares are given of."""
    source = torch.empty(1 << 30, device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    return 8 * source.numel() / median_us(lambda: torch.add(source, 1, out=target)) / 1e3


def matmul_tflop_per_s() -> float:
    """TFLOP/s of an 8192^3 bf16 matmul: the ceiling that shares are given of."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    us = in_turns({"matmul": capture(lambda: a @ b)}, 8)["matmul"]
    return 2 * 8192**3 / us / 1e6


def _turns(replays: Mapping[str, Callable[[], object]], rounds: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel once a round, forwards and backwards."""
    for turn in range(rounds):
        yield from list(replays.items())[:: 1 if turn % 2 == 0 else -1]


def _warm(function: Callable[[], object], repeats: int) -> float:
    """Microseconds a call, after one call that is not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    function()
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


@cache
def _flush_buffers() -> tuple[torch.Tensor, torch.Tensor]:
    """The large buffer, and one number to read it into."""
    return torch.zeros(FLUSH_BYTES // 4, device="cuda"), torch.zeros((), device="cuda")


def _cold(function: Callable[[], object], flush: Flush, repeats: int) -> list[float]:
    """Microseconds of each call, L2 cold before it."""
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
