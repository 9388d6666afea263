"""Steps as an engine's dummy and capture batches make them: lengths past every limit, more rows than tokens.

Both chips; decode rows, both kinds, and prefill alone, whose kernel then zeroes the padding itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.emulated_decode import run_decode
from tests.support.emulated_mixed import run_mixed
from tests.support.emulated_prefill import run_built
from tests.support.paged_case import BuiltCase, PagedCase

pytestmark = pytest.mark.emulated

ARCHS = ["emulated-sm_90a", "emulated-sm_100a"]
LIMIT, PAGES = 256, 16  # max_model_len, and the pages of 16 tokens that a row of the page table has for it
CASE = PagedCase(query_lens=(1,) * 8, kv_lens=(LIMIT,) * 8, num_q_heads=8, num_kv_heads=2, head_dim=128)
QUERIES = {"decode": (1,) * 8, "mixed": (1, 1, 40, 1, 1, 1, 1, 1), "prefill": (1, 40, 2, 1, 1, 1, 1, 1)}


def run_prefill_alone(case: PagedCase, *, built: BuiltCase, seed: int | None = None) -> Any:
    """The prefill kernel as exact mode launches it, no decode kernel before."""
    kernels = case.plan().kernels
    assert kernels is not None
    alone = replace(kernels.prefill, kernel=replace(kernels.prefill.kernel, is_dependent=False))
    return run_built(built, key=alone, seed=seed)


RUNS: dict[str, Callable[..., Any]] = {"decode": run_decode, "mixed": run_mixed, "prefill": run_prefill_alone}


def build(arch: str, kind: str, seqused_k: list[int] | None = None, **changes: Any) -> BuiltCase:
    """The case with a page table just as wide as the limit, and other lengths on the device than the sequences have."""
    case = replace(CASE, arch=arch, query_lens=QUERIES[kind], **changes)
    built = case.build()
    a = built.arguments
    lengths = a.seqused_k if seqused_k is None else torch.tensor(seqused_k, dtype=torch.int32)
    built.arguments = a._replace(page_table=a.page_table[:, :PAGES].contiguous(), seqused_k=lengths)
    return built


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", RUNS)
def test_lengths_past_the_page_table_are_cut(arch: str, kind: str) -> None:
    """A read past the table is an error of the emulator; the result is that of full sequences, bit for bit."""
    want = run(arch, kind)
    for seed, seqused_k in ((None, [512] * 8), (1, [2**31 - 1, 257, 300, 256, 272, 1 << 20, 512, 2**30])):
        got = run(arch, kind, seqused_k, seed=seed)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def run(arch: str, kind: str, seqused_k: list[int] | None = None, *, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, judged as if the lengths were the sequences' own."""
    built = build(arch, kind, seqused_k)
    done = RUNS[kind](built.case, built=built, seed=seed)
    a = built.arguments
    built.arguments = a._replace(seqused_k=torch.tensor(built.case.kv_lens, dtype=torch.int32))
    done.check()
    assert a.lse is not None
    return a.out.clone(), a.lse.clone()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_page_table_narrower_than_the_limit_cuts_too(arch: str, kind: str) -> None:
    """The schedule knows the plan's limit, the kernels alone the table of a call."""
    built = build(arch, kind)
    narrow = built.arguments.page_table[:, : PAGES - 5].contiguous()
    built.arguments = built.arguments._replace(page_table=narrow)
    done = RUNS[kind](built.case, built=built, seed=6)
    built.arguments = built.arguments._replace(seqused_k=built.arguments.seqused_k.clamp(max=16 * narrow.shape[1]))
    done.check()


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_negative_lengths_are_empty_sequences(kind: str) -> None:
    built = build(ARCHS[0], kind, [-1, 100, -(2**31), 0, 5, 256, -300, 17])
    done = RUNS[kind](built.case, built=built, seed=2)
    a = built.arguments
    built.arguments = a._replace(seqused_k=a.seqused_k.clamp(min=0))
    done.check()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", RUNS)
def test_padding_rows_are_zero_and_nothing_behind_them_is_written(arch: str, kind: str) -> None:
    """More padding rows than CTAs, `out` and `lse` windows of larger tensors with other strides than dense ones."""
    built = build(arch, kind, padding_rows=11)
    a = built.arguments
    rows, heads, dim = a.out.shape
    wide = torch.full((rows + 4, heads + 1, dim + 8), math.nan, dtype=a.out.dtype)
    wide_lse = torch.full((heads, rows + 4), math.nan)
    built.arguments = a._replace(out=wide[:rows, :heads, :dim], lse=wide_lse[:, :rows])
    RUNS[kind](built.case, built=built, seed=3).check()
    assert wide[rows:].isnan().all() and wide[:, heads:].isnan().all() and wide[..., dim:].isnan().all()
    assert wide_lse[:, rows:].isnan().all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", RUNS)
def test_query_ranges_past_the_rows_write_nothing_there(arch: str, kind: str) -> None:
    """`cu_seqlens_q` ends past the rows of q: the rows behind them stay as they are, and earlier sequences are right."""
    built = build(arch, kind, padding_rows=0)
    a = built.arguments
    whole, keep = a.out, built.total_q - 3
    assert a.lse is not None
    whole_lse = a.lse
    built.arguments = a._replace(q=a.q[:keep], out=a.out[:keep], lse=a.lse[:, :keep])
    RUNS[kind](built.case, built=built, seed=4)
    assert whole[:keep].isfinite().all() and whole[keep:].isnan().all() and whole_lse[:, keep:].isnan().all()


def test_query_ranges_that_descend_do_not_overrun_the_lists() -> None:
    built = build(ARCHS[0], "mixed")
    a = built.arguments
    cu_seqlens_q = torch.tensor([0, 40, 1, 44, -7, 2**31 - 1, 0, 47, 3], dtype=torch.int32)
    built.arguments = a._replace(cu_seqlens_q=cu_seqlens_q)
    run_mixed(built.case, built=built, seed=5)
