"""Why a fault that no run showed changes nothing: each reason is proven, from the text or by runs of the right program."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

from fa4_backend import emulator
from fa4_backend.emulator.mbarrier import MBarrier
from fa4_backend.emulator.races import Races
from fa4_backend.emulator.syntax import Instruction, Kernel, Vector
from fa4_backend.emulator.undefined import registers_in, successors
from tests.emulator import fault_order as order
from tests.emulator.fault_mutations import WAIT, Mutant, one_statement_a_line
from tests.emulator.fault_order import ACTS, SEEDS, acts_before, place
from tests.emulator.fault_targets import Target, planted

NOT_MODELLED = "not modelled"
NOT_TOLD = "not told by the case"
# Faults of values alone: what they compute reaches no output of the case, which the emulator has computed as a GPU would.
VALUES = (
    "drop a move", "swap copy coordinates", "maximum as minimum", "minimum as maximum", "shuffle from elsewhere", "shuffle among 16",
    "vote all for any", "round towards zero", "global load 16 bytes on", "shared load 16 bytes on", "shared store 16 bytes on",
    "global store 16 bytes on", "drop shared store", "drop global store", "drop tensor memory store", "sum as difference",
    "difference as sum", "tensor memory columns on", "negate a product", "drop product",
)  # fmt: skip
STATIC_REASONS = re.compile(r"tcgen05\.(wait::ld|fence)")  # of these, the text alone tells


# What is missed, and why, by reading the code; these count as missed, since nothing proves it. Kernel (a pattern), kind, a pattern of the
# statement, why.
_SECOND_COUNTER = (
    "a second counter's acq_rel covers it, unless the last CTA counts itself there before the first has; no schedule drew that"
)
MISSED = (
    (
        r"sm_100a prefill",
        "drop wait",
        r"try_wait",
        "the load warp waits for the second query tile's buffer after the first's, and the commit that frees the first covers the "
        "products of both",
    ),
    (
        r"sm_90a",
        "drop barrier",
        r"bar\.sync %r\d+, 128",
        "the warpgroup met in its turn, when each warp had seen its last product of Q end",
    ),
    (r"schedule", "drop barrier", r"bar\.sync 0", "between what it orders stands a barrier before or behind it, a few instructions away"),
    (r"", "relax atomic", r"\.cas\.", _SECOND_COUNTER),
    (r"", "narrow an atomic", r"\.cas\.", _SECOND_COUNTER),
    (r"", "atomic only acquires", r"\.cas\.", _SECOND_COUNTER),
    (r"", "atomic only releases", r"\.cas\.", _SECOND_COUNTER),
    (
        r"sm_(90a prefill|90a step|100a step)",
        "drop warp sync",
        r"",
        "before it there are copies, and lanes that waited for the buffer themselves",
    ),
    (r"sm_100a decode", "drop warp sync", r"", "lanes that read the numbers of an entry met again before another is written"),
    (
        r"CTA pairs",
        "drop guard of an operation",
        r"arrive",
        "a ring of numbers of tiles that never is full: no wait blocks on these arrivals",
    ),
    (
        r"sm_100a",
        "relax arrive",
        r"",
        "frees numbers of a tile or a buffer of Q, which the rings of K and V do not let their writer reach before",
    ),
    (
        r"sm_90a prefill, parts",
        "relax arrive",
        r"",
        "few buffers are filled again in this case; with longer rows the same statement is found",
    ),
    (r"CTA pairs", "relax remote arrive", r"", "frees numbers of a tile, which the rings of K and V do not let their writer reach before"),
    (r"CTA pairs", "relax cluster barrier", r"", "inits were fenced before it, and nobody reads the address of all of tensor memory"),
    (r"FP8 K and V", "fence by another lane", r"", "what it is for was stored by rows that this case does not have"),
    (r"FP8 K and V", "fence the other memory", r"", "what it is for was stored by rows that this case does not have"),
    (r"(MLA|latent) decode", "fence by another lane", r"", "the parts it is for were acquired by all lanes' waits"),
    (r"FP8 latents", "wait at the next barrier", r"", "the next buffer is free whenever this one is, in this case"),
    (
        r"FP8 K and V",
        "arrive at a named barrier only",
        r"",
        "a turn of two warpgroups, which orders their time; its judgement did not end in time",
    ),
)


def why_missed(kernel: str, kind: str, text: str) -> str:
    """What inspection found about a fault that counts as missed."""
    found = (
        why for of, its, pattern, why in MISSED if its == kind and re.search(of, kernel) and re.search(pattern, " ".join(text.split()))
    )
    return next(found, "")


def vacuous(target: Target, mutant: Mutant) -> str:
    """The reason, or "" when none is known."""
    if why := by_the_text(target, mutant):
        return why
    for kinds, reason in BY_KIND:
        if mutant.kind in kinds and (why := reason(target, mutant)):
            return why
    if re.search(r"fence\.(acq_rel|sc)\.(gpu|sys)|membar", mutant.text) and atomics_order(target, mutant):
        return "the acq_rel of the atomics orders the same; with relaxed atomics there are races"
    return f"{NOT_TOLD}: what it computes reaches none of its outputs" if mutant.kind in VALUES else ""


def by_the_text(target: Target, mutant: Mutant) -> str:
    """Reasons that the text alone tells."""
    if "tcgen05.wait::ld" in mutant.text and mutant.kind.startswith("drop"):
        # flash-attn-4's sm100 kernels, right on silicon, have no wait::ld at all: ptxas orders the use of a result behind its load.
        return "the use of a loaded register waits for it"
    if "tcgen05.fence" in mutant.text:
        return f"{NOT_MODELLED}: tcgen05.fence (flash-attn-4's kernels, right on silicon, have none)"
    if "tcgen05.wait::st" in mutant.text and later_wait_covers(target, mutant):
        return "a later tcgen05.wait::st comes before anything is released"
    if "wgmma.fence" in mutant.text and other_fence_covers(target, mutant):
        return "on every path, another wgmma.fence stands between each access to its products' registers and the products"
    if dead_result(target, mutant):
        return "nothing reads what it computes"
    if mutant.kind == "read-only load":
        return "the launch writes nothing that it reads there: a read-only load of what it writes is a finding"
    return ""


def said_of(holds: Callable[[Target, Mutant], bool], why: str) -> Callable[[Target, Mutant], str]:
    """A reason with fixed words."""
    return lambda target, mutant: why if holds(target, mutant) else ""


def later_wait_covers(target: Target, mutant: Mutant) -> bool:
    """Another tcgen05.wait::st follows before anything that could tell others of the stores."""
    for line in one_statement_a_line(target.ptx).split("\n")[mutant.line :]:
        if "tcgen05.wait::st" in line:
            return True
        if re.search(r"mbarrier\.arrive|\bbar(rier)?\.(?!warp)|commit|\bbra\b|ret;", line):
            return False
    return False


def _walk(kernel: Kernel, start: int, goes_on: Callable[[Instruction], bool]) -> set[int]:
    """Instructions that can follow `start`, not past those where `goes_on` is false."""
    seen: set[int] = set()
    work = successors(kernel, start)
    while work:
        pc = work.pop()
        if pc not in seen:
            seen.add(pc)
            if goes_on(kernel.instructions[pc]):
                work += successors(kernel, pc)
    return seen


def other_fence_covers(target: Target, mutant: Mutant) -> bool:
    """No path leads from an access of a product's registers to the product past the dropped wgmma.fence and no other."""
    kernel, dropped = place(target, mutant)
    instructions = kernel.instructions

    def is_fence(instruction: Instruction) -> bool:
        return instruction.opcode.startswith("wgmma.fence")

    after = [pc for pc in _walk(kernel, dropped, lambda i: not is_fence(i)) if instructions[pc].opcode.startswith("wgmma.mma_async")]
    needed = {r.index for pc in after for o in instructions[pc].operands[:2] if isinstance(o, Vector) for r in registers_in(o)}
    before = order.predecessors(kernel)
    seen: set[int] = set()
    work = list(before[dropped])
    while work:  # backwards, up to other fences
        pc = work.pop()
        if pc in seen or (is_fence(instructions[pc]) and pc != dropped):
            continue
        seen.add(pc)
        work += before[pc]
    if 0 in seen:
        return False  # the kernel's first fence
    return not any(
        needed & {r.index for operand in instructions[pc].operands for r in registers_in(operand)}
        for pc in seen
        if not instructions[pc].opcode.startswith("wgmma.mma_async")
    )


