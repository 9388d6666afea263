"""A step of the engine, refresh and call, launches kernels and does nothing else: what a captured graph needs. Launchers are recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fa4_backend import AttentionMetadata, mla_decode, paged_attention
from fa4_backend.problem import FP8
from tests.support.latent_case import LatentCase
from tests.support.operations import Operations
from tests.support.paged_case import PagedCase

# Every feature whose tensor or number goes into a launch; a decode row beside a prefill row.
CASE = PagedCase((1, 9), (70, 20), head_dim=128, window_left=40, sinks=True, alibi=True, softcap=20.0)


@pytest.mark.parametrize("arch", ["emulated-sm_90a", "emulated-sm_100a"])
def test_a_step_launches_and_nothing_else(arch: str, launches: list[tuple[str, tuple]]) -> None:
    """No allocation, conversion, copy or host read, in the first call of its kind and in one whose facts are remembered. The launches get
    the engine's own tensors, so that a graph follows what the engine writes there."""
    built = PagedCase(**{**vars(CASE), "arch": arch}).build()
    a, metadata = built.arguments, AttentionMetadata.allocate(built.case.plan(), "cpu")
    names = ("window_left", "softcap", "sinks", "alibi_slopes", "out", "lse")
    for _ in range(2):
        launches.clear()
        with Operations() as operations:
            metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=9, max_seqlen_k=70)
            paged_attention(*a[:6], plan=metadata.plan, metadata=metadata, **{name: getattr(a, name) for name in names})
        assert operations.names == []
        assert [name.split("-")[0] for name, _ in launches] == ["schedule", "decode", "prefill"]
        for _, arguments in launches[1:]:
            for name in ("q", "k_cache", "v_cache", "page_table", "out", "lse", "sinks", "alibi_slopes"):
                assert any(argument is getattr(a, name) for argument in arguments), name


def test_a_step_whose_shortest_query_is_long_launches_no_decode(launches: list[tuple[str, tuple]]) -> None:
    """Where the host says that no row is a decode row; not once the bound is taken back, before a capture."""
    built = PagedCase(**{**vars(CASE), "query_lens": (2, 9), "arch": "emulated-sm_90a"}).build()
    a, metadata = built.arguments, AttentionMetadata.allocate(built.case.plan(), "cpu")
    names = ("window_left", "softcap", "sinks", "alibi_slopes", "out", "lse")
    lengths: dict[str, Any] = {"cu_seqlens_q": a.cu_seqlens_q, "seqused_k": a.seqused_k, "max_seqlen_q": 9, "max_seqlen_k": 70}
    for shortest, is_captured, want in ((1, False, True), (2, False, False), (2, True, True)):
        metadata.refresh(**lengths, min_seqlen_q=shortest)
        if is_captured:
            metadata.expect_short_queries()
        launches.clear()
        paged_attention(*a[:6], plan=metadata.plan, metadata=metadata, **{name: getattr(a, name) for name in names})
        assert [name.split("-")[0] for name, _ in launches] == ["decode"] * want + ["prefill"]


def test_a_step_that_converts_launches_one_kernel_more(launches: list[tuple[str, tuple]]) -> None:
    """Before the decode kernel, beside which the prefill kernel reads what it wrote; and nothing else, no allocation either."""
    facts = {**vars(CASE), "kv_dtype": FP8, "arch": "emulated-sm_90a", "converts": True}
    built = PagedCase(**facts).build()
    a, metadata = built.arguments, AttentionMetadata.allocate(built.case.plan(), "cpu")
    names = ("window_left", "softcap", "sinks", "alibi_slopes", "k_scale", "v_scale", "out", "lse")
    for keys in (built.case.prefill_keys, None):
        launches.clear()
        with Operations() as operations:
            metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=9, max_seqlen_k=70, prefill_keys=keys)
            paged_attention(*a[:6], plan=metadata.plan, metadata=metadata, **{name: getattr(a, name) for name in names})
        assert not [name for name in operations.names if "empty" in name or "copy" in name]
        assert [name.split("-")[0] for name, _ in launches] == ["schedule", *["convert"] * (keys is not None), "decode", "prefill"]
        assert launches[-1][0].endswith("-converted") == (keys is not None)


@pytest.mark.parametrize("kv_dtype", ["auto", "float8_e4m3fn"])
def test_a_step_of_latent_attention_launches_and_nothing_else(kv_dtype: str, launches: list[tuple[str, tuple]]) -> None:
    """One kernel beside the schedule, whatever rows the step has."""
    built = LatentCase((4, 1), (70, 20), kv_dtype=kv_dtype, arch="emulated-sm_90a", decode_query_len=4, page_size=64).build()
    a, metadata = built.arguments, AttentionMetadata.allocate(built.case.plan(), "cpu")
    names = ("softmax_scale", "latent_scale", "out", "lse")
    for _ in range(2):
        launches.clear()
        with Operations() as operations:
            metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=4, max_seqlen_k=70)
            mla_decode(*a[:6], plan=metadata.plan, metadata=metadata, **{name: getattr(a, name) for name in names})
        assert operations.names == []
        assert [name.split("-")[0] for name, _ in launches] == ["schedule", "mladecode"]
        for name in ("q", "q_rope", "latent_cache", "page_table", "out", "lse"):
            assert any(argument is getattr(a, name) for argument in launches[1][1]), name
        scales = [x for x in launches[1][1] if isinstance(x, torch.Tensor) and x.shape == (1,) and x.dtype == torch.float32]
        assert [x.data_ptr() for x in scales] == ([] if a.latent_scale is None else [a.latent_scale.data_ptr()])


def test_the_control_of_operations(launches: list[tuple[str, tuple]]) -> None:
    """What the operator makes itself, `out` where none is given, is seen as an allocation."""
    built = PagedCase(**{**vars(CASE), "arch": "emulated-sm_90a"}).build()
    a, metadata = built.arguments, AttentionMetadata.allocate(built.case.plan(), "cpu")
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=9, max_seqlen_k=70)
    with Operations() as operations:
        names = ("window_left", "softcap", "sinks", "alibi_slopes", "lse")
        paged_attention(*a[:6], plan=metadata.plan, metadata=metadata, **{name: getattr(a, name) for name in names})
    assert operations.names == ["aten.new_empty.default"]


def test_a_refused_step_launches_nothing(launches: list[tuple[str, tuple]]) -> None:
    """On a compiled arch, as on the reference: the schedule is not run for lengths that are refused, nor a kernel for a wrong call."""
    built = PagedCase(**{**vars(CASE), "arch": "emulated-sm_100a"}).build()
    a, metadata = built.arguments, AttentionMetadata.allocate(built.case.plan(), "cpu")
    with pytest.raises(ValueError, match="seqused_k: expected dtype int32"):
        metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k.long(), max_seqlen_q=9, max_seqlen_k=70)
    assert launches == []
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=9, max_seqlen_k=70)
    launches.clear()
    names = ("window_left", "softcap", "alibi_slopes", "out", "lse")
    with pytest.raises(ValueError, match="sinks: expected dtype float32, got bfloat16"):
        given = {name: getattr(a, name) for name in names}
        paged_attention(*a[:6], plan=metadata.plan, metadata=metadata, sinks=torch.zeros(4).bfloat16(), **given)
    assert launches == []
