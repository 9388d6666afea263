"""Launches of a stream run side by side under a seed, exactly as far as programmatic launches may; each case beside a right neighbour."""

from __future__ import annotations

import numpy as np
import pytest

from fa4_backend import emulator
from tests.emulator.harness import aligned_copy
from tests.emulator.programs.program import Buffer, Program, output

SEEDS = range(12)
LAUNCH, WAIT = "griddepcontrol.launch_dependents;\n", "griddepcontrol.wait;\n"
# Atomics, which the race detector has nothing against: only the data can tell.
TAKE = "atom.relaxed.gpu.global.add.u32 %r1, [%p1{at}], 1;\n"
KEEP = "mov.u32 %r2, %ctaid.x;\nmad.wide.u32 %d0, %r2, 4, %p0;\nst.global.u32 [%d0{at}], %r1;\n"


def program(body: str, name: str, grid: int = 2) -> Program:
    buffers = (output("d", np.zeros(64, np.uint32)), Buffer("counters", np.zeros(64, np.uint32)))
    return Program(name, "9.7.13.14", body, buffers, block=1, grid=grid)


def run(*launches: Program, programmatic: bool = True, seed: int | None = None) -> tuple[np.ndarray, emulator.Report]:
    """Outputs of launches of one stream, the later ones with programmatic stream serialization if asked."""
    data, counters = (aligned_copy(b.data) for b in launches[0].args)  # type: ignore[union-attr]
    with emulator.session(arch="sm_90a", num_sms=4, seed=seed) as session:
        with session.stream():
            for number, p in enumerate(launches):
                session.launch(p.ptx, p.grid, p.block, [data, counters], programmatic=programmatic and number > 0)
    return data, session.report


def seen(first: str, second: str, **options: object) -> set[int]:
    """What CTA 0 of the first kernel took from the counter, over the schedules."""
    launches = program(first, "first"), program(second, "second")
    results = [run(*launches, seed=seed, **options) for seed in (None, *SEEDS)]  # type: ignore[arg-type]
    assert not any(report.races for _, report in results)
    return {int(data[0]) for data, _ in results}


FIRST = LAUNCH + TAKE.format(at="") + KEEP.format(at="")


def test_a_dependent_kernel_runs_beside_the_one_before_until_it_waits() -> None:
    """What the second does before its wait, CTAs of the first may see; what it does behind the wait, none does."""
    before, behind = TAKE.format(at="") + WAIT, WAIT + TAKE.format(at="")
    assert max(seen(FIRST, before)) > 1 and max(seen(FIRST, behind)) <= 1


@pytest.mark.parametrize("how", ["no attribute", "dependents launched at the end", "one CTA does not launch them"])
def test_kernels_that_may_not_run_side_by_side_do_not(how: str) -> None:
    first = FIRST
    if how == "dependents launched at the end":
        first = TAKE.format(at="") + KEEP.format(at="") + LAUNCH
    elif how == "one CTA does not launch them":
        first = "mov.u32 %r3, %ctaid.x;\nsetp.ne.u32 %q0, %r3, 0;\n@%q0 " + FIRST
    assert max(seen(first, TAKE.format(at="") + WAIT, programmatic=how != "no attribute")) <= 1


def test_a_counter_that_is_readied_too_early_shows_in_the_data() -> None:
    """The second kernel sets the first one's counter back, by an atomic: behind its wait that is right, before it the first suffers."""
    first = LAUNCH + TAKE.format(at="") * 2 + KEEP.format(at="")
    reset = "atom.relaxed.gpu.global.exch.b32 %r1, [%p1], 0;\n"

    def taken(second: str, seed: int | None) -> list[int]:
        return sorted(run(program(first, "first", grid=3), program(second, "second", grid=1), seed=seed)[0][:3].tolist())

    assert all(max(taken(WAIT + reset, seed)) == 5 for seed in (None, *SEEDS))
    assert any(max(taken(reset + WAIT, seed)) < 5 for seed in SEEDS)


def test_a_kernel_between_that_waits_late_vouches_once_it_has_waited() -> None:
    """The third starts before the second has waited, and reads the first's data behind its own wait."""
    store = "mov.u32 %r1, 7;\n" + KEEP.format(at="+64")
    load = WAIT + KEEP.format(at="+64").replace("st.global.u32 [%d0+64], %r1", "ld.global.u32 %r1, [%d0+64]") + KEEP.format(at="")
    middles = {"waits": LAUNCH + TAKE.format(at="") * 3 + WAIT, "never waits": LAUNCH + TAKE.format(at="") * 3}
    for how, middle in middles.items():
        launches = program(LAUNCH + store, "first"), program(middle, "second"), program(load, "third")
        for seed in (None, *SEEDS):
            data, report = run(*launches, seed=seed)
            assert bool(report.races) == (how == "never waits"), (how, seed, report.races[:1])
            assert how == "never waits" or data[:2].tolist() == [7, 7]


def test_an_error_of_a_kernel_that_still_runs_is_not_lost() -> None:
    broken = program(LAUNCH + TAKE.format(at="") * 3 + "trap;\n", "first")
    for seed in (None, *SEEDS[:4]):
        with pytest.raises(emulator.KernelFault, match="trap"):
            run(broken, program(WAIT, "second"), seed=seed)