def warpgroups_run_it(target: Target, mutant: Mutant) -> bool:
    """Of each warpgroup, all warps or none execute the statement in the right program."""
    with planted(target, one_statement_a_line(target.ptx)):
        counts = target.run(None)[1].kernels[target.kernel]
    _, pc = place(target, mutant)
    runs = counts.executed[:, pc] > 0
    return len(runs) % 4 == 0 and all(len(set(runs[i : i + 4])) == 1 for i in range(0, len(runs), 4))


def _runs_without_a_trap(target: Target, lines: list[str]) -> bool:
    """Whether the target, with this text, ends under every schedule."""
    with planted(target, "\n".join(lines)):
        for seed in (None, *SEEDS):
            try:
                target.run(seed)
            except emulator.KernelFault:
                return False
    return True


def same_values(target: Target, mutant: Mutant) -> bool:
    """A trap, taken where the shuffle and the changed one give different bits, never fires."""
    lines = one_statement_a_line(target.ptx).split("\n")
    changed = mutant.ptx.split("\n")[mutant.line - 1]
    match = re.match(r"\s*shfl[\w.:]*\s+(%\w+)", changed)
    if match is None:
        return False
    other = changed.replace(match.group(1), "fi_o", 1)
    check = f"setp.ne.u32 fi_q, fi_o, {match.group(1)}; @fi_q trap;"
    # The changed one comes first: the result may take the place of the source.
    lines[mutant.line - 1] = "{ .reg .pred fi_q; .reg .b32 fi_o; " + other + lines[mutant.line - 1] + check + " }"
    return _runs_without_a_trap(target, lines)


