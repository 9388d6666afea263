"""The torch kernel through the public operator, against the float32 oracle.

Grid: query and KV lengths at page (16), chunk (256) and batch edges; each mask feature once alone and once with others. Dropped:
products of features with every head_dim, since a head_dim only changes the width of a matrix product here.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fa4_backend import AttentionMetadata, paged_attention
from fa4_backend.kernels import torch_reference
from fa4_backend.problem import FP8
from tests.support.paged_case import NO_PAGE, BuiltCase, PagedCase, repage

# 0 and 1 query; page edges 15/16/17; chunk edges 255..257; a query longer than its KV (leading rows see nothing); empty KV.
EDGES = PagedCase((1, 0, 15, 16, 17, 255, 256, 257, 12, 3), (1, 9, 15, 16, 33, 255, 300, 513, 7, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 128, 256])
def test_edges_on_every_page_size_and_dtype(dtype: str, page_size: int) -> None:
    built = dataclasses.replace(EDGES, dtype=dtype, page_size=page_size).build()
    built.check(*built.run())


@pytest.mark.parametrize("head_dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (64, 128), (256, 256)])
def test_head_dims(head_dims: tuple[int, int]) -> None:
    built = dataclasses.replace(EDGES, head_dim=head_dims[0], head_dim_v=head_dims[1]).build()
    built.check(*built.run())


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (10, 2), (28, 4), (16, 1)])
def test_grouped_head_ratios(heads: tuple[int, int]) -> None:
    built = dataclasses.replace(EDGES, num_q_heads=heads[0], num_kv_heads=heads[1]).build()
    built.check(*built.run())


FEATURES: dict[str, dict[str, object]] = {
    "non-causal": {"is_causal": False},
    "window 0": {"window_left": 0},
    "window 16": {"window_left": 16},
    "window left and right": {"is_causal": False, "window_left": 5, "window_right": 3},
    "window right": {"is_causal": False, "window_right": 0},
    "soft cap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "gpt-oss": {"sinks": True, "window_left": 127},
    "gemma 2": {"softcap": 5.0, "window_left": 63},
    "all": {"softcap": 5.0, "window_left": 63, "sinks": True, "alibi": True},
    "peaked rows": {"peaked": 30.0},
}


@pytest.mark.parametrize("layout", ["separate", "nhd", "hnd"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_on_every_layout(feature: str, layout: str) -> None:
    built = dataclasses.replace(EDGES, layout=layout, **FEATURES[feature]).build()
    built.check(*built.run())


@pytest.mark.parametrize("window_left", [None, 20])
def test_page_sizes_agree_bit_for_bit(window_left: int | None) -> None:
    """The same tokens in pages of another size give the same bits; decode rows that go together, cut by a window or not, included."""
    case = dataclasses.replace(EDGES, query_lens=(*EDGES.query_lens, 1, 1), kv_lens=(*EDGES.kv_lens, 90, 141), window_left=window_left)
    built = case.build()
    out, lse = built.run()
    for page_size in (48, 256):
        other, other_lse = repage(built, page_size).run()
        assert torch.equal(other, out) and torch.equal(other_lse, lse), page_size


# Together: one row each (decode), of similar and of very different lengths; drafts of 4 rows; a sequence shorter than its query, which goes
# alone; short prompts. Windows: inside every sequence, inside some, beyond all; on and off page edges (16).
TOGETHER = PagedCase(
    (1, 1, 4, 1, 4, 1, 16, 16, 4, 1, 1, 17), (300, 16, 30, 17, 200, 1, 16, 40, 3, 2600, 0, 33),
    num_q_heads=6, num_kv_heads=2, decode_query_len=4,
)  # fmt: skip


@pytest.mark.parametrize("window_left", [None, 0, 1, 15, 16, 17, 100, 5000])
@pytest.mark.parametrize("feature", ["plain", "non-causal", "right", "sinks", "alibi", "soft cap", "head dims"])
def test_short_queries_go_together(feature: str, window_left: int | None) -> None:
    features: dict[str, dict[str, object]] = {
        "plain": {}, "non-causal": {"is_causal": False}, "right": {"is_causal": False, "window_right": 2}, "sinks": {"sinks": True},
        "alibi": {"alibi": True}, "soft cap": {"softcap": 2.0}, "head dims": {"head_dim": 96, "head_dim_v": 64},
    }  # fmt: skip
    for layout in ("separate", "hnd"):
        built = dataclasses.replace(TOGETHER, window_left=window_left, layout=layout, dtype="float32", **features[feature]).build()
        built.check(*built.run())


@pytest.mark.parametrize("window_left", [None, 100])
def test_groups_hold_what_they_may(window_left: int | None) -> None:
    """Rows as many, windows reached or not, padding and size within bounds; alone: nothing is shared."""
    built = dataclasses.replace(TOGETHER, window_left=window_left).build()
    spans = torch_reference._spans(built.arguments, right=0)
    groups = torch_reference._groups(spans, alone=False)
    assert sorted(span for group in groups for span in group) == spans
    assert len(groups) < len(spans)
    for group in groups:
        longest = max(span.num_keys for span in group)
        assert len({(span.num_rows, span.first > 0) for span in group}) == 1
        assert sum(longest - span.num_keys for span in group) <= torch_reference.GROUP_PADDING
        assert len(group) == 1 or len(group) * longest <= torch_reference.GROUP_KEYS
    assert torch_reference._groups(spans, alone=True) == [[span] for span in spans]


def test_large_groups_are_split() -> None:
    spans = [torch_reference.Span(i, i, 1, 4095, 0, 4096) for i in range(9)]
    sizes = [len(group) for group in torch_reference._groups(spans, alone=False)]
    assert sizes == [4, 4, 1], sizes


def test_batch_invariant_rows_do_not_depend_on_their_neighbours() -> None:
    case = dataclasses.replace(TOGETHER, dtype="float32", batch_invariant=True)
    built = case.build()
    out, lse = built.run()
    a, row = built.arguments, 0
    for seq_idx, query_len in enumerate(case.query_lens):
        rows = slice(row, row + query_len)
        alone = dataclasses.replace(case, query_lens=(query_len,), kv_lens=case.kv_lens[seq_idx : seq_idx + 1], padding_rows=0)
        arguments = a._replace(
            q=a.q[rows], page_table=a.page_table[seq_idx : seq_idx + 1], cu_seqlens_q=torch.tensor([0, query_len], dtype=torch.int32),
            seqused_k=a.seqused_k[seq_idx : seq_idx + 1], out=torch.empty_like(out[rows]), lse=torch.empty_like(lse[:, rows]),
        )  # fmt: skip
        alone_out, alone_lse = BuiltCase(alone, arguments, query_len).run()
        assert torch.equal(alone_out, out[rows]) and torch.equal(alone_lse, lse[:, rows]), seq_idx
        row += query_len


@pytest.mark.parametrize("page", [-1, 2**30, 8])
def test_a_visible_page_outside_the_pool_is_refused(page: int) -> None:
    built = PagedCase((1, 5), (20, 40)).build()
    a = built.arguments
    a.page_table[1, 1] = page if page != 8 else a.k_cache.shape[0]
    got = int(a.page_table[1, 1])
    words = rf"page_table\[1, 1\]: expected a page below {a.k_cache.shape[0]}.* sequence 1 on logical page 1 .* got {got}$"
    with pytest.raises(ValueError, match=words):
        built.run()


def test_lengths_are_clamped_by_the_page_table() -> None:
    """A device length past the table, as an engine's dummy batches have it, means all that the table holds; it is the diagonal too."""
    built = PagedCase((1, 5, 300), (16, 32, 32), dtype="float32").build()
    a = built.arguments
    built.arguments = a._replace(page_table=a.page_table[:, :2].contiguous(), seqused_k=torch.tensor([16, 512, 33], dtype=torch.int32))
    out, lse = built.run()
    built.check(out, lse)
    want = PagedCase((1, 5, 300), (16, 32, 32), dtype="float32").build()
    for mine, wanted in zip((out, lse), want.run(), strict=True):
        assert torch.equal(mine, wanted)


