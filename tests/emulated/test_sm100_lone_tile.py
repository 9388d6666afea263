"""The Blackwell prefill kernel of heads of 256: a query tile a CTA, as CTA pairs, whose blocks take two buffers of S in turns.

What the lone tile changes is asked again: the order of K and V, items of one tile a CTA, O in two parts, a rescale beside a product. The
rest is the same code (`test_sm100_prefill`, `test_sm100_pair`).
"""

from dataclasses import replace

import pytest
import torch

from fa4_backend.problem import FP8
from tests.emulated.test_sm100_prefill import FEATURES, SHAPES, case, repaged
from tests.support.emulated_prefill import run_prefill
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

WIDE = {"head_dim": 256, "num_q_heads": 4, "num_kv_heads": 1}


def wide(problem: PagedCase, **changes: object) -> PagedCase:
    return replace(problem, **{**WIDE, **changes})  # type: ignore[arg-type]


CASES = {
    **{name: wide(problem) for name, problem in (SHAPES | FEATURES).items()},
    # Around one item: two tiles of 32 tokens.
    "item 31, 32, 33": wide(case((31, 32, 33), (200, 256, 257))),
    "item 63, 64, 65": wide(case((63, 64, 65), (200, 256, 257))),
    "one block, two blocks, three": wide(case((20, 90, 5), (100, 200, 300))),
    "8 to 1, page 784": wide(case((20, 9), (300, 77)), num_q_heads=8, page_size=784),
    "MHA": wide(case((130, 3), (300, 65)), num_q_heads=2, num_kv_heads=2),
    "fp16, 5 to 1": wide(case((60, 33), (300, 65)), num_q_heads=5, dtype="float16", page_size=64),
    "one dominant key": wide(case((40, 5), (600, 77)), peaked=20.0),
    "strided pool": wide(case((40, 5), (300, 77)), layout="hnd"),
    "sm_103a": wide(case((40, 5), (300, 77)), arch="emulated-sm_103a"),
}


# A window on both sides has the code of one on the left and of none; packed heads are the code of every head dim.
SLOW = ["full attention", "window left", "8 to 1, page 784", "MHA", "sm_103a"]


@pytest.mark.parametrize("name", with_slow(CASES, SLOW))
def test_heads_of_256(name: str) -> None:
    run_prefill(CASES[name], num_ctas=1).check()  # one pair: its items follow each other


# The convert warps' turns with the correction: items of one, two and three blocks; tiles with an edge.
FP8_CASES = ("no query, no key, one of each", "one block, two blocks, three", "window left and right", "all score features", "fp16, 5 to 1")


@pytest.mark.parametrize("name", with_slow(FP8_CASES, ["window left and right", "fp16, 5 to 1"]))
def test_heads_of_256_with_k_and_v_in_fp8(name: str) -> None:
    run_prefill(replace(CASES[name], kv_dtype=FP8), num_ctas=1).check()


def test_its_key_is_of_pairs_of_lone_tiles() -> None:
    key = CASES["ragged"].plan().kernels.prefill
    assert (key.q_tiles, key.tuning.cta_group, key.o_parts, key.tokens_per_item) == (1, 2, 2, 64)


def rescaling() -> PagedCase:
    """Rows whose maximum moves in most blocks: O is rescaled beside the product with V of the block before."""
    return wide(case((40, 5), (700, 300)), peaked=20.0)


@pytest.mark.parametrize("threshold", with_slow([8.0, 0.0], [0.0]))
def test_rescaling(threshold: float) -> None:
    key = rescaling().plan().kernels.prefill
    kernel = replace(key.kernel, tile=replace(key.kernel.tile, rescale_threshold=threshold))
    run_prefill(rescaling(), key=replace(key, kernel=kernel), num_ctas=1).check()


@pytest.mark.parametrize("kv_dtype", ["auto", FP8])
@pytest.mark.parametrize("seed", range(2))
def test_no_race_under_random_schedules(seed: int, kv_dtype: str) -> None:
    problem = replace(rescaling(), kv_dtype=kv_dtype)
    first, other = (run_prefill(problem, num_ctas=1, seed=s) for s in (None, seed))
    other.check()
    rows = first.built.total_q
    assert torch.equal(other.out[:rows], first.out[:rows]) and torch.equal(other.lse[:, :rows], first.lse[:, :rows])


@pytest.mark.slow
def test_bits_do_not_depend_on_the_page_size() -> None:
    out, lse = repaged(16, **WIDE)
    for page_size in (48, 128, 784):
        other, other_lse = repaged(page_size, **WIDE)
        assert torch.equal(out[:40], other[:40]) and torch.equal(lse[:, :40], other_lse[:, :40]), f"{page_size=}"


def test_the_operator_serves_a_mixed_step() -> None:
    """Plan, device-made list and both kernels: rows of the decode kernel beside the prefill kernel's."""
    problem = wide(case((130, 1, 3), (300, 65, 40)))
    plan = problem.plan(num_sms=4)
    assert plan.kernels.decode is not None and plan.kernels.work.prefill_groups == 2
    built = problem.build()
    built.check(*built.run(plan))
