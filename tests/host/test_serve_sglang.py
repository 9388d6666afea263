"""How runs of SGLang on a GPU are judged (`tests.device.serve_sglang`): each thing that may be wrong is noticed, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device.serve_sglang import NEW_TOKENS, RUNS, RUNS_OF, compare, judge

REFERENCE = {"tokens": [[7] * NEW_TOKENS] * 2, "prefill": [-1.0, -2.0], "decode": [[-1.0] * NEW_TOKENS] * 2}
DISTANCE = {"fa3": 0.0, "triton": 0.02, "fa3, FP8": 0.2, "triton, FP8": 0.3}


def result_of(run: str, distance: float) -> dict[str, Any]:
    """What a run says that is everywhere `distance` away from the reference."""
    arguments = RUNS[run].arguments
    found: dict[str, Any] = {
        "tokens": REFERENCE["tokens"],
        "prefill": [value + distance for value in REFERENCE["prefill"]],
        "decode": [[value + distance for value in row] for row in REFERENCE["decode"]],
        "cached_tokens": 640, "drafts_right": 3.5 if "speculative_algorithm" in arguments else 0.0, "pid": 1, "processes": [2],
        "kernels": ["FA4: sm90 kernels, bfloat16" + (" (K and V float8_e4m3fn)" if "kv_cache_dtype" in arguments else "")],
        "graphs": {"prefill": 3, "decode": 0 if "disable_cuda_graph" in arguments else 40},
    }  # fmt: skip
    return {**found, "against_fa3": compare(found, REFERENCE)}


def runs_of(model: str, **distances: float) -> dict[str, Any]:
    """All runs of a model; ours at 0.01, those that are off at 0.5."""
    return {
        f"{model}: {run}": result_of(run, distances.get(run, DISTANCE.get(run, 0.5 if RUNS[run].is_off else 0.01)))
        for run in RUNS_OF[model]
    }


@pytest.mark.parametrize("model", RUNS_OF)
def test_right_runs_pass(model: str) -> None:
    assert judge(runs_of(model)) == []


@pytest.mark.parametrize("run", [run for run in RUNS if RUNS[run].is_ours])
def test_a_wrong_distance_is_noticed(run: str) -> None:
    model = next(model for model, runs in RUNS_OF.items() if run in runs)
    (wrong,) = judge(runs_of(model, **{run: 0.01 if RUNS[run].is_off else 0.25}))
    assert wrong.startswith(f"{model}: {run}: expected {'above' if RUNS[run].is_off else 'at most'}")


@pytest.mark.parametrize(
    ("run", "key", "value", "said"),
    [
        ("FA4", "kernels", [], "our kernels"),
        ("FA4, FP8", "kernels", ["FA4: sm90 kernels, bfloat16"], "our kernels"),
        ("FA4", "processes", [1], "scheduler's process"),
        ("FA4", "cached_tokens", 0, "radix cache"),
        ("FA4", "graphs", {"prefill": 1, "decode": 0}, "decode steps in graphs"),
        ("FA4, eager", "graphs", {"prefill": 0, "decode": 1}, "no graphs"),
        ("FA4, drafts", "drafts_right", 1.0, "drafts that are verified"),
    ],
)
def test_what_did_not_run_is_noticed(run: str, key: str, value: Any, said: str) -> None:
    model = next(model for model, runs in RUNS_OF.items() if run in runs)
    runs = runs_of(model)
    runs[f"{model}: {run}"][key] = value
    (wrong,) = judge(runs)
    assert said in wrong


def test_decoded_tokens_are_compared_as_far_as_they_are_the_same() -> None:
    """Behind another token the contexts are others; a reply's first log-probability is a prompt's."""
    other = {
        **REFERENCE,
        "tokens": [[7] * NEW_TOKENS, [7, 7, 8] + [7] * (NEW_TOKENS - 3)],
        "decode": [[-1.0] * NEW_TOKENS, [-1.0, -2.0] + [-9.0] * 46],
    }
    seen = compare(other, REFERENCE)
    assert seen["decode_tokens"] == NEW_TOKENS and seen["equal"] == 1
    assert seen["decode_rms"] == pytest.approx((1 / NEW_TOKENS) ** 0.5, abs=1e-6)


def test_a_failed_reference_is_noticed() -> None:
    runs = runs_of("gemma2")
    runs["gemma2: triton"] = {"failed": "no memory"}
    assert [line.split(": expected")[0] for line in judge(runs)] == ["gemma2: triton failed", "gemma2: FA4", "gemma2: FA4, scale off"]
