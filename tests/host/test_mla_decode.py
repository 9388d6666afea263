"""Latent attention through the public operator on the torch kernel, against the float32 oracle; and the oracle against projections.

Grid: lengths at page (16) edges, one query and drafts, rows that see nothing; each dtype and page size once. Dropped: products of them,
since the torch kernel runs them as paged attention, which `test_reference_kernel.py` covers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fa4_backend import AttentionMetadata, BatchLimits, UnsupportedProblem, mla_decode, paged_attention, plan_attention
from fa4_backend.kernels import torch_reference
from fa4_backend.problem import FP8, LATENT
from fa4_backend.reference import gather_pages, latent_oracle
from fa4_backend.support import LATENT_SUPPORT, check_limits
from tests.support.latent_case import BuiltLatent, LatentCase
from tests.support.problems import make_problem

# One query a row; page edges 15/16/17; no key; one key.
DECODE = LatentCase((1, 1, 1, 1, 1, 1), (15, 16, 17, 130, 0, 1))
# Drafts, ragged; a sequence without a query, whose keys are NaN; rows before the first key (2 keys for 4 queries); padded sequences.
DRAFTS = LatentCase((4, 1, 0, 3, 2, 4), (70, 16, 9, 33, 0, 2), num_q_heads=8, decode_query_len=4, padding_seqs=2)


@pytest.mark.parametrize("page_size", [16, 48, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kv_dtype", ["auto", FP8])
@pytest.mark.parametrize("case", [DECODE, DRAFTS], ids=["decode", "drafts"])
def test_edges(case: LatentCase, kv_dtype: str, dtype: str, page_size: int) -> None:
    built = dataclasses.replace(case, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size).build()
    assert built.arguments.latent_cache.float().isnan().any(), "nothing is poisoned"
    built.check(*built.run())


@pytest.mark.parametrize("num_q_heads", [8, 12, 40, 128])
def test_head_counts(num_q_heads: int) -> None:
    built = dataclasses.replace(DRAFTS, num_q_heads=num_q_heads).build()
    built.check(*built.run())


@pytest.mark.parametrize("head_dims", [(320, 256), (512, 448), (96, 64)])
def test_other_widths(head_dims: tuple[int, int]) -> None:
    built = dataclasses.replace(DRAFTS, head_dim=head_dims[0], head_dim_v=head_dims[1]).build()
    built.check(*built.run())


@pytest.mark.parametrize("is_one_q", [False, True])
@pytest.mark.parametrize("page_gap", [0, 64])
def test_strides_are_honoured(is_one_q: bool, page_gap: int) -> None:
    """A pair or one tensor of 576; rows of the cache with a gap of NaN: bit for bit what dense tensors give."""
    built = dataclasses.replace(DRAFTS, is_one_q=is_one_q, page_gap=page_gap).build()
    dense = dataclasses.replace(DRAFTS).build()
    assert torch.equal(built.arguments.q[: built.total_q], dense.arguments.q[: built.total_q])
    for got, want in zip(built.run(), dense.run(), strict=True):
        assert torch.equal(got, want)


def test_without_lse_and_without_out() -> None:
    built = dataclasses.replace(DRAFTS, has_lse=False).build()
    a, plan = built.arguments, built.case.plan()
    out, lse = mla_decode(*a[:6], plan=plan, metadata=built.metadata(plan), softmax_scale=a.softmax_scale)
    assert lse is None
    assert torch.equal(out, DRAFTS.build().run()[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peaked_rows(dtype: str) -> None:
    built = dataclasses.replace(DRAFTS, peaked=8.0, dtype=dtype).build()
    built.check(*built.run())


def test_an_fp8_latent_without_a_scale_is_what_is_stored() -> None:
    built = dataclasses.replace(DRAFTS, kv_dtype=FP8).build()
    built.arguments = built.arguments._replace(latent_scale=None)
    unit = dataclasses.replace(DRAFTS, kv_dtype=FP8).build()
    unit.arguments = unit.arguments._replace(latent_scale=torch.ones(()))
    for got, want in zip(built.run(), unit.run(), strict=True):
        assert torch.equal(got, want)
    unit.arguments = unit.arguments._replace(latent_scale=torch.ones(1))
    unit.check(*unit.run())


@pytest.mark.parametrize("num_q_heads", [8, 16])
def test_absorption(num_q_heads: int) -> None:
    """The oracle, and the operator, against attention written without absorption: keys and values of each head are projected up from the
    latents, queries meet them in 128 + 64 dimensions, and softmax runs over each row by itself. float64, so that only order differs."""
    case = dataclasses.replace(DRAFTS, num_q_heads=num_q_heads, dtype="float32")
    built = case.build()
    a, generator = built.arguments, torch.Generator().manual_seed(7)
    up_k, up_v = (torch.randn(num_q_heads, case.head_dim_v, 128, generator=generator).double() * case.head_dim_v**-0.5 for _ in "kv")
    q_nope = torch.randn(len(a.q), num_q_heads, 128, generator=generator).double()
    absorbed = torch.einsum("thd,hcd->thc", q_nope, up_k)
    built.arguments = a = a._replace(q=absorbed.float())
    oracle, oracle_lse = latent_oracle(a._replace(q=absorbed), dtype=torch.float64, accumulate=torch.float64)
    rows = 0
    for seq_idx, (query_len, kv_len) in enumerate(zip(case.query_lens, case.kv_lens, strict=True)):
        cache = gather_pages(a.latent_cache[:, :, None], a.page_table[seq_idx], 0, kv_len)[:, 0].double()
        latents, rope = cache[:, : case.head_dim_v], cache[:, case.head_dim_v :]
        k, v = (torch.einsum("jc,hcd->jhd", latents, up) for up in (up_k, up_v))
        for i in range(query_len):
            row, seen = rows + i, kv_len - query_len + i + 1
            for head in range(num_q_heads):
                if seen <= 0:
                    assert (oracle[row, head] == 0).all() and oracle_lse[head, row] == -math.inf
                    continue
                logit = (k[:seen, head] @ q_nope[row, head] + rope[:seen] @ a.q_rope[row, head].double()) * case.softmax_scale
                want = torch.softmax(logit, 0) @ v[:seen, head]
                assert torch.allclose(oracle[row, head] @ up_v[head], want, rtol=1e-9, atol=1e-9)
                assert math.isclose(oracle_lse[head, row], torch.logsumexp(logit, 0), rel_tol=1e-9, abs_tol=1e-9)
        rows += query_len
    built.check(*built.run())


def test_batch_invariant_rows_do_not_depend_on_their_neighbours() -> None:
    case = dataclasses.replace(DRAFTS, batch_invariant=True)
    built = case.build()
    out, lse = (tensor.clone() for tensor in built.run())
    a = built.arguments
    for seq_idx in (0, 3):
        rows = slice(int(a.cu_seqlens_q[seq_idx]), int(a.cu_seqlens_q[seq_idx + 1]))
        n = rows.stop - rows.start
        alone = dataclasses.replace(case, query_lens=(n,), kv_lens=(case.kv_lens[seq_idx],), padding_rows=0, padding_seqs=0)
        one = sequence_alone(built, alone, seq_idx, rows).run()
        assert torch.equal(one[0], out[rows]) and torch.equal(one[1], lse[:, rows])


def sequence_alone(built: BuiltLatent, alone: LatentCase, seq_idx: int, rows: slice) -> BuiltLatent:
    """One sequence of a batch as a batch of its own."""
    a = built.arguments
    lengths = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
    parts = {"q": a.q[rows], "q_rope": a.q_rope[rows], "page_table": a.page_table[seq_idx, None], "cu_seqlens_q": lengths}
    written = {"out": torch.empty_like(a.out[rows]), "lse": torch.empty(a.q.shape[1], rows.stop - rows.start)}
    return BuiltLatent(alone, a._replace(**parts, **written, seqused_k=a.seqused_k[seq_idx, None]), rows.stop - rows.start)


@pytest.mark.parametrize("kv_dtype", ["auto", FP8])
def test_the_budget_catches_a_scale_that_is_five_percent_off(kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = dataclasses.replace(DRAFTS, kv_dtype=kv_dtype).build()
    honest = torch_reference._fused_attention
    monkeypatch.setattr(torch_reference, "_fused_attention", lambda q, k, v, bias, scale: honest(q, k, v, bias, scale * 1.05))
    with pytest.raises(AssertionError, match=r"out:|lse:"):
        built.check(*built.run())


def test_the_budget_catches_a_rotary_part_that_is_left_out() -> None:
    built = DRAFTS.build()
    built.oracle = None
    a = built.arguments
    out, lse = BuiltLatent(DRAFTS, a._replace(q_rope=torch.zeros_like(a.q_rope)), built.total_q).run()
    with pytest.raises(AssertionError, match=r"out:|lse:"):
        built.check(out, lse)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 150)), min_size=1, max_size=6),
    num_q_heads=st.sampled_from([8, 16, 20]),
    page_size=st.sampled_from([16, 32, 48]),
    kv_dtype=st.sampled_from(["auto", FP8]),
    is_one_q=st.booleans(),
    padding_seqs=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_any_ragged_batch(lengths, num_q_heads, page_size, kv_dtype, is_one_q, padding_seqs, seed) -> None:
    query_lens, kv_lens = zip(*lengths, strict=True)
    # float32: torch's attention in 16 bits takes exponentials that are off by up to 2^-14, which is the whole lse of rows of few keys.
    built = LatentCase(
        query_lens, kv_lens, num_q_heads, page_size=page_size, kv_dtype=kv_dtype, is_one_q=is_one_q, padding_seqs=padding_seqs,
        seed=seed, decode_query_len=8, head_dim=96, head_dim_v=64, dtype="float32",
    ).build()  # fmt: skip
    built.check(*built.run())


# What is wrong -> (arguments it replaces, words the message must hold).
BAD_CALLS: dict[str, tuple[Callable, str]] = {
    "q has the rotary part in it": (
        lambda a: {"q": torch.cat((a.q, a.q_rope), -1)},
        r"q: expected shape \(any, 8, 512\), got \(17, 8, 576\)",
    ),
    "q_rope has fewer rows": (lambda a: {"q_rope": a.q_rope[1:]}, r"q_rope: expected shape \(17, 8, 64\), got \(16, 8, 64\)"),
    "q_rope has other heads": (lambda a: {"q_rope": a.q_rope[:, :4]}, r"q_rope: expected shape \(17, 8, 64\), got"),
    "q_rope has another dtype": (lambda a: {"q_rope": a.q_rope.half()}, "q_rope: expected dtype bfloat16, got float16"),
    "q_rope is strided": (lambda a: {"q_rope": a.q_rope.repeat_interleave(2, -1)[..., ::2]}, "q_rope: expected last stride 1, got 2"),
    "q_rope on another device": (lambda a: {"q_rope": a.q_rope.to("meta")}, "q_rope: expected a tensor on cpu as q, got meta"),
    "q_rope is missing": (lambda a: {"q_rope": None}, "q_rope: expected a tensor, got None"),
    "the cache has a head dimension": (
        lambda a: {"latent_cache": a.latent_cache[:, :, None]},
        r"latent_cache: expected shape \(any, 16, 576\)",
    ),
    "the cache holds no rotary part": (
        lambda a: {"latent_cache": a.latent_cache[..., :512]},
        r"latent_cache: expected shape .*, got .*512",
    ),
    "the cache has another page size": (
        lambda a: {"latent_cache": a.latent_cache[:, :8]},
        r"latent_cache: expected shape \(any, 16, 576\)",
    ),
    "the cache is empty": (lambda a: {"latent_cache": a.latent_cache[:0]}, "latent_cache: expected at least one page, got none"),
    "the cache has another dtype": (
        lambda a: {"latent_cache": a.latent_cache.half()},
        "latent_cache: expected dtype bfloat16, got float16",
    ),
    "page_table is int64": (lambda a: {"page_table": a.page_table.long()}, "page_table: expected dtype int32, got int64"),
    "seqused_k is short": (lambda a: {"seqused_k": a.seqused_k[:1]}, r"seqused_k: expected shape \(8\), got \(1,\)"),
    "out is as wide as the cache": (lambda a: {"out": torch.empty(17, 8, 576).bfloat16()}, r"out: expected shape \(17, 8, 512\)"),
    "out lies in the cache": (
        lambda a: {"out": a.latent_cache.view(-1, 8, 576)[:17, :, :512]},
        "out: expected memory of its own, got elements shared with latent_cache",
    ),
    "out is q": (lambda a: {"out": a.q}, "out: expected memory of its own, got elements shared with q"),
    "lse lies in q_rope": (
        lambda a: (lambda bits: {"q_rope": bits.view(torch.bfloat16).view(17, 8, 64), "lse": bits[:136].view(8, 17)})(
            torch.zeros(17 * 8 * 32)
        ),
        "lse: expected memory of its own, got elements shared with q_rope",
    ),
    "lse is short": (lambda a: {"lse": a.lse[:, 1:]}, r"lse: expected shape \(8, 17\), got \(8, 16\)"),
    "a scale of latents that are not FP8": (
        lambda a: {"latent_scale": torch.ones(1)},
        "latent_scale: expected none, since the plan's latents are bfloat16, got a tensor",
    ),
    "a softmax scale of zero": (lambda a: {"softmax_scale": 0.0}, "softmax_scale: expected a normal float32 above 0 .*, got 0.0"),
    "no softmax scale": (lambda a: {"softmax_scale": None}, "softmax_scale: expected a Python float, got None"),
    "q wants a gradient": (lambda a: {"q": a.q.clone().requires_grad_()}, "q: expected a call under torch.no_grad()"),
}


def call(built: BuiltLatent, **changes: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The case's call with some arguments replaced."""
    a, plan = built.arguments, built.case.plan()
    given = {name: value for name, value in a._asdict().items() if name != "latent_scale"}
    return mla_decode(plan=plan, metadata=built.metadata(plan), **{**given, **changes})


