"""Named barriers, cluster barriers, fences, register reallocation and grid dependencies.

PTX ISA 9.0: 9.7.13.1 bar, barrier; 9.7.13.4 membar, fence; 9.7.13.14 griddepcontrol; 9.7.13.3 barrier.cluster; 9.7.18.5 setmaxnreg.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fa4_backend.emulator.barrier_state import NUM_NAMED_BARRIERS
from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import BarrierMisuse, KernelFault, UnsupportedInstruction
from fa4_backend.emulator.mbarrier import value_reader
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import Immediate, Instruction, Not, Operand

if TYPE_CHECKING:
    from fa4_backend.emulator.warp import Warp

Votes = list[tuple[int, int]]


@handles("bar", "barrier", aligned=True)
def _named(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    mods.has("cta")
    if mods.has("cluster"):
        return _cluster(ins, mods)
    action = mods.one("sync", "arrive", "red")
    mods.has("aligned")
    operands = list(ins.operands)
    reduction = _reduction(b, mods, operands) if action == "red" else None
    mods.done()
    index = value_reader(b, operands[0])
    threads = value_reader(b, operands[1]) if len(operands) > 1 else None

    def handler(warp: Warp) -> bool | None:
        lane = warp.first_lane()
        number = index(warp, lane)
        if number >= NUM_NAMED_BARRIERS:
            raise BarrierMisuse(f"barrier {number}: a CTA has {NUM_NAMED_BARRIERS}")
        barrier = warp.cta.barriers[number]
        if warp.barrier_ticket is not None:
            waited, generation = warp.barrier_ticket
            if waited.generation == generation:
                warp.wait(str(waited))
                waited.waiters.append((warp, warp.waiting_lanes))
                return True
            warp.barrier_ticket = None
            if warp.races:
                warp.races.acquire(warp, waited, warp.exec)
                warp.races.synchronise(warp, warp.exec)
            if reduction:
                reduction[1](warp, waited.result)
            return None
        generation = barrier.generation
        if reduction:
            barrier.votes.append(reduction[0](warp))
        barrier.arrive(warp, threads(warp, lane) if threads else warp.cta.num_warps * 32)
        if action == "arrive":
            return None
        warp.barrier_ticket = (barrier, generation)
        return handler(warp)

    return handler


def _reduction(
    b: Builder, mods: Modifiers, operands: list[Operand]
) -> tuple[Callable[[Warp], tuple[int, int]], Callable[[Warp, Votes], None]]:
    """bar.red: every warp votes with a predicate; the result goes to all. Takes its operands off the list."""
    operation = mods.one("popc", "and", "or")
    mods.one("u32", "pred")
    result = b.dest(operands.pop(0), "u32" if operation == "popc" else "pred")
    source = predicate_source(b, operands.pop())

    def vote(warp: Warp) -> tuple[int, int]:
        if isinstance(source, bool):
            return (warp.exec if source else 0), warp.exec
        bits = int(warp.r[source[0], 0])
        return (~bits if source[1] else bits) & warp.exec, warp.exec

    def write(warp: Warp, votes: Votes) -> None:
        count = sum(true.bit_count() for true, _ in votes)
        if operation == "popc":
            warp.r[result, warp.lanes()] = count
        else:
            total = sum(lanes.bit_count() for _, lanes in votes)
            warp.set_predicate(result, 0xFFFFFFFF if (count == total if operation == "and" else count > 0) else 0)

    return vote, write


def _cluster(ins: Instruction, mods: Modifiers) -> Handler:
    action = mods.one("arrive", "wait")
    mods.has("release", "relaxed", "acquire")
    relaxed = ".relaxed" in ins.opcode
    mods.has("aligned")
    mods.done()

    def arrive(warp: Warp) -> None:
        cluster = warp.cta.cluster
        if warp.cluster_ticket is not None:
            raise BarrierMisuse("barrier.cluster.arrive twice without a wait")
        warp.cluster_ticket = cluster.barrier_generation
        cluster.barrier_arrive(warp, releases=not relaxed)

    def wait(warp: Warp) -> bool | None:
        cluster = warp.cta.cluster
        if warp.cluster_ticket is None:
            raise BarrierMisuse("barrier.cluster.wait without an arrive")
        if cluster.barrier_generation == warp.cluster_ticket:
            warp.wait(f"barrier.cluster ({cluster.barrier_arrived} of {cluster.num_warps} warps arrived)")
            cluster.barrier_waiters.append((warp, warp.waiting_lanes))
            return True
        warp.cluster_ticket = None
        if warp.races:
            warp.races.acquire(warp, cluster.barrier_edge, warp.exec)
            warp.races.peers_started(warp)
        return None

    return arrive if action == "arrive" else wait


@handles("fence", "membar")
def _fence(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """fence.proxy.async makes generic writes visible to the asynchronous proxy; the others order only what they say."""
    known = {
        "proxy", "async", "async.shared::cta", "mbarrier_init", "release", "acquire", "acq_rel", "sc", "cluster", "cta", "gpu", "sys", "gl",
        "shared::cta", "shared::cluster", "global", "alias", "tensormap::generic",
        "sync_restrict::shared::cta", "sync_restrict::shared::cluster",
        "generic", "generic::tensormap", "async::generic",
    }  # fmt: skip
    unknown = [p for p in mods.parts if p not in known]
    if unknown:
        raise UnsupportedInstruction(f"{ins.opcode}: modifier .{' .'.join(unknown)}")
    is_proxy = "proxy" in mods.parts and "async" in mods.parts
    in_shared, in_global = {"shared::cta", "shared::cluster"} & set(mods.parts), "global" in mods.parts
    everywhere = not in_shared and not in_global
    is_init = "mbarrier_init" in mods.parts
    is_memory, of_cta = "proxy" not in mods.parts and "mbarrier_init" not in mods.parts, "cta" in mods.parts

    def handler(warp: Warp) -> None:
        if warp.races:
            if is_proxy:
                warp.races.proxy_fence(warp, shared=everywhere or bool(in_shared), in_global=everywhere or in_global)
            elif is_init:
                warp.races.barriers_fenced(warp)
            elif is_memory:
                warp.races.memory_fence(warp, of_cta)

    return handler


@handles("setmaxnreg", aligned=True)
def _setmaxnreg(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """Registers move between a warp and the pool of its CTA; `.inc` waits until the pool can give."""
    grow = mods.one("inc", "dec") == "inc"
    for part in ("sync", "aligned", "u32"):
        mods.one(part)
    mods.done()
    count = ins.operands[0]
    if not isinstance(count, Immediate):
        raise UnsupportedInstruction("setmaxnreg with a register operand")
    wanted = count.bits
    if wanted % 8 or not 24 <= wanted <= 256:
        raise KernelFault(f"setmaxnreg {wanted}: expected a multiple of 8 from 24 to 256")

    def handler(warp: Warp) -> bool | None:
        cta = warp.cta
        if not warp.is_waiting_for_registers:
            moves = cta.register_moves.setdefault(warp.index // 4, [])
            if warp.num_register_moves == len(moves):
                moves.append(wanted)
            elif moves[warp.num_register_moves] != wanted:
                theirs = moves[warp.num_register_moves]
                raise KernelFault(
                    f"setmaxnreg {wanted}: another warp of the warpgroup executed setmaxnreg {theirs}, all must execute the same"
                )
            warp.num_register_moves += 1
        warp.is_waiting_for_registers = False
        need = (wanted - warp.num_registers) * 32
        if (grow and need < 0) or (not grow and need > 0):
            raise KernelFault(f"setmaxnreg.{'inc' if grow else 'dec'} {wanted}: the warp holds {warp.num_registers} registers a thread")
        if need > cta.free_registers:
            warp.wait(f"setmaxnreg.inc {wanted}: the pool of {cta.name} has {cta.free_registers} registers, {need} needed")
            cta.register_waiters.append((warp, warp.waiting_lanes))
            warp.is_waiting_for_registers = True
            return True
        cta.free_registers -= need
        warp.num_registers = wanted
        if need < 0:
            waiters, cta.register_waiters = cta.register_waiters, []
            for other, lanes in waiters:
                other.wake(lanes)
        return None

    return handler


@handles("griddepcontrol")
def _griddepcontrol(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.13.14; what runs beside what is decided in `stream.py`."""
    action = mods.one("launch_dependents", "wait")
    mods.done()

    def handler(warp: Warp) -> bool | None:
        return warp.cta.grid.dependency(warp, action)

    return handler


def predicate_source(b: Builder, operand: object) -> tuple[int, bool] | bool:
    """A predicate operand: (slot, negated), or a constant."""
    if isinstance(operand, Immediate):
        return bool(operand.bits)
    if isinstance(operand, Not):
        return b.source(operand.operand, "pred"), True
    return b.source(operand, "pred"), False  # type: ignore[arg-type]
