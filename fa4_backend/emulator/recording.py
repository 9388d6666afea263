"""What the warps of a kernel did in one run, as steps that `replay` can give modelled times.

A step is the instructions that a warp issued since its last step, as cycles of each pipe, and then an event: an arrival, a wait, a matrix
product, a commit, a copy. Which phase of which barrier an event concerns is kept, so the steps can be put in another order in time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fa4_backend.emulator.issue_stalls import FALLBACK, disassembly, ratios_of
from fa4_backend.emulator.machine_counts import machine_block, ptx_block, unit_scales
from fa4_backend.emulator.machine_order import early_shares, reorder
from fa4_backend.emulator.races import Access, Races
from fa4_backend.emulator.recorded_step import Step

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cluster, Cta, Warp

WARPGROUP = 4  # warps
MATRIX_BYTES = 128  # of one 8 x 8 matrix of 16 bits
PIPES = ("issue", "mufu", "fma", "alu", "tmem")
# Cycles a warp instruction occupies its scheduler's share of a pipe, from lanes a clock and SM: MUFU 16 (32 on sm_103a), FMA 128, minimum,
# maximum, integer and conversions to 16 bits 64 (CUDA programming guide, "Throughput of Native Arithmetic Instructions"). A column of
# TMEM, 128 bytes a warp, takes one cycle: an assumption, since no rate is published.
MUFU = {"sm_90a": 8, "sm_100a": 8, "sm_103a": 4}
FMA, FMA_PACKED, ALU = 1, 2, 2
ARITHMETIC = ("fma", "add", "sub", "mul")
# Instructions whose result is waited for at once, and the field of `timing.Timing` that says for how long.
LAGS = {"shfl": "shuffle", "tcgen05.wait": "tensor_memory", "ld.": "far_memory", "atom.": "far_memory"}
# What a role is known by: the first row whose instruction one of its warps executed.
ROLES = (("wgmma", "consumer"), ("ex2.", "softmax"), ("tcgen05.mma", "mma"), ("cp.async.bulk.tensor", "load"), ("tcgen05.ld", "correction"))
FREE = ("mov", "cvta", "ld.param")  # the assembler removes nearly all of them
ISSUE_ONLY = (
    "ld",
    "st",
    "bra",
    "exit",
    "ret",
    "mbarrier",
    "bar",
    "barrier",
    "fence",
    "elect",
    "vote",
    "tcgen05",
    "cp",
    "setmaxnreg",
    "stmatrix",
    "ldmatrix",
)


def tmem_columns(opcode: str) -> int:
    """Columns of 32 lanes that a TMEM load or store moves: of shape 32x32b one a repetition, of 16x256b the bytes of four."""
    repeat = next((int(part[1:]) for part in opcode.split(".") if part[:1] == "x" and part[1:].isdigit()), 0)
    return repeat * (4 if ".16x256b." in opcode else 1)


def pipe_cycles(opcode: str, arch: str) -> tuple[int, ...]:
    """Cycles of each of PIPES that one warp instruction takes."""
    base = opcode.split(".")[0]
    if opcode.startswith(FREE):
        return (0, 0, 0, 0, 0)
    if opcode.startswith(("tcgen05.ld", "tcgen05.st")):
        return (1, 0, 0, 0, tmem_columns(opcode))
    if base in ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh"):
        return (1, MUFU[arch], 0, 0, 0)
    if opcode.startswith("cvt.f32.f16"):
        return (1, 0, FMA, 0, 0)  # ptxas makes it HADD2.F32
    if base in ARITHMETIC and ".f32" in opcode:
        return (1, 0, FMA_PACKED if ".f32x2" in opcode else FMA, 0, 0)
    return (1, 0, 0, 0 if base in ISSUE_ONLY else ALU, 0)


def lag(opcode: str) -> str:
    """Which of `timing.Timing`'s latencies a warp waits out at the instruction; "" for none."""
    if opcode.startswith(("ld.", "atom.")) and ".global" not in opcode:
        return ""
    return next((name for start, name in LAGS.items() if opcode.startswith(start)), "")


