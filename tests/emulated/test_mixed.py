"""Steps with decode rows beside prefill rows: the prefill kernel starts behind the decode kernel's start, on the SMs it left free.

Both chips; the launches are programmatic, so the race detector holds the prefill kernel to touching nothing of the decode kernel's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend import plan_attention
from fa4_backend.kernels.schedule.work_list import PARTIAL_SLOT
from fa4_backend.problem import FP8
from tests.support.emulated_mixed import run_mixed
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

CASE = PagedCase(query_lens=(1, 130, 1, 0, 70, 1, 1), kv_lens=(1500, 333, 64, 0, 700, 1, 900), num_q_heads=8, num_kv_heads=2, head_dim=128)


@pytest.mark.parametrize("arch", ["emulated-sm_90a", "emulated-sm_100a"])
@pytest.mark.parametrize("seed", with_slow([None, 0, 1], [0]))
def test_mixed_step(arch: str, seed: int | None) -> None:
    run = run_mixed(replace(CASE, arch=arch), seed=seed)
    run.check()
    assert len(run.report.kernels) == 2
    assert run.report.opcodes()["griddepcontrol.launch_dependents"] > 0 and run.report.opcodes()["griddepcontrol.wait"] > 0
    # Not every CTA decodes, and those that do split rows.
    assert 0 < run.decode_ctas < len(run.work.decode_first)
    assert (run.work.decode_tiles[:, PARTIAL_SLOT] >= 0).any()


DRAFTS = {"decode_query_len": 4, "query_lens": (4, 130, 2, 0, 70, 1, 3)}
OTHER_HEADS = {"head_dim": 64, "layout": "hnd"}


@pytest.mark.parametrize("changes", with_slow([DRAFTS, OTHER_HEADS, {"kv_dtype": FP8}], [OTHER_HEADS]))
def test_mixed_step_of_drafts_other_heads_and_fp8(changes: dict) -> None:
    run_mixed(replace(CASE, arch="emulated-sm_90a", **changes), seed=2).check()


@pytest.mark.parametrize("arch", ["emulated-sm_90a", "emulated-sm_100a"])
@pytest.mark.parametrize("launches_decode", [True, False])
def test_a_step_of_prefill_rows_alone(arch: str, launches_decode: bool) -> None:
    """The prefill kernel does without the decode kernel: it zeroes the rows of padding, and begins when what was before has ended."""
    case = replace(CASE, query_lens=(5, 40, 0, 70), kv_lens=(700, 300, 0, 129), arch=arch)
    run_mixed(case, seed=4, launches_decode=launches_decode).check()


def test_cta_pairs_beside_decode() -> None:
    """(192, 128) on Blackwell: a decode CTA keeps a whole pair of prefill CTAs waiting."""
    case = replace(CASE, arch="emulated-sm_100a", head_dim=192, head_dim_v=128, num_q_heads=4, num_kv_heads=1)
    run = run_mixed(case, num_sms=12, seed=3)
    run.check()
    assert 0 < run.decode_ctas < len(run.work.decode_first)


def test_batch_invariant_rows_keep_their_bits_beside_prefill() -> None:
    """A decode row's bits do not depend on the SMs that prefill leaves to decode."""
    case = replace(CASE, arch="emulated-sm_90a", batch_invariant=True)
    mixed = run_mixed(case)
    many = run_mixed(case, num_sms=9)
    rows = [0, 131, 202, 203]  # the decode rows' tokens
    assert mixed.decode_ctas != many.decode_ctas
    assert torch.equal(mixed.built.arguments.out[rows], many.built.arguments.out[rows])


def test_exact_mode_has_no_decode_kernel_to_run_beside() -> None:
    plan = replace(CASE, arch="sm_90a").plan()
    assert plan.kernels.prefill.kernel.is_dependent
    exact = plan_attention(replace(plan.problem, batch_invariant=True, exact=True), plan.limits)
    assert exact.kernels.decode is None and not exact.kernels.prefill.kernel.is_dependent
