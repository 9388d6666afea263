"""The prefill kernel on a GPU, a short form of `prove_prefill`: its cases, bits over page sizes, a large pool, some fuzzed batches."""

from __future__ import annotations

import math

import pytest

from fa4_backend.problem import FP8, SAME_AS_Q
from tests.device import prove_prefill
from tests.device.fuzz_all import fuzz_all
from tests.support.fuzz_setups import prefill_setups

pytestmark = pytest.mark.gpu

FUZZED = 300


def test_cases_are_within_budget_and_repeat_bit_for_bit(arch: str) -> None:
    results = prove_prefill.check_cases(arch, SAME_AS_Q, repeats=5, only="")
    assert results and all(row["ok"] for row in results), [row for row in results if not row["ok"]]


def test_bits_do_not_depend_on_the_page_size(arch: str) -> None:
    for kv_dtype in (SAME_AS_Q, FP8):
        for case in prove_prefill.plain_cases(arch, kv_dtype):
            assert prove_prefill.check_page_sizes(case)["ok"], case


def test_pool_above_2_to_the_31_elements(arch: str) -> None:
    for kv_dtype in (SAME_AS_Q, FP8):
        for case in prove_prefill.plain_cases(arch, kv_dtype):
            result = prove_prefill.check_large_pool(case, prove_prefill.run_case)
            assert result["ok"] and result["elements"] > 2**31, case


def test_fuzzed_batches(arch: str) -> None:
    results = fuzz_all(prefill_setups(arch), FUZZED, math.inf, 12345, has_graphs=True)
    assert sum(row["batches"] for row in results) >= FUZZED and not any(row["failures"] for row in results), results