def port_bytes(opcode: str) -> int:
    """Bytes of shared memory that a warp's load or store reads or writes, of all 32 lanes."""
    parts = opcode.split(".")
    if parts[0] in ("stmatrix", "ldmatrix"):
        return MATRIX_BYTES * next(int(part[1:]) for part in parts if part in ("x1", "x2", "x4"))
    if parts[0] not in ("ld", "st") or not parts[-1][1:].isdigit() or not any(part.startswith("shared") for part in parts):
        return 0
    vector = next((int(part[1:]) for part in parts if part in ("v2", "v4")), 1)
    return 32 * vector * int(parts[-1][1:]) // 8


@dataclass
class Launches:
    """A recording of the first cluster of every launch of a session, in order; give it to `session(trace=...)`."""

    recordings: list[Recording] = field(default_factory=list)
    last: Any = None  # the launch that is being recorded

    def races(self, cluster: Cluster) -> Races:
        """The race detector that fills a launch's recording, or a plain one for its other clusters."""
        if cluster.grid is self.last:
            return Races(cluster)
        self.last = cluster.grid
        self.recordings.append(Recording())
        return RecordedRaces(cluster, self.recordings[-1])


@dataclass
class Recording:
    """Steps of the warps of the first cluster of a session's last launch; give it to `session(trace=...)`."""

    warps: list[list[Step]] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    warps_per_cta: int = 0
    stalls: dict[str, float] = field(default_factory=dict)  # role -> cycles that one warp alone takes an instruction (`issue_stalls.py`)

    def port_bytes(self) -> int:
        """Bytes of CTA 0's shared memory that its warps' own instructions read and write."""
        return sum(step.port for steps in self.warps[: self.warps_per_cta] for step in steps)

    def smem_bytes(self, kind: str) -> int:
        """Bytes of CTA 0's shared memory that products ("mma") read or copies ("copy") write."""
        return sum(step.smem_bytes.get(0, 0) for steps in self.warps for step in steps if step.kind == kind)

    def races(self, cluster: Cluster) -> Races:
        """The race detector that fills this recording."""
        return RecordedRaces(cluster, self)


