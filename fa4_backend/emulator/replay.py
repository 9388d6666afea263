"""Modelled times of a recorded run: who is busy, who waits for whom, and what the critical path consists of.

A discrete-event model, not a measurement. Every constant and its source is in `timing.py`. Rules:
* A warp's instructions run in order. Each occupies an issue slot and its unit's share on the warp's scheduler (warp w of a CTA: w mod 4),
  which that scheduler's warps share, and what it loads from and stores to shared memory takes the CTA's port. Work is served in pieces of
  about QUANTUM instructions, within which units overlap. A warp alone is no faster than the stall counts of the machine code let it be
  (`issue_stalls.py`), and what it waits for by scoreboard (`recording.LAGS`) comes on top.
* A tensor core runs its products one after the other, each for its flops over the arch's rate, or longer if the shared-memory port does
  not bring the operands in that time. Products of warpgroups (wgmma) take a quarter of the core a warp. Copies go one after the other too,
  in pieces that the port writes; they arrive `copy_latency` later. Bulk stores do likewise beside them, in pieces that the port reads, and
  are waited for until their sources are read.
* A wait ends `barrier` cycles after the last arrival of its phase, arrivals from another SM come `remote` later, and commits arrive when
  the products before them have left the tensor core's pipeline.
No bank conflicts, caches, or clocks that fall: those of a whole kernel are in `kernel_model.py`.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fa4_backend.emulator.recorded_step import Step
from fa4_backend.emulator.recording import PIPES, Recording
from fa4_backend.emulator.timing import TIMINGS, Timing

QUANTUM = 16
COPY_PIECE_BYTES = 1024
SCHEDULERS = 4
Edge = tuple[int, int]  # number of a barrier, phase


class Moment(NamedTuple):
    """When something was over, and what decided it: the chain of these is a critical path."""

    time: float
    label: str
    before: Moment | None

    def then(self, cycles: float, label: str) -> Moment:
        """What is over some cycles later."""
        return Moment(self.time + cycles, label, self) if cycles else self


START = Moment(0.0, "start", None)


def later(*moments: Moment) -> Moment:
    """The last of some moments."""
    return max(moments, key=lambda moment: moment.time)


@dataclass
class Pipe:
    """A unit that serves one thing at a time."""

    free: Moment = START
    busy: float = 0.0

    def serve(self, ready: Moment, cycles: float, label: str) -> Moment:
        """Take `cycles` from `ready` on, or from when the unit is free."""
        self.busy += cycles
        self.free = later(ready, self.free).then(cycles, label)
        return self.free


@dataclass
class Engine:
    """Works through what warps gave it, in order, beside them: the tensor core of a CTA or CTA pair, the copies or the stores of a CTA."""

    queue: deque[tuple[Moment, int, Step]] = field(default_factory=deque)  # issued when, by which warp, what
    now: Moment = START
    left: int = 0  # bytes of the copy or store under way
    drain: float = 0.0  # of the last product
    ends: dict[int, Moment] = field(default_factory=dict)  # warp -> end of its last product


@dataclass
class Times:
    """Modelled cycles; of CTA 0 where a unit is meant."""

    total: float
    tensor_busy: float
    tensor_idle: Counter[str]  # by what the issuing warp did meanwhile
    smem_busy: float
    busy: dict[str, Counter[str]]  # role -> pipe -> cycles, summed over the role's warps
    waits: dict[str, Counter[str]]  # role -> who came last -> cycles, summed over the role's warps
    critical: Counter[str]  # what the longest chain consists of


class Replay:
    """One replay of a recording."""

    def __init__(self, recording: Recording, timing: str | Timing) -> None:
        """timing: an arch, or constants of one's own."""
        self.recording, self.timing = recording, TIMINGS[timing] if isinstance(timing, str) else timing
        self.in_pairs = len(recording.warps) > recording.warps_per_cta
        warps = recording.warps
        self.at, self.now, self.pieces = [0] * len(warps), [START] * len(warps), [-1] * len(warps)
        self.share = [np.zeros(len(PIPES))] * len(warps)
        self.alone = [0.0] * len(warps)  # cycles of a piece that the warp takes however idle its scheduler is
        self.port_share = [0.0] * len(warps)
        self.missing: Counter[Edge] = Counter()  # arrivals a phase still lacks
        self.arrived: dict[Edge, tuple[Moment, str]] = {}  # latest arrival, and who
        self.sleepers: dict[Edge, list[int]] = defaultdict(list)
        self.pipes: dict[tuple[object, ...], Pipe] = defaultdict(Pipe)
        self.engines: dict[tuple[object, ...], Engine] = defaultdict(Engine)
        self.busy: dict[str, Counter[str]] = defaultdict(Counter)
        self.waits: dict[str, Counter[str]] = defaultdict(Counter)
        self.products: list[tuple[float, float]] = []  # of CTA 0
        self.issuer: list[tuple[float, float, str]] = []  # what the mma warp of CTA 0 did
        self.events: list[tuple[float, int, object]] = []
        self.num_events = 0
        for steps in warps:
            for step in steps:
                if step.kind != "wait":
                    self.missing.update(step.edges)

    def run(self) -> Times:
        """Replay everything."""
        for warp in range(len(self.recording.warps)):
            self.schedule(0.0, warp)
        while self.events:
            _, _, actor = heapq.heappop(self.events)
            if isinstance(actor, int):
                self.advance(actor)
            else:
                self.serve(actor)
        unfinished = [warp for warp, at in enumerate(self.at) if at < len(self.recording.warps[warp])]
        assert not unfinished, f"expected every warp to end, these wait: {unfinished}"
        return self.times()

    def schedule(self, time: float, actor: object) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (time, self.num_events, actor))

    # -- warps --------------------------------------------------------------------------------------------------

    def advance(self, warp: int) -> None:
        """The warp's next piece of work, or the event behind it."""
        steps, index = self.recording.warps[warp], self.at[warp]
        if index == len(steps):
            return
        step = steps[index]
        if self.pieces[warp] < 0:
            self.pieces[warp] = -(-int(step.work[0]) // QUANTUM)
            slow = self.timing.beside_products if self.recording.roles[warp] == "consumer" else 1.0
            self.share[warp] = step.work * (slow, *[1.0] * (len(PIPES) - 1)) / max(1, self.pieces[warp])
            self.alone[warp] = slow * self.recording.stalls.get(self.recording.roles[warp], 1.0) * step.work[0] / max(1, self.pieces[warp])
            self.port_share[warp] = step.port / self.timing.smem_bytes_a_cycle / max(1, self.pieces[warp])
        if self.pieces[warp]:
            self.work(warp)
        elif step.kind == "wait" and self.missing[step.edges[0]]:
            self.sleepers[step.edges[0]].append(warp)
            return
        else:
            self.at[warp], self.pieces[warp] = index + 1, -1
            lag = sum(getattr(self.timing, name) * count for name, count in step.lags.items())
            self.now[warp] = self.now[warp].then(lag, f"{self.recording.roles[warp]}: latencies")
            self.event(warp, step)
        self.schedule(self.now[warp].time, warp)

    def work(self, warp: int) -> None:
        """Serve one piece of the step's instructions."""
        role, cta = self.recording.roles[warp], warp // self.recording.warps_per_cta
        begin, needs = self.now[warp], [(pipe, float(c)) for pipe, c in zip(PIPES, self.share[warp], strict=True) if c]
        over = [self.pipes[cta, warp % SCHEDULERS, pipe].serve(begin, cycles, f"{role}: {pipe}") for pipe, cycles in needs]
        if self.port_share[warp]:
            over.append(self.pipes[cta, "smem"].serve(begin, self.port_share[warp], "shared-memory port"))
        self.now[warp] = later(*over, begin.then(self.alone[warp], f"{role}: latencies"))
        self.busy[role].update(dict(needs))
        self.pieces[warp] -= 1
        self.note(warp, begin.time, "it issues")

    def event(self, warp: int, step: Step) -> None:
        cta = warp // self.recording.warps_per_cta
        if step.kind == "wait":
            last, who = self.arrived[step.edges[0]]
            begin = self.now[warp].time
            if last.time + self.timing.barrier > begin:
                self.now[warp] = last.then(self.timing.barrier, "barriers")
                self.waits[self.recording.roles[warp]][who] += self.now[warp].time - begin
                self.note(warp, begin, f"it waits for {who}")
        elif step.kind == "arrive":
            moment = self.now[warp]
            self.arrive(step, moment.then(self.timing.remote, "barriers") if step.is_remote else moment, self.recording.roles[warp])
        elif step.kind in ("mma", "commit"):
            self.give(("tensor core", cta), warp, step)
        elif step.kind in ("wgmma", "wgmma commit"):
            self.give(("tensor core", cta, warp % SCHEDULERS), warp, step)
        elif step.kind == "copy":
            self.give(("copies", cta), warp, step)
        elif step.kind == "store":
            self.give(("stores", cta), warp, step)

    def note(self, warp: int, begin: float, what: str) -> None:
        if self.recording.roles[warp] == "mma" and warp < self.recording.warps_per_cta:
            self.issuer.append((begin, self.now[warp].time, what))

    def arrive(self, step: Step, moment: Moment, who: str) -> None:
        for edge in step.edges:
            self.missing[edge] -= 1
            if edge not in self.arrived or self.arrived[edge][0].time <= moment.time:
                self.arrived[edge] = (moment, who)
            if not self.missing[edge]:
                for warp in self.sleepers.pop(edge, []):
                    self.schedule(max(self.arrived[edge][0].time, self.now[warp].time), warp)

    # -- engines ------------------------------------------------------------------------------------------------

    def give(self, name: tuple[object, ...], warp: int, step: Step) -> None:
        engine = self.engines[name]
        engine.queue.append((self.now[warp], warp, step))
        if len(engine.queue) == 1:
            self.schedule(max(engine.now.time, self.now[warp].time), name)

    def serve(self, name: object) -> None:
        """The engine's next product, commit or piece of a copy."""
        engine = self.engines[name]  # type: ignore[index]
        issued, warp, step = engine.queue[0]
        ready = later(issued, engine.now)
        if step.kind in ("copy", "store"):
            over = self.copy_piece(engine, step, ready)
        else:
            over = True
            if step.kind in ("mma", "wgmma"):
                engine.now = self.multiply(step, ready)
                engine.drain = self.drain(step)
                engine.ends[warp] = engine.now
            else:
                ready = later(issued, engine.ends.get(warp, START))
                self.arrive(step, ready.then(max(0.0, engine.drain - self.timing.barrier), "tensor core pipeline"), "tensor core")
        if over:
            engine.queue.popleft()
        if engine.queue:
            self.schedule(later(engine.queue[0][0], engine.now).time, name)

    def drain(self, step: Step) -> float:
        """From a product's end to the next instruction of who waits for it."""
        t = self.timing
        if self.in_pairs and len(step.flops) > 1:
            return t.pair_ts if step.is_ts else t.pair_ss
        return t.product_ts if step.is_ts else t.product_ss

    def multiply(self, step: Step, ready: Moment) -> Moment:
        """Run one product; the end."""
        ends = []
        for cta, flops in step.flops.items():
            cycles = flops / self.timing.flops_a_cycle * (SCHEDULERS if step.kind == "wgmma" else 1)  # a scheduler's part of the core
            self.pipes[cta, "tensor"].busy += cycles
            ends.append(ready.then(cycles, "tensor core"))
            ends.append(
                self.pipes[cta, "smem"].serve(ready, step.smem_bytes.get(cta, 0) / self.timing.smem_bytes_a_cycle, "shared-memory port")
            )
        if 0 in step.flops:
            self.products.append((ready.time, later(*ends).time))
        return later(*ends)

    def copy_piece(self, engine: Engine, step: Step, ready: Moment) -> bool:
        """Write one piece of a copy or read one of a store; whether it was the last."""
        ((cta, num_bytes),) = step.smem_bytes.items()
        engine.left = engine.left or num_bytes
        piece = min(engine.left, COPY_PIECE_BYTES)
        engine.left -= piece
        written = self.pipes[cta, "smem"].serve(ready, piece / self.timing.smem_bytes_a_cycle, "shared-memory port")
        engine.now = later(ready.then(piece / self.timing.copy_bytes_a_cycle, "copies"), written)
        if not engine.left and step.kind == "copy":
            self.arrive(step, engine.now.then(self.timing.copy_latency, "copy latency"), "copies")
        elif not engine.left:
            self.arrive(step, engine.now, "stores")
        return not engine.left

    # -- results ------------------------------------------------------------------------------------------------

    def times(self) -> Times:
        last = later(*self.now)
        critical: Counter[str] = Counter()
        moment = last
        while moment.before is not None:
            critical[moment.label] += moment.time - moment.before.time
            moment = moment.before
        tensor, smem = self.pipes[0, "tensor"].busy, self.pipes[0, "smem"].busy
        return Times(last.time, tensor, self.idle(), smem, dict(self.busy), dict(self.waits), critical)

    def idle(self) -> Counter[str]:
        """Gaps between the tensor core's products, by what the issuing warp did in them."""
        gaps: Counter[str] = Counter()
        doing = deque(sorted(self.issuer))
        for (_, end), (begin, _) in zip(self.products, self.products[1:], strict=False):
            while doing and doing[0][1] <= end:
                doing.popleft()
            for first, last, what in doing:
                if first >= begin:
                    break
                gaps[what] += min(begin, last) - max(end, first)
        return gaps
