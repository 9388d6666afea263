"""What `tests.device.serve_mla` says of runs on a GPU: each way to be wrong is seen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device.serve_mla import METRICS, RUNS, judge

OURS = {"kernels": ["FA4: sm90 kernels on sm_90a, 16 heads of latent attention, ..."]}


def good() -> dict[str, dict[str, Any]]:
    """Runs as they have to be: ours at the yardstick, the planted error at twice it."""
    runs: dict[str, dict[str, Any]] = {run: {"against_reference": dict.fromkeys(METRICS, 0.01), "kernels": []} for run in RUNS}
    for run, (backend, _, _) in RUNS.items():
        if backend == "FA4":
            runs[run] = {"against_reference": dict.fromkeys(METRICS, 0.02 if "off" in run else 0.01), **OURS}
    return runs


def test_good_runs_are_good() -> None:
    assert judge(good()) == []


@pytest.mark.parametrize(
    ("run", "change", "words"),
    [
        ("FA4", {"against_reference": {"decode_logprob_rms": 0.016}, **OURS}, "FA4: decode_logprob_rms 0.016, TRITON_MLA 0.01"),
        ("FA4", {"against_reference": {"prefill_logprob_rms": 0.016}, **OURS}, "FA4: prefill_logprob_rms 0.016, TRITON_MLA 0.01"),
        ("FA4, scale 5% off", {"against_reference": {"decode_logprob_rms": 0.01}, **OURS}, "FA4, scale 5% off: decode_logprob_rms 0.01"),
        ("FA4, FP8", {"against_reference": {"decode_logprob_rms": 0.01}, "kernels": []}, "FA4, FP8: our kernel did not run"),
        ("FA4, graphs", {"failed": "a log"}, "FA4, graphs failed"),
    ],
)
def test_a_wrong_run_is_named(run: str, change: dict[str, Any], words: str) -> None:
    (wrong,) = judge({**good(), run: change})
    assert wrong.startswith(words)


def test_without_a_yardstick_nothing_is_judged_right() -> None:
    wrong = judge({**good(), "TRITON_MLA": {"failed": "a log"}})
    assert wrong[0] == "TRITON_MLA failed" and any(line.startswith("FA4: expected FLASH_ATTN_MLA and TRITON_MLA") for line in wrong)