@pytest.mark.parametrize("what", BAD_CALLS)
def test_wrong_call(what: str) -> None:
    change, words = BAD_CALLS[what]
    built = DRAFTS.build()
    with pytest.raises(ValueError, match=words):
        call(built, **change(built.arguments))
    assert built.arguments.out.isnan().all() and built.arguments.lse.isnan().all(), "something ran before the refusal"


BAD_SCALES = {
    "two numbers": (torch.ones(2), r"latent_scale: expected shape \(\) or \(1\) for latents, got \(2,\)"),
    "float64": (torch.ones(1).double(), "latent_scale: expected dtype float32, got float64"),
    "another device": (torch.ones(1, device="meta"), "latent_scale: expected a tensor on cpu as q, got meta"),
    "a number": (0.5, "latent_scale: expected a tensor, got float"),
}


@pytest.mark.parametrize("what", BAD_SCALES)
def test_wrong_scale(what: str) -> None:
    scale, words = BAD_SCALES[what]
    built = dataclasses.replace(DRAFTS, kv_dtype=FP8).build()
    with pytest.raises(ValueError, match=words):
        call(built, latent_scale=scale)


def test_a_longer_query_than_a_decode_rows_is_refused_by_refresh() -> None:
    built, plan = DRAFTS.build(), DRAFTS.plan()
    a, metadata = built.arguments, built.metadata(DRAFTS.plan())
    before = metadata.bounds
    words = "max_seqlen_q: expected at most 4, the plan's decode_query_len, since latent attention serves short rows only, got 5"
    with pytest.raises(ValueError, match=words):
        metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=5, max_seqlen_k=70)
    assert metadata.bounds == before and plan.limits.decode_query_len == 4