def test_a_table_without_columns_holds_no_key() -> None:
    built = PagedCase((1, 2), (0, 0)).build()
    built.arguments = built.arguments._replace(page_table=torch.empty(2, 0, dtype=torch.int32))
    built.check(*built.run())


def test_infinities_and_nan_left_of_a_window_change_no_bit() -> None:
    """The same batch with finite values and real pages left of the window."""
    case = dataclasses.replace(TOGETHER, window_left=17)
    poisoned = case.build()
    out, lse = poisoned.run()
    a = poisoned.arguments
    for cache in (a.k_cache, a.v_cache):
        cache.copy_(torch.where(cache.isfinite(), cache, 1.0))
    assert (a.page_table == -1).any() and (a.page_table == NO_PAGE).any()
    a.page_table.clamp_(0, a.k_cache.shape[0] - 1)
    wanted_out, wanted_lse = out.clone(), lse.clone()
    clean_out, clean_lse = poisoned.run()
    assert torch.equal(clean_out, wanted_out) and torch.equal(clean_lse, wanted_lse)


def test_pool_above_two_to_the_31_elements() -> None:
    """Offsets are 64-bit: the sequence's pages lie past element 2^31 of the pool (memory is touched there only)."""
    built = PagedCase((4,), (40,), head_dim=64).build()
    a = built.arguments
    page_elements = a.k_cache[0].numel()
    num_pages = 2**31 // page_elements + 8
    far = {}
    for name in ("k_cache", "v_cache"):
        pool = torch.empty((num_pages, *a.k_cache.shape[1:]), dtype=a.k_cache.dtype)
        pool[-a.k_cache.shape[0] :] = getattr(a, name)
        far[name] = pool
    table = torch.where(a.page_table < a.k_cache.shape[0], a.page_table + num_pages - a.k_cache.shape[0], a.page_table)
    built.arguments = a._replace(page_table=table, **far)
    assert built.arguments.k_cache.numel() > 2**31
    built.check(*built.run())


