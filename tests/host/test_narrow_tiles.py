"""Steps of decode rows alone on narrow prefill tiles: which problems have them, which steps go there, and what is launched then."""

from __future__ import annotations

from typing import Any

import pytest

from fa4_backend import AttentionMetadata, AttentionPlan, BatchLimits, paged_attention, plan_attention
from fa4_backend.kernels.schedule.work_list import NO_WINDOW
from fa4_backend.kernels.sm90.config import Sm90Config
from fa4_backend.kernels.sm90.warp_roles import WarpRoles
from fa4_backend.problem import FP8
from tests.support.operations import Operations
from tests.support.paged_case import BuiltCase, PagedCase
from tests.support.problems import make_problem


def plan_of(q_heads: int, kv_heads: int, head_dim: int, query_len: int = 1, **facts: Any) -> AttentionPlan:
    problem = make_problem(q_heads, kv_heads, head_dim, head_dim, page_size=16, **{"dtype": "bfloat16", "arch": "sm_90a", **facts})
    return plan_attention(problem, BatchLimits(64, 512, 4096, query_len))


def tile_m(plan: AttentionPlan) -> int | None:
    """Rows of the plan's narrow tiles; None where it has none."""
    return None if plan.narrow is None else plan.narrow.prefill.kernel.tile.tile_m


@pytest.mark.parametrize(
    ("heads", "query_len", "expected"),
    [
        ((32, 1, 64), 1, None), ((33, 1, 64), 1, 64), ((64, 1, 64), 1, 64), ((65, 1, 64), 1, 128), ((128, 1, 64), 1, 128),
        ((32, 1, 128), 1, None), ((48, 1, 128), 1, 64), ((65, 1, 128), 1, 128), ((97, 1, 128), 1, None),
        ((64, 8, 128), 8, 64), ((64, 8, 128), 4, None), ((64, 1, 256), 1, None),
    ],
)  # fmt: skip
def test_tiles_have_the_rows_of_a_row_group(heads: tuple[int, int, int], query_len: int, expected: int | None) -> None:
    """A tile of a prompt's height is no narrow one (97/1 heads of 128), few rows are the decode kernel's."""
    plan = plan_of(*heads, query_len)
    assert tile_m(plan) == expected
    if expected is not None:
        narrow = plan.narrow
        assert narrow is not None and narrow.prefill in plan.keys and narrow.prefill.tokens_per_item >= query_len
        assert narrow.work.decode_query_len == 0, "no decode list"


@pytest.mark.parametrize("facts", [{"batch_invariant": True}, {"batch_invariant": True, "exact": True}, {"arch": "sm_100a"}], ids=str)
def test_what_has_none(facts: dict[str, Any]) -> None:
    assert tile_m(plan_of(64, 1, 64)) == 64
    assert tile_m(plan_of(64, 1, 64, **facts)) is None


@pytest.mark.parametrize(
    ("heads", "query_len", "expected"),
    [
        ((32, 8, 128), 8, None), ((64, 8, 128), 8, 64), ((48, 1, 96), 1, 64), ((16, 2, 256), 5, 64), ((64, 8, 64), 8, 64),
        ((65, 1, 64), 1, None),
    ],
)  # fmt: skip
def test_fp8_has_those_of_one_warpgroup(heads: tuple[int, int, int], query_len: int, expected: int | None) -> None:
    """Beside one consumer there is room for more warps that convert than a prompt's tile has."""
    plan = plan_of(*heads, query_len, kv_dtype=FP8)
    assert tile_m(plan) == expected
    if plan.narrow is not None and plan.kernels is not None and isinstance(plan.kernels.prefill, Sm90Config):
        narrow, usual = (WarpRoles.of(key.kernel) for key in (plan.narrow.prefill, plan.kernels.prefill))
        assert (narrow.num_consumers, narrow.threads) == (1, 512 if heads[2] < 256 else 384)
        assert narrow.convert_warps > usual.convert_warps


def built_step() -> tuple[BuiltCase, AttentionMetadata]:
    """A step of 64/1 heads of 64 and what serves it."""
    case = PagedCase((1, 1), (70, 20), num_q_heads=64, num_kv_heads=1, head_dim=64, arch="emulated-sm_90a")
    return case.build(), AttentionMetadata.allocate(case.plan(), "cpu")


def run(built: BuiltCase, metadata: AttentionMetadata, **bounds: Any) -> None:
    a = built.arguments
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, **{"max_seqlen_q": 1, "max_seqlen_k": 70, **bounds})
    paged_attention(*a[:6], plan=metadata.plan, metadata=metadata, out=a.out, lse=a.lse)


