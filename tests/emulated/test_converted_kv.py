"""K and V in FP8 brought to 16 bits once a call, on the emulator: schedule, conversion, decode and prefill kernel, by the public operator.

Everything that no row sees is NaN, pages that no row sees lie outside the pool, and the workspace begins as memory that nobody wrote.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fa4_backend import AttentionMetadata, paged_attention
from fa4_backend import metadata as metadata_module
from fa4_backend.emulator.kernels import observed
from fa4_backend.kernels.convert_kv.config import ConvertConfig
from fa4_backend.kernels.launch_abi import schedule_arguments
from fa4_backend.kernels.loading import load
from fa4_backend.problem import FP8
from tests.support import large_logits
from tests.support.paged_case import BuiltCase, PagedCase, repage
from tests.support.slow_cases import with_slow

BASE = PagedCase(
    (1, 40, 0, 70, 5, 33), (70, 20, 9, 200, 0, 130), head_dim=128, num_q_heads=8, num_kv_heads=2, kv_dtype=FP8, arch="emulated-sm_90a",
    converts=True,
)  # fmt: skip
CASES = {
    # Decode rows among the others, more queries than keys, no query, no key, and rows that end inside a group of keys of a warp.
    "mixed": BASE,
    # Four parts of a head; rows left of the window in pages that lie nowhere, and cleared at both edges of one tile.
    "d256, left window, hnd": replace(
        BASE, query_lens=(40, 3), kv_lens=(130, 65), head_dim=256, num_q_heads=2, num_kv_heads=1, window_left=5, layout="hnd"
    ),
    # K's rows and V's differ, in the other 16 bits.
    "(192, 128) in fp16, sinks": replace(
        BASE, query_lens=(10, 70), kv_lens=(230, 300), head_dim=192, head_dim_v=128, num_q_heads=2, num_kv_heads=2, dtype="float16",
        sinks=True,
    ),
}  # fmt: skip


def run(built: BuiltCase, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The call's results, judged; no race."""
    built.oracle = None
    with observed(seed, None, "never") as seen:
        out, lse = built.run(built.case.plan(num_sms=3))
    for report in seen.reports:
        assert report.races == [], report.races[:3]
    built.check(out, lse)
    return out[: built.total_q].clone(), lse[:, : built.total_q].clone()


# Five kernels each; the converted ones of other heads and masks are Hopper's without pages, which `test_ragged.py` runs.
@pytest.mark.parametrize("name", with_slow(CASES, [name for name in CASES if name != "mixed"]))
def test_edges(name: str) -> None:
    run(CASES[name].build(), seed=len(name))


def test_bits_do_not_depend_on_schedule_or_page_size() -> None:
    base = BASE.build()
    first = run(base)
    for page_size, seed in ((16, 7), (48, 8)):
        again = run(repage(base, page_size), seed)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["growing", "-3e37"])
def test_tiles_in_parts(name: str) -> None:
    """A head's scale of K reaches the rows that all CTAs add up together, and V's comes once; also where weights take another scale."""
    drawn = large_logits.build(
        name, query_lens=(5,), kv_lens=(2100,), num_q_heads=8, num_kv_heads=2, head_dim=128, kv_dtype=FP8, arch=BASE.arch, converts=True
    )
    plan = drawn.case.plan(num_sms=18)
    with observed(3, None, "never") as seen:
        out, lse = drawn.run(plan)
    assert all(report.races == [] for report in seen.reports)
    large_logits.check(drawn, out, lse)


