"""The Blackwell prefill kernel, compiled by the real compiler and executed on the emulator, against the float32 oracle.

Sizes sit at the kernel's edges: 128 keys a KV block, 128 packed rows a query tile, two tiles an item, 16-row TMA boxes, pages. Interior
sizes are left out: they run the same code as the edges' first blocks.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fa4_backend.compile import CompileKey
from tests.support.emulated_prefill import run_prefill
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

BASE = PagedCase((5, 40, 300), (133, 300, 300), num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, arch="emulated-sm_100a")


def case(query_lens: tuple[int, ...], kv_lens: tuple[int, ...], **changes: object) -> PagedCase:
    return replace(BASE, query_lens=query_lens, kv_lens=kv_lens, **changes)  # type: ignore[arg-type]


SHAPES = {
    "ragged": case((5, 40, 300), (133, 300, 300)),
    # Around one KV block, one query tile (32 tokens of 4 heads) and one item (64 tokens).
    "kv 127": case((31,), (127,)),
    "kv 128": case((32,), (128,)),
    "kv 129": case((33,), (129,)),
    "item 63, 64, 65": case((63, 64, 65), (200, 256, 257)),
    "no query, no key, one of each": case((0, 4, 1, 1), (40, 0, 1, 17)),
    "more queries than keys": case((100, 9), (20, 3)),  # the first rows see no key
    "one key on the last page": case((3,), (257,)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_tile_and_page_edges(name: str) -> None:
    run_prefill(SHAPES[name]).check()


FEATURES = {
    "full attention": case((70, 3), (257, 64), is_causal=False),
    "window left": case((100, 33), (500, 64), window_left=100),  # whole blocks left of the window are skipped
    "window left and right": case((100, 33), (500, 64), window_left=90, window_right=20, is_causal=False),
    "all score features": case((100, 33, 1), (500, 20, 1), sinks=True, alibi=True, softcap=20.0, window_left=60),
}


@pytest.mark.parametrize("name", FEATURES)
def test_mask_and_score_features(name: str) -> None:
    run_prefill(FEATURES[name]).check()


HEADS = {
    "d64, 4 to 1": case((130, 3), (300, 65), head_dim=64, num_q_heads=4, num_kv_heads=1),
    "d96, 3 to 1": case((130, 3), (300, 65), head_dim=96, num_q_heads=6, page_size=48),  # 126 of 128 rows, half a part
    "d192 and 128": case((130, 3), (300, 65), head_dim=192, head_dim_v=128, num_q_heads=2),
    "fp16, 5 to 1": case((100, 33), (300, 65), num_q_heads=5, num_kv_heads=1, dtype="float16", page_size=64),
    "7 to 1": case((40, 3), (300, 65), num_q_heads=14),
    "128 to 1": case((3,), (300,), num_q_heads=128, num_kv_heads=1),
}


@pytest.mark.parametrize("name", with_slow(HEADS, ["7 to 1"]))  # rows of a token across a tile's end are those of 5 to 1
def test_heads_and_dtypes(name: str) -> None:
    run_prefill(HEADS[name]).check()


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_k_and_v_in_one_strided_pool(layout: str) -> None:
    run_prefill(case((40, 5), (300, 77), layout=layout)).check()


def test_rows_of_one_dominant_key() -> None:
    run_prefill(case((40, 5), (300, 77), peaked=20.0)).check()


def repaged(
    page_size: int, key_of: Callable[[PagedCase], CompileKey] | None = None, **changes: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same keys and values for every page size: one sequence whose tokens are drawn before they are paged."""
    from tests.support import emulated_prefill

    paged = case((40,), (300,), page_size=page_size, **changes)
    built = paged.build()
    a = built.arguments
    generator = torch.Generator().manual_seed(7)
    for cache in (a.k_cache, a.v_cache):
        tokens = torch.randn(300, cache.shape[2], cache.shape[3], generator=generator).to(cache.dtype)
        for logical in range(-(-300 // page_size)):
            rows = tokens[logical * page_size : (logical + 1) * page_size]
            cache[int(a.page_table[0, logical]), : rows.shape[0]] = rows
    a.q[:40] = torch.randn(a.q[:40].shape, generator=generator).to(a.q.dtype)
    done = emulated_prefill.run_built(built, key=key_of(paged) if key_of else None)
    done.check()
    return done.out, done.lse


@pytest.mark.slow
def test_bits_do_not_depend_on_the_page_size() -> None:
    out, lse = repaged(16)
    for page_size in (32, 48, 64, 128, 256, 528, 784):
        other, other_lse = repaged(page_size)
        assert torch.equal(out[:40], other[:40]) and torch.equal(lse[:, :40], other_lse[:, :40]), f"{page_size=}"


def test_bits_do_not_depend_on_neighbours_or_ctas() -> None:
    alone = run_prefill(case((40,), (300,)))
    both = run_prefill(case((40, 70), (300, 512)), num_ctas=3)  # the first sequence's tensors are drawn first
    # Pages are drawn in another order, so compare what a copy of the first sequence's data gives.
    a, b = alone.built.arguments, both.built.arguments
    for k, v, table in ((b.k_cache, b.v_cache, b.page_table),):
        for logical in range(-(-300 // 16)):
            page, source = int(table[0, logical]), int(a.page_table[0, logical])
            k[page], v[page] = a.k_cache[source], a.v_cache[source]
    b.q[:40] = a.q[:40]
    from tests.support import emulated_prefill

    again = emulated_prefill.run_built(both.built, num_ctas=3)
    assert torch.equal(again.out[:40], alone.out[:40]) and torch.equal(again.lse[:, :40], alone.lse[:, :40])


# sm_103a's kernel is all exp2 instructions, and of this one's each kind is a part.
@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 1])
def test_any_share_of_polynomial_exp2(every: int) -> None:
    key = BASE.plan().kernels.prefill.with_tuning(polynomial_every=every)
    run_prefill(BASE, key=key).check()


def test_rescaling_at_every_growth() -> None:
    key = BASE.plan().kernels.prefill
    kernel = replace(key.kernel, tile=replace(key.kernel.tile, rescale_threshold=0.0))
    key = replace(key, kernel=kernel)
    run_prefill(BASE, key=key).check()


def test_b300_from_the_same_source() -> None:
    run_prefill(replace(BASE, arch="emulated-sm_103a")).check()


@pytest.mark.parametrize("seed", with_slow(range(4), [2, 3]))  # `scripts/sm100_races.py` has 50 a key
def test_no_race_under_random_schedules(seed: int) -> None:
    run_prefill(BASE, seed=seed).check()
