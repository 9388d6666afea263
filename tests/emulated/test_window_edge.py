"""Keys left of a window reach no product: they may hold NaN and Inf, and their page-table entries anything.

Every windowed case of the other tests is poisoned there too (`PagedCase.build`); here are the smallest inputs of each kind, where a run
with poison must have the bits of a run with finite values, and random windows around boxes, pages and KV tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.support.emulated_decode import run_decode_built
from tests.support.emulated_prefill import EmulatedRun, run_built
from tests.support.paged_case import NO_PAGE, BuiltCase, PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated


def run_pairs(built: BuiltCase, *, seed: int | None = None) -> EmulatedRun:
    """The Blackwell prefill kernel as CTA pairs."""
    key = built.case.plan().kernels.prefill.with_tuning(cta_group=2)
    return run_built(built, seed=seed, key=key)


# (arch, head_dim, who runs a case)
KERNELS: dict[str, tuple[str, int, Callable]] = {
    "decode on Hopper": ("emulated-sm_90a", 64, run_decode_built),
    "decode on Blackwell": ("emulated-sm_100a", 64, run_decode_built),
    "prefill on Hopper": ("emulated-sm_90a", 64, run_built),
    "prefill on Blackwell": ("emulated-sm_100a", 64, run_built),
    "prefill by CTA pairs": ("emulated-sm_100a", 128, run_pairs),
}

# Query and KV lengths, and window. Boxes hold 16 keys at page 16 and up to 128 at page 128, a KV tile 64 (decode) or 128.
EDGES: dict[str, tuple[int, int, int, int]] = {  # query_len, kv_len, window_left, page_size
    "the box before": (1, 17, 0, 16),
    "in the box": (1, 16, 0, 16),
    "both edges in a box": (1, 13, 5, 16),
    "both edges in a page of 128": (2, 75, 30, 128),
    "three boxes and a part": (3, 70, 10, 16),
    "tiles apart": (2, 300, 150, 16),
}


def poisoned(built: BuiltCase, value: float | None) -> BuiltCase:
    """Keys that no row sees hold `value` (None: ordinary numbers), and their pages stand in the table."""
    a, case = built.arguments, built.case
    first_key, page_size = case.num_hidden(0), case.page_size
    spare = [page for page in range(a.k_cache.shape[0]) if page not in a.page_table[0].tolist()]
    for logical in range(first_key // page_size):
        if int(a.page_table[0, logical]) in (-1, NO_PAGE):
            a.page_table[0, logical] = spare.pop()
    generator = torch.Generator().manual_seed(9)
    for token in range(first_key):
        for cache in (a.k_cache, a.v_cache):
            row = cache[int(a.page_table[0, token // page_size]), token % page_size]
            row.copy_(torch.randn(row.shape, generator=generator) if value is None else torch.full(row.shape, value))
    return built


# Boxes of 32 keys and more ask for a kernel of their own.
SLOW = [(kernel, "both edges in a page of 128") for kernel in KERNELS if kernel.startswith("prefill")]


@pytest.mark.parametrize(("kernel", "edge"), with_slow([(kernel, edge) for kernel in KERNELS for edge in EDGES], SLOW))
def test_bits_are_those_of_finite_values(kernel: str, edge: str) -> None:
    """Poison left of the window changes no bit: NaN, Inf and -Inf in rows, and -1 and a page far outside in the table."""
    (arch, head_dim, run), (query_len, kv_len, window_left, page_size) = KERNELS[kernel], EDGES[edge]
    case = PagedCase(
        (query_len,), (kv_len,), num_q_heads=1, num_kv_heads=1, head_dim=head_dim, page_size=page_size, arch=arch,
        window_left=window_left, decode_query_len=4,
    )  # fmt: skip
    assert case.num_hidden(0) == kv_len - query_len - window_left > 0

    def attend(built: BuiltCase) -> tuple[torch.Tensor, torch.Tensor]:
        done = run(built)
        done.check()
        assert built.arguments.lse is not None
        return built.arguments.out[:query_len].clone(), built.arguments.lse[:, :query_len].clone()

    want = attend(poisoned(case.build(), None))
    for value in (math.nan, math.inf, -math.inf):
        got = attend(poisoned(case.build(), value))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), value
    for entry in (-1, NO_PAGE):
        built = case.build()
        built.arguments.page_table[0, : case.num_hidden(0) // page_size] = entry
        got = attend(built)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), entry


def random_case(rng: np.random.Generator, arch: str, head_dim: int, max_query: int, max_kv: int) -> PagedCase:
    """Two or three sequences around one window, more queries than keys among them."""
    num_seqs = int(rng.integers(2, 4))
    kv_lens = [int(n) for n in rng.integers(1, max_kv, num_seqs)]
    query_lens = [int(rng.integers(1, max_query + 1)) for _ in kv_lens]
    heads, kv_heads = [(1, 1), (4, 2), (3, 1)][int(rng.integers(3))]
    features = rng.random(3) < 0.3
    is_causal = bool(rng.random() < 0.7)
    return PagedCase(
        tuple(query_lens), tuple(kv_lens), num_q_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, arch=arch,
        page_size=int(rng.choice([16, 48, 64, 128, 256, 784])), window_left=int(rng.choice([0, 1, 15, 16, 17, 63, 64, 100, 130])),
        is_causal=is_causal, window_right=None if is_causal else int(rng.integers(0, 40)), decode_query_len=max_query,
        softcap=20.0 if features[0] else 0.0, sinks=bool(features[1]), alibi=bool(features[2]), seed=int(rng.integers(1 << 30)),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_random_windows(kernel: str) -> None:
    arch, head_dim, run = KERNELS[kernel]
    is_decode = kernel.startswith("decode")
    for seed in range(40):
        rng = np.random.default_rng(seed)
        case = random_case(rng, arch, head_dim, 4 if is_decode else 150, 400)
        done = run(case.build(), seed=seed)
        done.check()