@pytest.mark.parametrize("decode_alone", [True, False])
def test_a_step_goes_there_where_the_host_says_so(decode_alone: bool, launches: list[tuple[str, tuple]]) -> None:
    """The schedule and one kernel, nothing else; slots of parts are those of the plan's other steps."""
    built, metadata = built_step()
    assert metadata.work is not None and metadata.narrow is not None
    for _ in range(2):
        launches.clear()
        with Operations() as operations:
            run(built, metadata, decode_alone=decode_alone)
        assert operations.names == []
        (_, schedule), (name, arguments) = launches
        work = metadata.narrow.work if decode_alone else metadata.work
        assert ("m64" in name) == decode_alone and name.startswith("prefill" if decode_alone else "decode")
        assert schedule[-1] == work.shape.params(NO_WINDOW, 0) and schedule[2] is work.prefill_tiles
        assert all(any(x is tensor for x in arguments) for tensor in (built.arguments.k_cache, built.arguments.out))
        assert any(x is (work.part_slots if decode_alone else work.slots) for x in arguments)
    narrow, wide = metadata.narrow.work.part_slots, metadata.work.part_slots
    assert narrow is not None and wide is not None and narrow.data_ptr() == wide.data_ptr() and narrow.is_contiguous()
    assert narrow.shape == (len(wide), metadata.narrow.work.shape.part_floats)


MESSAGES = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "arch": "emulated-sm_90a", "kv_dtype": FP8}


@pytest.mark.parametrize(
    ("query_lens", "prefill_keys", "expected"),
    [((16, 1), 70, "m64"), ((16, 3), 140, "m64"), ((17, 1), 70, "m128"), ((16, 1), None, "m128"), ((1, 1), 0, None)],
)
def test_short_messages_in_fp8_have_tiles_of_their_height(
    query_lens: tuple[int, int], prefill_keys: int | None, expected: str | None, launches: list[tuple[str, tuple]]
) -> None:
    """Where the host counts keys, as it does of steps that are not captured; decode rows have their own kernel."""
    case = PagedCase(query_lens, (70, 70), **MESSAGES)
    built, metadata = case.build(), AttentionMetadata.allocate(case.plan(), "cpu")
    bounds = {"max_seqlen_q": max(query_lens), "min_seqlen_q": min(query_lens), "prefill_keys": prefill_keys}
    for _ in range(2):
        launches.clear()
        run(built, metadata, **bounds)
        (_, schedule), *kernels = launches
        shape = schedule[-1]
        names = [name.split("-")[0] for name, _ in kernels]
        assert names == ["decode"] * (min(query_lens) == 1) + ["prefill"] * (expected is not None)
        if expected is not None:
            assert f"-{expected}n" in kernels[-1][0]
        assert shape.tokens_per_item == (16 if expected == "m64" else 32) and shape.decode_query_len == 1


def test_what_has_no_tiles_for_messages() -> None:
    """16-bit K and V, whose tiles convert nothing; modes in which a row's bits must not depend on the batch; Blackwell; (192, 128)."""
    assert plan_of(8, 2, 128, kv_dtype=FP8).messages is not None
    for facts in ({}, {"kv_dtype": FP8, "batch_invariant": True}, {"kv_dtype": FP8, "arch": "sm_100a"}):
        assert plan_of(8, 2, 128, **facts).messages is None
    assert plan_of(128, 1, 128, kv_dtype=FP8).messages is None  # a token fills more than a tile
    wide = make_problem(8, 2, 192, 128, "bfloat16", 16, "sm_90a", kv_dtype=FP8)
    assert plan_attention(wide, BatchLimits(64, 512, 4096, 1)).messages is None


def test_a_bound_that_speaks_against_it_is_refused(launches: list[tuple[str, tuple]]) -> None:
    built, metadata = built_step()
    with pytest.raises(ValueError, match=r"decode_alone: expected max_seqlen_q of at most 1, .*got 2"):
        run(built, metadata, decode_alone=True, max_seqlen_q=2)
    assert launches == []


def test_layers_that_write_fp8_share_the_step(launches: list[tuple[str, tuple]]) -> None:
    built, metadata = built_step()
    problem = metadata.plan.problem
    fused = metadata.sharing(
        plan_attention(make_problem(64, 1, 64, 64, "bfloat16", 16, problem.arch, has_lse=True, out_dtype=FP8), metadata.plan.limits)
    )
    run(built, metadata, decode_alone=True)
    assert (
        fused.bounds is metadata.bounds
        and fused.bounds.is_narrow
        and fused.narrow is not None
        and fused.narrow.work.part_slots.data_ptr() == metadata.narrow.work.part_slots.data_ptr()
    )