def dead_result(target: Target, mutant: Mutant) -> bool:
    """A register instruction whose result no statement names."""
    words = re.match(r"\s*(?:shfl|vote|min|max|add|sub|mul|mad|fma|cvt|selp)[\w.:]*\s+(%\w+)[,|]", mutant.text)
    return words is not None and len(re.findall(rf"{words.group(1)}\b", target.ptx)) == 1


Touched = tuple[frozenset[str], frozenset[str]]


def touched(instructions: list[Instruction]) -> Touched:
    """State spaces that these instructions read and write; what is no plain load or store is taken to write all."""
    reads: set[str] = set()
    writes: set[str] = set()
    for instruction in instructions:
        plain = re.match(r"(ld|st)\.(?:\w+\.)*?(shared|global)\b", instruction.opcode)
        if plain:
            (reads if plain.group(1) == "ld" else writes).add(plain.group(2))
        elif not instruction.opcode.startswith("ld.param") and (ACTS.search(instruction.text) or "mbarrier" in instruction.opcode):
            writes |= {"shared", "global"}
    return frozenset(reads), frozenset(writes)


def barrier_beside_reads(target: Target, mutant: Mutant) -> bool:
    """What the barrier orders and its neighbours of the same threads do not: accesses between it and them, of which none conflict."""
    kernel, site = place(target, mutant)
    instructions = kernel.instructions
    words = " ".join(instructions[site].text.split())
    if instructions[site].guard is not None or not re.match(r"bar\.sync \d+(, \d+)?;?$", words):
        return False
    leads_to: list[list[int]] = [[] for _ in instructions]
    for pc in range(len(instructions)):
        for after in successors(kernel, pc):
            leads_to[after].append(pc)

    def is_neighbour(pc: int) -> bool:
        return pc != site and instructions[pc].guard is None and " ".join(instructions[pc].text.split()) == words

    def between(begin: list[int], following: Callable[[int], list[int]]) -> list[Instruction]:
        seen: set[int] = set()
        work = begin
        while work:
            pc = work.pop()
            if pc not in seen and not is_neighbour(pc):
                seen.add(pc)
                work += following(pc)
        return [instructions[pc] for pc in seen]

    reads, writes = touched(between(list(leads_to[site]), lambda pc: list(leads_to[pc])))
    reads_behind, writes_behind = touched(between(successors(kernel, site), lambda pc: successors(kernel, pc)))
    return not (writes & (reads_behind | writes_behind) or reads & writes_behind)


def atomics_order(target: Target, mutant: Mutant) -> bool:
    """Without this fence, the kernel races as soon as its atomics are relaxed: theirs is the order. PTX ISA 8.9.5, causality order."""
    assert ".acq_rel" in mutant.ptx
    with planted(target, re.sub(r"(atom[\w.:]*?)\.acq_rel", r"\1.relaxed", mutant.ptx)):
        return bool(target.run(None)[1].races)