def test_lengths_past_their_bound_leave_other_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has more keys than the host said, and than the workspace has room for: nothing is written behind it. As on a GPU, where
    nobody holds the lengths against their bounds."""
    monkeypatch.setattr(metadata_module, "check_bounds", lambda *bounds: None)
    case = replace(BASE, query_lens=(70, 33), kv_lens=(200, 130))
    built = case.build()
    plan = case.plan(num_sms=3)
    plan = replace(plan, limits=replace(plan.limits, convert_keys=230))
    assert plan.kernels is not None and plan.kernels.converted is not None
    work = replace(plan.kernels.converted.work, convert_keys=230)
    plan = replace(plan, kernels=replace(plan.kernels, converted=replace(plan.kernels.converted, work=work)))
    a = built.arguments
    metadata = AttentionMetadata.allocate(plan, "cpu")
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=70, max_seqlen_k=200, prefill_keys=230)
    out, _ = call(metadata, built)
    assert metadata.work is not None and metadata.work.key_starts is not None
    assert metadata.work.key_starts.tolist() == [0, 200, 230]
    assert out[: built.total_q].isfinite().all()


def test_a_narrow_page_table_is_refused() -> None:
    case = replace(BASE, query_lens=(70,), kv_lens=(200,))
    built = case.build()
    plan = case.plan(num_sms=3)
    metadata = AttentionMetadata.allocate(plan, "cpu")
    a = built.arguments
    metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=70, max_seqlen_k=200, prefill_keys=200)
    narrow = replace(built, arguments=a._replace(page_table=a.page_table[:, :12].contiguous()))
    with pytest.raises(ValueError, match="expected room for max_seqlen_k=200 tokens"):
        call(metadata, narrow)


def call(metadata: AttentionMetadata, built: BuiltCase) -> Any:
    """The operator on metadata that the caller refreshed."""
    a = built.arguments
    values = {name: getattr(a, name) for name in ("softmax_scale", "window_left", "k_scale", "v_scale", "out", "lse")}
    return paged_attention(*a[:6], plan=metadata.plan, metadata=metadata, **values)


@pytest.mark.parametrize(("heads", "dims"), with_slow([(3, (128, 128)), (5, (192, 128))], [(5, (192, 128))]))
def test_the_conversion_alone(heads: int, dims: tuple[int, int]) -> None:
    """A number of heads and of keys that no unit of a warp divides, a seen page outside the pool, which gives zeros, and rows left of a
    window, of which nothing is written and no page is looked up."""
    dtype, lens, query_lens, window_left, page_size = torch.bfloat16, (39, 58), (5, 4), 30, 16
    generator = torch.Generator().manual_seed(heads)
    pools = [(30 * torch.randn(20, page_size, heads, dim, generator=generator)).to(torch.float8_e4m3fn) for dim in dims]
    table = torch.randperm(20, generator=generator)[:16].reshape(2, 8).int()
    table[0, 1], table[1, 0] = 999, -(2**31)
    starts, bounds = (torch.tensor([0, *n]).cumsum(0).int() for n in (lens, query_lens))
    rooms = [torch.full((100, heads, dim), 7.0, dtype=dtype) for dim in dims]
    with observed(1, None, "never") as seen:
        load(ConvertConfig("sm_90a", "bfloat16", *dims), emulated=True)(*pools, table, starts, bounds, *rooms, window_left, 2)
    assert all(report.races == [] for report in seen.reports) and seen.reports
    for pool, room in zip(pools, rooms, strict=True):
        want = torch.full_like(room, 7.0)
        for row, (length, query_len) in enumerate(zip(lens, query_lens, strict=True)):
            for token in range(max(0, length - query_len - window_left), length):
                page = int(table[row, token // page_size])
                want[int(starts[row]) + token] = pool[page, token % page_size].to(dtype) if 0 <= page < 20 else 0
        assert torch.equal(room, want)


def test_where_keys_begin_in_a_batch_of_many_rows() -> None:
    """More rows than a CTA of the schedule has threads, decode rows among them; cut to the workspace."""
    query = torch.arange(700) % 4  # of one token and less: no keys here
    keys = torch.arange(700) % 50
    case = replace(BASE, query_lens=tuple(query.tolist()), kv_lens=tuple(keys.tolist()))
    plan = case.plan(num_sms=3)
    assert plan.kernels is not None and plan.kernels.converted is not None
    metadata = AttentionMetadata.allocate(plan, "cpu")
    assert metadata.work is not None and metadata.kernels is not None
    starts = torch.tensor([0, *(keys * (query > 1)).tolist()]).cumsum(0)
    for room in (int(starts[-1]), 5000):
        shape = replace(plan.kernels.converted.work, convert_keys=room)
        bounds = torch.tensor([0, *query.tolist()]).cumsum(0).int()
        metadata.kernels.schedule(*schedule_arguments(metadata.work, bounds, keys.int(), shape=shape))
        assert metadata.work.key_starts is not None
        assert torch.equal(metadata.work.key_starts, starts.clamp(max=room).int())
