"""The decode kernel with K and V in FP8, on the emulator against the oracle on dequantised values.

A case's scales lie between 2^-7 and 2^6, one a KV head or one for all: stored values are subnormal, saturated or zero in places, and what
no row sees is 0x7F, which is NaN. Cases share few compiled kernels.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fa4_backend.compile_cache import ensure_object
from fa4_backend.kernels.decode.config import BOX_KEYS, DecodeConfig, resolve
from fa4_backend.kernels.decode.operands_fp8 import Fp8Operands
from fa4_backend.problem import FP8
from tests.support.contraction import contractible
from tests.support.emulated_decode import run_decode
from tests.support.large_logits import build, check
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

DRAFTS = PagedCase(
    (4, 1, 3), (200, 65, 3), num_q_heads=8, num_kv_heads=2, head_dim=128, kv_dtype=FP8, decode_query_len=4, arch="emulated-sm_90a"
)  # fmt: skip
CASES = {
    "4 tokens, page 48, hnd": replace(DRAFTS, page_size=48, layout="hnd"),
    "edges of boxes and tiles": replace(DRAFTS, query_lens=(1,) * 6, kv_lens=(1, 15, 16, 17, 63, 65), layout="nhd", per_head_scales=False),
    "more tokens than keys, no key, no query": replace(DRAFTS, query_lens=(4, 1, 0), kv_lens=(2, 0, 40)),
    "windows, d96": replace(DRAFTS, head_dim=96, window_left=50, window_right=1, is_causal=False, arch="emulated-sm_100a"),
    "sinks, soft cap, alibi, float16, d256": replace(DRAFTS, head_dim=256, dtype="float16", sinks=True, softcap=20.0, alibi=True),
    "32 rows of 192 and 128": replace(DRAFTS, num_q_heads=16, head_dim=192, head_dim_v=128, arch="emulated-sm_103a"),
    "Q in FP8, page 48": replace(DRAFTS, q_dtype=FP8, page_size=48, layout="nhd", arch="emulated-sm_100a"),
    "Q in FP8, d96, all score features": replace(
        DRAFTS, q_dtype=FP8, head_dim=96, sinks=True, softcap=20.0, alibi=True, window_left=50, arch="emulated-sm_103a", dtype="float16"
    ),
    "batch invariant, d64": replace(
        DRAFTS, query_lens=(2, 1), kv_lens=(1500, 65), head_dim=64, num_q_heads=6, decode_query_len=2, batch_invariant=True
    ),
}
WHOLE = ("more tokens than keys, no key, no query",)  # rows that are not cut; all others are
# Features and other head dims have the code of K and V in 16 bits, and are in the cases of sm_103a.
SLOW = ["windows, d96", "sinks, soft cap, alibi, float16, d256", "32 rows of 192 and 128"]


@pytest.mark.parametrize("name", with_slow(CASES, SLOW))
def test_edges_and_features(name: str) -> None:
    run = run_decode(CASES[name], seed=1)
    run.check()
    assert run.num_parts > 0 or name in WHOLE


def test_bits_do_not_depend_on_schedule_or_page_size() -> None:
    first = run_decode(DRAFTS, seed=None).rows
    for page_size, seed in ((48, 4), (128, 5)):
        again = run_decode(replace(DRAFTS, page_size=page_size), seed=seed).rows
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_batch_invariant_bits_do_not_depend_on_the_gpu() -> None:
    first, again = (run_decode(CASES["batch invariant, d64"], num_ctas=n).rows for n in (1, 7))
    assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_scales_are_read_at_each_launch() -> None:
    """K times 1/8 with a query times 8, and V times 4, are the same and 4 times the result: powers of 2 change no bit."""
    built = DRAFTS.build()
    first = run_decode(DRAFTS, built=built).rows
    out, lse = first[0].clone(), first[1].clone()
    a = built.arguments
    assert a.k_scale is not None and a.v_scale is not None
    changed = replace(built, arguments=a._replace(q=a.q * 8, k_scale=a.k_scale / 8, v_scale=a.v_scale * 4))
    again = run_decode(DRAFTS, built=changed).rows
    assert torch.equal(again[0], 4 * out) and torch.equal(again[1], lse)


# A level whose reference is rounded, a maximum that moves with every block, and the largest bfloat16 queries.
@pytest.mark.parametrize("name", ["level", "growing", "-3e37"])
def test_large_logits(name: str) -> None:
    built = build(name, kv_dtype=FP8, arch="emulated-sm_90a", query_lens=(1, 4), kv_lens=(700, 129), num_q_heads=8, num_kv_heads=2,
                  decode_query_len=4)  # fmt: skip
    run_decode(built.case, built=built)
    a = built.arguments
    assert a.lse is not None
    check(built, a.out, a.lse)


def test_rows_of_queries_over_all_of_bfloat16() -> None:
    """Each head's queries at another power of 2, elements 2^0 to 2^-20 of the row's largest: what makes them float16 must not show."""
    built = replace(DRAFTS, query_lens=(4, 1, 1), kv_lens=(64, 33, 16)).build()
    a, generator = built.arguments, torch.Generator().manual_seed(5)
    rows = slice(0, built.total_q)
    exponents = torch.tensor([-126.0, -60.0, -30.0, -5.0, 0.0, 5.0, 30.0, 120.0])
    spread = torch.randint(0, 21, (a.q.shape[-1],), generator=generator)
    a.q[rows] = (a.q[rows].float() * (exponents[:, None] - spread).exp2()).to(a.q.dtype)
    # Heads of one KV head share its K, so their scores differ as the queries do; float64 knows no limits.
    run_decode(built.case, built=built)
    assert a.lse is not None
    check(built, a.out, a.lse)


def test_no_weight_outgrows_float16() -> None:
    """The reference lies below a row's largest score, and how far is rounded where scores are large. 2^16 would be infinite."""
    weights = Fp8Operands(config_of(DRAFTS)).weights
    steps = np.concatenate([np.arange(0, 17, 0.5), [2.0**i for i in range(5, 31)]]).astype(np.float32)
    largest = 0.0
    for exponent, sign in itertools.product(range(40), (1, -1)):
        first = np.float32(sign) * np.ldexp(1 + np.arange(64, dtype=np.float32) / 64, exponent).astype(np.float32)
        reference = first - np.float32(weights.largest)
        score = first[:, None] + steps  # later blocks; kept where the reference does not move
        kept = (score - np.float32(weights.largest)) - reference[:, None] <= np.float32(weights.growth)
        largest = max(largest, (score - reference[:, None])[kept].max())
    assert largest == 15.0


def test_no_product_may_be_fused_into_a_sum() -> None:
    assert contractible(ensure_object(config_of(DRAFTS)).with_suffix(".ptx").read_text()) == []


def test_columns_of_a_row_are_each_one_lanes() -> None:
    operands = Fp8Operands(config_of(DRAFTS))
    tiles = range(operands.config.head_dim_v // 8)
    columns = [operands.column(tile, pair, e) for tile in tiles for pair in range(4) for e in range(2)]
    assert sorted(columns) == list(range(operands.config.head_dim_v)) and BOX_KEYS == 16


def config_of(case: PagedCase) -> DecodeConfig:
    """Compile key of a case's decode kernel."""
    config = resolve(case.problem(), case.plan().limits, prefill_has_parts=False)
    assert config is not None
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_race_over_seeds(name: str) -> None:
    for seed in range(100):
        run_decode(CASES[name], seed=seed).check()
