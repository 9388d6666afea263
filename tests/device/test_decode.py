"""Schedule and decode kernel on a GPU, a short form of `prove_decode` and of `prove_large_logits`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fa4_backend.problem import FP8
from tests.device import prove_decode, prove_large_logits
from tests.support.fuzz import FuzzSetup

pytestmark = pytest.mark.gpu

FUZZED = 200
kv_dtypes = pytest.mark.parametrize("kv_dtype", ["bfloat16", FP8])


def test_the_devices_lists_are_the_hosts(arch: str) -> None:
    assert prove_decode.check_lists(arch, 40)["steps"] == 40


@kv_dtypes
@pytest.mark.parametrize("setups_of", [prove_decode.setups, prove_decode.mixed_setups], ids=["alone", "beside prefill"])
def test_fuzzed_batches(arch: str, kv_dtype: str, setups_of: Callable[[str, str], list[FuzzSetup]]) -> None:
    setups = setups_of(arch, kv_dtype)
    seen = prove_decode.check_fuzz(setups, FUZZED, seed=1)
    assert seen["batches"] >= FUZZED and len(seen["setups"]) == len(setups)


@kv_dtypes
def test_pools_above_2_to_the_32_elements(arch: str, kv_dtype: str) -> None:
    assert all(pool["elements"] > 2**32 for pool in prove_decode.check_pool(arch, kv_dtype)["pools"])


@kv_dtypes
def test_bits_do_not_depend_on_pages_neighbours_or_replay(arch: str, kv_dtype: str) -> None:
    assert prove_decode.check_bits(arch, kv_dtype, 20)["rounds"] == 20


@kv_dtypes
def test_exact_mode_keeps_a_prompts_bits(arch: str, kv_dtype: str) -> None:
    assert prove_decode.check_exact(arch, kv_dtype, 10)["tokens"] > 0


# The channel that shows a weight's drift where ptxas contracts a product, and one with random values beside it; both ends of the lengths.
@pytest.mark.parametrize("setup", prove_large_logits.SETUPS, ids=str)
@pytest.mark.parametrize("keys", [2048, 32768])
@pytest.mark.parametrize("channel", ["level", "random"])
def test_large_logits_err_at_most_twice_as_much_as_torch(arch: str, setup: prove_large_logits.Setup, keys: int, channel: str) -> None:
    result = prove_large_logits.judge(channel, setup, keys)
    assert result["ok"], result
