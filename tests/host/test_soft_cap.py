"""The arithmetic of a soft cap as Hopper's prefill computes it, step by step in float32, against float64."""

from itertools import product

import numpy as np
import pytest

LOG2_E = np.log2(np.e)
CAP_ERROR = 6e-7  # of the cap: docs/numerics.md, "Score features"
EX2_ERROR, RCP_ERROR = 2.0**-22, 2.0**-23  # relative, of ex2.approx and rcp.approx (PTX ISA)


def scores(softmax_scale: float, softcap: float) -> np.ndarray:
    """Every 4,999th float32 of either sign whose |x| in tanh(x) is between 2^-40 and 2^10, and 0."""
    lowest, highest = (np.float32(x * softcap / softmax_scale) for x in (2.0**-40, 2.0**10))
    x = np.arange(lowest.view(np.uint32), highest.view(np.uint32), 4999, dtype=np.uint32).view(np.float32)
    return np.concatenate([x, -x, np.zeros(1, np.float32)])


def capped(score: np.ndarray, softmax_scale: float, softcap: float, *, exp_error: float, rcp_error: float) -> np.ndarray:
    """`RowFragment.softcap` and `CapScale`: log2 units, each instruction rounded once, the approximate ones off by what is given."""
    one = np.float32
    bias = one(one(softcap) * one(LOG2_E))
    inner = one(one(one(softmax_scale) / one(softcap)) * one(2 * LOG2_E))
    with np.errstate(over="ignore"):
        exponential = (np.exp2((score * inner).astype(np.float64)) * (1 + exp_error)).astype(one)
    inverse = (1 / (-one(1) - exponential).astype(np.float64) * (1 + rcp_error)).astype(one)
    return (inverse.astype(np.float64) * one(bias * one(2)) + bias).astype(one)


@pytest.mark.parametrize(("softmax_scale", "softcap"), [(0.0625, 50.0), (0.125, 30.0), (256**-0.5, 0.1), (1.0, 5000.0)])
def test_error_of_the_cap_over_float32(softmax_scale: float, softcap: float) -> None:
    score = scores(softmax_scale, softcap)
    want = np.tanh(score.astype(np.float64) * softmax_scale / softcap)
    for exp_error, rcp_error in product((0.0, EX2_ERROR, -EX2_ERROR), (0.0, RCP_ERROR, -RCP_ERROR)):
        got = capped(score, softmax_scale, softcap, exp_error=exp_error, rcp_error=rcp_error) / (softcap * LOG2_E)
        worst = np.abs(got - want).max()
        assert worst <= CAP_ERROR, (exp_error, rcp_error, worst)
