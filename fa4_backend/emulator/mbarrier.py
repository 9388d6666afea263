"""Instructions of mbarrier objects. PTX ISA 9.0, 9.7.13.16 (mbarrier), 5.5 of the memory model for what arrive and wait order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fa4_backend.emulator.barrier_state import MAX_COUNT, MBarrier
from fa4_backend.emulator.builder import Builder
from fa4_backend.emulator.errors import BarrierMisuse, UnsupportedInstruction
from fa4_backend.emulator.opcodes import Handler, Modifiers, handles
from fa4_backend.emulator.syntax import Address, Immediate, Instruction, Operand, Register, Sink

if TYPE_CHECKING:
    from fa4_backend.emulator.warp import Warp

Reader = Callable[["Warp", int], int]


def find_barrier(warp: Warp, address: int, asynchronous: bool = False) -> MBarrier:
    """The barrier at a shared address; `asynchronous`: a TMA copy or a commit will signal it."""
    cta = warp.cta.cluster.cta_at(address)
    barrier = cta.mbarriers.get(address & 0xFFFFFF)
    if barrier is None:
        raise BarrierMisuse(f"no mbarrier was initialised at {cta.name} smem+{address & 0xFFFFFF:#x}")
    if warp.races:
        warp.races.check_init(warp, barrier, asynchronous)
        if cta is not warp.cta and not asynchronous:
            warp.races.remote_access(warp, cta)
    return barrier


def value_reader(b: Builder, operand: Operand) -> Reader:
    """Reader of an unsigned 32-bit operand for one lane."""
    if isinstance(operand, Immediate):
        value = operand.bits & 0xFFFFFFFF
        return lambda warp, lane: value
    slot = b.u32(operand)
    return lambda warp, lane: int(warp.r[slot, lane])


def values_reader(b: Builder, operand: Operand) -> Callable[[Warp], list[int]]:
    """Reader of an unsigned 32-bit operand for all 32 lanes."""
    if isinstance(operand, Immediate):
        values = [operand.bits & 0xFFFFFFFF] * 32
        return lambda warp: values
    slot = b.u32(operand)
    return lambda warp: warp.r[slot].tolist()


def _barriers(warp: Warp, lanes: list[int], addresses: list[int]) -> list[MBarrier]:
    """The barriers that these lanes name, each looked up once; `addresses` are those of all 32 lanes."""
    wanted = [addresses[lane] for lane in lanes]
    found = {address: find_barrier(warp, address) for address in dict.fromkeys(wanted)}
    return [found[address] for address in wanted]


def value_reader_16(b: Builder, operand: Operand) -> Reader:
    """Reader of an unsigned 16-bit operand for one lane."""
    if isinstance(operand, Immediate):
        value = operand.bits & 0xFFFF
        return lambda warp, lane: value
    slot = b.source(operand, "u16")
    return lambda warp, lane: int(warp.r[slot, lane]) & 0xFFFF


def _scope(mods: Modifiers) -> bool:
    """Take what may follow the name of an mbarrier instruction; whether it is relaxed."""
    relaxed = "relaxed" in mods.parts
    mods.has("release", "acquire", "relaxed")
    mods.has("cta", "cluster")
    mods.has("shared", "shared::cta", "shared::cluster")
    mods.one("b64")
    mods.done()
    return relaxed


def _by_barrier(lanes: list[int], barriers: list[MBarrier]) -> list[tuple[MBarrier, int]]:
    """Each barrier with the lanes that name it."""
    masks: dict[MBarrier, int] = {}
    for lane, barrier in zip(lanes, barriers, strict=True):
        masks[barrier] = masks.get(barrier, 0) | 1 << lane
    return list(masks.items())


@handles("mbarrier.init")
def _init(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.13.16.9"""
    _scope(mods)
    where, count = b.smem_address(ins.operands[0]), value_reader(b, ins.operands[1])

    def handler(warp: Warp) -> None:
        for lane in warp.lanes():
            address, number = where(warp, lane), count(warp, lane)
            cta = warp.cta
            if address >> 24 != cta.rank or address & 7:
                raise BarrierMisuse(f"mbarrier.init at {address:#x}: not an 8-byte aligned address of this CTA")
            if not 1 <= number <= MAX_COUNT:
                raise BarrierMisuse(f"mbarrier.init with count {number}, expected 1 to {MAX_COUNT}")
            offset = address & 0xFFFFFF
            known = cta.mbarriers.get(offset)
            if known is not None:
                raise BarrierMisuse(f"mbarrier.init over {known}, which mbarrier.inval did not end")
            barrier = cta.mbarriers[offset] = MBarrier(cta, offset, number)
            if warp.races:
                warp.races.initialised(warp, barrier, lane)
            cta.write_smem(offset, (0).to_bytes(8, "little"), warp, lane)
            if warp.races:
                warp.races.set_barrier(barrier, live=True)

    return handler


