"""The Blackwell prefill kernel with Q, K and V in FP8, on the emulator, against the oracle on dequantised values.

What is its own: tcgen05.mma of kind f8f6f4 with V as it is stored, swizzles of 128, 64 and 32 bytes, weights in e4m3 behind each block's
maximum, the scale of Q. The budget of weights in e4m3 follows from their rounding (`error_budget.e4m3_spread`). The rest is the code of the
16-bit kernel (`test_sm100_prefill`).
"""

import math
from dataclasses import replace

import pytest
import torch

from fa4_backend import BatchLimits, plan_attention
from fa4_backend.compile_cache import ensure_object
from fa4_backend.error_budget import e4m3_spread
from fa4_backend.kernels.sm100.tuning import E4M3_LIFT, E4M3_THRESHOLD
from fa4_backend.problem import FP8, FP8_MAX, RAGGED
from tests.emulated import test_sm100_prefill
from tests.support import large_logits
from tests.support.contraction import contractible
from tests.support.emulated_prefill import run_built, run_prefill
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

BASE = PagedCase(
    (70, 3), (300, 65), num_q_heads=4, num_kv_heads=2, head_dim=128, page_size=16, arch="emulated-sm_100a", kv_dtype=FP8, q_dtype=FP8
)
CASES = {
    "one block, then none, then more": replace(BASE, query_lens=(40, 4, 3, 1), kv_lens=(127, 0, 300, 128)),
    "d64, float16, page 64": replace(BASE, head_dim=64, dtype="float16", page_size=64),
    "d96, 3 to 1, page 48": replace(BASE, head_dim=96, num_q_heads=6, page_size=48),
    "d192 and 128, 5 to 1, page 256": replace(BASE, head_dim=192, head_dim_v=128, num_q_heads=10, page_size=256),
    "d256": replace(BASE, head_dim=256),
    "windows on both sides": replace(BASE, query_lens=(33, 64), kv_lens=(400, 64), is_causal=False, window_left=90, window_right=20),
    "all score features": replace(BASE, query_lens=(33, 1), kv_lens=(300, 1), sinks=True, alibi=True, softcap=20.0, window_left=60),
    "one scale for all heads": replace(BASE, per_head_scales=False, layout="hnd"),
    "rows of one dominant key": replace(BASE, peaked=20.0),
    "without pages": replace(BASE, kv_source=RAGGED),
    "out in FP8": replace(BASE, out_dtype=FP8),
    "sm_103a": replace(BASE, arch="emulated-sm_103a"),
}


SLOW = ["windows on both sides", "d96, 3 to 1, page 48", "d192 and 128, 5 to 1, page 256", "without pages", "out in FP8", "sm_103a"]


@pytest.mark.parametrize("name", with_slow(CASES, SLOW))
def test_right_against_dequantised_values(name: str) -> None:
    run_prefill(CASES[name]).check()


def test_bits_do_not_depend_on_the_page_size() -> None:
    out, lse = test_sm100_prefill.repaged(16, kv_dtype=FP8, q_dtype=FP8, num_q_heads=4, num_kv_heads=2)
    other, other_lse = test_sm100_prefill.repaged(528, kv_dtype=FP8, q_dtype=FP8, num_q_heads=4, num_kv_heads=2)
    assert torch.equal(out[:40], other[:40]) and torch.equal(lse[:, :40], other_lse[:, :40])


def test_every_value_is_read_as_it_is_stored() -> None:
    """One key a row has the weight 2^7, which is exact: O is its V times v_scale. All 254 finite numbers, zeros and subnormals included."""
    case = replace(BASE, query_lens=(2,), kv_lens=(2,), num_q_heads=1, num_kv_heads=1, is_causal=False)
    built = case.build()
    a = built.arguments
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    page = int(a.page_table[0, 0])
    a.k_cache[page, 1, 0] = a.k_cache[page, 0, 0]
    for first in (0, 126):
        a.v_cache[page, :2, 0] = codes[first : first + 128]
        done = run_built(built)
        want = (codes[first : first + 128].float() * a.v_scale[0]).bfloat16()
        assert torch.equal(done.out[:2, 0], want.expand(2, 128)), f"{first=}"


def test_a_long_tail_is_kept() -> None:
    """One key has V = 0 and 2^12 times the weight of each of the 511 others, whose V is 1: relative to it without a lift, they were 0."""
    built = replace(BASE, query_lens=(20,), kv_lens=(512,), num_q_heads=1, num_kv_heads=1, is_causal=False).build()
    a = built.arguments
    pages = a.page_table[0].long()
    a.q.fill_(0.0)
    a.q[:20, 0, 0] = 1.0
    a.k_cache[pages] = torch.zeros(()).to(a.k_cache.dtype)
    a.v_cache[pages] = torch.ones(()).to(a.v_cache.dtype)
    a.k_cache[pages[-1], 15, 0, 0] = 128.0
    a.v_cache[pages[-1], 15, 0] = 0.0
    a.q_scale.fill_(1.0), a.v_scale.fill_(1.0), a.k_scale.fill_(12 * math.log(2.0) / (128.0 * a.softmax_scale))
    out, want = run_built(built).out[:20].float(), 511 / (511 + 2.0**12)
    assert ((out / want - 1.0).abs() <= 2.0**-4 + 2.0**-8).all(), f"{out[0, 0, 0]=} {want=}"


