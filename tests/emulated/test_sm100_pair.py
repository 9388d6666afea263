"""The Blackwell prefill kernel as CTA pairs (`cta_group` 2): right, and the same bits as with one CTA a product.

Only what pairs change is asked again: halves of K and V, items of four query tiles, barriers across two CTAs. The rest is the same code
(`test_sm100_prefill`).
"""

from dataclasses import replace

import pytest
import torch

from fa4_backend.kernels.sm100.config import Sm100Config
from tests.emulated.test_sm100_prefill import BASE, FEATURES, SHAPES, case, repaged
from tests.support.emulated_prefill import run_prefill
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated


def group_key(problem: PagedCase, ctas: int) -> Sm100Config:
    return problem.plan().kernels.prefill.with_tuning(cta_group=ctas)


def pair_key(problem: PagedCase) -> Sm100Config:
    return group_key(problem, 2)


CASES = {
    **SHAPES,
    **FEATURES,
    # Around one item: four tiles of 32 tokens.
    "item 127, 128, 129": case((127, 128, 129), (200, 256, 257)),
    "one tile, three tiles": case((20, 90), (300, 65)),  # CTAs of a pair without a query token
    "d192 and 128": case((130, 3), (300, 65), head_dim=192, head_dim_v=128, num_q_heads=2, page_size=16),
    "d192 and 128, page 256": case((130, 3), (300, 65), head_dim=192, head_dim_v=128, num_q_heads=2, page_size=256),
    "fp16, 5 to 1": case((100, 33), (300, 65), num_q_heads=5, num_kv_heads=1, dtype="float16", page_size=64),
    "7 to 1": case((40, 3), (300, 65), num_q_heads=14),
    "128 to 1": case((7,), (300,), num_q_heads=128, num_kv_heads=1),
    "one dominant key": case((40, 5), (300, 77), peaked=20.0),
    "strided pool": case((40, 5), (300, 77), layout="hnd"),
}


# Pairs serve d192, d256 (`test_sm100_lone_tile`, with every mask) and FP8; at d128 the sizes are enough, which share a kernel.
SLOW = [*FEATURES, "d192 and 128, page 256", "fp16, 5 to 1", "7 to 1", "128 to 1"]


@pytest.mark.parametrize("name", with_slow(CASES, SLOW))
def test_same_bits_as_one_cta(name: str) -> None:
    pairs, single = (run_prefill(CASES[name], key=group_key(CASES[name], ctas)) for ctas in (2, 1))
    pairs.check()
    single.check()
    rows = pairs.built.total_q
    assert torch.equal(pairs.out[:rows], single.out[:rows]) and torch.equal(pairs.lse[:, :rows], single.lse[:, :rows])


@pytest.mark.slow
def test_bits_do_not_depend_on_the_page_size() -> None:
    out, lse = repaged(16, pair_key)
    for page_size in (32, 48, 64, 128, 256, 528, 784):
        other, other_lse = repaged(page_size, pair_key)
        assert torch.equal(out[:40], other[:40]) and torch.equal(lse[:, :40], other_lse[:, :40]), f"{page_size=}"


@pytest.mark.parametrize("seed", with_slow(range(4), [2, 3]))  # `scripts/sm100_races.py` has 50 a key
def test_no_race_under_random_schedules(seed: int) -> None:
    run_prefill(BASE, seed=seed, key=pair_key(BASE)).check()


def test_refused_where_v_has_no_whole_half() -> None:
    with pytest.raises(ValueError, match="cta_group 2: expected a head_dim_v of whole parts for each CTA, got 64"):
        pair_key(replace(BASE, head_dim=64))


@pytest.mark.parametrize("num_sms", [1, 2, 5])  # one pair even of one SM; an SM that is left over
def test_the_operator_runs_pairs_where_they_are_tuned(num_sms: int) -> None:
    """Plan, device-made list and launch agree on pairs: head_dim 192, with a row for the decode kernel's threshold besides."""
    problem = case((130, 3, 1), (300, 65, 40), head_dim=192, head_dim_v=128, num_q_heads=2)
    plan = problem.plan(num_sms=num_sms)
    assert plan.kernels.prefill.tuning.cta_group == 2 and plan.kernels.work.prefill_groups == max(1, num_sms // 2)
    built = problem.build()
    built.check(*built.run(plan))