def test_the_budget_catches_a_scale_that_is_five_percent_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judgement itself is judged: a planted error must fail it."""
    built = dataclasses.replace(EDGES, dtype="bfloat16").build()
    honest = torch_reference._fused_attention
    monkeypatch.setattr(torch_reference, "_fused_attention", lambda q, k, v, bias, scale: honest(q, k, v, bias, scale * 1.05))
    with pytest.raises(AssertionError, match=r"over budget|out:|lse:"):
        built.check(*built.run())


def test_the_float32_budget_catches_values_of_eleven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The term for float32 arithmetic leaves no room for TF32 or 16-bit operands."""
    built = dataclasses.replace(EDGES, dtype="float32").build()
    honest = torch_reference._fused_attention
    monkeypatch.setattr(torch_reference, "_fused_attention", lambda q, k, v, bias, scale: honest(q, k, v.half().float(), bias, scale))
    with pytest.raises(AssertionError, match="out:"):
        built.check(*built.run())


FP8_EDGES = dataclasses.replace(EDGES, kv_dtype="float8_e4m3fn")


@pytest.mark.parametrize("per_head_scales", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("feature", ["plain", *FEATURES])
def test_fp8_keys_and_values(feature: str, dtype: str, per_head_scales: bool) -> None:
    """Scales from 2^-7 to 2^6, saturated values, zeros, and bytes of NaN where no row looks."""
    built = dataclasses.replace(FP8_EDGES, dtype=dtype, per_head_scales=per_head_scales, **FEATURES.get(feature, {})).build()
    assert (built.arguments.k_cache.view(torch.uint8) == 0x7F).any(), "nothing is poisoned"
    built.check(*built.run())


@pytest.mark.parametrize("layout", ["separate", "nhd", "hnd"])
@pytest.mark.parametrize("window_left", [None, 17])
def test_fp8_short_queries_go_together(window_left: int | None, layout: str) -> None:
    case = dataclasses.replace(TOGETHER, kv_dtype="float8_e4m3fn", window_left=window_left, layout=layout, dtype="float32", alibi=True)
    built = case.build()
    out, lse = built.run()
    built.check(out, lse)
    for page_size in (48, 256):
        other, other_lse = repage(built, page_size).run()
        assert torch.equal(other, out) and torch.equal(other_lse, lse), page_size


@pytest.mark.parametrize("exponents", [(-6, 6), (6, -6), (0, 0)])
@pytest.mark.parametrize("stored", [448.0, -448.0, 0.0, 2.0**-9])
def test_fp8_extremes(stored: float, exponents: tuple[int, int]) -> None:
    """All values the largest, zero or the smallest: a row's result is that value times V's scale, and equal logits give the lse."""
    built = dataclasses.replace(FP8_EDGES, dtype="float16").build()
    k_scale, v_scale = (torch.tensor([2.0**exponent]).expand(2) for exponent in exponents)
    built.arguments = built.arguments._replace(k_scale=k_scale, v_scale=v_scale)
    for cache in built.arguments[1:3]:
        cache.copy_(torch.where(cache.float().isnan(), cache.float(), stored))
    out, lse = built.run()
    built.check(out, lse)
    seen = ~lse[:, : built.total_q].isneginf().T
    assert seen.any() and (out[: built.total_q][seen] == stored * 2.0 ** exponents[1]).all()


def test_fp8_without_scales_is_what_is_stored() -> None:
    """Bit for bit the result of the same numbers in the dtype of q: e4m3 is exact in it."""
    built = FP8_EDGES.build()
    a = built.arguments
    built.arguments = a._replace(k_scale=None, v_scale=None)
    out, lse = (tensor.clone() for tensor in built.run())
    wide = BuiltCase(EDGES, built.arguments._replace(k_cache=a.k_cache.to(a.q.dtype), v_cache=a.v_cache.to(a.q.dtype)), built.total_q)
    for got, want in zip((out, lse), wide.run(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("per_head_scales", [True, False])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("head", [0, 1])
def test_the_budget_catches_a_scale_of_one_head_that_is_five_percent_off(name: str, head: int, per_head_scales: bool) -> None:
    built = dataclasses.replace(FP8_EDGES, per_head_scales=per_head_scales).build()
    out, lse = built.run()
    built.check(out, lse)
    scale = getattr(built.arguments, name).clone()
    scale[head] *= 1.05
    built.arguments = built.arguments._replace(**{name: scale})
    with pytest.raises(AssertionError, match=r"out:|lse:"):
        built.check(*built.run())


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 150)), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (6, 2), (9, 3), (8, 8), (5, 1)]),
    page_size=st.sampled_from([16, 32, 48]),
    is_causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(0, 100)),
    softcap=st.sampled_from([0.0, 3.0]),
    sinks=st.booleans(),
    alibi=st.booleans(),
    layout=st.sampled_from(["separate", "nhd", "hnd"]),
    kv_dtype=st.sampled_from(["auto", "float8_e4m3fn"]),
    seed=st.integers(0, 1000),
)
def test_any_ragged_batch(lengths, heads, page_size, is_causal, window, softcap, sinks, alibi, layout, kv_dtype, seed) -> None:
    query_lens, kv_lens = zip(*lengths, strict=True)
    case = PagedCase(
        query_lens, kv_lens, num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=32, dtype="float32", page_size=page_size,
        is_causal=is_causal, window_left=window, softcap=softcap, sinks=sinks, alibi=alibi, layout=layout, kv_dtype=kv_dtype, seed=seed,
    )  # fmt: skip
    built = case.build()
    built.check(*built.run())


