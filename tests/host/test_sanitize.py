"""What `tests.device.sanitize` runs on a GPU, as far as a CPU shows it; and the check of large pools, with a small one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.device.prove_prefill import check_large_pool
from tests.device.sanitize import SHARDS, SUMMARY, jobs
from tests.device.sanitize_cases import KINDS, KV_DTYPES, chosen_cases, plans_of
from tests.support.paged_case import BuiltCase, PagedCase

ELEMENTS = 2**20
CASE = PagedCase((1, 40), (70, 45), kv_dtype="float8_e4m3fn")


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_fuzzed_problem_has_a_short_batch_of_its_own_kernels(kind: str, kv_dtype: str) -> None:
    shards = [chosen_cases(kind, "sm_90a", kv_dtype, shard=f"{i}/{SHARDS[kind]}") for i in range(SHARDS[kind])]
    setups = KINDS[kind]("sm_90a", KV_DTYPES[kv_dtype])
    assert {setup.name for shard in shards for setup, _ in shard} == {setup.name for setup in setups}
    for shard in shards:
        for (setup, _), plan in zip(shard, plans_of(kind, shard), strict=True):
            own = setup.plan(132).kernels
            assert plan.kernels is not None and own is not None and set(plan.kernels.keys) <= set(own.keys), setup.name


def test_a_short_batch_is_right_on_a_cpu() -> None:
    (_, case), *_ = chosen_cases("mixed", "sm_90a", "fp8", only="mixed 8/2 d128 q2 out FP8")
    built = replace(case, arch="cpu").build()
    built.check(*built.run())


def test_jobs_are_told_apart_and_their_verdict_is_found() -> None:
    found = jobs()
    assert len({job.name for job in found}) == len(found) and sum(job.is_planted for job in found) == 1
    assert all("--kernel-name kns=fa4_backend" in " ".join(job.command) for job in found)
    seen = "x\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"
    assert SUMMARY.findall(seen) == ["RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"]


def test_a_large_pool_is_right_on_a_cpu() -> None:
    result = check_large_pool(CASE, lambda built: built.run(), ELEMENTS, "cpu")
    assert result["ok"] and result["elements"] > ELEMENTS, result


@pytest.mark.parametrize("bound", [ELEMENTS, ELEMENTS // 2], ids=["wraps", "wraps at half"])
def test_an_offset_that_wraps_is_seen(bound: int) -> None:
    """A kernel whose page offsets wrap reads the NaN of an unused page."""

    def run(built: BuiltCase) -> tuple[torch.Tensor, torch.Tensor]:
        a = built.arguments
        per_page = bound // (a.k_cache.stride(0))
        wrapped = a._replace(page_table=(a.page_table % per_page).int())
        return BuiltCase(built.case, wrapped, built.total_q).run()

    assert not check_large_pool(CASE, run, ELEMENTS, "cpu")["ok"]
