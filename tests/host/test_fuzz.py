"""The fuzzer itself, over the torch kernel: right results pass, a wrong one is counted and named. On a GPU it judges ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fa4_backend.arguments import AttentionArguments
from fa4_backend.problem import FP8, RAGGED
from tests.support.fuzz import Fuzzer, FuzzSetup
from tests.support.problems import make_problem

EVERY_FEATURE = {"has_window_left": True, "has_softcap": True, "has_sinks": True, "has_alibi": True}
PROBLEMS = {
    "bf16, every feature": make_problem(4, 2, 32, 32, "bfloat16", 16, "cpu", has_lse=True, **EVERY_FEATURE),
    "FP8, out too": make_problem(4, 2, 32, 32, "float16", 48, "cpu", kv_dtype=FP8, out_dtype=FP8, has_lse=True),
    "both windows": make_problem(
        2, 2, 32, 16, "float16", 16, "cpu", has_lse=True, is_causal=False, has_window_left=True, has_window_right=True
    ),
    "without pages": make_problem(4, 2, 32, 32, "bfloat16", 1, "cpu", kv_dtype=FP8, kv_source=RAGGED, has_lse=True),
}  # fmt: skip
SMALL = FuzzSetup("", PROBLEMS["FP8, out too"], max_seqs=3, max_query=9, max_kv=70)


@pytest.mark.parametrize("name", PROBLEMS)
def test_right_results_pass(name: str) -> None:
    result = Fuzzer(replace(SMALL, name=name, problem=PROBLEMS[name]), "cpu").run(30)
    assert (result.batches, result.failures, result.first_failure) == (30, 0, -1), result
    assert result.rows > 30
    assert 0 < result.worst_out <= 1
    assert 0 <= result.worst_lse <= 1


def nan_in_a_row(a: AttentionArguments) -> None:
    a.out[0, 0, 0] = float("nan")


def unwritten_padding(a: AttentionArguments) -> None:
    a.out[-1] = 1.0


def row_is_doubled(a: AttentionArguments) -> None:
    a.out[0] = (2 * a.out[0].float() + 0.1).to(a.out.dtype)


def lse_is_off(a: AttentionArguments) -> None:
    assert a.lse is not None
    a.lse[0, 0] += 1e-3


@pytest.mark.parametrize("fault", [nan_in_a_row, unwritten_padding, row_is_doubled, lse_is_off])
def test_a_fault_is_counted(fault: Callable[[AttentionArguments], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fuzzer = Fuzzer(replace(SMALL, min_query=1, problem=replace(SMALL.problem, out_dtype="float16")), "cpu")
    launch, calls = fuzzer._launch, 0

    def faulty(a: AttentionArguments) -> None:
        nonlocal calls
        launch(a)
        if calls >= 7:
            fault(a)
        calls += 1

    monkeypatch.setattr(fuzzer, "_launch", faulty)
    result = fuzzer.run(12)
    assert result.first_failure >= 7, result
    assert result.failures >= 3, result  # a row without keys may have no lse to be off


def test_no_more_batches_than_there_is_time() -> None:
    result = Fuzzer(SMALL, "cpu").run(10**6, seconds=0.5)
    assert 6 <= result.batches < 10**4
    assert torch.isfinite(torch.tensor(result.worst_out))
