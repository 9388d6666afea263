"""Who may touch the registers of a wgmma.mma_async, and when. PTX ISA 9.0, 9.7.15.5 and 9.7.15.7.

* From `wgmma.mma_async` to the `wgmma.wait_group` that completes its group, its accumulators and its A registers are the tensor core's:
  no other instruction may access them. A product that no `commit_group` covers is completed by no wait.
* An access before it must be ordered by a `wgmma.fence`, and a warp's first product needs one whatever came before.

The ISA exempts accumulators that products of one shape have in common. So are A registers that products have in common here: nothing
writes them, and a product wider than 256 columns is two instructions with one A.

Accesses are found by counting: every instruction that names one of the registers is known from the text, and how often a warp ran it is
counted anyway. So nothing is asked of the loop that runs register instructions.

With a random schedule the accumulators hold NaN until they are waited for, so that the data differ too.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from fa4_backend.emulator.syntax import Register, Vector

if TYPE_CHECKING:
    from fa4_backend.emulator.lowered_program import Program
    from fa4_backend.emulator.warp import Warp

POISON = 0xFFFFFFFF
_users: WeakKeyDictionary[Program, dict[int, np.ndarray]] = WeakKeyDictionary()


class InFlight(NamedTuple):
    """A product that may not be complete."""

    pc: int
    users: np.ndarray  # instructions that may not run meanwhile
    counts: np.ndarray  # how often each had run when the product was issued


class Pending(NamedTuple):
    """Accumulators whose values are withheld until group number `group` was waited for."""

    slots: np.ndarray
    values: np.ndarray
    group: int


def _registers(program: Program, pc: int) -> tuple[frozenset[int], frozenset[int]]:
    """Accumulators and A registers of the product at `pc`."""
    d, a = program.kernel.instructions[pc].operands[:2]
    return _indices(d), _indices(a) if isinstance(a, Vector) else frozenset()


def _indices(operand: object) -> frozenset[int]:
    assert isinstance(operand, Vector)
    return frozenset(item.index for item in operand.items if isinstance(item, Register))


def find_users(program: Program, pc: int) -> np.ndarray:
    """Instructions that may not run between a wgmma.fence and the product at `pc`, nor between the product and its wait."""
    accumulators, a_registers = _registers(program, pc)
    instructions = program.kernel.instructions
    users = set()
    for register in accumulators | a_registers:
        users.update(program.register_accesses.get(register, ()))
    for other in [u for u in users if instructions[u].opcode.startswith("wgmma.mma_async")]:
        other_accumulators, other_a = _registers(program, other)
        shared = (accumulators & other_a) | (a_registers & other_accumulators)
        if instructions[other].opcode != instructions[pc].opcode:
            shared |= accumulators & other_accumulators
        if not shared:
            users.discard(other)
    return np.array(sorted(users), np.int64)


class ProductRegisters:
    """The registers of one warp's products."""

    def __init__(self, warp: Warp) -> None:
        self.warp = warp
        self.fenced: np.ndarray | None = None  # counts of all instructions at the last wgmma.fence
        self.open: list[InFlight] = []
        self.groups: deque[list[InFlight]] = deque()
        self.num_groups = 0  # committed so far
        self.withheld: dict[bytes, Pending] = {}

    # -- order --------------------------------------------------------------------------------------------------

    def fence(self) -> None:
        if self.warp.races:
            self.fenced = self.warp.executed()

    def issue(self) -> None:
        """The warp stands at a wgmma.mma_async."""
        warp = self.warp
        if not warp.races:
            return
        pc = warp.state.pc
        known = _users.setdefault(warp.program, {})
        users = known[pc] = known[pc] if pc in known else find_users(warp.program, pc)
        counts = warp.executed(users)
        if self.fenced is None:
            self.report(f"no wgmma.fence came before\n  the warp's first product: {warp.place(pc)}")
        else:
            self.check(pc, users, self.fenced[users], "is accessed without a wgmma.fence before the product that uses it")
        self.open.append(InFlight(pc, users, counts))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []
        self.num_groups += 1

    def wait(self, allowed: int) -> None:
        """All but the newest `allowed` groups are complete."""
        while len(self.groups) > allowed:
            for product in self.groups.popleft():
                self.check_in_flight(product)
        self.hand_over(self.num_groups - allowed)

    def finish(self) -> None:
        """The warp exits: products that nothing waited for were in flight to the end."""
        for group in (*self.groups, self.open):
            for product in group:
                self.check_in_flight(product)

    def check_in_flight(self, product: InFlight) -> None:
        self.check(product.pc, product.users, product.counts, "is accessed before a wgmma.wait_group covers the product that uses it")

    def check(self, pc: int, users: np.ndarray, before: np.ndarray, what: str) -> None:
        ran = users[self.warp.executed(users) != before]
        if ran.size:
            program = self.warp.program
            self.report(f"a register {what}\n  access:  {program.describe(int(ran[0]))}\n  product: {self.warp.place(pc)}")

    def report(self, text: str) -> None:
        self.warp.cta.grid.session.report.note("race", text)

    # -- values -------------------------------------------------------------------------------------------------

    def read(self, slots: np.ndarray) -> np.ndarray:
        """Accumulators as the next product of a chain finds them."""
        pending = self.withheld.get(slots.tobytes())
        return self.warp.r[slots] if pending is None else pending.values

    def write(self, slots: np.ndarray, values: np.ndarray) -> None:
        if self.warp.cta.cluster.rng is None:
            self.warp.r[slots] = values
            return
        self.withheld[slots.tobytes()] = Pending(slots, values, self.num_groups)
        self.warp.r[slots] = POISON

    def hand_over(self, groups: int) -> None:
        """Write the accumulators of the first `groups` groups, in the order of their products."""
        for key in [key for key, pending in self.withheld.items() if pending.group < groups]:
            pending = self.withheld.pop(key)
            self.warp.r[pending.slots] = pending.values
