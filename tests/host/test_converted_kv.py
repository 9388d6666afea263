"""When a step brings K and V in FP8 to 16 bits once a call: what is planned for it, and the host's choice. Nothing is launched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend import AttentionMetadata, AttentionPlan, BatchLimits, envs, plan_attention
from fa4_backend.kernels.sm90.tuning import TILES
from fa4_backend.plan import bounded
from fa4_backend.problem import FP8, MAX_CONVERT_KEYS, RAGGED
from tests.support.problems import make_problem

LIMITS = BatchLimits(8, 16384, 8192, convert_keys=4096)


def plan_of(limits: BatchLimits = LIMITS, *, kv_dtype: str = FP8, arch: str = "sm_90a", **facts: object) -> AttentionPlan:
    return plan_attention(make_problem(8, 2, 128, 128, "bfloat16", facts.pop("page_size", 16), arch, kv_dtype=kv_dtype, **facts), limits)  # type: ignore[arg-type]


def converts(plan: AttentionPlan, queries: int, keys: int | None, window_left: int | None = None) -> bool:
    """Whether a step of one row is one that converts."""
    metadata = AttentionMetadata(plan, torch.device("cpu"), window_left=window_left)
    lengths = torch.tensor([0, queries], dtype=torch.int32), torch.tensor([keys or 0], dtype=torch.int32)
    metadata.refresh(cu_seqlens_q=lengths[0], seqused_k=lengths[1], max_seqlen_q=queries, max_seqlen_k=keys or 0, prefill_keys=keys)
    assert metadata.bounds is not None
    return metadata.bounds.converts


def test_a_step_converts_where_its_keys_fit_and_many_queries_see_each() -> None:
    plan = plan_of()
    assert plan.kernels is not None and plan.kernels.converted is not None
    # Queries that must see a key: all of a late chunk nearly do, of a whole prompt half.
    least = plan.kernels.converted.least_visits * plan.kernels.converted.work.tokens_per_item
    whole, late = 2 * least, least + least**2 // 4096
    assert converts(plan, whole, whole) and not converts(plan, whole - 2, whole - 2)
    assert converts(plan, late, 4096) and not converts(plan, least, 4096)
    assert not converts(plan, whole, 4097), "no room"
    assert not converts(plan, whole, None), "a graph may replay it"
    # A key is seen by the queries of its window alone.
    windowed = plan_of(has_window_left=True)
    assert converts(windowed, whole, 4096, window_left=least - 1) and not converts(windowed, whole, 4096, window_left=least - 2)
    full = plan_of(is_causal=False)
    assert converts(full, least, least) and not converts(full, least - 1, least - 1)


@pytest.mark.parametrize("dims", TILES)
@pytest.mark.parametrize("has_window_left", [False, True])
def test_steps_of_both_ways_share_lists_at_every_head_dimension(dims: tuple[int, int], has_window_left: bool) -> None:
    """A tile of other rows for 16-bit K and V than for FP8 alone would break them: the plan refuses it."""
    problem = make_problem(8, 2, *dims, "bfloat16", 16, "sm_90a", kv_dtype=FP8, has_window_left=has_window_left)
    kernels = plan_attention(problem, LIMITS).kernels
    assert kernels is not None and kernels.converted is not None
    assert kernels.converted.work.tokens_per_item == kernels.work.tokens_per_item == kernels.converted.prefill.tokens_per_item


def test_no_decode_row_is_worth_it() -> None:
    assert not converts(plan_of().always_converting(), 1, 64)
    assert converts(plan_of().always_converting(), 2, 64)


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(replace(LIMITS, convert_keys=0)),
        plan_of(kv_dtype="bfloat16"),
        plan_of(batch_invariant=True),
        plan_of(arch="sm_100a"),
        plan_of(kv_source=RAGGED, page_size=1),
    ],
    ids=["no room", "16 bits", "bits would depend on the batch", "Blackwell", "no pages"],
)
def test_who_never_converts(plan: AttentionPlan) -> None:
    assert plan.kernels is not None and plan.kernels.converted is None
    assert not any(name.startswith("convert") for name in plan.kernel_names)
    with pytest.raises(ValueError, match="expected one with room for converted keys"):
        plan.always_converting()


@pytest.mark.parametrize("keys", [-1, MAX_CONVERT_KEYS + 1])
def test_room_out_of_range_is_refused(keys: int) -> None:
    with pytest.raises(ValueError, match="convert_keys: expected 0 to"):
        replace(LIMITS, convert_keys=keys)


@pytest.mark.parametrize("text", ["-1", "many", str(envs.MAX_CONVERT_MIB + 1)])
def test_the_variable_is_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_BACKEND_CONVERT_MIB", text)
    with pytest.raises(ValueError, match="FA4_BACKEND_CONVERT_MIB: expected 0 to"):
        envs.convert_bytes()


@pytest.mark.parametrize(
    ("mib", "heads", "dims", "asked", "keys"),
    [
        ("256", 8, (128, 128), MAX_CONVERT_KEYS, 65536),
        ("256", 2, (256, 256), MAX_CONVERT_KEYS, 131072),
        ("256", 8, (128, 128), 1000, 1000),  # all that an engine's sequences have
        ("1", 3, (192, 128), MAX_CONVERT_KEYS, 546),  # 1,920 bytes a key: what is left of the MiB holds none
        ("0", 8, (128, 128), MAX_CONVERT_KEYS, 0),
    ],
)
def test_room_is_bounded_in_mib(
    mib: str, heads: int, dims: tuple[int, int], asked: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FA4_BACKEND_CONVERT_MIB", mib)
    problem = make_problem(4 * heads, heads, *dims, "bfloat16", 16, "sm_90a", kv_dtype=FP8)
    limits = bounded(replace(LIMITS, convert_keys=asked), problem)
    assert limits.convert_keys == keys
    plan = plan_attention(problem, limits)
    assert plan.room_bytes <= int(mib) << 20 and (plan.room_bytes > 0) == (keys > 0)