def only_exit_follows(target: Target, mutant: Mutant) -> bool:
    """After the wait there are only other waits and register instructions up to the warp's end, and the CTA has no peers."""
    if "cluster" in "".join(re.findall(r"^\.(?:reqnctapercluster|explicitcluster).*$", target.ptx, re.M)):
        return False
    kernel, pc = place(target, mutant)
    harmless = re.compile(
        r"bra|ret|exit|mbarrier\.(try|test)_wait|nanosleep|(add|sub|mul|mad|mov|selp|setp|not|and|or|xor|shl|shr|cvt|min|max)\."
    )
    return all(harmless.match(kernel.instructions[after].opcode) for after in _walk(kernel, pc, lambda _: True))


def never_blocks(target: Target, mutant: Mutant) -> bool:
    """Whether the wait has nothing to wait for: a trap in its place, taken when the phase is not complete, never fires."""
    lines = one_statement_a_line(target.ptx).split("\n")
    line = lines[mutant.line - 1]
    match = WAIT.search(line)
    assert match
    test = line.replace("try_wait", "test_wait")
    operands = test.rsplit(",", 1) if test.count(",") == 3 else [test.rstrip("; ")]  # a suspend-time hint is not for test_wait
    lines[mutant.line - 1] = f"{operands[0]};\n@!{match.group(1)} trap;"
    with planted(target, "\n".join(lines)):
        for seed in SEEDS:
            try:
                target.run(seed)
            except emulator.KernelFault:
                return False
    return True


def only_copies_are_announced(target: Target, mutant: Mutant) -> bool:
    """Nothing but copies that signal an mbarrier, what announces their bytes, and loads from global memory stand before it.

    A phase ends when its bytes and its arrivals have come, in whatever order (PTX ISA 9.7.13.16.5), and every lane has waited for the
    buffer itself, since waits are no lane's alone.
    """
    harmless = re.compile(r"mbarrier\.arrive|cp\.async\.bulk\.tensor.*complete_tx|ld\.(global|param)|tcgen05\.fence")
    acts = acts_before(*place(target, mutant))
    return any("complete_tx" in i.opcode for i in acts) and all(harmless.match(i.opcode) for i in acts)


def nothing_to_order(target: Target, mutant: Mutant) -> bool:
    """Since the synchronisations before it, lanes did nothing of their own that others would have to know of.

    Loads and stores of tensor memory and their waits are the whole warp's (`.sync.aligned`); a fence of the proxies that every lane
    executes is that lane's, too, which arrives or copies behind it, and orders what it has learnt of (PTX ISA 8.9.6).
    """
    kernel, site = place(target, mutant)
    own = r"tcgen05\.(ld|st|wait|fence)|wgmma\.|fence\.|mbarrier\.arrive|ld\.(global|param)|cp\.async\.bulk\.tensor.*complete_tx"
    near = kernel.instructions[site + 1 : site + order.NEAR]
    after = next((i.opcode for i in near if ACTS.search(i.text)), "")
    if after.startswith("mbarrier.arrive"):
        own += r"|st\.global"  # whoever waits at an mbarrier reads nothing of global memory that this launch stores
    acts = acts_before(kernel, site)
    fences = [i for i in acts if i.opcode.startswith("fence")]
    return all(re.match(own, i.opcode) for i in acts) and all(i.guard is None for i in fences)


def lane_0_alone_acts(target: Target, mutant: Mutant) -> bool:
    """A trap, taken where another lane runs, never fires at what stands between the synchronisations before and this one."""
    kernel, site = place(target, mutant)
    instructions = kernel.instructions
    near = order.before_it(kernel, site)
    lines = one_statement_a_line(target.ptx).split("\n")
    for pc in near:
        if ACTS.search(instructions[pc].text):
            number = instructions[pc].line - 1
            check = "{ .reg .pred fi_q; .reg .b32 fi_m; activemask.b32 fi_m; setp.ne.u32 fi_q, fi_m, 1; @fi_q trap; }"
            lines[number] = check + "\n" + lines[number]
    return _runs_without_a_trap(target, lines)


