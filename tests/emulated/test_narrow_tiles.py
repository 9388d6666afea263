"""Steps of decode rows alone on prefill tiles of their height: the operator, and the kernel alone with tiles cut along KV."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fa4_backend import AttentionMetadata
from fa4_backend.kernels.schedule.work_list import PARTIAL_SLOT, QUEUE_TOTAL
from fa4_backend.problem import FP8
from tests.support.emulated_prefill import Cuts, run_built
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

# Rows at edges of a block of 128 keys and of pages, one without queries; 48 of 64 rows of a tile.
ONE_QUERY = PagedCase(
    (1, 1, 0, 1, 1), (300, 129, 40, 128, 1), num_q_heads=48, num_kv_heads=1, head_dim=128, arch="emulated-sm_90a", decode_alone=True
)  # fmt: skip
DRAFTS = PagedCase(
    (8, 3, 0, 1, 8), (270, 128, 0, 17, 5), num_q_heads=12, num_kv_heads=2, head_dim=64, arch="emulated-sm_90a", decode_query_len=8,
    decode_alone=True, sinks=True, window_left=200,
)  # fmt: skip
CASES = {
    "drafts": DRAFTS, "one query": ONE_QUERY, "71 of 128 rows": replace(ONE_QUERY, num_q_heads=71, head_dim=64),
    "drafts, FP8": replace(DRAFTS, kv_dtype=FP8), "one query, FP8": replace(ONE_QUERY, kv_dtype=FP8),
    "drafts of d256, FP8": replace(DRAFTS, head_dim=256, num_q_heads=5, num_kv_heads=1, kv_dtype=FP8, dtype="float16"),
}  # fmt: skip


# Messages of up to 16 tokens beside decode rows, and alone: a row that is cut, one without queries.
MESSAGES = {
    "beside decode rows": replace(
        ONE_QUERY,
        query_lens=(16, 1, 0, 2, 1),
        kv_lens=(700, 129, 40, 128, 1),
        num_q_heads=8,
        num_kv_heads=2,
        kv_dtype=FP8,
        decode_alone=False,
    ),
    "d64, window, sinks": replace(
        DRAFTS,
        query_lens=(9, 3, 0, 17, 8),
        kv_lens=(700, 128, 0, 17, 5),
        decode_query_len=1,
        num_q_heads=6,
        kv_dtype=FP8,
        decode_alone=False,
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_short_messages_in_fp8(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operator: decode rows by their kernel, messages on tiles of 64 rows, which the schedule cuts."""
    built = replace(MESSAGES[name], counts_prefill_keys=True).build()
    plan = built.case.plan(num_sms=12)
    assert plan.messages is not None and plan.kernels is not None and plan.messages.prefill.kernel.tile.tile_m == 64
    metadata: list[AttentionMetadata] = []
    allocate = AttentionMetadata.allocate
    monkeypatch.setattr(AttentionMetadata, "allocate", lambda *arguments: metadata.append(allocate(*arguments)) or metadata[-1])
    # Kernels of other steps are not launched, and so not compiled.
    built.check(*built.run(replace(plan, kernels=replace(plan.kernels, prefill=plan.messages.prefill))))
    work = metadata[0].work
    assert work is not None and metadata[0].bounds is not None and metadata[0].bounds.has_messages
    assert (work.prefill_tiles[: int(work.prefill_queue[0, QUEUE_TOTAL]), PARTIAL_SLOT] >= 0).any()


@pytest.mark.parametrize("name", with_slow(CASES, {"one query", "71 of 128 rows", "drafts of d256, FP8"}))
def test_decode_rows_alone(name: str) -> None:
    """Right through the operator, whose schedule cuts few long rows; and without a race, whoever adds the parts up."""
    built = CASES[name].build()
    plan = built.case.plan(num_sms=6)
    assert plan.narrow is not None and plan.kernels is not None
    narrow = plan.narrow.prefill
    # Kernels of other steps are not launched, and so not compiled.
    built.check(*built.run(replace(plan, kernels=replace(plan.kernels, decode=None, prefill=narrow))))
    for cuts, seed in ((Cuts((3, 2, 1, 1, 1)), 1), (Cuts((2, 1, 1, 1, 1), is_reversed=True), 2)):
        run_built(built, num_ctas=4, key=narrow, cuts=cuts, seed=seed).check()
