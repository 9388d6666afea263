"""The judges of the GPU's proof of latent decode, which attend all sequences at once, against the oracle that takes one after the other.

Grid: lengths at page edges, 0 and 1 keys, fewer keys than queries, sequences without a query; FP8 once. Batches that are drawn in tensor
operations of fixed shapes are run with the oracle in place of the kernels, right and with one result changed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fa4_backend.problem import FP8
from tests.device.latent_fuzz import COUNTS, Kind, LatentFuzzer, Tally
from tests.device.mla_batches import Latent, Shape, attend, draw, judge
from tests.support.emulated_mla import oracle

QUERIES, KEYS = [2, 0, 1, 3, 1, 2, 1], [48, 9, 17, 2, 0, 1, 130]


def finished(shape: Shape) -> Latent:
    """A batch with the results of one sequence after the other."""
    a = draw(shape, QUERIES, KEYS, 3, device="cpu")
    out, lse = oracle(a._replace(q=a.q.nan_to_num(), q_rope=a.q_rope.nan_to_num()), a.q.dtype)
    a.out.copy_(out)
    a.lse.copy_(lse)
    return a


@pytest.mark.parametrize("kv_dtype", ["auto", FP8])
def test_all_at_once_is_one_after_the_other(kv_dtype: str) -> None:
    a = finished(Shape(8, 3, 16, kv_dtype=kv_dtype))
    want, want_lse = oracle(a, torch.float32)
    rounded = oracle(a, torch.bfloat16)[0]
    out, lse, yardstick = attend(a)
    n = sum(QUERIES)
    assert torch.allclose(out, want[:n].float(), atol=1e-5) and torch.allclose(lse, want_lse[:, :n], atol=1e-5)
    assert (yardstick - rounded[:n]).abs().max() <= 2**-6 and a.latent_cache.float().isnan().any()
    share, lse_share = judge(a)
    assert 0 < share <= 1 and 0 <= lse_share <= 1


WRONG = {
    "a value": lambda a: a.out[0, 3].add_(0.05),
    "NaN": lambda a: a.out[4, 0, 5].fill_(torch.nan),
    "lse": lambda a: a.lse[2, 1].add_(0.01),
    "a row without a key": lambda a: a.out[6].fill_(0.5),
    "padding": lambda a: a.out[-1].fill_(1.0),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_result_is_refused(what: str) -> None:
    a = finished(Shape(8, 3, 16))
    judge(a)
    WRONG[what](a)
    with pytest.raises(AssertionError):
        judge(a)


def fuzzed(shape: Shape, change: Callable[[Latent], object] | None = None) -> dict[str, int]:
    """Counts of a few drawn batches whose results are the oracle's, `change`d in the last one."""
    torch.manual_seed(1)
    tally, drawn = Tally.on("cpu"), []

    def launch(a: Latent) -> None:
        drawn.append(a)
        out, lse = oracle(a._replace(q=a.q.nan_to_num(), q_rope=a.q_rope.nan_to_num()), a.q.dtype)
        a.out.copy_(out)
        a.lse.copy_(lse)
        if len(drawn) == 3 and change is not None:
            change(a)

    fuzzer = LatentFuzzer(shape, Kind(16, 66, 1), tally, "cpu", launch)
    for _ in range(3):
        fuzzer.batch()
    counts = dict(zip(COUNTS, tally.counts.tolist(), strict=True))
    assert counts["batches"] == 3 and counts["rows"] == 48 and counts["longest row"] == 66
    assert min(counts[f"rows {what}"] for what in ("without a key", "of one token", "without a query")) > 0
    assert drawn[0].latent_cache.float().isnan().any() and 0 < tally.worst[0] <= 1 and tally.worst[1] > 0
    if change is None:
        assert tally.worst[1] <= 1
    return counts


@pytest.mark.parametrize("kv_dtype", ["auto", FP8])
def test_drawn_batches_of_right_results(kv_dtype: str) -> None:
    counts = fuzzed(Shape(8, 3, 16, kv_dtype=kv_dtype))
    assert (counts["failures"], counts["first failure"]) == (0, -1)


CHANGES = {
    "NaN": lambda a: a.out[0, 3, 5].fill_(torch.nan),
    "lse": lambda a: a.lse[2].add_(0.1),
    "padding": lambda a: a.out[-1].fill_(1.0),
    "lse of padding": lambda a: a.lse[0, -1].fill_(0.0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_drawn_batch_with_a_wrong_result_is_counted(what: str) -> None:
    counts = fuzzed(Shape(8, 3, 16), CHANGES[what])
    assert (counts["failures"], counts["first failure"]) == (1, 2)