@pytest.mark.parametrize("step", [0.8, 1.75, 3.0, 9.0])
def test_no_weight_is_cut(step: float) -> None:
    """Scores grow by `step` log2 units from block to block as the kernel takes them, all V are the same: a weight that were cut at 448
    would lack in O, while the row sum has it."""
    assert 2.0 ** (E4M3_LIFT + E4M3_THRESHOLD) < FP8_MAX
    built = replace(BASE, query_lens=(20,), kv_lens=(512,), num_q_heads=1, num_kv_heads=1, is_causal=False).build()
    a = built.arguments
    pages = a.page_table[0].long()
    a.q.fill_(0.0)
    a.q[:20, 0, 0] = 1.0
    a.k_cache[pages] = torch.zeros(()).to(a.k_cache.dtype)
    a.k_cache[pages, :, 0, 0] = (128.0 * (3 - torch.arange(512) // 128)).to(a.k_cache.dtype).view(-1, 16)
    a.v_cache[pages] = torch.ones(()).to(a.v_cache.dtype)
    a.q_scale.fill_(1.0), a.v_scale.fill_(1.0), a.k_scale.fill_(step * math.log(2.0) / (128.0 * a.softmax_scale))
    out = run_built(built).out[:20].float()
    # Weights of a block are equal, and so is their rounding: by 2^-4 at most, and that of O to bfloat16.
    assert ((out - 1.0).abs() <= 2.0**-4 + 2.0**-8).all(), f"{(out - 1.0).abs().max()=}"


def test_a_nan_that_rows_see_reaches_these_rows_alone() -> None:
    case = replace(BASE, query_lens=(40,), kv_lens=(300,))
    built = case.build()
    a = built.arguments
    page, row = divmod(280, 16)  # query rows 20 and on see key 280
    a.k_cache[int(a.page_table[0, page]), row, :, 5] = math.nan
    done = run_built(built)
    assert done.out[20:40].isnan().all() and done.out[:20].isfinite().all()


@pytest.mark.parametrize("name", ["one block, then none, then more", "all score features"])
def test_nothing_depends_on_what_ptxas_fuses(name: str) -> None:
    case = CASES[name]
    assert contractible(ensure_object(case.plan().kernels.prefill).with_suffix(".ptx").read_text()) == []
    run_prefill(case, contraction="always").check()


@pytest.mark.parametrize("name", ["growing", "-3e37"])
def test_large_logits(name: str) -> None:
    """From scales: k_scale is up to 7 * 10^16."""
    shape = {"query_lens": (70, 3), "kv_lens": (400, 129), "num_q_heads": 2, "num_kv_heads": 1}
    built = large_logits.build(name, arch=BASE.arch, kv_dtype=FP8, q_dtype=FP8, **shape)
    done = run_built(built)
    large_logits.check(built, done.out, done.lse)


@pytest.mark.parametrize("seed", range(2))
def test_no_race_under_random_schedules(seed: int) -> None:
    run_prefill(BASE, num_ctas=1, seed=seed).check()


@pytest.mark.parametrize("arch", with_slow(["emulated-sm_100a", "emulated-sm_103a"], ["emulated-sm_103a"]))
def test_a_step_of_decode_rows_and_prompts(arch: str) -> None:
    """Both kernels take q in FP8: what an engine hands over is quantised for all rows of a step or for none."""
    case = replace(BASE, query_lens=(1, 40, 1), kv_lens=(300, 65, 17), arch=arch)
    built = case.build()
    plan = plan_attention(case.problem(), BatchLimits(3, built.arguments.q.shape[0], 300), num_sms=2)
    assert plan.kernels is not None and plan.kernels.decode is not None
    built.check(*built.run(plan))


def test_the_budget_is_that_of_the_rounding() -> None:
    """Of weights rounded as the kernel rounds them, in torch: the spread holds, and is not ten times what they make."""
    case = replace(BASE, query_lens=(64,), kv_lens=(1000,), num_q_heads=2, num_kv_heads=2, is_causal=False)
    a = case.build().arguments
    q = a.q[:64].float() * a.q_scale[:, None]
    k, v = (
        torch.cat([cache[int(page)].float() for page in a.page_table[0]])[:1000] * scale[:, None]
        for cache, scale in ((a.k_cache, a.k_scale), (a.v_cache, a.v_scale))
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) * a.softmax_scale
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * 2.0**E4M3_LIFT
    error = torch.einsum("hqk,khd->hqd", weights.to(torch.float8_e4m3fn).float() - weights, v) / weights.sum(-1, keepdim=True)
    spread = e4m3_spread(a, is_causal=False)
    assert spread / 10 < error.abs().max().item() <= spread
