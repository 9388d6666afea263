"""The Hopper prefill kernel with K and V in FP8, on the emulator against the oracle on dequantised values.

A case's scales lie between 2^-7 and 2^6, one a KV head or one for all: stored values are subnormal, saturated or zero in places, and what
no row sees is 0x7F, which is NaN. Blocks hold 128 keys at d128, boxes 16 at page 16; cases share few compiled kernels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fa4_backend.compile_cache import ensure_object
from fa4_backend.kernels.common.wgmma_fragment import FP8_LIFT, HUGE
from fa4_backend.problem import FP8
from tests.support import large_logits
from tests.support.contraction import contractible
from tests.support.emulated_prefill import Cuts, run_built, run_prefill
from tests.support.paged_case import PagedCase, repage
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

BASE = PagedCase(
    (5, 40, 90), (133, 300, 90), num_q_heads=8, num_kv_heads=2, head_dim=128, kv_dtype=FP8, page_size=16, arch="emulated-sm_90a"
)  # fmt: skip


def case(query_lens: tuple[int, ...], kv_lens: tuple[int, ...], **changes: object) -> PagedCase:
    return replace(BASE, query_lens=query_lens, kv_lens=kv_lens, **changes)  # type: ignore[arg-type]


CASES = {
    # Around one KV block and one query tile, and one scale for all heads.
    "kv 127, 128, 129": case((31, 32, 33), (127, 128, 129), per_head_scales=False),
    # Empty rows, and a last block of which one box is seen in part and the others not at all.
    "more queries than keys, no query, no key": case((40, 0, 4, 1), (20, 40, 0, 1)),
    "both windows, page 48": case((70, 33), (300, 64), window_left=90, window_right=20, is_causal=False, page_size=48),
    # Three consumers; one part of 64 elements a row.
    "d64, all score features": case((60, 33, 1), (260, 20, 1), head_dim=64, num_q_heads=6, sinks=True, alibi=True, softcap=20.0),
    # Four parts, a left window only: rows cleared at both edges of one tile.
    "d256, left window": case((40, 3), (130, 65), head_dim=256, num_q_heads=2, num_kv_heads=1, window_left=5, layout="hnd"),
    # Three parts beside two, tiles of 80 keys, K in float16 as well.
    "(192, 128) in fp16, sinks": case(
        (10, 70), (230, 300), head_dim=192, head_dim_v=128, num_q_heads=2, num_kv_heads=2, dtype="float16", sinks=True
    ),
    "d96": case((70, 3), (200, 65), head_dim=96, num_q_heads=4),  # rows of 64 bytes in the ring
    "one token fills a tile": case((3, 2), (140, 20), num_q_heads=128, num_kv_heads=1),
}


@pytest.mark.parametrize("name", with_slow(CASES, ["d96", "one token fills a tile"]))
def test_edges_and_features(name: str) -> None:
    run_prefill(CASES[name], seed=len(name)).check()


@pytest.mark.parametrize("name", ["both warpgroups, 3 parts", "8 parts"])
def test_parts(name: str) -> None:
    """Parts lay down O without V's scale; whoever comes last brings it in."""
    drawn, parts = {
        "both warpgroups, 3 parts": (case((33,), (400,)), (3,)),
        "8 parts": (case((5,), (1100,)), (8,)),
    }[name]
    run_prefill(drawn, cuts=Cuts(parts), num_ctas=3, seed=2).check()


def test_shares_have_the_bits_of_the_last() -> None:
    """Four parts that all CTAs add up, as atomics of those that leave tell; or whoever comes last, from memory and in registers.

    A bfloat16 Q has a scale a row, which a share reads from the slot.
    """
    built = case((5,), (4096,), num_q_heads=4, num_kv_heads=1, sinks=True).build()
    leaving, outs = [], []
    for num_ctas, seed in ((4, 1), (4, 2), (4, 3), (3, None), (1, None)):  # fewer CTAs take entries from the queue, too
        run = run_built(built, cuts=Cuts((4,)), num_ctas=num_ctas, seed=seed)
        run.check()
        leaving.append(sum(n for name, n in run.report.opcodes().items() if name.startswith("atom.global.acq_rel.add")) - 4)
        outs.append((run.out[: built.total_q].clone(), run.lse[:, : built.total_q].clone()))
    assert max(leaving[:3]) == 4, leaving
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


def test_bits_do_not_depend_on_schedule_or_page_size() -> None:
    base = BASE.build()
    outs = []
    for page_size, seed in ((16, None), (16, 7), (64, 8)):
        run = run_built(repage(base, page_size), seed=seed)
        run.check()
        outs.append((run.out[: base.total_q].clone(), run.lse[:, : base.total_q].clone()))
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


def test_scales_are_read_at_each_launch() -> None:
    """K times 1/8 with a query times 8, and V times 4, are the same and 4 times the result: powers of 2 change no bit."""
    built = BASE.build()
    run = run_built(built)
    run.check()
    out, lse = run.out[: built.total_q].clone(), run.lse[:, : built.total_q].clone()
    a = built.arguments
    assert a.k_scale is not None and a.v_scale is not None
    again = run_built(replace(built, arguments=a._replace(q=a.q * 8, k_scale=a.k_scale / 8, v_scale=a.v_scale * 4)))
    assert torch.equal(again.out[: built.total_q], 4 * out) and torch.equal(again.lse[:, : built.total_q], lse)