def test_each_operator_refuses_the_others_plan() -> None:
    built = DRAFTS.build()
    a, plan = built.arguments, DRAFTS.plan()
    cache = a.latent_cache[:, :, None]
    with pytest.raises(ValueError, match="plan: expected kv_source paged for paged_attention, got latent"):
        paged_attention(a.q, cache, cache, *a[3:6], plan=plan, metadata=built.metadata(plan))
    paged = plan_attention(make_problem(8, 1, 576, 512, "bfloat16", 16, "cpu"), plan.limits)
    with pytest.raises(ValueError, match="plan: expected kv_source latent for mla_decode, got paged"):
        mla_decode(*a[:6], plan=paged, metadata=AttentionMetadata.allocate(paged, "cpu"), softmax_scale=1.0)


def test_a_visible_page_outside_the_pool_is_refused() -> None:
    built = DRAFTS.build()
    built.arguments.page_table[0, 1] = 10_000
    with pytest.raises(ValueError, match=r"page_table\[0, 1\]: expected a page below .*, got 10000"):
        built.run()


def test_lengths_are_cut_at_the_page_table() -> None:
    built = DRAFTS.build()
    want = [tensor.clone() for tensor in built.run()]
    longest = built.arguments.page_table.shape[1] * 16
    full = dataclasses.replace(DRAFTS, kv_lens=(longest, 16, 9, 33, 0, 2)).build()
    cut = dataclasses.replace(full, arguments=full.arguments._replace(seqused_k=full.arguments.seqused_k.clone()))
    reference = [tensor.clone() for tensor in full.run()]
    cut.arguments.seqused_k[0] = longest + 1000
    for got, expected in zip(cut.run(), reference, strict=True):
        assert torch.equal(got, expected)
    assert not torch.equal(reference[0], want[0])


