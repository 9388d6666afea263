"""Latent decode on Blackwell, compiled by the real compiler and executed on the emulator behind the device's schedule, against an oracle.

Sizes sit at 128 keys a block, 64 of them a CTA, 64 packed rows a CTA, 16 rows a warp, 16 or 64 keys a box. The pretended GPU has few SMs,
so rows are cut between pairs of CTAs. What no row sees is NaN, lists, counters and slots hold garbage before. Six keys are compiled; other
shapes run by hand: `python -m scripts.mla_sm100_races`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend.kernels.schedule.work_list import NUM_PIECES
from fa4_backend.problem import FP8
from tests.support.emulated_mla import MlaCase, run_mla

pytestmark = pytest.mark.emulated

# 16 rows of the first CTA's tile, none of the second's; a row without keys, one of one key, a block and two keys, three blocks.
FEW = MlaCase((1, 1, 1, 0, 1, 1), (130, 64, 0, 70, 1, 300), arch="sm_100a")
# Both tiles of a pair; more tokens than keys; fewer tokens than the longest, so that the second tile or some of its warps have no row.
DRAFTS = MlaCase((4, 1, 3, 2), (200, 65, 3, 1), num_heads=32, decode_query_len=4, page_size=16, one_q=True, arch="sm_100a")
# 128 heads, whose pieces of 1 and 2 blocks are added up by one pair or by several.
PIECES = MlaCase((1, 1), (1200, 65), num_heads=128, batch_invariant=True, max_seqlen_k=2048, arch="sm_100a")


def test_few_heads_and_parts_of_rows() -> None:
    for seed in (None, 1, 2):
        run = run_mla(FEW, num_sms=6, seed=seed)
        run.check()
        assert (run.work.decode_tiles[:6, NUM_PIECES] > 1).any(), "no row is cut"


def test_drafts_and_bits_in_all_page_sizes() -> None:
    first = run_mla(DRAFTS)
    first.check()
    for page_size, seed in ((16, 3), (64, 4)):
        again = run_mla(replace(DRAFTS, page_size=page_size), seed=seed)
        again.check()
        for got, want in zip(again.rows, first.rows, strict=True):
            assert torch.equal(got, want), f"pages of {page_size}"


def test_peaked_rows_move_their_reference() -> None:
    """Logits of several hundred: most blocks rescale O, whose columns and keys two warps share."""
    case = replace(DRAFTS, kv_lens=(390, 300, 3, 129), peaked=20.0)
    for seed in (None, 5):
        run = run_mla(case, seed=seed)
        run.check()
        assert run.num_parts > 0


def test_batch_invariant_bits_do_not_depend_on_the_gpu() -> None:
    first = run_mla(PIECES, num_sms=2)
    first.check()
    assert (first.work.decode_tiles[:2, NUM_PIECES] == 1).all(), "a row is cut on one pair"
    again = run_mla(PIECES, num_sms=8, seed=7)
    again.check()
    assert (again.work.decode_tiles[:2, NUM_PIECES] > 1).any(), "no row is cut on four pairs"
    for got, want in zip(again.rows, first.rows, strict=True):
        assert torch.equal(got, want)


def test_fp8_latents_few_heads() -> None:
    """Q and weights in two terms, two blocks of K and V in flight; a row of Q near the smallest numbers, one with an element beyond all
    others."""
    case = replace(FEW, kv_dtype=FP8)
    arguments = case.build()
    arguments.q[0] *= 2.0**-100
    arguments.q_rope[0] *= 2.0**-100
    arguments.q[1, :, 7] *= 2.0**10
    for seed in (None, 1):
        run_mla(case, num_sms=6, seed=seed, arguments=arguments).check()


def test_fp8_latents_of_drafts() -> None:
    """Both tiles of a pair, references that move in most blocks, pages of 16 and 64."""
    case = replace(DRAFTS, kv_dtype=FP8, kv_lens=(390, 300, 3, 129), peaked=20.0)
    first = run_mla(case)
    first.check()
    assert first.num_parts > 0
    again = run_mla(replace(case, page_size=64), seed=5)
    again.check()
    for got, want in zip(again.rows, first.rows, strict=True):
        assert torch.equal(got, want)
