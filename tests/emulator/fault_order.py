"""Why a fault of order alone changes nothing: what the race detector says of stronger faults of the kind.

No such fault changes a value. The detector follows every access, so where it is silent the order that is left suffices, unless it does not
watch these accesses or takes them for ordered by itself. So each reason has two halves: under more schedules the fault stays silent; and
with all statements of its kind taken away, not this one alone, the detector does report the accesses that the statement is there for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

from fa4_backend import emulator
from fa4_backend.emulator.parser import parse_module
from fa4_backend.emulator.syntax import Instruction, Kernel
from fa4_backend.emulator.undefined import successors
from tests.emulator.fault_mutations import Mutant, one_statement_a_line
from tests.emulator.fault_targets import Target, planted

SEEDS = range(100, 110)
ACTS = re.compile(
    r"\b(ld|st|atom|red|cp|fence|stmatrix|ldmatrix|tcgen05|wgmma)\b[\w.:]*\.(?!param)|mbarrier\.(arrive|init|inval|expect|complete)"
)
WARP_SYNC, ARRIVES = re.compile(r"bar\.warp\.sync"), re.compile(r"mbarrier\.arrive(?!\.expect_tx)")
NEAR = 12  # instructions between a warp's synchronisation and the arrival that it is for


@functools.cache
def kernel_of(ptx: str) -> Kernel:
    """The first kernel of a text."""
    return next(iter(parse_module(ptx).values()))


def place(target: Target, mutant: Mutant) -> tuple[Kernel, int]:
    """The kernel of the mutant's line and the instruction there."""
    kernel = kernel_of(one_statement_a_line(target.ptx))
    return kernel, next(pc for pc, instruction in enumerate(kernel.instructions) if instruction.line == mutant.line)


def predecessors(kernel: Kernel) -> list[list[int]]:
    """Of each instruction, those that may run just before it."""
    before: list[list[int]] = [[] for _ in kernel.instructions]
    for pc in range(len(kernel.instructions)):
        for after in successors(kernel, pc):
            before[after].append(pc)
    return before


def reached(kernel: Kernel, starts: Iterable[int], leads_to: Callable[[int], Iterable[int]], ends: str) -> set[int]:
    """Instructions on all ways from `starts` to opcodes that begin with `ends`, a pattern."""
    found: set[int] = set()
    work = list(starts)
    while work:
        pc = work.pop()
        if pc not in found and not re.match(ends, kernel.instructions[pc].opcode):
            found.add(pc)
            work += leads_to(pc)
    return found


def lines_behind(kernel: Kernel, site: int, ends: str) -> set[int]:
    """Lines of the instructions from this one to the next of `ends`."""
    found = reached(kernel, successors(kernel, site), lambda pc: successors(kernel, pc), ends)
    return {kernel.instructions[pc].line for pc in found}


def before_it(kernel: Kernel, site: int) -> set[int]:
    """Instructions from the synchronisations before this one to this one."""
    before = predecessors(kernel)
    return reached(kernel, before[site], before.__getitem__, r"bar\.|barrier\.")


def acts_before(kernel: Kernel, site: int) -> list[Instruction]:
    """Of those, what other threads could see or be seen by."""
    return [kernel.instructions[pc] for pc in before_it(kernel, site) if ACTS.search(kernel.instructions[pc].text)]


@functools.cache
def raced_lines(target: Target, ptx: str) -> frozenset[int] | None:
    """Lines that races name in a run of the target with this text; None where it ends in an error."""
    with planted(target, ptx):
        try:
            report = target.run(None)[1]
        except emulator.EmulatorError:
            return None
    return frozenset(int(line) for race in report.races for line in re.findall(r"PTX line (\d+)", race))


def stays_silent(target: Target, ptx: str, seeds: Iterable[int] = SEEDS) -> bool:
    """No race, no error and no further schedule in which the text shows."""
    with planted(target, ptx):
        for seed in seeds:
            try:
                if target.run(seed)[1].races:
                    return False
            except emulator.EmulatorError:
                return False
    return True


def without(target: Target, pattern: re.Pattern[str], change: Callable[[str], str] = lambda _: "") -> str:
    """The target's text with every line that matches changed, or left out; numbers of lines stay."""
    return "\n".join(change(line) if pattern.search(line) else line for line in one_statement_a_line(target.ptx).split("\n"))


def relaxed(line: str) -> str:
    """An arrival that announces nothing."""
    line = line.replace("mbarrier.arrive.release", "mbarrier.arrive.relaxed")
    return re.sub(r"mbarrier\.arrive\.(shared|b64)", r"mbarrier.arrive.relaxed.cta.\1", line)


