"""What `tests.device.sanitize` runs on a GPU, as far as a CPU shows it; and the check of large pools, with a small one."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fa4_backend.compile_cache import ensure_object
from tests.device.prove_prefill import check_large_pool
from tests.device.sanitize import SHARDS, SUMMARY, SYMBOL, ended, is_as_it_has_to_be, jobs
from tests.device.sanitize_cases import FEW_SMS, KINDS, KV_DTYPES, chosen_cases, plans_of
from tests.support.paged_case import BuiltCase, PagedCase

ELEMENTS = 2**20
NAMES = ("racecheck lanes mixed", "memcheck plant", "racecheck prefill")
CASE = PagedCase((1, 40), (70, 45), kv_dtype="float8_e4m3fn")


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_fuzzed_problem_has_a_short_batch_of_its_own_kernels(kind: str, kv_dtype: str) -> None:
    shards = [chosen_cases(kind, "sm_90a", kv_dtype, shard=f"{i}/{SHARDS[kind]}") for i in range(SHARDS[kind])]
    setups = KINDS[kind]("sm_90a", KV_DTYPES[kv_dtype])
    assert {setup.name for shard in shards for setup, _ in shard} == {setup.name for setup in setups}
    for shard in shards:
        for (setup, _), plan in zip(shard, plans_of(shard), strict=True):
            own = setup.plan(132)
            assert plan.keys and set(plan.keys) <= set(own.keys), setup.name
            assert setup.plan(FEW_SMS).keys == own.keys, setup.name


def test_a_short_batch_is_right_on_a_cpu() -> None:
    (_, case), *_ = chosen_cases("mixed", "sm_90a", "fp8", only="mixed 8/2 d128 q2 out FP8")
    built = replace(case, arch="cpu").build()
    built.check(*built.run())


def test_jobs_are_told_apart_and_their_verdict_is_found() -> None:
    found = jobs()
    assert len({job.name for job in found}) == len(found) and sum(job.is_planted for job in found) == 3
    assert all(f"--kernel-name kns={SYMBOL}" in " ".join(job.command) for job in found)
    seen = "x\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"
    assert SUMMARY.findall(seen) == ["RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"]


@pytest.mark.parametrize(
    ("kind", "kv_dtype", "only", "families"),
    [
        ("mixed", "auto", "mixed 8/2 d128 q4", {"schedule", "decode", "prefill"}),
        ("prefill", "fp8", "once a call: d128 page 16", {"schedule", "decode", "prefill", "convert"}),
    ],
)
def test_the_tools_filter_names_every_kernel(kind: str, kv_dtype: str, only: str, families: set[str]) -> None:
    """A kernel whose symbol it does not name is not watched, and nothing says so: class names stand in some symbols, modules in others."""
    (_, case), *_ = chosen_cases(kind, "sm_90a", kv_dtype, only=only)
    keys = replace(case, arch="emulated-sm_90a").plan().keys
    assert {key.name.split("-")[0] for key in keys} == families
    for key in keys:
        entries = re.findall(r"\.entry (\w+)\(", ensure_object(key).with_name("kernel.ptx").read_text())
        assert entries and all(SYMBOL in entry for entry in entries), (key.name, entries)


def test_a_verdict_needs_an_end_batches_and_a_summary() -> None:
    job, planted, as_it_is = (next(job for job in jobs() if job.name.startswith(name)) for name in NAMES)
    clean = {"ended": "exit 0", "batches": 2, "wrong": [], "summary": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"}
    assert is_as_it_has_to_be(job, clean) and not is_as_it_has_to_be(planted, clean)
    changes = ({"ended": "exit 9"}, {"batches": 0}, {"wrong": [{}]}, {"summary": "none"}, {"summary": "ERROR SUMMARY: 10 errors"})
    assert not any(is_as_it_has_to_be(job, {**clean, **change}) for change in changes)
    seen = {**clean, "ended": "exit 9", "summary": "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"}
    assert is_as_it_has_to_be(as_it_is, seen) and not is_as_it_has_to_be(job, seen)
    assert not any(is_as_it_has_to_be(as_it_is, {**seen, **change}) for change in ({"ended": "exit 1"}, {"batches": 0}, {"wrong": [{}]}))
    assert is_as_it_has_to_be(planted, {**clean, "summary": "ERROR SUMMARY: 10 errors"})
    assert not is_as_it_has_to_be(planted, {**clean, "summary": "none"})


def test_a_process_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ended(["sh", "-c", "echo a; exit 3"], log, dict(os.environ), 60) == "exit 3" and log.read_text() == "a\n"
    script = "sleep 600 & echo $!; wait"
    assert ended(["sh", "-c", script], log, dict(os.environ), 1) == "no end within 1 s"
    child, limit = Path(f"/proc/{log.read_text().strip()}/stat"), time.monotonic() + 60
    while not has_ended(child) and time.monotonic() < limit:  # it was told to end; a busy machine lets it do so late
        time.sleep(0.05)
    assert has_ended(child)


def has_ended(stat: Path) -> bool:
    """Whether the process of a `/proc/PID/stat` is gone, or is a zombie that nobody has waited for."""
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


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