def test_every_stored_value_reaches_the_products() -> None:
    """One query row a key, its last one, whose softmax is that key: O is its V, all 254 finite values of e4m3 among them."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[values.float().isfinite()]
    built = replace(BASE, query_lens=(96,), kv_lens=(96,)).build()
    a = built.arguments
    pages = a.page_table[0].long()
    a.k_cache[pages] = torch.zeros(()).to(a.k_cache.dtype)
    # K of key i is 448 in channel i, so a query of 64 in channel i takes all weight there.
    for key in range(96):
        a.k_cache[pages[key // 16], key % 16, :, key] = 448.0
    a.q[:96] = 0
    for token in range(96):
        a.q[token, :, token] = 64.0
    stored = values[torch.arange(96 * 2 * 128) % len(values)].view(96, 2, 128)
    a.v_cache[pages] = stored.view(6, 16, 2, 128)
    a.k_scale.fill_(1.0)
    a.v_scale.fill_(1.0)
    run = run_built(built)
    assert torch.equal(run.out[:96].float(), stored.float().repeat_interleave(4, dim=1))


@pytest.mark.parametrize("page_size", with_slow([16, 64], [64]))
def test_nan_at_both_edges_changes_no_bit(page_size: int) -> None:
    """0x7F left of the window and right of the last key, in pages that hold keys too, against the same rows as numbers."""
    drawn = case((20,), (150,), window_left=37, window_right=3, is_causal=False, page_size=page_size)
    built = drawn.build()
    run = run_built(built)
    run.check()
    out, lse = run.out[:20].clone(), run.lse[:, :20].clone()
    for cache in (built.arguments.k_cache, built.arguments.v_cache):
        bits = cache.view(torch.uint8)
        assert (bits == 0x7F).any()
        bits[bits == 0x7F] = 0x38  # 1
    again = run_built(built)
    assert torch.equal(again.out[:20], out) and torch.equal(again.lse[:, :20], lse)


# Of kernels that other tests compile; the window hides nothing.
HEADS: dict[int, dict[str, Any]] = {
    128: {"head_dim": 128, "num_q_heads": 8, "num_kv_heads": 2},
    256: {"head_dim": 256, "num_q_heads": 8, "num_kv_heads": 4, "window_left": 1000},
}


# A level whose reference is rounded, a maximum that moves with every block, and the largest bfloat16 queries, as they are and as float16.
@pytest.mark.parametrize(("name", "head_dim"), [("level", 128), ("growing", 128), ("-3e37", 128), ("growing", 256), ("-3e37", 256)])
def test_large_logits(name: str, head_dim: int) -> None:
    built = large_logits.build(name, query_lens=(33,), kv_lens=(300,), kv_dtype=FP8, arch=BASE.arch, **HEADS[head_dim])
    # By whoever comes last, in registers; from memory, with the scales of rows that slots hold.
    for cuts, num_ctas in ((Cuts((3,)), 2), (Cuts((4,)), 8)):
        run = run_built(built, cuts=cuts, num_ctas=num_ctas)
        assert run.report.races == []
        large_logits.check(built, run.out, run.lse)


def test_no_weight_outgrows_float16() -> None:
    """A row's reference lies `FP8_LIFT` below its largest score, rounded: below `HUGE` its float32 neighbours are up to 16 apart."""
    largest = 0.0
    for exponent in range(int(math.log2(HUGE))):
        scores = np.ldexp(1 + np.arange(0, 1, 2.0**-12), exponent)
        scores = np.concatenate(
            [scores, scores + 2.0 ** (exponent - 24), -scores, 2.0 ** (exponent + 1) - np.ldexp(1.0, np.arange(-20, 5))]
        )
        scores = scores[np.abs(scores) < HUGE]
        largest = max(largest, float((scores - (scores - FP8_LIFT).astype(np.float32)).max()))
    assert 2.0**largest <= torch.finfo(torch.float16).max, largest


@pytest.mark.parametrize(("head_dim", "largest"), [(128, 100.0), (256, 120.0)])
def test_rows_of_queries_over_all_of_bfloat16(head_dim: int, largest: float) -> None:
    """Each head's queries at another power of 2, elements 2^0 to 2^-20 of the row's largest: what makes them float16 must not show.

    Scores of what is stored must be float32 numbers, so a bfloat16 Q that stays so ends earlier.
    """
    built = case((40, 3), (64, 33), **HEADS[head_dim]).build()
    a, generator = built.arguments, torch.Generator().manual_seed(5)
    exponents = torch.tensor([-126.0, -60.0, -30.0, -5.0, 0.0, 5.0, 30.0, largest])
    spread = torch.randint(0, 21, (a.q.shape[-1],), generator=generator)
    a.q[: built.total_q] = (a.q[: built.total_q].float() * (exponents[:, None] - spread).exp2()).to(a.q.dtype)
    run = run_built(built)
    large_logits.check(built, run.out, run.lse)


def test_no_product_may_be_fused_into_a_sum() -> None:
    for drawn in (BASE, CASES["d64, all score features"]):
        kernels = drawn.plan().kernels
        assert kernels is not None and contractible(ensure_object(kernels.prefill).with_suffix(".ptx").read_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", *CASES])
def test_no_race_over_seeds(name: str) -> None:
    for seed in range(100):
        run_prefill({"base": BASE, **CASES}[name], seed=seed).check()