@pytest.mark.parametrize("kv_dtype", ["auto", FP8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_in_fp8(dtype: str, kv_dtype: str) -> None:
    """Single rows, rows that go together, empty rows and padding; values above 2.24 are saturated."""
    built = dataclasses.replace(EDGES, dtype=dtype, kv_dtype=kv_dtype, out_dtype=FP8, peaked=5.0).build()
    out, lse = built.run()
    built.check(out, lse)
    assert (out.float().abs() == 448).any()


def test_a_plan_that_differs_in_out_alone_shares_its_steps() -> None:
    built = EDGES.build()
    fp8 = dataclasses.replace(EDGES, out_dtype=FP8)
    plan, a = EDGES.plan(), built.arguments
    metadata = AttentionMetadata.allocate(plan, "cpu")
    follower = metadata.sharing(fp8.plan())
    lengths = {"cu_seqlens_q": a.cu_seqlens_q, "seqused_k": a.seqused_k}
    metadata.refresh(**lengths, max_seqlen_q=257, max_seqlen_k=513)
    wide, _ = paged_attention(*a[:6], plan=plan, metadata=metadata)
    out, _ = paged_attention(*a[:6], plan=follower.plan, metadata=follower, out_scale=torch.tensor(0.25))
    assert out.dtype == torch.float8_e4m3fn
    want = (wide.float() * 4).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out.view(torch.uint8), want.view(torch.uint8))
    with pytest.raises(ValueError, match="plan: expected one that differs in out_dtype alone"):
        metadata.sharing(dataclasses.replace(fp8, page_size=32).plan())