EMPTY = {
    "no row": lambda a: {"q": a.q[:0], "q_rope": a.q_rope[:0], "out": a.out[:0], "lse": a.lse[:, :0]},
    "no sequence": lambda a: {"page_table": a.page_table[:0], "seqused_k": a.seqused_k[:0], "cu_seqlens_q": a.cu_seqlens_q[:1]},
    "no page in the table": lambda a: {"page_table": a.page_table[:, :0]},
}


@pytest.mark.parametrize("what", EMPTY)
def test_empty_tensors_are_served(what: str) -> None:
    built = DRAFTS.build()
    built.arguments = built.arguments._replace(**EMPTY[what](built.arguments))
    out, lse = built.run(DRAFTS.plan())
    assert (out == 0).all() and lse.isneginf().all()


GOOD = {"num_q_heads": 16, "num_kv_heads": 1, "head_dim": 576, "head_dim_v": 512, "dtype": "bfloat16", "page_size": 64, "arch": "cpu"}
BAD_PROBLEMS = {
    "two KV heads": ({"num_kv_heads": 2}, "num_kv_heads, head_dim_v: expected 1 .* for a latent cache, got num_kv_heads=2"),
    "values wider than latents": ({"head_dim": 448}, "head_dim_v: expected 1 and at most head_dim for a latent cache"),
    "all keys": ({"is_causal": False}, "is_causal: expected True for latent attention, got False"),
    "a window": ({"has_window_left": True}, "has_window_left on cpu: expected False, got True; use another attention backend"),
    "sinks": ({"has_sinks": True}, "has_sinks on cpu: expected False, got True"),
    "page 24": ({"page_size": 24}, "page_size: expected a multiple of 16, got 24"),
    "exact": ({"batch_invariant": True, "exact": True}, "exact on cpu: expected False, got True"),
    "FP8 queries": ({"dtype": FP8}, "dtype: expected one of float32, bfloat16, float16"),
}