class RecordedRaces(Races):
    """The race detector that also keeps every warp's steps."""

    def __init__(self, cluster: Cluster, recording: Recording) -> None:
        super().__init__(cluster)
        program, arch = cluster.grid.program, cluster.grid.session.arch
        self.opcodes = [i.opcode for i in program.kernel.instructions]
        self.cycles = np.array([pipe_cycles(opcode, arch) for opcode in self.opcodes], np.int64)
        self.port = np.array([port_bytes(opcode) for opcode in self.opcodes], np.int64)
        self.lags = {name: np.array([lag(opcode) == name for opcode in self.opcodes], np.int64) for name in set(LAGS.values())}
        self.seen = [np.zeros(len(self.opcodes), np.int64) for _ in range(cluster.num_warps)]
        self.numbers: dict[int, int] = {}  # id of a barrier -> its number
        self.kept: list[Any] = []  # so that no id is used twice
        self.open: dict[int, Step] = {}  # id of an access -> its step
        self.recording = recording
        self.report = cluster.grid.session.report
        self.product: tuple[Step, int] | None = None  # the wgmma issued last, and the report's flops before it
        self.groups = [0] * cluster.num_warps  # wgmma groups that each warp has committed
        self.storing: tuple[Access, Warp] | None = None  # a bulk store whose bytes are about to be named
        self.stores: set[tuple[int, ...]] = set()  # warp, instruction, its how manieth execution, first piece
        self.stored: set[tuple[int, int]] = set()  # edges of bulk groups that hold a store
        recording.warps = [[] for _ in range(cluster.num_warps)]

    def step(self, warp: Warp, kind: str) -> Step:
        counts = warp.counts[: len(self.opcodes)].astype(np.int64)
        done = counts - self.seen[warp.actor]
        self.seen[warp.actor] = counts
        steps = self.recording.warps[warp.actor]
        self.settle_wgmma()
        lags = {name: int(done @ mask) for name, mask in self.lags.items() if done @ mask}
        steps.append(Step(kind, done @ self.cycles, int(done @ self.port), lags=lags))
        return steps[-1]

    def settle_wgmma(self) -> None:
        """What the wgmma issued last took is known once it ran: its flops; a quarter of the operand bytes that its warp was seen to read,
        since the four warps of a warpgroup share one reading."""
        if self.product is None:
            return
        step, before = self.product
        (cta,) = step.smem_bytes
        step.flops[cta] = self.report.tensor_flops - before
        step.smem_bytes[cta] //= WARPGROUP
        self.product = None

    def phase(self, edge: Any) -> tuple[int, int]:
        """(number of the barrier, phase it is in)."""
        if id(edge) not in self.numbers:
            self.numbers[id(edge)] = len(self.numbers)
            self.kept.append(edge)
        if edge is self.cluster.barrier_edge:
            return self.numbers[id(edge)], self.cluster.barrier_generation
        return self.numbers[id(edge)], edge.phase if hasattr(edge, "phase") else edge.generation

    # -- events -------------------------------------------------------------------------------------------------

    def release(self, warp: Warp, edge: Any, lanes: int, relaxed: bool = False) -> None:
        super().release(warp, edge, lanes, relaxed)
        step = self.step(warp, "arrive")
        step.edges.append(self.phase(edge))
        step.is_remote = getattr(edge, "cta", warp.cta) is not warp.cta

    def acquire(self, warp: Warp, edge: Any, lanes: int, relaxed: bool = False) -> None:
        super().acquire(warp, edge, lanes, relaxed)
        number, phase = self.phase(edge)
        steps = self.recording.warps[warp.actor]
        if phase and not (steps and steps[-1].kind == "wait" and steps[-1].edges == [(number, phase - 1)]):
            self.step(warp, "wait").edges.append((number, phase - 1))

    def issue_mma(self, warp: Warp, pipeline: object = None) -> Access:
        access = super().issue_mma(warp, pipeline)
        self.open[id(access)] = self.step(warp, "mma")
        self.kept.append(access)
        return access

    def issue_commit(self, warp: Warp) -> Access:
        access = super().issue_commit(warp)
        self.open[id(access)] = self.step(warp, "commit")
        self.kept.append(access)
        return access

    def issue_wgmma(self, warp: Warp) -> Access:
        access = super().issue_wgmma(warp)
        self.open[id(access)] = step = self.step(warp, "wgmma")
        self.product = (step, self.report.tensor_flops)
        self.kept.append(access)
        return access

    def group(self, warp: Warp, index: int) -> tuple[int, int]:
        """The edge of a warp's wgmma group."""
        return -1 - warp.actor, index

    def commit_wgmma(self, warp: Warp) -> None:
        super().commit_wgmma(warp)
        self.step(warp, "wgmma commit").edges.append(self.group(warp, self.groups[warp.actor]))
        self.groups[warp.actor] += 1

    def wait_wgmma(self, warp: Warp, allowed: int) -> None:
        super().wait_wgmma(warp, allowed)
        if (done := self.groups[warp.actor] - allowed) > 0:
            self.step(warp, "wait").edges.append(self.group(warp, done - 1))

    def bulk_group(self, warp: Warp, epoch: int) -> tuple[int, int]:
        """The edge of a warp's bulk group, which ends when its stores have read their sources."""
        return -1 - self.cluster.num_warps - warp.actor, epoch

    def issue_bulk_read(self, warp: Warp) -> Access:
        access = super().issue_bulk_read(warp)
        self.storing = access, warp
        return access

    def store(self, access: Access, warp: Warp, cta: Cta, chunks: np.ndarray) -> None:
        """A bulk store. What all lanes of a warp store alike is one: the machine has one instruction for the warp, not one a lane."""
        pc = warp.state.pc
        key = warp.actor, pc, int(warp.counts[pc]), int(chunks.flat[0])
        if key not in self.stores:
            step = self.step(warp, "store")
            step.edges.append(self.bulk_group(warp, int(self.counters[access.actor])))
            step.smem_bytes[cta.rank] = 16 * np.size(chunks)
            self.stores.add(key)
            self.stored.add(step.edges[0])

    def acquire_bulk(self, warp: Warp, epoch: int, only_read: bool) -> None:
        super().acquire_bulk(warp, epoch, only_read)
        if (edge := self.bulk_group(warp, epoch)) in self.stored:
            self.step(warp, "wait").edges.append(edge)

    def issue_copy(self, warp: Warp, barrier: Any) -> Access:
        access = super().issue_copy(warp, barrier)
        step = self.open[id(access)] = self.step(warp, "copy")
        step.edges.append(self.phase(barrier))
        self.kept.append(access)
        return access

    def complete(self, access: Access, barrier: Any) -> None:
        super().complete(access, barrier)
        step = self.open.get(id(access))
        if step is not None and step.kind == "commit":
            step.edges.append(self.phase(barrier))

    def smem_chunks(self, access: Access, cta: Cta, chunks: np.ndarray, write: bool) -> None:
        super().smem_chunks(access, cta, chunks, write)
        if self.storing is not None and self.storing[0] is access:
            self.store(*self.storing, cta, chunks)
            self.storing = None
        step = self.open.get(id(access))
        if step is not None:
            step.smem_bytes[cta.rank] = step.smem_bytes.get(cta.rank, 0) + 16 * np.size(chunks)

    def tmem_access(self, access: Access, cta: Cta, groups: Any, column: int, columns: int, write: bool, read: bool = False) -> None:
        super().tmem_access(access, cta, groups, column, columns, write, read)
        step = self.open.get(id(access))
        if step is not None and not write:
            step.is_ts = True
        elif step is not None:
            # 16 lanes a group, and the 16 steps of the reduction of one 16-bit product.
            step.flops[cta.rank] = step.flops.get(cta.rank, 0) + 2 * 16 * len(groups) * columns * 16

    def close(self) -> None:
        if self.handle:
            self.settle_wgmma()
            for cta in self.cluster.ctas:
                for warp in cta.warps:
                    self.step(warp, "end")
                    self.recording.roles.append(self.role(warp))
            self.recording.warps_per_cta = self.cluster.ctas[0].num_warps
            self.follow_machine_code()
        super().close()

    def follow_machine_code(self) -> None:
        """What only the machine code says: how fast a warp of each role issues alone, in which order it computes and waits, and how many
        instructions a consumer of products has for each unit."""
        sass = disassembly(self.cluster.grid.cubin)
        ratios, early = ratios_of(sass), early_shares(sass)
        self.recording.stalls = {role: ratios.get(role, FALLBACK) for role in set(self.recording.roles)}
        if early is None:
            return
        consumers = [steps for steps, role in zip(self.recording.warps, self.recording.roles, strict=True) if role == "consumer"]
        for steps in consumers:
            reorder(steps, early, PIPES.index("mufu"))
        executed = sum(warp.counts[: len(self.opcodes)].astype(np.int64) for cta in self.cluster.ctas for warp in cta.warps)
        machine, ptx = machine_block(sass), ptx_block(self.cluster.grid.program.kernel, self.cycles, np.asarray(executed))
        if machine is not None and ptx is not None:
            scales, self.recording.stalls["consumer"] = unit_scales(machine[0], ptx), machine[1]
            for steps in consumers:
                for step in steps:
                    step.work = step.work * scales

    def role(self, warp: Warp) -> str:
        executed = [self.opcodes[i] for i in np.flatnonzero(warp.counts[: len(self.opcodes)])]
        return next((role for start, role in ROLES if any(opcode.startswith(start) for opcode in executed)), "other")
