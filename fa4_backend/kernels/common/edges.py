"""Pipelines between warp roles, declared as named edges; arrive counts and transaction bytes are derived and checked here.

An edge is a ring of `stages` buffers between a producer and a consumer. Each buffer has a `full` mbarrier (the payload is there) and,
unless another edge already proves that the buffer was drained, an `empty` one (it may be overwritten). A count that is too high hangs
the consumer, one that is too low lets it read a half-written buffer; so call sites state facts (which warps signal, how) and never counts.
No part of this module needs the compiler: `tests/host/test_edges.py` pins the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import accumulate

from fa4_backend.kernels.common.hardware import LANES

MBARRIER_BYTES = 8
MAX_ARRIVALS = (1 << 20) - 1  # PTX ISA, "mbarrier": range of the pending count
MAX_TX_BYTES = (1 << 20) - 1  # PTX ISA, "mbarrier": range of the tx-count


class Signal(Enum):
    """How a role completes a phase of a barrier."""

    TMA = "one arrival that announces the bytes of the TMA boxes that follow"
    COMMIT = "one arrival of tcgen05.commit when the MMAs have completed"
    WARPS = "one arrival of each of the role's warps that share the buffer"
    LANES = "one arrival of each lane that wrote its part of the buffer"


AT_BARRIER = "a barrier of the CTA"  # `drained_by`: the producer meets the consumers before it fills a buffer again


@dataclass(frozen=True)
class Party:
    """A role's part in an edge."""

    role: str
    signal: Signal
    warps: int = 1  # warps of a CTA that signal one buffer; 1 for TMA and COMMIT, which one elected thread issues
    ctas: int = 1  # CTAs of a cluster whose warps signal it; each announces its own TMA bytes
    lanes: int = 1  # of a warp that signal; 1 for all but LANES

    def __post_init__(self) -> None:
        if self.warps < 1 or (self.signal is not Signal.WARPS and self.warps != 1):
            raise ValueError(f"{self.role}: expected 1 warp for {self.signal.name} and at least 1 for WARPS, got {self.warps}")
        if not 1 <= self.lanes <= (LANES if self.signal is Signal.LANES else 1):
            raise ValueError(f"{self.role}: expected 1 to 32 lanes for LANES and 1 for {self.signal.name}, got {self.lanes}")

    @property
    def arrivals(self) -> int:
        """What this party adds to the arrive count of a barrier."""
        return self.warps * self.ctas * self.lanes


@dataclass(frozen=True)
class PipelineEdge:
    """One edge; `name` is `<payload>_<producer>_to_<consumer>`.

    Raises:
        ValueError: the facts contradict each other; the message says which and what would happen.
    """

    name: str
    stages: int
    full_by: tuple[Party, ...]
    empty_by: tuple[Party, ...] = ()  # empty: `drained_by` says why no barrier is needed
    tx_bytes: int = 0  # bytes that the TMA boxes of a CTA deliver to one buffer; boxes out of bounds count in full
    drained_by: str = ""  # the edge whose full barrier proves that a buffer was read, or AT_BARRIER

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise ValueError(f"{self.name}: expected at least 1 stage, got {self.stages}")
        if "_to_" not in self.name:
            raise ValueError(f"edge name: expected <payload>_<producer>_to_<consumer>, got {self.name!r}")
        by_tma = sum(party.signal is Signal.TMA for party in self.full_by)
        if by_tma > 1 or bool(by_tma) != (0 < self.tx_bytes <= MAX_TX_BYTES):
            raise ValueError(
                f"{self.name}: expected 1 to {MAX_TX_BYTES} tx bytes exactly when one TMA party fills it, got {self.tx_bytes} and {by_tma} "
                "(too many bytes: the consumer hangs; too few: it reads before the data)"
            )
        if bool(self.empty_by) == bool(self.drained_by):
            raise ValueError(
                f"{self.name}: expected either who empties a buffer or the edge that proves it, got {self.empty_by}, {self.drained_by!r}"
            )
        for count in (self.full_count, self.empty_count):
            if count > MAX_ARRIVALS:
                raise ValueError(f"{self.name}: expected at most {MAX_ARRIVALS} arrivals a phase, got {count}")
        if not self.full_count:
            raise ValueError(f"{self.name}: expected someone to fill it, got nobody (the consumer would hang)")

    @property
    def full_count(self) -> int:
        """Arrivals that complete a phase of the full barrier."""
        return sum(party.arrivals for party in self.full_by)

    @property
    def empty_count(self) -> int:
        """Arrivals that complete a phase of the empty barrier; 0 where there is none."""
        return sum(party.arrivals for party in self.empty_by)

    @property
    def num_barriers(self) -> int:
        """mbarriers this edge needs."""
        return self.stages * (2 if self.empty_by else 1)


@dataclass(frozen=True)
class EdgeBarriers:
    """Where each edge's barriers lie in shared memory: all full barriers of an edge, then its empty ones.

    Raises:
        ValueError: two edges have one name, or `drained_by` names none.
    """

    declared: tuple[PipelineEdge, ...]
    base_bytes: int  # where the first barrier lies

    def __post_init__(self) -> None:
        names = [edge.name for edge in self.declared]
        for edge in self.declared:
            if names.count(edge.name) > 1:
                raise ValueError(f"edges: expected distinct names, got {edge.name} twice")
            if edge.drained_by and edge.drained_by not in (*names, AT_BARRIER):
                raise ValueError(f"{edge.name}: expected drained_by to name an edge, got {edge.drained_by!r}")

    @cached_property
    def edges(self) -> dict[str, PipelineEdge]:
        """The edges by name."""
        return {edge.name: edge for edge in self.declared}

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each edge's first barrier."""
        before = accumulate((edge.num_barriers * MBARRIER_BYTES for edge in self.declared), initial=self.base_bytes)
        return dict(zip(self.edges, before, strict=False))

    @property
    def end_bytes(self) -> int:
        """Byte offset behind the last barrier."""
        return self.base_bytes + sum(edge.num_barriers for edge in self.declared) * MBARRIER_BYTES

    def full_offset(self, name: str) -> int:
        """Byte offset of the edge's first full barrier."""
        return self.offsets[name]

    def empty_offset(self, name: str) -> int:
        """Byte offset of the edge's first empty barrier."""
        edge = self.edges[name]
        if not edge.empty_by:
            raise ValueError(f"{name}: expected an edge with an empty barrier; {edge.drained_by} proves that its buffers are drained")
        return self.offsets[name] + edge.stages * MBARRIER_BYTES

    def initial_counts(self) -> list[tuple[int, int]]:
        """(byte offset, arrive count) of every barrier."""
        counts = []
        for name, edge in self.edges.items():
            both = [edge.full_count] * edge.stages + [edge.empty_count] * (edge.num_barriers - edge.stages)
            counts += [(self.offsets[name] + i * MBARRIER_BYTES, count) for i, count in enumerate(both)]
        return counts