@pytest.mark.parametrize("what", BAD_PROBLEMS)
def test_unsupported_problem(what: str) -> None:
    change, words = BAD_PROBLEMS[what]
    with pytest.raises(UnsupportedProblem, match=words):
        plan_attention(make_problem(**{**GOOD, "kv_source": LATENT, **change}), BatchLimits(1, 1, 1))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_103a"])
def test_a_chip_without_a_kernel_refuses(arch: str) -> None:
    problem = make_problem(**{**GOOD, "kv_source": LATENT, "arch": arch})
    if arch in LATENT_SUPPORT:
        assert plan_attention(problem, BatchLimits(1, 8, 64, 8)).kernels is not None
        return
    with pytest.raises(UnsupportedProblem, match=f"kv_source on {arch}: expected paged.*, got latent; use another attention backend"):
        plan_attention(problem, BatchLimits(1, 1, 1))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_103a"])
def test_fp8_latents_beside_float16_queries(arch: str) -> None:
    """Blackwell splits Q into two terms of 8 bits, which hold a bfloat16 and no float16."""
    problem = make_problem(**{**GOOD, "kv_source": LATENT, "arch": arch, "kv_dtype": FP8})
    assert plan_attention(problem, BatchLimits(1, 8, 64, 8)).kernels is not None
    problem = dataclasses.replace(problem, dtype="float16", out_dtype="float16", q_dtype="float16")
    if arch == "sm_90a":
        assert plan_attention(problem, BatchLimits(1, 8, 64, 8)).kernels is not None
        return
    with pytest.raises(UnsupportedProblem, match=f"kv_dtype on {arch}: expected float16 with q in float16, got {FP8}"):
        plan_attention(problem, BatchLimits(1, 8, 64, 8))


def test_more_queries_a_row_than_the_kernels_pack() -> None:
    problem = make_problem(**{**GOOD, "kv_source": LATENT, "arch": "sm_90a"})
    check_limits(problem, BatchLimits(1, 8, 64, 8))
    with pytest.raises(UnsupportedProblem, match=r"decode_query_len on sm_90a: expected at most 8 queries a row .*, got 9"):
        check_limits(problem, BatchLimits(1, 9, 64, 9))


def test_what_a_plan_says() -> None:
    plan = plan_attention(make_problem(**{**GOOD, "kv_source": LATENT, "kv_dtype": FP8}), BatchLimits(1, 1, 64))
    assert plan.describe() == (
        f"FA4: torch reference on cpu, 16 heads of latent attention, head_dim 576/512, bfloat16 (latents {FP8}), page 64"
    )
