"""How many sequences one launch of the schedule serves, from the numbers that its kernel is built on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fa4_backend import AttentionProblem, BatchLimits, plan_attention
from fa4_backend.arch import ARCHS
from fa4_backend.kernels.mla_decode.config import MlaDecodeConfig, most_parts
from fa4_backend.kernels.schedule.limits import FIXED_BYTES, MAX_DECODE_CTAS, SEQ_BYTES, largest_num_seqs, table_size
from fa4_backend.kernels.schedule.work_list import MOST_PARTS
from fa4_backend.problem import LATENT

PROBLEM = AttentionProblem(
    num_q_heads=32, num_kv_heads=8, head_dim=128, head_dim_v=128, dtype="bfloat16", page_size=16, arch="sm_90a",
)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_sixteen_thousand_sequences_fit_every_chip(arch: str) -> None:
    largest = largest_num_seqs(arch, 1 << 17)
    assert 16384 <= largest
    for rows in (1, 256, 257, 16384, 16385, largest):
        size = table_size(arch, rows)
        assert rows <= size and SEQ_BYTES * size + FIXED_BYTES <= ARCHS[arch].smem_bytes
    assert table_size(arch, 16384) == 16384 and table_size(arch, 16385) == largest


def test_sums_of_kv_tiles_bound_the_sequences_too() -> None:
    """Of 2^25 keys a row is 2^19 tiles; a sum of int32 counts fewer than 4,096 such rows."""
    assert largest_num_seqs("sm_90a", 1 << 25) == 4095


def test_a_plan_of_many_sequences_shares_the_kernel_of_its_size() -> None:
    limits = BatchLimits(max_num_seqs=9000, max_num_tokens=16384, max_seqlen_k=1 << 17)
    assert plan_attention(PROBLEM, limits).kernels.schedule.max_num_seqs == 16384
    assert plan_attention(PROBLEM, replace(limits, max_num_seqs=3)).kernels.schedule.max_num_seqs == 256


def test_more_decode_ctas_than_cuts_are_refused() -> None:
    """A thread of the schedule stands for each cut; no chip here has as many SMs."""
    shape = plan_attention(PROBLEM, BatchLimits(8, 8, 1024)).kernels.work
    with pytest.raises(AssertionError, match=f"at most {MAX_DECODE_CTAS}"):
        replace(shape, decode_num_ctas=MAX_DECODE_CTAS + 1)


LATENTS = AttentionProblem(
    num_q_heads=128, num_kv_heads=1, head_dim=576, head_dim_v=512, dtype="bfloat16", page_size=64, arch="sm_90a", kv_source=LATENT,
)  # fmt: skip


@pytest.mark.parametrize("problem", [PROBLEM, replace(PROBLEM, batch_invariant=True), LATENTS, replace(LATENTS, batch_invariant=True)])
def test_parts_of_a_row_group_fit_its_counter(problem: AttentionProblem) -> None:
    """On the largest chip and with rows of a million keys; a latent row group's parts fit the merge's shared memory too."""
    kernels = plan_attention(problem, BatchLimits(64, 64, 1 << 20), num_sms=max(arch.num_sms for arch in ARCHS.values())).kernels
    assert kernels.work.max_parts() <= MOST_PARTS
    if isinstance(kernels.decode, MlaDecodeConfig):
        assert kernels.work.max_parts() <= most_parts(kernels.decode)


def test_more_parts_than_are_counted_or_added_up_are_refused() -> None:
    shape = plan_attention(replace(PROBLEM, batch_invariant=True), BatchLimits(8, 8, 1024)).kernels.work
    with pytest.raises(AssertionError, match=f"at most {MOST_PARTS}"):
        replace(shape, max_seqlen_k=shape.decode_tile_n * shape.split_blocks * (MOST_PARTS + 1))
    with pytest.raises(AssertionError, match="max_parts"):
        plan_attention(LATENTS, BatchLimits(8, 8, 1024), num_sms=280)


def test_lengths_are_cut_at_whole_pages() -> None:
    """A row of the page table has room for whole pages, and an engine's dummy batch may name them all."""
    plan = plan_attention(PROBLEM, BatchLimits(max_num_seqs=8, max_num_tokens=8, max_seqlen_k=250))
    assert plan.kernels.work.max_seqlen_k == 256
