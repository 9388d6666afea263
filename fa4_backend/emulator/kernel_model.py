"""From modelled cycles of a few recorded tiles to the time of a whole kernel. `timing.py` has the constants of an SM, `chip.py` those of a chip.

A prefill kernel's time is that of its last CTA: what its tiles cost, in the order of the work list, by the cycles of three replays. Tiles of
a list are dealt out by the list, or taken from a queue by whoever is free first; kernels that start a CTA a tile are the latter. The clock
follows the load: a board at its power limit is slower the busier its tensor cores are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fa4_backend.emulator.chip import Chip
from fa4_backend.emulator.recording import Recording
from fa4_backend.emulator.replay import Replay, Times
from fa4_backend.emulator.timing import Timing

SHORT, LONG = 4, 12  # KV blocks of the tiles that are recorded
Record = Callable[[int, int], Recording]  # (tiles, KV blocks of each) -> what one CTA or CTA pair does


@dataclass(frozen=True)
class TileCosts:
    """Cycles of a CTA (or pair): `first` once, `tile` for each tile with its mask's edge and its output, `block` for each KV block.

    `tensor` is the tensor core's part of a block, and the tables name who is busy in a block, and what a block's longest chain consists of.
    """

    first: float
    tile: float
    block: float
    tensor: float
    busy: dict[str, float]
    critical: dict[str, float]

    def of(self, blocks: Iterable[int]) -> float:
        """Cycles of tiles that follow one another, `first` left out."""
        return sum(self.tile + self.block * count for count in blocks)


def tile_costs(record: Record, timing: Timing) -> TileCosts:
    """What tiles cost by three replays: one of few blocks, one of many, two of few."""
    recordings = [record(1, SHORT), record(1, LONG), record(2, SHORT)]
    short, long, two = (Replay(recording, timing).run() for recording in recordings)
    block = (long.total - short.total) / (LONG - SHORT)
    return TileCosts(
        first=2 * short.total - two.total,
        tile=two.total - short.total - SHORT * block,
        block=block,
        tensor=(long.tensor_busy - short.tensor_busy) / (LONG - SHORT) / _quarters(recordings[0]),
        busy=_busy_units(short, long, len(recordings[0].warps) // recordings[0].warps_per_cta),
        critical={name: (cycles - short.critical.get(name, 0.0)) / (LONG - SHORT) for name, cycles in long.critical.items()},
    )


def _quarters(recording: Recording) -> int:
    """Warpgroup products keep a quarter of the tensor core busy each."""
    return 4 if "consumer" in recording.roles else 1


def _busy_units(short: Times, long: Times, ctas: int) -> dict[str, float]:
    """Cycles a block that each unit of one scheduler, and the port of shared memory, is busy."""
    units: dict[str, float] = {}
    for role, pipes in long.busy.items():
        for pipe, cycles in pipes.items():
            more = (cycles - short.busy.get(role, {}).get(pipe, 0.0)) / (LONG - SHORT) / ctas / 4
            units[pipe] = units.get(pipe, 0.0) + more
    units["shared-memory port"] = (long.smem_busy - short.smem_busy) / (LONG - SHORT)
    return units


def dealt_cycles(costs: TileCosts, lists: Sequence[Sequence[int]]) -> float:
    """Cycles until the last CTA ends, each with its own list of tiles (KV blocks of each)."""
    return max((costs.first + costs.of(blocks) for blocks in lists if blocks), default=0.0)


def queued_cycles(costs: TileCosts, blocks: Sequence[int], num_ctas: int, per_tile: float = 0.0) -> float:
    """Cycles until the last CTA ends, tiles taken by whoever is free first; per_tile: more for each, where each is a CTA of its own."""
    free = [costs.first] * min(num_ctas, max(1, len(blocks)))
    heapq.heapify(free)
    for count in blocks:
        heapq.heapreplace(free, free[0] + costs.tile + costs.block * count + per_tile)
    return max(free) if blocks else 0.0


@dataclass(frozen=True)
class KernelTime:
    """Modelled time of one kernel. `low_us` and `high_us`: with the fastest and the slowest clock, see `Chip.mhz`."""

    cycles: float
    utilisation: float  # of the tensor cores, over the whole kernel
    mhz: float
    us: float
    low_us: float
    high_us: float
    memory_us: float  # that the bytes alone take


def kernel_time(chip: Chip, cycles: float, tensor_cycles: float, num_bytes: float) -> KernelTime:
    """Time of a kernel that takes `cycles` on its last SM and keeps an SM's tensor core busy for `tensor_cycles` on average."""
    utilisation = tensor_cycles / cycles if cycles else 0.0
    memory_us = num_bytes / chip.gb_per_s.value / 1e3
    fast, middle, slow = (chip.mhz(utilisation, load) for load in ("rested", "mixed", "sustained"))

    def us(mhz: float) -> float:
        return chip.launch_us.value + max(cycles / mhz, memory_us)

    return KernelTime(cycles, utilisation, middle, us(middle), us(fast), us(slow), memory_us)
