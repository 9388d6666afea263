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

from fa4_backend.kernels import torch_reference
from tests.support.paged_case import PagedCase

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


def test_page_sizes_agree_bit_for_bit() -> None:
    """The same tokens in pages of another size give the same bits."""
    results = []
    for page_size in (16, 48, 256):
        case = dataclasses.replace(EDGES, page_size=page_size, dtype="bfloat16")
        built = case.build()
        small = dataclasses.replace(EDGES, page_size=16).build()
        _copy_tokens(small, built)
        results.append(built.run())
    for out, lse in results[1:]:
        assert torch.equal(out[: -EDGES.padding_rows], results[0][0][: -EDGES.padding_rows])
        assert torch.equal(lse[:, : -EDGES.padding_rows], results[0][1][:, : -EDGES.padding_rows])


def _copy_tokens(source, target) -> None:
    """Give `target` the queries, keys and values of `source`, in its own pages."""
    a, b = source.arguments, target.arguments
    b.q.copy_(a.q)
    for seq_idx, kv_len in enumerate(source.case.kv_lens):
        for token in range(kv_len):
            for cache_a, cache_b in ((a.k_cache, b.k_cache), (a.v_cache, b.v_cache)):
                page_a = int(a.page_table[seq_idx, token // cache_a.shape[1]])
                page_b = int(b.page_table[seq_idx, token // cache_b.shape[1]])
                cache_b[page_b, token % cache_b.shape[1]] = cache_a[page_a, token % cache_a.shape[1]]


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


@settings(max_examples=60, deadline=None)
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
    seed=st.integers(0, 1000),
)
def test_any_ragged_batch(lengths, heads, page_size, is_causal, window, softcap, sinks, alibi, layout, seed) -> None:
    query_lens, kv_lens = zip(*lengths, strict=True)
    case = PagedCase(
        query_lens, kv_lens, num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=32, dtype="float32", page_size=page_size,
        is_causal=is_causal, window_left=window, softcap=softcap, sinks=sinks, alibi=alibi, layout=layout, seed=seed,
    )  # fmt: skip
    built = case.build()
    built.check(*built.run())
