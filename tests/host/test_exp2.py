"""The exp2 polynomial: the committed coefficients are the derived ones, and their error is what docs/numerics.md says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fa4_backend.kernels.common.exp2 import COEFFICIENTS, uses_polynomial
from scripts import exp2_minimax

ROOT = Path(__file__).parents[2]


def test_committed_coefficients_are_the_minimax_ones() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "exp2_minimax.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("degree", "largest"), [(2, 2.06e-3), (3, 8.6e-5), (4, 3.0e-6), (5, 1.7e-7)])
def test_error_by_degree(degree: int, largest: float) -> None:
    error, _, _, within_one_ulp = exp2_minimax.error_row(COEFFICIENTS[degree])
    assert 0.9 * largest < error <= largest
    assert within_one_ulp == 1.0


def test_whole_exponents_and_extremes_are_exact() -> None:
    # p(0) = 1: the largest score of a row weighs exactly 1 on either unit. Everything below 2^-126 may flush.
    x = np.array([0.0, 1.0, 8.0, -1.0, -126.0, -127.0, -1e30, -np.inf], np.float32)
    got = exp2_minimax.polynomial_exp2(x, COEFFICIENTS[4])
    assert got.tolist() == [1.0, 2.0, 256.0, 0.5, 2.0**-126, 0.0, 0.0, 0.0]


def test_columns_do_not_depend_on_the_tile() -> None:
    for every in (1, 2, 4, 8, 16):
        chosen = [uses_polynomial(col, every) for col in range(256)]
        assert sum(chosen) == 256 // every
        assert all(chosen[col] == chosen[col % 32] for col in range(256))
    assert not any(uses_polynomial(col, 0) for col in range(256))
