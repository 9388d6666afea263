"""out in FP8 with one scale, written by every kernel's epilogue: prefill on Hopper and Blackwell, decode whole, in parts and merged.

The scale lets values above 2.24 saturate in each case, and the smallest be subnormal.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend.problem import FP8
from tests.support.emulated_decode import run_decode
from tests.support.emulated_prefill import Cuts, run_built, run_prefill
from tests.support.paged_case import BuiltCase, PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

BASE = PagedCase(
    (5, 33, 0, 4, 1), (133, 200, 10, 2, 40), num_q_heads=8, num_kv_heads=2, head_dim=64, out_dtype=FP8, peaked=3.0, arch="emulated-sm_90a"
)  # fmt: skip
PREFILL = {
    # Three consumers and two buffers of Q; K and V in 16 bits, and in FP8, whose scale goes into the same factor.
    "sm_90a d64": BASE,
    "sm_90a d128, FP8 K and V": replace(BASE, head_dim=128, kv_dtype=FP8),
    # One buffer of Q.
    "sm_90a (192, 128) in fp16, sinks": replace(BASE, head_dim=192, head_dim_v=128, dtype="float16", sinks=True),
    "sm_100a d128": replace(BASE, head_dim=128, arch="emulated-sm_100a"),
    # O in two parts through one buffer.
    "sm_100a d256": replace(BASE, head_dim=256, arch="emulated-sm_100a"),
    # 96 bytes a row of O.
    "sm_100a d96, FP8 K and V": replace(BASE, head_dim=96, kv_dtype=FP8, arch="emulated-sm_100a"),
}


def saturated(built: BuiltCase) -> bool:
    return bool((built.arguments.out[: built.total_q].float().abs() == 448).any())


@pytest.mark.parametrize("name", with_slow(PREFILL, ["sm_90a d128, FP8 K and V", "sm_90a (192, 128) in fp16, sinks"]))
def test_prefill(name: str) -> None:
    run = run_prefill(PREFILL[name])
    run.check()
    assert saturated(run.built)


def test_parts_of_a_prefill_tile() -> None:
    """Slots hold float32; whoever comes last rounds."""
    run = run_prefill(replace(BASE, query_lens=(33,), kv_lens=(700,)), cuts=Cuts((3,)), num_ctas=3)
    run.check()


MODES = [("auto", False), ("auto", True), (FP8, False), (FP8, True)]


@pytest.mark.parametrize(("kv_dtype", "batch_invariant"), with_slow(MODES, [("auto", True), (FP8, False)]))
def test_decode(kv_dtype: str, batch_invariant: bool) -> None:
    """Rows of whole CTAs, and one long enough to be cut among CTAs and added up."""
    case = replace(BASE, query_lens=(1, 1, 1), kv_lens=(40, 0, 900), head_dim=128, kv_dtype=kv_dtype, batch_invariant=batch_invariant)
    run = run_decode(case, num_ctas=4)
    run.check()
    assert saturated(run.built)


def test_the_scale_is_read_at_each_launch() -> None:
    built = BASE.build()
    run = run_built(built)
    run.check()
    out = built.arguments.out[: built.total_q].float()
    again = run_built(replace(built, arguments=built.arguments._replace(out_scale=torch.tensor([BASE.out_scale / 2]))))
    # Powers of two change no bit but where a value saturates or is subnormal.
    got = again.out[: built.total_q].float()
    normal = (out.abs() >= 2.0**-6) & (out.abs() < 224)
    assert normal.any() and torch.equal(got[normal], 2 * out[normal])


@pytest.mark.parametrize("name", with_slow(["sm_90a d64", "sm_100a d128"], ["sm_90a d64"]))
def test_the_lse_is_that_of_the_kernel_that_writes_16_bits(name: str) -> None:
    run = run_prefill(PREFILL[name])
    wide = run_prefill(replace(PREFILL[name], out_dtype="auto"))
    assert torch.equal(run.lse[:, : run.built.total_q], wide.lse[:, : run.built.total_q])
