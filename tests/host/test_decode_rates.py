"""Rates of decode rows with K and V in FP8 in a plan's lists, and what a step makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from fa4_backend import BatchLimits, plan_attention
from fa4_backend.bench.decode_batches import issue_batches
from fa4_backend.kernels.families import resolve_kernels
from fa4_backend.kernels.schedule.work_list import NUM_ENTRIES
from fa4_backend.problem import FP8
from tests.support.host_schedule import make_lists
from tests.support.problems import make_problem

LIMITS, H200 = BatchLimits(256, 8192, 131072, 1, 32768), 4814.0  # GB/s


def kernels_of(**facts: Any) -> tuple[Any, Any]:
    """A plan's kernels, and those that are resolved without these rates."""
    problem = make_problem(32, 8, 128, 128, page_size=16, **{"dtype": "bfloat16", "arch": "sm_90a", **facts})
    return plan_attention(problem, LIMITS, num_sms=132, memory_gb=H200).kernels, resolve_kernels(problem, LIMITS, 132, H200)


def test_a_tile_in_fp8_takes_longer_than_half_a_tile() -> None:
    kernels, resolved = kernels_of(kv_dtype=FP8)
    for work, before in ((kernels.work, resolved.work), (kernels.converted.work, resolved.converted.work)):
        assert (before.decode_tile_ticks, before.decode_full_sms) == (10, 76)
        assert (work.decode_tile_ticks, work.decode_full_sms) == (22, 132), "0.6 us; more SMs than there are would fill the memory"
    assert kernels.keys == resolved.keys


@pytest.mark.parametrize("facts", [{}, {"kv_dtype": FP8, "batch_invariant": True}, {"kv_dtype": FP8, "arch": "sm_100a"}], ids=str)
def test_others_keep_theirs(facts: dict[str, Any]) -> None:
    kernels, resolved = kernels_of(**facts)
    assert kernels == resolved


@pytest.mark.parametrize("name", ["128 x 1K + a prompt of 2K", "64 x 8K + a 512 chunk of 4K"])
def test_decode_rows_that_are_most_of_a_step_have_the_whole_chip_first(name: str) -> None:
    """With the rates of 16 bits 46 and 99 SMs had one CTA each, and prefill waited for them."""
    batch = next(b for b in issue_batches(FP8)["mixed"] if b.name == name)
    kernels, resolved = kernels_of(kv_dtype=FP8)
    rows = [list(lens) for lens in zip(*batch.row_lens, strict=True)]
    busy, before = ((make_lists(of.converted.work, *rows).decode_first[:, NUM_ENTRIES] > 0).sum() for of in (kernels, resolved))
    assert busy == 256, "two CTAs an SM, equal shares"
    assert before == {"128 x 1K + a prompt of 2K": 46, "64 x 8K + a 512 chunk of 4K": 99}[name]
