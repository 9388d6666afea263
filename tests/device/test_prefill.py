"""The prefill kernel on a GPU, a short form of `prove_prefill`: its cases, bits over page sizes, large pools, some fuzzed batches."""

from __future__ import annotations

import pytest

from fa4_backend.problem import FP8, SAME_AS_Q
from tests.device import prove_prefill
from tests.device.fuzz_all import fuzz_all
from tests.support.fuzz_setups import prefill_setups

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("kv_dtype", [SAME_AS_Q, FP8])]

FUZZED = 300


def test_cases_are_within_budget_and_repeat_bit_for_bit(arch: str, kv_dtype: str) -> None:
    results = prove_prefill.check_cases(arch, kv_dtype, repeats=5, only="")
    assert results and all(row["ok"] for row in results), [row for row in results if not row["ok"]]


def test_bits_do_not_depend_on_the_page_size(arch: str, kv_dtype: str) -> None:
    for case in prove_prefill.plain_cases(arch, kv_dtype):
        assert prove_prefill.check_page_sizes(case)["ok"], case


@pytest.mark.parametrize("name", prove_prefill.LARGE_POOLS + prove_prefill.ONCE)
def test_pool_above_2_to_the_32_elements(arch: str, kv_dtype: str, name: str) -> None:
    cases = prove_prefill.cases(arch, kv_dtype)
    if name not in cases:
        pytest.skip(f"{kv_dtype} K and V are not converted")
    result = prove_prefill.check_large_pool(cases[name], prove_prefill.run_case)
    assert result["ok"] and result["elements"] > 2**32, result


def test_fuzzed_batches(arch: str, kv_dtype: str) -> None:
    results = fuzz_all(prefill_setups(arch, kv_dtype), FUZZED, seed=12345)
    assert sum(row["batches"] for row in results) >= FUZZED and not any(row["failures"] for row in results), results
