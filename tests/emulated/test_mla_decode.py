"""Latent decode on Hopper, compiled by the real compiler and executed on the emulator behind the device's schedule, against an oracle.

Sizes sit at 64 keys a block, 64 packed rows a tile, two blocks a pair, 16 keys a box. The pretended GPU has few SMs, so rows are cut
between CTAs. What no row sees is NaN, lists, counters and slots hold garbage before.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import torch

from fa4_backend.compile_cache import ensure_object
from fa4_backend.kernel_facts import find_cuda_tool
from fa4_backend.kernels.schedule.work_list import NUM_PIECES
from fa4_backend.problem import FP8
from tests.support.emulated_mla import MlaCase, run_mla
from tests.support.sass import loads_in_flight_at_arrivals
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

FEW = MlaCase((1, 1, 1, 0, 1), (130, 64, 0, 70, 1))  # 16 rows of a tile; 1, 2 and 3 blocks
WAITING = (("arrival_looks", 1 << 20),)  # for all parts of a row: another constant in the same code
APART = MlaCase((1, 1), (300, 64), num_heads=128)  # two tiles
PAIR = replace(APART, tuning=(("max_cluster", 2),))  # a cluster of two CTAs
DRAFTS = MlaCase((4, 1, 3, 2), (200, 65, 3, 1), num_heads=16, decode_query_len=4, page_size=16, one_q=True)

CASES = {
    "16 heads": replace(FEW, tuning=WAITING),
    "128 heads": APART,
    "128 heads, a cluster": PAIR,
    "drafts, more tokens than keys, one tensor of q": DRAFTS,
    "24 heads, 3 tokens: tiles that begin inside a token": MlaCase((3, 1), (129, 63), num_heads=24, decode_query_len=3, page_size=48),
    "8 heads, 8 tokens, float16, peaked": MlaCase((8, 5), (140, 66), num_heads=8, decode_query_len=8, dtype="float16", peaked=8.0),
    "128 heads, 3 tokens, peaked": MlaCase((3, 2), (190, 20), num_heads=128, decode_query_len=3, peaked=20.0),
    "FP8, 16 heads": replace(FEW, kv_dtype=FP8),
    "FP8, 8 heads, 2 tokens, float16": MlaCase((2, 1, 0, 2), (300, 64, 9, 3), 8, 2, "float16", FP8, page_size=16, peaked=8.0),
    "FP8, 16 heads, batch invariant, peaked": MlaCase(
        (1, 1), (600, 65), kv_dtype=FP8, batch_invariant=True, max_seqlen_k=2048, peaked=20.0
    ),
    "FP8, 128 heads": replace(APART, kv_dtype=FP8, page_size=16),
    "FP8, a cluster": replace(PAIR, kv_dtype=FP8, page_size=16),
    "batch invariant": MlaCase((4, 1), (600, 65), decode_query_len=4, dtype="float16", batch_invariant=True, max_seqlen_k=2048),
}


# No plan has clusters (`config.MAX_CLUSTER`); the others are the code of cases that stay, of other sizes: several tiles of 24 heads.
SLOW = ["128 heads", "128 heads, a cluster", "FP8, a cluster", "8 heads, 8 tokens, float16, peaked", "128 heads, 3 tokens, peaked"]


@pytest.mark.parametrize("name", with_slow(CASES, SLOW))
def test_edges(name: str) -> None:
    run = run_mla(CASES[name], num_sms=6, seed=1)
    run.check()
    assert run.num_parts > 0 or name == "128 heads, 3 tokens, peaked"  # six tiles, a CTA each


def test_bits_do_not_depend_on_page_size_or_schedule() -> None:
    first = run_mla(DRAFTS, seed=None)
    first.check()
    assert first.num_parts > 0
    for page_size, seed in ((64, 3), (96, None)):
        again = run_mla(replace(DRAFTS, page_size=page_size), seed=seed)
        again.check()
        for got, want in zip(again.rows, first.rows, strict=True):
            assert torch.equal(got, want), f"pages of {page_size}"


def test_no_arrival_overtakes_an_ldmatrix() -> None:
    """As `test_decode_sass.py` has it: of the kernel whose latents come by ldmatrix, a stage is released when all of it has come."""
    tool = find_cuda_tool("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is in no package here (triton carries one)")
    key = CASES["FP8, 16 heads"].kernels(6).decode
    assert key is not None
    cubin = ensure_object(key).with_suffix(".cubin")
    sass = subprocess.run([tool, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    arrivals, faults = loads_in_flight_at_arrivals(sass)
    assert arrivals >= 4, "expected arrivals for Q and KV tiles, of load warp and consumers"
    assert faults == []


@pytest.mark.parametrize(("kv_dtype", "looks"), with_slow([(FP8, 1), ("auto", 1), ("auto", 1 << 20)], [("auto", 1)]))
def test_parts_are_added_up_by_all_or_by_the_last(kv_dtype: str, looks: int) -> None:
    """CTAs that leave at once, so that the last one has all to do, and CTAs that wait for all parts and add up a share each."""
    case = MlaCase((1,), (260,), kv_dtype=kv_dtype, tuning=(("arrival_looks", looks),))
    outs = []
    for seed in (None, 0):
        run = run_mla(case, num_sms=2, seed=seed)
        assert (run.work.decode_tiles[:2, NUM_PIECES] == 2).all()
        run.check()
        outs.append(run.rows[0].clone())
    assert torch.equal(outs[1], outs[0])


def test_batch_invariant_bits_do_not_depend_on_the_gpu() -> None:
    """The same row cut over 1, 2 and 5 CTAs: whole, its pieces are added up by one CTA; cut, by all from their slots."""
    alone = MlaCase((1,), (700,), decode_query_len=4, dtype="float16", batch_invariant=True, max_seqlen_k=2048)
    first = run_mla(alone, num_sms=1)
    first.check()
    for num_sms in (2, 5):
        again = run_mla(alone, num_sms=num_sms, seed=num_sms)
        again.check()
        assert torch.equal(again.rows[0], first.rows[0]) and torch.equal(again.rows[1], first.rows[1])
    cut = replace(alone, batch_invariant=False, dtype="bfloat16", page_size=16)  # a kernel that other tests compile
    normal = [run_mla(cut, num_sms=n).rows[0] for n in (1, 5)]
    assert not torch.equal(*normal), "the comparison cannot see a different cut"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_race_over_seeds(name: str) -> None:
    for seed in range(100):
        run_mla(CASES[name], num_sms=6, seed=seed).check()
