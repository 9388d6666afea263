"""A step with decode rows and prefill rows on the emulator: schedule, decode and prefill kernel as the operator launches them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from fa4_backend import emulator
from fa4_backend.emulator.kernels import load_function
from fa4_backend.kernels.decode.config import decode_config
from fa4_backend.kernels.decode.launch import launch_decode
from fa4_backend.kernels.launch import launch_prefill
from fa4_backend.kernels.schedule.launch import schedule_key
from fa4_backend.kernels.schedule.work_list import NUM_ENTRIES, WorkLists
from fa4_backend.kernels.tuning import prefill_key
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


def run_mixed(case: PagedCase, *, num_sms: int = 4, seed: int | None = None, built: BuiltCase | None = None) -> MixedRun:
    """Schedule and attend `case` (arch "emulated-..."); outputs are poisoned, work lists and workspaces hold garbage before.

    Args:
        num_sms: of the pretended GPU.
        seed: of the emulator's schedule; None: deterministic.
        built: the case's tensors, where a test has changed them.
    """
    built = built or case.build()
    plan, a = case.plan(num_sms=num_sms), built.arguments
    decode, prefill = decode_config(plan.problem, plan.limits), prefill_key(plan)
    assert decode is not None and prefill.is_dependent, case
    work = WorkLists.allocate(plan, "cpu")
    assert a.lse is not None
    fill_with_garbage(work)
    for poisoned in (a.out, a.lse):
        poisoned.fill_(math.nan)
    arch = plan.problem.target_arch
    scheduled = run_schedule(arch, schedule_key(plan), work, a.cu_seqlens_q.diff().tolist(), a.seqused_k.tolist(), seed=seed)
    assert scheduled.races == []
    with emulator.session(arch=arch, num_sms=num_sms, seed=seed, detect_races=True) as emu:
        launch_decode(partial(emu.run, load_function(decode)), a, work)
        launch_prefill(partial(emu.run, load_function(prefill)), a, work.prefill_tiles, work.prefill_begin)
    return MixedRun(built, work, emu.report)
