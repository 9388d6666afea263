"""A timeline of an emulated kernel for people: who waits for whom, and what overlaps, as a Chrome or Perfetto trace.

Time is modelled, never measured: a warp instruction costs the cycles of `CYCLES`, a matrix product its flops over the arch's rate, a copy a
latency and its bytes over a rate; a wait ends when the last of what it waits for is done. Warps do not compete for issue slots, so the
picture is that of a machine without contention: right about dependences, kind about time.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fa4_backend.emulator.races import Access, Races

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cluster, Cta
    from fa4_backend.emulator.warp import Warp

# Cycles of a warp instruction on its scheduler. MUFU: 16 lanes a clock and SM on sm_90 and sm_100 (CUDA programming guide, throughput of
# native arithmetic instructions), so 8 a scheduler's warp; conversions to 16 bits run at half rate.
CYCLES = (("ex2.", 8), ("lg2.", 8), ("rcp.", 8), ("rsqrt.", 8), ("sqrt.", 8), ("sin.", 8), ("cos.", 8), ("tanh.", 8), ("cvt.rn.", 2))
FLOPS_A_CYCLE = {"sm_90a": 4096, "sm_100a": 8192, "sm_103a": 8192}  # dense 16-bit, one SM
COPY_LATENCY, COPY_BYTES_A_CYCLE = 600, 64
# What a stretch of work is called: the first row whose opcode it executed.
PHASES = (
    ("ex2.", "softmax: exp2"),
    ("add.rm.", "softmax: exp2 on FMA"),
    ("tcgen05.st", "TMEM store"),
    ("tcgen05.ld", "TMEM load"),
    ("tcgen05.mma", "issue MMA"),
    ("wgmma", "issue MMA"),
    ("mma.sync", "MMA"),
    ("cp.async", "issue copies"),
    ("stmatrix", "store O"),
    ("st.global", "store"),
    ("mul.", "scale"),
)
ROLES = (
    ("ex2.", "softmax"),
    ("tcgen05.mma", "mma"),
    ("cp.async.bulk.tensor", "copy"),
    ("cp.async", "load"),
    ("tcgen05.ld", "correction"),
    ("st.global", "store"),
)


@dataclass
class Trace:
    """Events of every launch of a session; give it to `session(trace=...)`, then `save`."""

    events: list[dict[str, Any]] = field(default_factory=list)
    num_clusters: int = 0

    def races(self, cluster: Cluster) -> Races:
        """The race detector that fills this timeline."""
        return TimedRaces(cluster, self)

    def save(self, path: Path) -> None:
        """Write JSON that ui.perfetto.dev and chrome://tracing open."""
        data = {"traceEvents": self.events, "otherData": {"time": "modelled cycles, one a microsecond of the viewer; not measured"}}
        path.write_text(json.dumps(data))

    def slice(self, name: str, start: float, end: float, process: int, row: int, **details: Any) -> None:
        if end > start:
            event = {"name": name, "ph": "X", "ts": round(start, 1), "dur": round(end - start, 1), "pid": process, "tid": row}
            self.events.append(event | ({"args": details} if details else {}))

    def label(self, process: int, name: str, rows: dict[int, str]) -> None:
        self.events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}})
        for order, (row, text) in enumerate(rows.items()):
            self.events.append({"name": "thread_name", "ph": "M", "pid": process, "tid": row, "args": {"name": text}})
            self.events.append({"name": "thread_sort_index", "ph": "M", "pid": process, "tid": row, "args": {"sort_index": order}})


