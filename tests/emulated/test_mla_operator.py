"""`mla_decode` as a user calls it, with Hopper's compiled kernels on the emulator: plan, device-made schedule, launch.

`test_mla_decode.py` has the kernel's own edges; here are the operator's: padded rows and sequences, the caller's strides, default outputs,
a scale that the device holds, lengths that the plan or the page table cuts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend import mla_decode
from fa4_backend.problem import FP8
from tests.support.latent_case import LatentCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

# Ragged drafts, a sequence without a query, one without a key, fewer keys than queries; sequences and rows of padding.
DRAFTS = LatentCase(
    (4, 1, 0, 3, 2, 4), (70, 130, 9, 33, 0, 2), num_q_heads=16, decode_query_len=4, page_size=16, padding_seqs=2, arch="emulated-sm_90a"
)  # fmt: skip
CASES = {
    "pair": DRAFTS,
    "one tensor of q, rows with a gap": replace(DRAFTS, is_one_q=True, page_gap=64),
    "FP8": replace(DRAFTS, query_lens=(1, 1, 0, 1, 1, 1), decode_query_len=1, kv_dtype=FP8, page_size=64),
    "128 heads": replace(DRAFTS, query_lens=(1, 1), kv_lens=(70, 1), num_q_heads=128, decode_query_len=1, page_size=64),
    "batch invariant, float16": replace(DRAFTS, batch_invariant=True, dtype="float16", page_size=64),
}


@pytest.mark.parametrize("name", with_slow(CASES, ["128 heads"]))
def test_operator(name: str) -> None:
    built = CASES[name].build()
    built.check(*built.run(CASES[name].plan(num_sms=4)))


def test_without_lse_and_without_out() -> None:
    case = replace(CASES["FP8"], has_lse=False)
    built, plan = case.build(), case.plan(num_sms=4)
    a = built.arguments
    out, lse = mla_decode(*a[:6], plan=plan, metadata=built.metadata(plan), softmax_scale=a.softmax_scale, latent_scale=a.latent_scale)
    assert lse is None
    assert torch.equal(out, CASES["FP8"].build().run(CASES["FP8"].plan(num_sms=4))[0])


def test_a_scale_of_no_dimension_and_none() -> None:
    """() is what engines hold; none is 1."""
    case = CASES["FP8"]
    outs = []
    for scale in (None, torch.tensor(1.0)):
        built = case.build()
        built.arguments = built.arguments._replace(latent_scale=scale)
        outs.append(built.run(case.plan(num_sms=4))[0].clone())
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], case.build().run(case.plan(num_sms=4))[0])


def test_lengths_are_cut_at_the_page_table() -> None:
    width = 9 * 16  # of DRAFTS' table: its longest row has 130 keys
    full = replace(DRAFTS, kv_lens=(70, width, 9, 33, 0, 2))
    want = [tensor.clone() for tensor in full.build().run(full.plan(num_sms=4))]
    cut = full.build()
    cut.arguments.seqused_k[1] = width + 1000
    for got, expected in zip(cut.run(full.plan(num_sms=4)), want, strict=True):
        assert torch.equal(got, expected)


def test_the_check_sees_a_scale_that_is_five_percent_off() -> None:
    built = DRAFTS.build()
    built.arguments = built.arguments._replace(softmax_scale=DRAFTS.softmax_scale * 1.05)
    out, lse = built.run(DRAFTS.plan(num_sms=4))
    built.arguments = built.arguments._replace(softmax_scale=DRAFTS.softmax_scale)
    with pytest.raises(AssertionError, match=r"out:|lse:"):
        built.check(out, lse)
