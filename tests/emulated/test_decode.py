"""Schedule and decode kernel, compiled by the real compiler for Hopper and Blackwell and executed on the emulator, against the oracle.

Sizes sit at 16 keys a TMA box, 64 keys a KV tile, 16 packed rows a warp. The emulated GPU has three SMs, so rows are split
between CTAs and combined by whichever comes last.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fa4_backend import AttentionMetadata, paged_attention
from fa4_backend.kernels.schedule.work_list import NUM_PIECES
from tests.support.emulated_decode import run_decode
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

BASE = PagedCase((1, 1, 1), (300, 64, 0), num_q_heads=8, num_kv_heads=2, head_dim=128, arch="emulated-sm_100a")


def case(query_lens: tuple[int, ...], kv_lens: tuple[int, ...], **changes: object) -> PagedCase:
    return replace(BASE, query_lens=query_lens, kv_lens=kv_lens, **changes)  # type: ignore[arg-type]


# As in `test_decode_sass.py`.
NARROW_HEADS: dict[str, Any] = {"head_dim": 64, "num_q_heads": 9, "num_kv_heads": 3, "window_left": 64, "sinks": True}
CASES = {
    "keys 15, 16, 17, 63, 65": case((1,) * 5, (15, 16, 17, 63, 65)),
    "no query, no key, one key": case((0, 1, 1), (40, 0, 1)),
    "4 tokens, page 48, hnd": case((4, 1, 3), (200, 65, 3), decode_query_len=4, page_size=48, layout="hnd"),
    "more tokens than keys": case((4, 2), (2, 1), decode_query_len=4),
    "32 packed rows, nhd": case((4, 2), (130, 70), decode_query_len=4, num_q_heads=16, layout="nhd", page_size=64, arch="emulated-sm_90a"),
    "1 head a KV head, 2 tokens": case((2, 1), (130, 70), decode_query_len=2, num_q_heads=2),
    "d64, 3 to 1, peaked": case((1, 1), (250, 31), peaked=20.0, arch="emulated-sm_90a", **NARROW_HEADS),
    "windows": case((3, 2), (300, 65), decode_query_len=3, window_left=50, window_right=1, is_causal=False),
    "sinks, alibi, soft cap, window": case((1, 1), (250, 17), sinks=True, alibi=True, softcap=20.0, window_left=64),
    "d256, float16": case((1, 1), (130, 17), head_dim=256, dtype="float16", arch="emulated-sm_90a"),
    "batch invariant": case((2, 1), (1500, 65), decode_query_len=2, batch_invariant=True, arch="emulated-sm_90a"),
}
# Rows of which no CTA's equal share ends inside one; all others are cut.
WHOLE = ("keys 15, 16, 17, 63, 65", "no query, no key, one key", "more tokens than keys", "32 packed rows, nhd")
TWO_ROWS = case((4, 4), (1500, 1700), decode_query_len=4, num_q_heads=8, num_kv_heads=1, arch="emulated-sm_90a")


@pytest.mark.parametrize("name", with_slow(CASES, ["1 head a KV head, 2 tokens"]))
def test_edges_and_features(name: str) -> None:
    run = run_decode(CASES[name], seed=1)
    run.check()
    assert run.num_parts > 0 or name in WHOLE


def test_a_cta_that_arrives_last_for_two_rows() -> None:
    """Its second row's slots take the place of the first one's, which some warps may still read: 4 and 3 stages of them share 3 places.

    Without the barrier between the rows seed 2 finds a race, seed 4 a deadlock.
    """
    for seed in range(6):
        run_decode(TWO_ROWS, num_ctas=15, seed=seed).check()


def test_many_parts_are_added_up_by_all_or_by_the_last() -> None:
    """CTAs that wait for each other and add up a share each, and CTAs that leave at once, so that the last one has all to do."""
    long = case((1,), (1400,), num_q_heads=4, num_kv_heads=1, sinks=True, arch="emulated-sm_90a")
    outs = []
    for looks, seed in ((1 << 20, None), (1 << 20, 1), (1, None), (1, 2)):
        run = run_decode(long, num_ctas=4, seed=seed, share_vectors=1, arrival_looks=looks)
        assert (run.work.decode_first[:, NUM_PIECES] == 8).all()
        run.check()
        outs.append([rows.clone() for rows in run.rows])
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


def test_hopper_runs_the_same() -> None:
    run_decode(replace(CASES["4 tokens, page 48, hnd"], arch="emulated-sm_90a"), seed=2).check()


def test_bits_do_not_depend_on_schedule_or_page_size() -> None:
    first = run_decode(BASE, seed=None).rows
    for page_size, seed in ((16, 3), (48, 4), (128, 5)):
        again = run_decode(replace(BASE, page_size=page_size), seed=seed).rows
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_batch_invariant_bits_do_not_depend_on_the_gpu_or_the_batch() -> None:
    """The same row cut over 1, 3 and 7 SMs, alone and beside others: in normal mode its bits differ, in this mode never."""
    alone = case((1,), (1500,), batch_invariant=True, num_q_heads=4, num_kv_heads=1)
    first = run_decode(alone, num_ctas=1).rows
    for num_ctas in (3, 7):
        again = run_decode(alone, num_ctas=num_ctas).rows
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
    normal = [run_decode(replace(alone, batch_invariant=False), num_ctas=n).rows[0] for n in (1, 7)]
    assert not torch.equal(*normal), "the comparison cannot see a different cut"


# On both sides of a KV tile's end, which normal mode would cut the row by.
@pytest.mark.parametrize(("num_drafts", "tile_end", "window_left"), with_slow([(2, 1600, None), (4, 128, 70)], [(4, 128, 70)]))
def test_batch_invariant_bits_do_not_depend_on_drafts_beside_a_token(num_drafts: int, tile_end: int, window_left: int | None) -> None:
    """Together as drafts, and each alone."""
    first = tile_end - num_drafts // 2
    drafts = case(
        (num_drafts,),
        (first + num_drafts,),
        batch_invariant=True,
        decode_query_len=num_drafts,
        window_left=window_left,
        arch="emulated-sm_90a",
    )
    built, plan = drafts.build(), drafts.plan(num_sms=3)
    a, metadata = built.arguments, AttentionMetadata.allocate(plan, "cpu")

    def attend(begin: int, end: int) -> torch.Tensor:
        cu_seqlens_q = torch.tensor([0, end - begin], dtype=torch.int32)
        seqused_k = torch.tensor([first + end], dtype=torch.int32)
        metadata.refresh(cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k, max_seqlen_q=end - begin, max_seqlen_k=first + num_drafts)
        q = a.q[begin:end].contiguous()
        return paged_attention(q, *a[1:4], cu_seqlens_q, seqused_k, plan=plan, metadata=metadata, window_left=window_left)[0]

    together = attend(0, num_drafts)
    for token in range(num_drafts):
        assert torch.equal(attend(token, token + 1)[0], together[token])


def test_schedule_may_know_the_window() -> None:
    """The lists leave out keys before the widest window; a call with a wider one is refused."""
    windowed = case((1, 2), (900, 300), decode_query_len=3, window_left=100, window_right=0, is_causal=False)
    built, plan = windowed.build(), windowed.plan(num_sms=3)
    a = built.arguments
    metadata = AttentionMetadata.allocate(plan, "cpu")
    metadata.window_left = 150
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=2, max_seqlen_k=900)
    assert metadata.work is not None
    first_blocks = {int(e[0]): int(e[3]) for e in metadata.work.decode_first if e[11] > 0}
    assert min(first_blocks.values()) == (300 - 2 - 150) // 64, "the second row's first key in sight"

    def call(window_left: int) -> None:
        paged_attention(*a[:6], plan=plan, metadata=metadata, window_left=window_left, window_right=0, out=a.out, lse=a.lse)

    call(100)
    assert a.lse is not None
    built.check(a.out, a.lse)
    with pytest.raises(ValueError, match="window_left: expected at most 150"):
        call(151)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_race_over_seeds(name: str) -> None:
    for seed in range(100):
        run_decode(CASES[name], seed=seed).check()