def lanes_are_ordered(target: Target, mutant: Mutant) -> str:
    """Of a dropped bar.warp.sync: what other lanes did before it, they race with if there is none in the kernel; or, before copies, not
    even then, since each lane waited for the buffer itself and bytes may come before they are announced."""
    kernel, site = place(target, mutant)
    raced, acts = raced_lines(target, without(target, WARP_SYNC)), acts_before(kernel, site)
    if raced is None or not stays_silent(target, mutant.ptx):
        return ""
    if raced & {act.line for act in acts}:
        return (
            f"another order covers it in {len(SEEDS)} more schedules; without any bar.warp.sync in the kernel, what stands before it races"
        )
    if any("complete_tx" in act.opcode for act in acts):
        return "bytes of copies may come before they are announced; without any bar.warp.sync in the kernel nothing before it races either"
    return ""


def arrival_is_covered(target: Target, mutant: Mutant) -> str:
    """Of an arrival made relaxed: what it announces races if all arrivals are relaxed."""
    kernel, site = place(target, mutant)
    sync = next((pc for pc in range(site, max(site - NEAR, 0), -1) if WARP_SYNC.search(kernel.instructions[pc].text)), site)
    lines = {act.line for start in {site, sync} for act in acts_before(kernel, start)}
    if not (raced_lines(target, without(target, ARRIVES, relaxed)) or frozenset()) & lines or not stays_silent(target, mutant.ptx):
        return ""
    return f"another order covers it in {len(SEEDS)} more schedules; with all arrivals of the kernel relaxed, what it announces races"


def met_since_the_stores(target: Target, mutant: Mutant) -> bool:
    """Of a proxy fence that one lane executes, or of other memory: since the lanes met they wrote nothing that it is for."""
    kernel, site = place(target, mutant)
    is_shared = "shared::cta" in mutant.text
    writes = re.compile(r"(st|atom|red)\.[\w.:]*shared|stmatrix" if is_shared else r"(st|atom|red)\.|stmatrix|ld\.acquire")
    return not any(writes.match(act.opcode) for act in acts_before(kernel, site))


def other_barriers_cover(target: Target, mutant: Mutant) -> str:
    """Of a dropped barrier: without any of its kind in the kernel, accesses on both sides of it race."""
    kernel, site = place(target, mutant)
    words = kernel.instructions[site].opcode
    raced = raced_lines(target, without(target, re.compile(re.escape(words) + r"\s"))) or frozenset()
    sides = {act.line for act in acts_before(kernel, site)}, lines_behind(kernel, site, r"bar\.sync|barrier\.")
    if not all(raced & side for side in sides) or not stays_silent(target, mutant.ptx):
        return ""
    return f"other barriers cover it in {len(SEEDS)} more schedules; without any {words}, what stands on both sides of it races"


def is_a_turn(target: Target, mutant: Mutant) -> bool:
    """Of a named barrier of two warpgroups: left out everywhere, nothing races, and the results are the same: it orders time alone."""
    words = " ".join(kernel_words(target, mutant).split())
    register = re.match(r"bar\.sync (%\w+), (\d+)", words)
    if register is None:
        return False
    text = without(target, re.compile(rf"bar\.(sync|arrive)\s+%\w+,\s*{register.group(2)}\s*;"))
    return raced_lines(target, text) == frozenset() and stays_silent(target, text)


def dependency_is_covered(target: Target, mutant: Mutant) -> str:
    """Of a wait for the kernel before that is left out: without any such wait, accesses behind it race with that kernel's."""
    case = target.second
    if case is None:
        return ""
    case.run(None)  # loads its kernels
    kernel, site = place(target, mutant)
    raced = raced_lines(case, without(case, re.compile(r"griddepcontrol\.wait"))) or frozenset()
    if not raced & lines_behind(kernel, site, r"bar\.|barrier\.|griddepcontrol") or not stays_silent(case, mutant.ptx):
        return ""
    return f"another warp's wait covers it in {len(SEEDS)} more schedules; without any, what stands behind it races with the kernel before"


def kernel_words(target: Target, mutant: Mutant) -> str:
    """The statement."""
    kernel, site = place(target, mutant)
    return kernel.instructions[site].text


def products_are_fenced(target: Target, mutant: Mutant) -> str:
    """Of a dropped wgmma.fence: the emulator counts the accesses since the last fence; without any fence it reports the next product."""
    kernel, site = place(target, mutant)
    raced = raced_lines(target, without(target, re.compile(r"wgmma\.fence"))) or frozenset()
    nearest = next((i.line for i in kernel.instructions[site:] if i.opcode.startswith("wgmma.mma_async")), 0)
    if "wgmma.fence" not in mutant.text or nearest not in raced or not stays_silent(target, mutant.ptx):
        return ""
    return f"an earlier wgmma.fence covers the product in {len(SEEDS)} more schedules; without any, the same product is reported"
