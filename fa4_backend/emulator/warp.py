"""A warp: 32 lanes with their registers, what they wait for, and the loop between the native interpreter and the handlers in Python."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator import native_core as native
from fa4_backend.emulator.barrier_state import NamedBarrier
from fa4_backend.emulator.errors import Deadlock, EmulatorError, KernelFault, MemoryFault
from fa4_backend.emulator.lanes import LaneClocks
from fa4_backend.emulator.wgmma_registers import ProductRegisters

if TYPE_CHECKING:
    from fa4_backend.emulator.cta import Cta
    from fa4_backend.emulator.races import Races


class Warp:
    """32 lanes of one CTA; `state` is shared with the native loop."""

    def __init__(self, cta: Cta, index: int, registers: np.ndarray) -> None:
        program = cta.grid.program
        self.cta, self.index, self.program = cta, index, program
        self.races: Races | None = cta.cluster.races
        self.r = registers
        self.r64 = registers.reshape(-1).view(np.uint64)
        self.counts, self.skipped = np.zeros((2, len(program.code)), np.uint32)
        self.local = np.zeros((32, max(16, program.local_bytes)), np.uint8)
        threads = min(32, cta.num_threads - 32 * index)
        state = self.state = native.WarpState()
        state.regs, state.code, state.aux = registers.ctypes.data, program.code.ctypes.data, program.aux.ctypes.data
        state.skipped = self.skipped.ctypes.data
        state.counts, state.param, state.local = self.counts.ctypes.data, cta.grid.params.ctypes.data, self.local.ctypes.data
        state.cluster = ctypes.addressof(cta.cluster.state)
        state.param_bytes, state.local_bytes = cta.grid.params.size, program.local_bytes
        state.cta_rank = cta.rank
        state.warp_in_cluster = cta.rank * cta.num_warps + index
        state.alive = state.active = (1 << threads) - 1
        self.ptr = ctypes.addressof(state)
        self.actor = state.warp_in_cluster
        rng = cta.cluster.rng
        state.split = rng.getrandbits(32) | 1 if rng and rng.random() < 0.5 else 0
        self.exited = False
        self.ready = True
        self.exec = 0
        self.waiting_for: dict[int, tuple[str, bool]] = {}  # lane mask -> what it waits for, and whether it may time out
        self.waiting_lanes = 0
        self.timed_out = False
        self.yields = self.was_strong = False
        self.barrier_ticket: tuple[NamedBarrier, int] | None = None
        self.cluster_ticket: int | None = None
        self.num_registers = cta.grid.registers_per_thread
        self.num_register_moves, self.is_waiting_for_registers = 0, False
        self.bulk_groups: deque[BulkGroup] = deque()
        self.open_bulk_group: BulkGroup | None = None
        self.copy_groups: list[list[Callable[[], None]]] = []
        self.open_copies: list[Callable[[], None]] = []
        self.products = ProductRegisters(self)
        self.tmem_loads: list[tuple[int, np.ndarray, int]] = []  # loads that may not be over (race detector)
        self.clocks: LaneClocks
        self.seen_relaxed: list[tuple[int, np.ndarray]] = []  # lanes and what their relaxed waits would bring them; a fence acquires it
        self.unacquired: dict[object, dict[int, np.ndarray]] = {}  # what strong reads found, by address; a fence acquires it
        if self.races:
            self.races.start_warp(self)
        self.start_registers(threads)
        self.written = np.zeros(len(program.watched_registers), np.uint32)
        self.read_unwritten = np.zeros(len(program.watched), np.uint32)  # lanes, of each entry of `watched`
        if self.races and program.watched.size:
            state.watched, state.num_watched = program.watched.ctypes.data, len(program.watched)
            state.written, state.read_unwritten = self.written.ctypes.data, self.read_unwritten.ctypes.data

    def start_registers(self, threads: int) -> None:
        program, cta, grid = self.program, self.cta, self.cta.grid
        start = program.const_start
        self.r[:start] = 0xFFFFFFFF
        self.r[start:] = program.constants
        tid = np.arange(32, dtype=np.int64) + 32 * self.index
        bx, by, _ = grid.block
        lane = np.arange(32)
        values: dict[str, object] = {
            "%tid.x": tid % bx, "%tid.y": tid // bx % by, "%tid.z": tid // (bx * by), "%laneid": lane,
            "%warpid": self.index, "%nwarpid": 64, "%smid": cta.sm, "%nsmid": grid.num_sms, "%gridid": 0,
            "%lanemask_eq": 1 << lane, "%lanemask_lt": (1 << lane) - 1, "%lanemask_le": (2 << lane) - 1,
            "%lanemask_gt": ~((2 << lane) - 1), "%lanemask_ge": ~((1 << lane) - 1),
            "%dynamic_smem_size": grid.dynamic_smem, "%total_smem_size": grid.smem_bytes, "%aggr_smem_size": grid.smem_bytes,
            "%reserved_smem_offset_begin": 0, "%reserved_smem_offset_end": 1024, "%is_explicit_cluster": int(grid.explicit_cluster),
            "%cluster_ctarank": cta.rank, "%cluster_nctarank": cta.cluster.size,
        }  # fmt: skip
        clusters = [g // c for g, c in zip(grid.grid, grid.cluster, strict=True)]
        for i, axis in enumerate("xyz"):
            values[f"%ntid.{axis}"] = grid.block[i]
            values[f"%ctaid.{axis}"] = cta.ctaid[i]
            values[f"%nctaid.{axis}"] = grid.grid[i]
            values[f"%cluster_ctaid.{axis}"] = cta.ctaid[i] % grid.cluster[i]
            values[f"%cluster_nctaid.{axis}"] = grid.cluster[i]
            values[f"%clusterid.{axis}"] = cta.ctaid[i] // grid.cluster[i]
            values[f"%nclusterid.{axis}"] = clusters[i]
        for name, (slot, num_bytes) in program.specials.items():
            if name not in values:
                raise KernelFault(f"special register {name} is not modelled")
            self.set_slot(slot, num_bytes, values[name])
        for key, (slot, num_bytes) in program.symbols.items():
            self.set_slot(slot, num_bytes, self.symbol_value(key.rsplit(":", 1)[0]))

    def symbol_value(self, name: str) -> int:
        parameter = self.program.kernel.params.get(name)
        if parameter is not None:
            return self.cta.grid.params.ctypes.data + parameter.offset
        variable = self.program.kernel.variables[name]
        if variable.space == "shared":
            return self.cta.rank << 24 | variable.offset
        if variable.space == "local":
            return variable.offset
        return self.cta.grid.global_symbol(variable)

    def set_slot(self, slot: int, num_bytes: int, value: object) -> None:
        if num_bytes == 8:
            self.r64[slot * 16 : slot * 16 + 32] = np.asarray(value, np.int64).view(np.uint64) if not isinstance(value, int) else value
        else:
            self.r[slot] = np.asarray(value, np.int64) & 0xFFFFFFFF

    def executed(self, instructions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """How often each of some instructions ran in a lane at least."""
        return self.counts[instructions] - self.skipped[instructions]

    # -- for instruction handlers -------------------------------------------------------------------------------

    def lanes(self) -> list[int]:
        mask = self.exec
        if mask & (mask - 1) == 0:
            return [mask.bit_length() - 1]
        return [lane for lane in range(32) if mask >> lane & 1]

    def first_lane(self) -> int:
        return (self.exec & -self.exec).bit_length() - 1

    def one_lane(self, what: str) -> int:
        """The lane of an instruction that one thread must issue."""
        if self.exec & (self.exec - 1):
            raise KernelFault(f"{what} is issued by {self.exec.bit_count()} threads at once, expected one (elect.sync missing?)")
        return self.exec.bit_length() - 1

    def predicate(self, slot: int, lane: int) -> bool:
        return bool(int(self.r[slot, 0]) >> lane & 1)

    def set_predicate(self, slot: int, bits: int) -> None:
        self.r[slot, 0] = (int(self.r[slot, 0]) & ~self.exec | bits & self.exec) & 0xFFFFFFFF

    def wait(self, what: str, may_time_out: bool = False) -> None:
        """The running lanes must wait; the handler then returns True. Someone calls `wake(waiting_lanes)` later."""
        self.waiting_lanes = self.state.active
        self.waiting_for[self.waiting_lanes] = (what, may_time_out)

    def wake(self, lanes: int) -> None:
        if self.waiting_for.pop(lanes, None) is None:
            return
        self.state.parked &= ~lanes & 0xFFFFFFFF
        if not self.ready:
            self.ready = True
            self.cta.cluster.ready.append(self)

    def place(self, pc: int | None = None, lane: int | None = None) -> str:
        pc = self.state.pc if pc is None else pc
        who = f"kernel {self.program.name[:80]}, {self.cta.name}, warp {self.index}"
        return f"{who}{'' if lane is None else f', lane {lane}'}, {self.program.describe(pc)}"

    def submit_copy(self, operation: Callable[[], None]) -> None:
        """A cp.async of the open group: done at once, or with a seed when something waits for it."""
        if self.cta.cluster.rng is None:
            operation()
        else:
            self.open_copies.append(operation)

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, quantum: int) -> None:
        """Run until the warp exits, waits, or has used `quantum` instructions."""
        state, handlers, ptr = self.state, self.program.handlers, self.ptr
        self.was_strong = False
        emu_run = native.core().emu_run
        cluster = self.cta.cluster
        end = state.steps + quantum
        while True:
            event = emu_run(ptr, end - state.steps)
            if event == native.EV_HANDLER:
                pc = state.pc
                self.exec = state.exec
                try:
                    blocked = handlers[pc](self)  # type: ignore[misc]
                except EmulatorError as error:
                    if isinstance(error, KernelFault) and not error.place:
                        raise type(error)(error.message, self.place(pc, self.first_lane())) from None
                    raise
                if blocked:
                    state.steps -= 1
                    self.counts[pc] -= 1
                    if state.active == state.alive:
                        state.parked = state.active
                        state.active = 0
                        for lane in range(32):
                            state.lane_pc[lane] = pc
                        self.ready = False
                        return
                    if not native.core().emu_park(ptr):
                        self.ready = False
                        return
                else:
                    state.pc = pc + 1
                    if self.yields:
                        self.yields = False
                        return
                if cluster.rng is not None and cluster.pending and cluster.rng.random() < cluster.haste:
                    cluster.complete_one()
                if state.steps >= end:
                    return
            elif event == native.EV_WARP_SYNC:
                assert self.races
                self.races.synchronise(self, state.exec)
                if state.steps >= end:
                    return
            elif event == native.EV_STRONG:
                self.strong_access()
                if self.was_strong or state.steps >= end:
                    return
            elif event == native.EV_EXIT:
                self.finish()
                return
            elif event == native.EV_STEPS:
                return
            elif event == native.EV_ALL_PARKED:
                if self.waiting_for:
                    self.ready = False
                    return
                raise Deadlock("lanes of the warp wait for each other at different instructions", self.place())
            else:
                self.fault()

    def strong_access(self) -> None:
        """A strong access of global memory was made; its ordering lies where `native_ops.py` put it."""
        assert self.races
        self.exec = self.state.strong_mask
        row = self.program.code[self.state.pc_now]
        semantics = int(row["e"]) >> 4 if row["op"] == native.OP["ATOMIC"] else int(row["f"])
        self.races.in_global.strong_access(self, semantics)
        self.was_strong = self.cta.cluster.rng is not None

    def finish(self) -> None:
        self.exited, self.ready = True, False
        for operation in [o for group in self.copy_groups for o in group] + self.open_copies:
            operation()
        self.products.finish()
        self.report_unwritten()
        if self.bulk_groups or self.open_bulk_group:
            self.cta.at_exit(self)
        self.cta.cluster.warp_done(self)

    def report_unwritten(self) -> None:
        """Registers that were read before they were written."""
        for entry in self.program.watched[self.read_unwritten != 0]:
            name = self.program.kernel.registers[self.program.watched_registers[int(entry["register"])]].name
            where = f"warp {self.index}, {self.program.describe(int(entry['pc']))}"
            self.cta.grid.session.report.note("uninitialised", f"register {name} is read before it is written by {where}")

    def fault(self) -> None:
        state = self.state
        text = native.FAULTS[state.fault]
        place = self.place(state.pc, state.fault_lane)
        if state.fault >= native.FAULTS.index("trap"):
            raise KernelFault(text, place)
        space = native.SPACES[state.fault_space]
        address = f"{state.fault_bytes} bytes at {space} address {state.fault_address:#x}"
        if text == native.FAULTS[1]:
            address += f"; nearest buffer: {self.cta.grid.memory.nearest(state.fault_address)}"
        elif "shared" in text:
            address += f"; the CTA has {self.cta.grid.smem_bytes} bytes"
        raise MemoryFault(f"{text}: {address}", place)


class BulkGroup:
    """Bulk asynchronous operations committed together by one warp."""

    __slots__ = ("epoch", "reads_left", "waiters", "writes_left")

    def __init__(self) -> None:
        self.reads_left = self.writes_left = 0
        self.waiters: list[tuple[Warp, int]] = []
        self.epoch = 0
