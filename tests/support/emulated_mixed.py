"""A step with decode rows and prefill rows on the emulator: schedule, decode and prefill kernel as the operator launches them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fa4_backend import emulator
from fa4_backend.emulator.kernels import load_function
from fa4_backend.kernels.launch_abi import decode_arguments, prefill_arguments
from fa4_backend.kernels.schedule.work_list import NUM_ENTRIES, WorkLists
from tests.support.emulated_decode import fill_with_garbage, run_schedule
from tests.support.paged_case import BuiltCase, Errors, PagedCase


@dataclass(frozen=True)
class MixedRun:
    """What came out of one step."""

    built: BuiltCase
    work: WorkLists
    report: emulator.Report  # of the decode and the prefill kernel, launched one behind the other

    @property
    def decode_ctas(self) -> int:
        """Decode CTAs that had work."""
        return int((self.work.decode_first[:, NUM_ENTRIES] > 0).sum())

    def check(self) -> Errors:
        """Within the error budget, nothing written that is not ours, no race."""
        assert self.report.races == [], "\n".join(str(race) for race in self.report.races[:3])
        assert self.built.arguments.lse is not None
        return self.built.check(self.built.arguments.out, self.built.arguments.lse)


def run_mixed(
    case: PagedCase,
    *,
    num_sms: int = 6,
    seed: int | None = None,
    built: BuiltCase | None = None,
    min_part_blocks: int | None = None,
    launches_decode: bool = True,
) -> MixedRun:
    """Schedule and attend `case` (arch "emulated-..."); outputs are poisoned, work lists and workspaces hold garbage before.

    Args:
        num_sms: of the pretended GPU.
        seed: of the emulator's schedule; None: deterministic.
        built: the case's tensors, where a test has changed them.
        launches_decode: whether the decode kernel is launched, which a step without decode rows does without.
        min_part_blocks: n_blocks of the shortest part of a prefill tile, where it is to be others than the plan's.
    """
    built = built or case.build()
    plan, a = case.plan(num_sms=num_sms), built.arguments
    kernels = plan.kernels
    assert kernels is not None and kernels.decode is not None and kernels.prefill.kernel.is_dependent, case
    shape = kernels.work if min_part_blocks is None else replace(kernels.work, min_part_blocks=min_part_blocks)
    work = WorkLists.allocate(shape, plan.limits, "cpu")
    assert a.lse is not None
    fill_with_garbage(work)
    for poisoned in (a.out, a.lse):
        poisoned.fill_(math.nan)
    arch = plan.problem.target_arch
    scheduled = run_schedule(arch, kernels.schedule, work, a.cu_seqlens_q.diff().tolist(), a.seqused_k.tolist(), seed=seed)
    assert scheduled.races == []
    with emulator.session(arch=arch, num_sms=num_sms, seed=seed, detect_races=True) as emu, emu.stream():
        if launches_decode:
            emu.run(load_function(kernels.decode), *decode_arguments(a, work))
        emu.run(load_function(kernels.prefill), *prefill_arguments(a, work))
    return MixedRun(built, work, emu.report)