def nobody_waits(target: Target, mutant: Mutant) -> bool:
    """In the right program, no wait passes after the completion of a phase that the arrival takes part in."""
    _, site = place(target, mutant)
    arrived: set[tuple[MBarrier, int]] = set()
    passed: dict[MBarrier, int] = {}  # the highest phase that a wait saw open when it passed
    release, acquire = Races.release, Races.acquire

    def watch_release(races: Races, warp: Any, edge: Any, *more: Any) -> None:
        if isinstance(edge, MBarrier) and warp.state.pc == site:
            arrived.add((edge, edge.phase))
        release(races, warp, edge, *more)

    def watch_acquire(races: Races, warp: Any, edge: Any, *more: Any) -> None:
        if isinstance(edge, MBarrier):
            passed[edge] = max(passed.get(edge, 0), edge.phase)
        acquire(races, warp, edge, *more)

    with (
        planted(target, one_statement_a_line(target.ptx)),
        mock.patch.object(Races, "release", watch_release),
        mock.patch.object(Races, "acquire", watch_acquire),
    ):
        for seed in (None, *SEEDS):
            target.run(seed)
    assert arrived, mutant.name
    return not any(passed.get(barrier, 0) > phase for barrier, phase in arrived)


def never_runs_where(register: str, test: str) -> Callable[[Target, Mutant], bool]:
    """A trap before the statement, taken by a lane of which a special register compares so with 0, never fires."""

    def holds(target: Target, mutant: Mutant) -> bool:
        lines = one_statement_a_line(target.ptx).split("\n")
        check = f"{{ .reg .pred fi_q; .reg .b32 fi_w; mov.u32 fi_w, {register}; setp.{test}.u32 fi_q, fi_w, 0; @fi_q trap; }}"
        lines[mutant.line - 1] = f"{check} {lines[mutant.line - 1]}"
        return _runs_without_a_trap(target, lines)

    return holds


_MANY = f"in {len(SEEDS)} random schedules"
# Kinds of fault and a reason that may hold for them, cheap ones first.
BY_KIND: tuple[tuple[tuple[str, ...], Callable[[Target, Mutant], str]], ...] = (
    (
        ("registers unlike the warpgroup's", "drop setmaxnreg"),
        said_of(
            warpgroups_run_it,
            f"{NOT_MODELLED}: how many registers the code behind it needs; every warp of the warpgroup runs the statement",
        ),
    ),
    (("shuffle from elsewhere", "shuffle among 16"), said_of(same_values, f"both lanes hold the same, {_MANY}")),
    (
        ("drop barrier",),
        said_of(
            barrier_beside_reads,
            "from the same barrier before it to the same barrier behind it, no memory is written that the other side reads or writes",
        ),
    ),
    (("drop barrier",), order.other_barriers_cover),
    (("drop dependency wait",), order.dependency_is_covered),
    (
        ("drop barrier", "arrive at a named barrier only"),
        said_of(
            order.is_a_turn, "with all turns of the two warpgroups left out nothing races and the results are the same: they order time"
        ),
    ),
    (
        ("drop warp sync",),
        said_of(only_copies_are_announced, "before it there are only copies and the announcement of their bytes, whose order is free"),
    ),
    (
        ("drop warp sync",),
        said_of(
            nothing_to_order,
            "since the synchronisations before it, lanes arrived and fenced, the warp as a whole accessed tensor memory, "
            "and nothing else is handed on",
        ),
    ),
    (
        ("drop warp sync",),
        said_of(lane_0_alone_acts, f"before it lane 0 alone acts, {_MANY}; another lane that accessed what it wrote would race"),
    ),
    (("drop warp sync",), order.lanes_are_ordered),
    (("relax arrive", "relax remote arrive"), order.arrival_is_covered),
    (
        ("fence by another lane", "fence the other memory", "fence only shared memory"),
        said_of(
            order.met_since_the_stores,
            "since the lanes met before it they stored nothing that it is for, and a fence covers what one knows",
        ),
    ),
    (("drop fence",), order.products_are_fenced),
    (
        ("own barrier for the peer's",),
        said_of(never_runs_where("%cluster_ctarank", "ne"), f"rank 0 alone runs it, whose own it is, {_MANY}"),
    ),
    (("arrive without lane 0",), said_of(never_runs_where("%laneid", "eq"), f"lane 0 never runs it, {_MANY}")),
    (("drop wait",), said_of(only_exit_follows, "the warp does nothing after it but exit")),
    (("drop wait",), said_of(never_blocks, f"the wait is satisfied whenever it is reached, {_MANY}")),
    (("drop arrive",), said_of(nobody_waits, f"no wait needs the phases that it arrives at, {_MANY}")),
)
