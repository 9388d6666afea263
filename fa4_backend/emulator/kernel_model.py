"""From modelled cycles of a few recorded tiles to the time of a whole kernel: `timing.py` has an SM's constants, `chip.py` those of a chip.

A prefill kernel's time is that of its last CTA: what its tiles cost, in the order of the work list, by the cycles of three replays. Tiles
are dealt out by the list, or taken from a queue by whoever is free first; kernels that start a CTA a tile are the latter. The clock follows
the load: a board at its power limit is slower the busier its tensor cores are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

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
    short, two = (Replay(record(tiles, SHORT), timing).run().total for tiles in (1, 2))
    alone = single_tile_costs(record, timing)
    return replace(alone, first=2 * short - two, tile=two - short - SHORT * alone.block)


def single_tile_costs(record: Record, timing: Timing) -> TileCosts:
    """The same of a kernel that starts a CTA a tile: all that is not a block's is the tile's."""
    recordings = [record(1, SHORT), record(1, LONG)]
    short, long = (Replay(recording, timing).run() for recording in recordings)
    block = (long.total - short.total) / (LONG - SHORT)
    tensor = (long.tensor_busy - short.tensor_busy) / (LONG - SHORT) / _quarters(recordings[0])
    busy = _busy_units(short, long, len(recordings[0].warps) // recordings[0].warps_per_cta)
    critical = {name: (cycles - short.critical.get(name, 0.0)) / (LONG - SHORT) for name, cycles in long.critical.items()}
    return TileCosts(0.0, short.total - SHORT * block, block, tensor, busy, critical)


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


@dataclass(frozen=True)
class DecodeTime:
    """Modelled time of a decode step; GB/s of K and V, each read once."""

    us: float
    low_us: float
    high_us: float
    gb_per_s: float
    parts: dict[str, float]  # microseconds


def decode_time(chip: Chip, kv_bytes: float, is_split: bool) -> DecodeTime:
    """The launch, the chain that no other CTA hides, and the bytes at the rate that large reads reach."""
    facts = {"launch": chip.launch_us, "first entry, Q, first K and V, arithmetic, end": chip.decode_chain_us}
    if is_split:
        facts["adding up parts of rows"] = chip.decode_merge_us
    stream = kv_bytes / chip.gb_per_s.value / 1e3
    parts = {name: fact.value for name, fact in facts.items()} | {"K and V at the memory's rate": stream}
    us = sum(parts.values())
    low = sum(fact.low for fact in facts.values()) + kv_bytes / chip.gb_per_s.high / 1e3
    high = sum(fact.high for fact in facts.values()) + kv_bytes / chip.gb_per_s.low / 1e3
    return DecodeTime(us, low, high, kv_bytes / us / 1e3, parts)
