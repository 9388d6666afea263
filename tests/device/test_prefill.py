"""The prefill kernel on a GPU, a short form of `prove_prefill`: its cases, bits over page sizes, a large pool, some fuzzed batches."""

from __future__ import annotations

import pytest

from tests.device import prove_prefill

pytestmark = pytest.mark.gpu

FUZZED = 300


def test_cases_are_within_budget_and_repeat_bit_for_bit(arch: str) -> None:
    results = prove_prefill.check_cases(arch, repeats=5, only="")
    assert results and all(row["ok"] for row in results), [row for row in results if not row["ok"]]


def test_bits_do_not_depend_on_the_page_size(arch: str) -> None:
    assert prove_prefill.check_page_sizes(arch)["ok"]


def test_pool_above_2_to_the_31_elements(arch: str) -> None:
    result = prove_prefill.check_large_pool(arch)
    assert result["ok"] and result["elements"] > 2**31


def test_fuzzed_batches(arch: str) -> None:
    results = prove_prefill.check_fuzz(arch, FUZZED, seed=12345)
    assert sum(row["batches"] for row in results) >= FUZZED and not any(row["failures"] for row in results), results
