"""The Blackwell prefill kernel with K and V in FP8, on the emulator, against the oracle on dequantised values.

What FP8 changes: staged tiles, the convert warps between them and the ring, their turns with the correction, scales, and who clears what no
row sees. Cases have scales of 2^-7 to 2^6 a head, saturated values, zeros, and NaN (0x7F) in all that no row sees (`paged_case`). The rest
is the code of the 16-bit kernel (`test_sm100_prefill`). Masks have small tiles' worth of rows, since they are the same code as well.
"""

import math
from dataclasses import replace

import pytest
import torch

from fa4_backend import BatchLimits, plan_attention
from fa4_backend.compile_cache import ensure_object
from fa4_backend.problem import FP8
from tests.emulated import test_sm100_prefill
from tests.support import large_logits
from tests.support.contraction import contractible
from tests.support.emulated_prefill import run_built, run_prefill
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

BASE = PagedCase(
    (5, 40), (301, 17), num_q_heads=2, num_kv_heads=1, head_dim=128, page_size=16, arch="emulated-sm_100a", kv_dtype=FP8
)  # two items of two CTAs or of one, more tiles than a ring holds, both with a tail
TWO_HEADS = replace(BASE, query_lens=(70, 3), kv_lens=(300, 65), num_q_heads=4, num_kv_heads=2)


def with_ctas(case: PagedCase, ctas: int):
    return case.plan().kernels.prefill.with_tuning(cta_group=ctas)


CASES = {
    # One tile, two and three for a CTA pair's four: the convert warps' turns differ for items of one and of more blocks.
    "one block, then none, then more": replace(BASE, query_lens=(40, 4, 3, 1), kv_lens=(127, 0, 300, 128)),
    "d64": replace(TWO_HEADS, head_dim=64),
    "d96, 3 to 1, page 48": replace(TWO_HEADS, head_dim=96, num_q_heads=6, page_size=48),
    "d128, float16, 5 to 1, page 64": replace(TWO_HEADS, num_q_heads=10, dtype="float16", page_size=64),
    "d192 and 128, page 256": replace(TWO_HEADS, head_dim=192, head_dim_v=128, page_size=256),
    "full attention": replace(TWO_HEADS, is_causal=False),
    # Both edges: what is left of the window, in the middle of a box, and what is past the last key.
    "window": replace(TWO_HEADS, query_lens=(33, 3), kv_lens=(500, 200), window_left=100),
    "windows on both sides": replace(TWO_HEADS, query_lens=(33, 64), kv_lens=(400, 64), is_causal=False, window_left=90, window_right=20),
    "all score features": replace(TWO_HEADS, query_lens=(33, 1), kv_lens=(300, 1), sinks=True, alibi=True, softcap=20.0, window_left=60),
    "one scale for all heads": replace(TWO_HEADS, per_head_scales=False, layout="hnd"),
    "rows of one dominant key": replace(TWO_HEADS, peaked=20.0),
    "sm_103a": replace(BASE, arch="emulated-sm_103a"),
}


# A window on both sides has the code of one on the left and of none; rows of 96 bytes in the ring are those of Q in FP8 or of decode.
SLOW = ["full attention", "window", "d96, 3 to 1, page 48"]


@pytest.mark.parametrize("name", with_slow(CASES, SLOW))
def test_right_against_dequantised_values(name: str) -> None:
    run_prefill(CASES[name]).check()


def test_pairs_have_the_bits_of_one_cta() -> None:
    assert BASE.plan().kernels.prefill.tuning.cta_group == 2
    pairs, single = (run_prefill(TWO_HEADS, key=with_ctas(TWO_HEADS, ctas)) for ctas in (2, 1))
    pairs.check()
    single.check()
    rows = pairs.built.total_q
    assert torch.equal(pairs.out[:rows], single.out[:rows]) and torch.equal(pairs.lse[:, :rows], single.lse[:, :rows])


def test_bits_do_not_depend_on_the_page_size() -> None:
    heads = {"head_dim": 64, "num_q_heads": 4, "num_kv_heads": 2}
    out, lse = test_sm100_prefill.repaged(16, kv_dtype=FP8, **heads)
    for page_size in (64, 528):
        other, other_lse = test_sm100_prefill.repaged(page_size, kv_dtype=FP8, **heads)
        assert torch.equal(out[:40], other[:40]) and torch.equal(lse[:, :40], other_lse[:, :40]), f"{page_size=}"


def test_every_e4m3_is_exact() -> None:
    """Keys of one V: O is that, converted, times v_scale. All 254 finite numbers, zeros of both signs and subnormals included."""
    case = replace(BASE, query_lens=(2,), kv_lens=(2,))
    built = case.build()
    a = built.arguments
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    page = int(a.page_table[0, 0])
    for first in (0, 126):
        a.v_cache[page, :2, 0] = codes[first : first + 128]
        done = run_built(built)
        want = (codes[first : first + 128].float() * a.v_scale[0]).bfloat16()
        assert torch.equal(done.out[:2], want.expand(2, 2, 128)), f"{first=}"


def test_a_nan_that_rows_see_reaches_these_rows_alone() -> None:
    case = replace(BASE, query_lens=(40,), kv_lens=(300,))
    built = case.build()
    a = built.arguments
    page, row = divmod(280, 16)  # query rows 20 and on see key 280
    a.k_cache[int(a.page_table[0, page]), row, 0, 5] = math.nan
    done = run_built(built)
    assert done.out[20:40].isnan().all() and done.out[:20].isfinite().all()


@pytest.mark.parametrize("name", ["one block, then none, then more", "all score features"])
def test_scales_add_no_product_that_may_be_fused_into_a_sum(name: str) -> None:
    case = CASES[name]
    assert contractible(ensure_object(case.plan().kernels.prefill).with_suffix(".ptx").read_text()) == []
    run_prefill(case, contraction="always").check()


@pytest.mark.parametrize("name", ["growing", "-3e37"])
def test_large_logits(name: str) -> None:
    """From scales: k_scale is up to 7 * 10^16."""
    built = large_logits.build(name, arch=BASE.arch, kv_dtype=FP8, query_lens=(70, 3), kv_lens=(400, 129), num_q_heads=2, num_kv_heads=1)
    done = run_built(built)
    large_logits.check(built, done.out, done.lse)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seed", range(2))
def test_no_race_under_random_schedules(head_dim: int, seed: int) -> None:
    run_prefill(replace(BASE, head_dim=head_dim), num_ctas=1, seed=seed).check()


def test_the_operator_in_exact_mode() -> None:
    """Every row on this kernel: scales from the caller, one for all heads as (1,), and none, which is 1."""
    built = TWO_HEADS.build()
    a = built.arguments
    problem = replace(TWO_HEADS.problem(), batch_invariant=True, exact=True)
    plan = plan_attention(problem, BatchLimits(2, a.q.shape[0], 300), num_sms=2)
    assert plan.kernels is not None and plan.kernels.decode is None
    built.check(*built.run(plan))
    one = torch.tensor([0.25])
    built.arguments = a._replace(k_scale=one, v_scale=one)
    out, lse = (result.clone() for result in built.run(plan))
    built.arguments, built.oracle = a._replace(k_scale=one.expand(2), v_scale=one.expand(2)), None
    built.check(out, lse)