class TimedRaces(Races):
    """The race detector that also keeps a clock of modelled cycles for every warp, barrier and engine of a cluster."""

    def __init__(self, cluster: Cluster, trace: Trace) -> None:
        super().__init__(cluster)
        self.trace = trace
        program = cluster.grid.program
        self.opcodes = [i.opcode for i in program.kernel.instructions]
        self.cycles = np.ones(len(program.code))
        for index, opcode in enumerate(self.opcodes):
            self.cycles[index] = next((c for start, c in CYCLES if opcode.startswith(start)), 1)
        self.flops_a_cycle = FLOPS_A_CYCLE[cluster.grid.session.arch]
        self.waited = np.zeros(cluster.num_warps)
        self.told = np.zeros(cluster.num_warps)  # until when a warp's row is drawn
        self.seen = [np.zeros(len(program.code), np.int64) for _ in range(cluster.num_warps)]
        self.arriving: dict[int, float] = {}  # edge -> latest arrival of the open phase
        self.complete_at: dict[int, float] = {}  # edge -> when its last complete phase was complete
        self.tensor_free = self.copy_free = 0.0
        self.flops_seen = cluster.grid.session.report.tensor_flops
        self.mma_issued: float | None = None
        self.copies: dict[int, list[float]] = {}  # access -> issue time, bytes
        self.commits: dict[int, float] = {}
        self.groups: dict[int, list[float]] = {}  # warp -> when each wgmma group is done
        self.first_process = trace.num_clusters * 64
        trace.num_clusters += 1

    # -- clocks -------------------------------------------------------------------------------------------------

    def now(self, warp: Warp) -> float:
        return float(warp.counts[: self.cycles.size] @ self.cycles) + float(self.waited[warp.actor])

    def row(self, warp: Warp) -> tuple[int, int]:
        return self.first_process + warp.cta.rank, warp.index

    def work_until(self, warp: Warp, time: float) -> None:
        """Draw what the warp did since its last event."""
        counts = warp.counts.astype(np.int64)
        done = counts[: len(self.opcodes)] - self.seen[warp.actor][: len(self.opcodes)]
        self.seen[warp.actor] = counts
        executed = {self.opcodes[i]: int(done[i]) for i in np.flatnonzero(done)}
        name = next((phase for start, phase in PHASES if any(o.startswith(start) for o in executed)), "control")
        self.trace.slice(name, float(self.told[warp.actor]), time, *self.row(warp), instructions=int(done.sum()))
        self.told[warp.actor] = time

    def wait_until(self, warp: Warp, time: float, what: str) -> None:
        now = self.now(warp)
        if time <= now:
            return
        self.work_until(warp, now)
        self.trace.slice(f"wait: {what}", now, time, *self.row(warp))
        self.waited[warp.actor] += time - now
        self.told[warp.actor] = time

    def arrived(self, edge: Any, time: float) -> None:
        self.arriving[id(edge)] = max(self.arriving.get(id(edge), 0.0), time)

    # -- edges --------------------------------------------------------------------------------------------------

    def release(self, warp: Warp, edge: Any, lanes: int, relaxed: bool = False) -> None:
        super().release(warp, edge, lanes, relaxed)
        self.arrived(edge, self.now(warp))

    def snapshot(self, edge: Any) -> np.ndarray:
        self.complete_at[id(edge)] = self.arriving.pop(id(edge), 0.0)
        return super().snapshot(edge)

    def acquire(self, warp: Warp, edge: Any, lanes: int, relaxed: bool = False) -> None:
        super().acquire(warp, edge, lanes, relaxed)
        what = f"mbarrier {edge.offset:#x}" if hasattr(edge, "offset") else f"barrier {edge.index}"
        self.wait_until(warp, self.complete_at.get(id(edge), 0.0), what)

    # -- engines ------------------------------------------------------------------------------------------------

    def settle_mma(self, process: int) -> None:
        """Give the product issued last its time on the tensor core: its flops are known only after it ran."""
        total = self.cluster.grid.session.report.tensor_flops
        if self.mma_issued is not None and total > self.flops_seen:
            start = max(self.tensor_free, self.mma_issued)
            self.tensor_free = start + (total - self.flops_seen) / self.flops_a_cycle
            self.trace.slice("MMA", start, self.tensor_free, process, 1000, flops=total - self.flops_seen)
        self.flops_seen, self.mma_issued = total, None

    def issue_mma(self, warp: Warp, pipeline: object = None) -> Access:
        self.settle_mma(self.first_process)
        self.mma_issued = self.now(warp)
        return super().issue_mma(warp, pipeline)

    def issue_commit(self, warp: Warp) -> Access:
        self.settle_mma(self.first_process)
        access = super().issue_commit(warp)
        self.commits[id(access)] = max(self.tensor_free, self.now(warp))
        return access

    def issue_wgmma(self, warp: Warp) -> Access:
        self.settle_mma(self.first_process)
        self.mma_issued = self.now(warp)
        return super().issue_wgmma(warp)

    def commit_wgmma(self, warp: Warp) -> None:
        self.settle_mma(self.first_process)
        self.groups.setdefault(warp.actor, []).append(self.tensor_free)
        super().commit_wgmma(warp)

    def wait_wgmma(self, warp: Warp, allowed: int) -> None:
        super().wait_wgmma(warp, allowed)
        done = self.groups.get(warp.actor, [])
        if len(done) > allowed:
            self.wait_until(warp, done[len(done) - allowed - 1], "wgmma")

    def issue_copy(self, warp: Warp, barrier: Any) -> Access:
        access = super().issue_copy(warp, barrier)
        self.copies[id(access)] = [self.now(warp), 0.0]
        return access

    def smem_chunks(self, access: Access, cta: Cta, chunks: np.ndarray, write: bool) -> None:
        super().smem_chunks(access, cta, chunks, write)
        if id(access) in self.copies:
            self.copies[id(access)][1] += 16 * np.size(chunks)

    def complete(self, access: Access, barrier: Any) -> None:
        super().complete(access, barrier)
        if id(access) in self.commits:
            self.arrived(barrier, self.commits.pop(id(access)))
        elif id(access) in self.copies:
            issued, num_bytes = self.copies.pop(id(access))
            start = max(self.copy_free, issued)
            self.copy_free = start + num_bytes / COPY_BYTES_A_CYCLE
            self.trace.slice("copy", start, self.copy_free, self.first_process + barrier.cta.rank, 1001, bytes=int(num_bytes))
            self.arrived(barrier, self.copy_free + COPY_LATENCY)

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self.handle:
            self.settle_mma(self.first_process)
            for cta in self.cluster.ctas:
                rows = {}
                for warp in cta.warps:
                    self.work_until(warp, self.now(warp))
                    rows[warp.index] = f"{self.role(warp)}: warp {warp.index}"
                rows = dict(sorted(rows.items(), key=lambda item: (item[1].split(":")[0], item[0])))
                rows |= {1000: "tensor core", 1001: "copy engine (TMA)"}
                name = f"{self.cluster.grid.program.name[:40]} {cta.name} (modelled cycles)"
                self.trace.label(self.first_process + cta.rank, name, rows)
        super().close()

    def role(self, warp: Warp) -> str:
        executed = Counter({self.opcodes[i]: int(warp.counts[i]) for i in np.flatnonzero(warp.counts[: len(self.opcodes)])})
        return next((role for start, role in ROLES if any(o.startswith(start) for o in executed)), "idle")
