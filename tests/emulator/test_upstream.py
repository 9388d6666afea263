"""Kernels that others proved on silicon must run right, and without a finding: flash-attn-4 from PyPI, compiled here, unchanged."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Found, not imported: an import takes seconds, in every process that collects this file.
IS_INSTALLED = importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None
pytestmark = pytest.mark.skipif(not IS_INSTALLED, reason="flash-attn-4 is not installed")
ROOT = Path(__file__).parents[2]

# What each case must have executed: a test that ran another kernel would pass without testing.
PROOFS = {
    ("sm_100a", "causal"): "tcgen05.mma.cta_group::1.kind::f16",
    ("sm_100a", "noncausal-2cta"): "tcgen05.mma.cta_group::2.kind::f16",
    ("sm_100a", "paged128"): "cp.async.bulk.tensor.4d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint",
    ("sm_100a", "paged16"): "cp.async.cg.shared.global",
    ("sm_100a", "split"): "tcgen05.mma.cta_group::1.kind::f16",
    ("sm_90a", "causal"): "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    ("sm_90a", "paged128"): "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    ("sm_90a", "paged16"): "cp.async.cg.shared.global",
}


def run(arch: str, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.support.emulator_upstream_cases", arch, *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def judge(arch: str, row: dict[str, Any]) -> None:
    assert row["err"] <= 2 * row["rounding"], row["err"]
    assert row["lse_err"] <= 2e-5, row["lse_err"]
    assert row["races"] == []
    assert PROOFS[arch, row["case"]] in row["opcodes"]
    # Upstream's sm90 scheduler barrier keeps its last arrival; nothing else may be left over.
    assert [n for n in row["notes"] if not n.startswith("barrier-leak")] == []


def check(arch: str, cases: list[str]) -> None:
    rows = run(arch, *cases)
    assert {row["case"] for row in rows} == set(cases)
    for row in rows:
        judge(arch, row)


# A compilation costs 10 s, so a change runs one kernel a chip: on Blackwell that of CTA pairs, on Hopper that of pages of 16.
@pytest.mark.emulated
@pytest.mark.parametrize(("arch", "case"), [("sm_100a", "noncausal-2cta"), ("sm_90a", "paged16")])
def test_upstream_kernels_are_right_and_free_of_findings(arch: str, case: str) -> None:
    check(arch, [case])


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.parametrize("arch", ["sm_100a", "sm_90a"])
def test_all_upstream_kernels(arch: str) -> None:
    check(arch, [case for a, case in PROOFS if a == arch])


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.parametrize(("arch", "case"), [("sm_100a", "causal"), ("sm_90a", "causal")])
def test_no_false_alarm_over_200_seeds(arch: str, case: str) -> None:
    for row in run(arch, case, "--seeds", "200"):
        judge(arch, row)