@handles("mbarrier.inval")
def _inval(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.13.16.10"""
    _scope(mods)
    where = b.smem_address(ins.operands[0])

    def handler(warp: Warp) -> None:
        for lane in warp.lanes():
            barrier = find_barrier(warp, where(warp, lane))
            if barrier.waiters:
                raise BarrierMisuse(f"mbarrier.inval while warps wait: {barrier}")
            del barrier.cta.mbarriers[barrier.offset]
            if warp.races:
                warp.races.set_barrier(barrier, live=False)

    return handler


def _state_writer(b: Builder, operand: Operand) -> Callable[[Warp, int, int], None] | None:
    if isinstance(operand, Sink):
        return None
    slot = b.dest(operand, "u64")

    def write(warp: Warp, lane: int, state: int) -> None:
        warp.r64[slot * 16 + lane] = state

    return write


def _arrival(
    b: Builder, operands: tuple[Operand, ...]
) -> tuple[Callable[[Warp, int, int], None] | None, Callable[[Warp], list[int]], Reader | None]:
    """(state writer, addresses of all lanes, third operand): the state result is left out by remote arrivals and by the short form."""
    write = None
    if not isinstance(operands[0], Address):
        write, operands = _state_writer(b, operands[0]), operands[1:]
    return write, b.smem_addresses(operands[0]), value_reader(b, operands[1]) if len(operands) > 1 else None


@handles("mbarrier.arrive", "mbarrier.arrive_drop")
def _arrive(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.13.16.13 mbarrier.arrive, 9.7.13.16.14 mbarrier.arrive_drop"""
    drop = "arrive_drop" in ins.opcode
    expect, no_complete = mods.has("expect_tx"), mods.has("noComplete")
    relaxed = _scope(mods)
    write, where, third = _arrival(b, ins.operands)

    def handler(warp: Warp) -> None:
        lanes = warp.lanes()
        barriers = _barriers(warp, lanes, where(warp))
        if warp.races:
            for barrier, some in _by_barrier(lanes, barriers):
                warp.races.release(warp, barrier, some, relaxed)
        for lane, barrier in zip(lanes, barriers, strict=True):
            amount = third(warp, lane) if third else None
            count, tx = (1, amount or 0) if expect else (1 if amount is None else amount, 0)
            if write:
                write(warp, lane, barrier.phase & 0xFFFFFFFF | barrier.pending << 32)
            if no_complete and barrier.pending <= count:
                raise BarrierMisuse(f"mbarrier.arrive.noComplete would complete the phase: {barrier}")
            if drop:
                barrier.count -= count
            barrier.arrive(count, tx)

    return handler


@handles("mbarrier.expect_tx")
def _expect_tx(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.13.16.11"""
    _scope(mods)
    where, amount = b.smem_address(ins.operands[0]), value_reader(b, ins.operands[1])

    def handler(warp: Warp) -> None:
        for lane in warp.lanes():
            find_barrier(warp, where(warp, lane)).expect(amount(warp, lane))

    return handler


@handles("mbarrier.complete_tx")
def _complete_tx(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.13.16.12"""
    _scope(mods)
    where, amount = b.smem_address(ins.operands[0]), value_reader(b, ins.operands[1])

    def handler(warp: Warp) -> None:
        for lane in warp.lanes():
            barrier = find_barrier(warp, where(warp, lane))
            if warp.races:
                warp.races.release(warp, barrier, 1 << lane)
            barrier.complete_tx(amount(warp, lane))

    return handler


@handles("mbarrier.pending_count")
def _pending_count(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.13.16.17: of the state that an arrive returned."""
    mods.one("b64")
    mods.done()
    result, state = b.dest(ins.operands[0], "u32"), b.u64(ins.operands[1])

    def handler(warp: Warp) -> None:
        for lane in warp.lanes():
            warp.r[result, lane] = int(warp.r64[state * 16 + lane]) >> 32

    return handler


@handles("mbarrier.try_wait", "mbarrier.test_wait")
def _wait(b: Builder, ins: Instruction, mods: Modifiers) -> Handler:
    """9.7.13.16.16. try_wait suspends the warp until the phase completes; it gives up (false) when nothing else can
    happen, and with a seed now and then before: how long it waits is the hardware's choice."""
    suspends = ".try_wait" in ins.opcode
    parity = mods.has("parity")
    mods.has("shared::cta")
    relaxed = "relaxed" in mods.parts
    _scope(mods) if "b64" in mods.parts else mods.done()
    result = b.dest(ins.operands[0], "pred")
    where = b.smem_addresses(ins.operands[1])
    state = ins.operands[2]
    if parity:
        expected = values_reader(b, state)
    elif isinstance(state, Register):
        slot = b.u64(state)
        expected = lambda warp: warp.r64[slot * 16 : slot * 16 + 32].tolist()  # noqa: E731
    else:
        raise UnsupportedInstruction(f"{ins.opcode} with state {state!r}")
    phase_bits = 1 if parity else 0xFFFFFFFF

    def handler(warp: Warp) -> bool | None:
        lanes, phases = warp.lanes(), expected(warp)
        barriers = _barriers(warp, lanes, where(warp))
        passed = sum(1 << lane for lane, barrier in zip(lanes, barriers, strict=True) if (barrier.phase ^ phases[lane]) & phase_bits)
        if warp.races:
            for barrier, some in _by_barrier(lanes, barriers):
                if some & passed:
                    warp.races.acquire(warp, barrier, some & passed, relaxed)
        waiting = warp.exec & ~passed
        if waiting and suspends and not warp.timed_out and not warp.cta.cluster.gives_up():
            first = (waiting & -waiting).bit_length() - 1
            barrier = barriers[lanes.index(first)]
            warp.wait(f"{'parity ' + str(phases[first]) if parity else 'state'} of {barrier}", may_time_out=True)
            barrier.waiters.append((warp, warp.waiting_lanes))
            return True
        if waiting:
            warp.yields = True  # a failed poll ends the warp's turn
        warp.timed_out = False
        warp.set_predicate(result, passed)
        return None

    return handler
