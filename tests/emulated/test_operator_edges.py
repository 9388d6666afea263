"""The public operator on the compiled kernels: windows that overflow a position, and empty tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fa4_backend import AttentionMetadata, paged_attention
from tests.support.paged_case import BuiltCase, PagedCase

pytestmark = pytest.mark.emulated

ARCHS = ("emulated-sm_90a", "emulated-sm_100a")
# Decode rows beside a prefill row, both windows; rows with more queries than keys, where the diagonal is negative.
WINDOWED = PagedCase(
    (1, 40, 3, 1), (70, 64, 2, 1), num_q_heads=8, num_kv_heads=2, head_dim=128, is_causal=False, window_left=500, window_right=500,
    decode_query_len=3, page_size=48,
)  # fmt: skip
FULL = replace(WINDOWED, window_left=None, window_right=None)


def attend(built: BuiltCase, metadata: AttentionMetadata, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One step through the operator, into poisoned outputs; returns copies."""
    a, case = built.arguments, built.case
    assert a.lse is not None
    for poisoned in (a.out, a.lse):
        poisoned.fill_(math.nan)
    metadata.refresh(
        cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=max(case.query_lens), max_seqlen_k=max(*case.kv_lens, 1)
    )
    windows = {"window_left": a.window_left, "window_right": a.window_right}
    paged_attention(
        *a[:6], plan=metadata.plan, metadata=metadata, softmax_scale=a.softmax_scale, out=a.out, lse=a.lse, **{**windows, **changes}
    )
    return a.out.clone(), a.lse.clone()


@pytest.mark.parametrize("arch", ARCHS)
def test_the_widest_windows_hide_nothing(arch: str) -> None:
    """`diagonal + window_right + 1` and `diagonal - window_left` would wrap in 32 bits: the result is that of attention without windows,
    for decode and prefill rows, and bit for bit that of windows that are just wide enough."""
    built = replace(WINDOWED, arch=arch).build()
    plan = built.case.plan(num_sms=2)
    assert plan.kernels is not None and plan.kernels.decode is not None
    metadata = AttentionMetadata.allocate(plan, "cpu")
    out, lse = attend(built, metadata)
    # The same tensors judged as a case without windows: `build` draws no poison from a window that hides nothing.
    BuiltCase(replace(FULL, arch=arch), built.arguments._replace(window_left=None, window_right=None), built.total_q).check(out, lse)
    for left, right in ((500, 2**31 - 2), (500, 2**31 - 1), (2**31 - 1, 500), (2**31, 2**31), (2**63, 2**63)):
        metadata.window_left = left
        got, got_lse = attend(built, metadata, window_left=left, window_right=right)
        assert torch.equal(got, out) and torch.equal(got_lse, lse), (left, right)


@pytest.mark.parametrize("arch", ARCHS)
def test_empty_tensors_are_served(arch: str) -> None:
    """No sequence, no page in the table, fewer rows than the lengths say: rows of 0 and -inf where there is nothing to see, no fault."""
    built = replace(WINDOWED, arch=arch).build()
    a, metadata = built.arguments, AttentionMetadata.allocate(built.case.plan(num_sms=2), "cpu")
    assert a.lse is not None
    for changes in (
        {"page_table": a.page_table[:0], "seqused_k": a.seqused_k[:0], "cu_seqlens_q": a.cu_seqlens_q[:1]},
        {"page_table": a.page_table[:, :0]},
    ):
        out, lse = attend(BuiltCase(built.case, a._replace(**changes), built.total_q), metadata)
        assert (out == 0).all() and lse.isneginf().all()
    a.out.fill_(math.nan), a.lse.fill_(math.nan)
    short = a._replace(q=a.q[:17], out=a.out[:17], lse=a.lse[:, :17])
    out, lse = attend(BuiltCase(built.case, short, built.total_q), metadata)
    assert out.isfinite().all() and not lse.isnan().any()
    assert a.out[17:].isnan().all() and a.lse[:, 17:].isnan().all(), "written past the tensors of the call"
