"""State of the barriers of a CTA, named ones and mbarriers: who arrived, who waits. Instructions: `barriers.py`, `mbarrier.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa4_backend.emulator.errors import BarrierMisuse

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cta
    from fa4_backend.emulator.warp import Warp

NUM_NAMED_BARRIERS = 16  # of a CTA; PTX ISA 9.0, 9.7.13.1
MAX_COUNT = (1 << 20) - 1  # of arrivals and of bytes of an mbarrier; PTX ISA 9.0, 9.7.13.16


class NamedBarrier:
    """One of the 16 barriers of a CTA. Warps arrive as a whole: a barrier counts 32 threads a warp."""

    __slots__ = ("arrived", "clock", "cta", "done_clock", "expected", "generation", "index", "result", "votes", "waiters")

    def __init__(self, cta: Cta, index: int) -> None:
        self.cta, self.index = cta, index
        self.expected = self.arrived = self.generation = 0
        self.waiters: list[tuple[Warp, int]] = []
        self.votes: list[tuple[int, int]] = []  # (lanes with a true predicate, lanes) of each warp, for barrier.red
        self.result: list[tuple[int, int]] = []  # the votes of the last complete use
        self.clock: object = None
        self.done_clock: object = None

    def __str__(self) -> str:
        return f"barrier {self.index} of {self.cta.name} ({self.arrived} of {self.expected} threads arrived)"

    def arrive(self, warp: Warp, threads: int) -> None:
        if threads % 32 or not threads:
            raise BarrierMisuse(f"barrier {self.index} with {threads} threads: not a multiple of the warp size")
        if self.arrived and threads != self.expected:
            raise BarrierMisuse(f"{self}: now used with {threads} threads")
        self.expected = threads
        self.arrived += 32
        if self.arrived > threads:
            raise BarrierMisuse(f"over-arrival: {self}")
        self.cta.cluster.progress += 1
        if warp.races:
            warp.races.release(warp, self, warp.exec)
        if self.arrived == threads:
            self.arrived = self.expected = 0
            self.generation += 1
            self.result, self.votes = self.votes, []
            if self.clock is not None:
                self.done_clock = self.cta.cluster.races.snapshot(self)
            waiters, self.waiters = self.waiters, []
            for other, lanes in waiters:
                other.wake(lanes)


class MBarrier:
    """State of one barrier: `pending` arrivals and `tx` bytes are missing in the phase numbered `phase`."""

    __slots__ = (
        "clock",
        "count",
        "cta",
        "done_clock",
        "fenced",
        "init_by",
        "init_epoch",
        "init_known",
        "offset",
        "pending",
        "phase",
        "tx",
        "waiters",
    )

    def __init__(self, cta: Cta, offset: int, count: int) -> None:
        self.cta, self.offset, self.count = cta, offset, count
        self.pending, self.tx, self.phase = count, 0, 0
        self.waiters: list[tuple[Warp, int]] = []
        self.init_by = -1  # generic actor and epoch of the init, and whether a fence made it visible to asynchronous operations
        self.init_epoch, self.fenced = 0, False
        self.init_known: set[int] = set()  # warps whose lanes all know of the init
        self.clock: object = None  # what the arrivals of this phase released (race detector)
        self.done_clock: object = None  # what a waiter of the last complete phase acquires

    def __str__(self) -> str:
        text = f"mbarrier {self.cta.name} smem+{self.offset:#x} (phase {self.phase}, pending {self.pending} of {self.count}"
        return text + (f", tx {self.tx} bytes)" if self.tx else ")")

    def arrive(self, count: int, tx: int = 0) -> None:
        """Count arrivals; `tx` bytes are expected besides."""
        self.tx += tx
        if not -MAX_COUNT <= self.tx <= MAX_COUNT:
            raise BarrierMisuse(f"tx-count out of range: {self}")
        if count > self.pending:
            raise BarrierMisuse(f"over-arrival: {count} arrivals on {self}")
        self.pending -= count
        self.cta.cluster.progress += 1
        self.check()

    def expect(self, num_bytes: int) -> None:
        self.tx += num_bytes
        if self.tx > MAX_COUNT:
            raise BarrierMisuse(f"tx-count out of range: {self}")

    def complete_tx(self, num_bytes: int) -> None:
        self.tx -= num_bytes
        if self.tx < -MAX_COUNT:
            raise BarrierMisuse(f"tx-count out of range: {self}")
        self.cta.cluster.progress += 1
        self.check()

    def check(self) -> None:
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.count
            if self.clock is not None:
                self.done_clock = self.cta.cluster.races.snapshot(self)
            waiters, self.waiters = self.waiters, []
            for warp, lanes in waiters:
                warp.wake(lanes)
