"""Long rows of latent attention as short ones: against a loop over tokens, and where the device's lengths are below the host's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend import AttentionProblem, BatchLimits, plan_attention
from fa4_backend.kernels.schedule.limits import largest_num_seqs
from fa4_backend.problem import FP8, LATENT
from fa4_backend.split_rows import SplitRows, is_cheaper_absorbed, message_limits, message_queries, row_queries

CPU = torch.device("cpu")


def problem(num_heads: int, arch: str = "sm_90a", **facts: str) -> AttentionProblem:
    return AttentionProblem(num_heads, 1, 576, 512, "bfloat16", 64, arch, kv_source=LATENT, **facts)  # type: ignore[arg-type]


def seen(queries: list[int], keys: list[int], most: int) -> list[tuple[int, int, int]]:
    """Of each token of q: its sequence, its row after the split and the keys that it sees."""
    tokens, row = [], 0
    for seq_idx, (q, k) in enumerate(zip(queries, keys, strict=True)):
        tokens += [(seq_idx, row + i // most, k - q + i + 1) for i in range(q)]
        row += -(-q // most)
    return tokens


@pytest.mark.parametrize("most", [1, 4, 8])
@pytest.mark.parametrize("spare", [0, 3])
def test_tokens_see_the_keys_that_they_saw(most: int, spare: int) -> None:
    # One row, one full, one more than full, none, the longest message; fewer keys than queries; a page table wider than a sequence's pages.
    queries, keys = [1, most, most + 1, 0, 256, 2 * most, 0], [7, 1, 400, 9, 1000, most, 0]
    limits = message_limits(BatchLimits(7, 512, 1000), problem(16), most)
    assert limits is not None and limits.decode_query_len == most
    rows = SplitRows.allocate(limits, 64, CPU)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    table = torch.arange(7 * 20).int().view(7, 20)
    num_rows = rows.num_rows(queries)
    short = rows.split(starts, torch.tensor(keys).int(), table, num_rows + spare)
    lens = short.cu_seqlens_q.diff()
    assert len(lens) == len(short.seqused_k) == len(short.page_table) == num_rows + spare
    assert (lens[:num_rows] > 0).all() and (lens <= most).all() and (lens[num_rows:] == 0).all()
    got = [
        (int(short.page_table[row, 0]) // 20, row, int(short.seqused_k[row] - lens[row] + i + 1))
        for row in range(len(lens))
        for i in range(lens[row])
    ]
    want = seen(queries, keys, most)
    # Lengths below 0 are cut, so of a row without a key only its place is told.
    assert [token[:2] for token in got] == [token[:2] for token in want]
    assert all(g == w for g, w in zip(got, want, strict=True) if short.seqused_k[g[1]] > 0)
    assert all(w[2] <= 0 for g, w in zip(got, want, strict=True) if short.seqused_k[g[1]] == 0)
    assert short.page_table.shape[1] == -(-1000 // 64) and (short.page_table.diff(dim=1) == 1).all()


def test_buffers_that_an_engine_discarded() -> None:
    """While it sleeps; addresses stay, contents do not. Nothing is left of a step before."""
    rows = SplitRows.allocate(BatchLimits(8, 64, 256, 4), 64, CPU)
    step = torch.tensor([0, 2, 11]).int(), torch.tensor([30, 90]).int(), torch.arange(8).int().view(2, 4), 5
    awake = [tensor.clone() for tensor in rows.split(*step)]
    for buffer in (rows.places, rows.cu_seqlens_q, rows.seqused_k, rows.page_table):
        buffer.fill_(-0x5A5A5A5B)
    assert all(torch.equal(*pair) for pair in zip(rows.split(*step), awake, strict=True))


def test_lengths_on_the_device_below_the_hosts() -> None:
    rows = SplitRows.allocate(BatchLimits(8, 64, 256, 4), 64, CPU)
    short = rows.split(torch.tensor([0, 2, 11]).int(), torch.tensor([30, 90]).int(), torch.zeros(2, 4).int(), rows.num_rows([5, 12]))
    assert short.cu_seqlens_q.tolist() == [0, 2, 6, 10, 11, 11] and short.seqused_k.tolist()[:4] == [30, 85, 89, 90]


@pytest.mark.parametrize(("batch", "num_rows"), [(2, 9), (0, 1)])
def test_more_rows_than_room_or_none(batch: int, num_rows: int) -> None:
    rows = SplitRows.allocate(BatchLimits(8, 64, 256, 4), 64, CPU)
    with pytest.raises(ValueError, match=f"num_rows: expected at most 8 of at least one sequence, got {num_rows} of {batch}"):
        rows.split(torch.zeros(batch + 1).int(), torch.zeros(batch).int(), torch.zeros(batch, 4).int(), num_rows)


@pytest.mark.parametrize(
    ("arch", "queries"),
    [("sm_90a", {8: 8, 16: 4, 32: 2, 64: 1, 128: 1}), ("sm_100a", {8: 8, 16: 8, 32: 4, 64: 2, 128: 1}), ("cpu", {16: 8, 128: 8})],
)
def test_a_row_fills_one_row_group(arch: str, queries: dict[int, int]) -> None:
    """One of 64 packed rows, or of 128 where CTAs are pairs: no row group of a long row is without a query, nor half of it."""
    for num_heads, most in queries.items():
        for facts in ({}, {"kv_dtype": FP8}):
            p = problem(num_heads, arch, **facts)
            assert row_queries(p) == most
            kernels = plan_attention(p, BatchLimits(8, 64, 256, most)).kernels
            assert kernels is None or kernels.work.num_kv_heads == max(1, num_heads * most // (128 if arch == "sm_100a" else 64))


def test_room() -> None:
    """As many rows as a schedule of wheels has a table for, or as 64 MiB of page table hold; nothing where sequences fill it, nor where
    bits must not depend on the batch."""
    engine = {max_seqlen_k: BatchLimits(256, 8192, max_seqlen_k, 4) for max_seqlen_k in (8192, 1 << 18, 1 << 19, 1 << 22)}
    sizes = [message_limits(limits, problem(128)) for limits in engine.values()]
    assert sizes == [
        BatchLimits(4096, 8192, 8192, 1), BatchLimits(4096, 8192, 1 << 18, 1), BatchLimits(2048, 8192, 1 << 19, 1), None
    ]  # fmt: skip
    for limits in sizes[:3]:
        assert limits is not None
        plan_attention(problem(128), limits)
    assert message_limits(engine[8192], replace(problem(128), batch_invariant=True)) is None
    assert message_limits(replace(engine[8192], max_num_seqs=3000), problem(128)) == BatchLimits(6000, 8192, 8192, 1)
    for arch in ("sm_90a", "sm_100a"):  # an engine's most sequences: more rows than a schedule serves would refuse its start
        most = largest_num_seqs(arch, 4096)
        for max_num_seqs, rows in ((most // 2 + 1, most), (most - 1, most), (most, None)):
            limits = message_limits(BatchLimits(max_num_seqs, 8192, 4096), problem(128, arch))
            assert rows == (None if limits is None else plan_attention(problem(128, arch), limits).limits.max_num_seqs)


def test_what_is_cheaper() -> None:
    """q (2 k + q) below 2 * 256 * k, summed."""
    for cheaper, queries, contexts in (
        (True, [64], [32768]), (True, [255], [1 << 16]), (False, [256], [1 << 20]), (False, [64], [0]), (False, [9], [0]),
        (True, [64, 200], [32768, 0]), (False, [9, 200], [16, 0]), (True, [200], [358]), (False, [200], [357]),
    ):  # fmt: skip
        assert is_cheaper_absorbed(queries, contexts, 256) == cheaper, (queries, contexts)


def test_longest_messages() -> None:
    """Those that an H200 took as long for both ways, fewer over FP8 latents, which its decode takes longer for."""
    kinds = {"sm_90a": {}, "emulated-sm_90a": {"kv_dtype": FP8}, "sm_103a": {"kv_dtype": FP8}, "cpu": {}}
    assert [message_queries(problem(128, arch, **facts)) for arch, facts in kinds.items()] == [320, 192, 256, 256]
