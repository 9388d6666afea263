"""Minimax polynomials for 2^f on [0, 1): coefficients of fa4_backend/kernels/common/exp2.py and the error table of docs/numerics.md.

    python scripts/exp2_minimax.py           # prints both
    python scripts/exp2_minimax.py --check   # exit 1 when exp2.py holds other coefficients

Remez exchange in 40 digits on the relative error p(f) / 2^f - 1 with p(0) = 1 fixed, so n free coefficients and n + 1 alternations.
Errors are measured in emulated float32 (fused Horner, each step rounded once) over every bfloat16 x and 2^22 float32 x in [-126, 8].
"""

from __future__ import annotations

import sys

import mpmath as mp
import numpy as np

from fa4_backend.kernels.common.exp2 import COEFFICIENTS, FLOOR_MAGIC, MIN_EXPONENT

GRID = 4000  # points the error curve is sampled at between exchanges


def minimax(degree: int) -> list[mp.mpf]:
    """Coefficients, ascending, of the polynomial with p(0) = 1 that minimises the largest relative error on [0, 1]."""
    n = degree
    points = [(1 - mp.cos(mp.pi * (i + mp.mpf(1) / 2) / (n + mp.mpf(1) / 2))) / 2 for i in range(n + 1)]
    for _ in range(60):
        a, b = mp.matrix(n + 1, n + 1), mp.matrix(n + 1, 1)
        for row, x in enumerate(points):
            weight = mp.mpf(2) ** -x
            for power in range(1, degree + 1):
                a[row, power - 1] = x**power * weight
            a[row, n] = (-1) ** row
            b[row] = 1 - weight
        solved = mp.lu_solve(a, b)
        coefficients = [mp.mpf(1)] + [solved[i] for i in range(n)]
        moved = _extrema(coefficients, n + 1)
        if max(abs(new - old) for new, old in zip(moved, points, strict=True)) < mp.mpf(10) ** -9:
            return coefficients
        points = moved
    raise ArithmeticError(f"degree {degree}: the exchange did not converge")


def _extrema(coefficients: list[mp.mpf], count: int) -> list[mp.mpf]:
    """The `count` alternating extrema of the relative error."""
    runs: list[tuple[mp.mpf, mp.mpf]] = []
    for i in range(1, GRID + 1):
        x = mp.mpf(i) / GRID
        error = mp.polyval(coefficients[::-1], x) * mp.mpf(2) ** -x - 1
        if runs and mp.sign(runs[-1][1]) == mp.sign(error):
            runs[-1] = max(runs[-1], (x, error), key=lambda point: abs(point[1]))
        else:
            runs.append((x, error))
    best = sorted(runs, key=lambda point: -abs(point[1]))[:count]
    return sorted(x for x, _ in best)


def to_float32(coefficients: list[mp.mpf]) -> tuple[float, ...]:
    """Nearest float32 of each coefficient."""
    return tuple(float(np.float32(float(c))) for c in coefficients)


def polynomial_exp2(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """What the kernel computes, in float32: `fa4_backend.kernels.common.exp2.exp2_polynomial`. x: float32."""
    x = np.maximum(x, np.float32(MIN_EXPONENT))
    n = np.floor(x.astype(np.float64))
    fraction = (x.astype(np.float64) - n).astype(np.float32)
    result = np.full_like(x, np.float32(coefficients[-1]))
    for c in coefficients[-2::-1]:
        result = (result.astype(np.float64) * fraction + np.float64(np.float32(c))).astype(np.float32)
    bits = result.view(np.int32) + (n.astype(np.int32) << 23)
    return bits.view(np.float32)


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """Nearest-even bfloat16, as its 16 bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.int64)


def inputs() -> np.ndarray:
    """Every bfloat16 in [-126, 8] and 2^22 random float32 of the same range."""
    patterns = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    patterns = patterns[np.isfinite(patterns) & (patterns >= -126) & (patterns <= 8)]
    return np.concatenate([patterns, np.random.default_rng(0).uniform(-126, 8, 1 << 22).astype(np.float32)])


def error_row(coefficients: tuple[float, ...] | None) -> tuple[float, float, float, float]:
    """(max relative error in float32, after bfloat16, share equal to the right bfloat16, share within one ulp); None: exact."""
    x = inputs()
    exact = np.exp2(x.astype(np.float64))
    got = exact.astype(np.float32) if coefficients is None else polynomial_exp2(x, coefficients)
    ulps = np.abs(round_bfloat16(got) - round_bfloat16(exact))
    rounded = (round_bfloat16(got).astype(np.uint32) << 16).view(np.float32)
    relative = np.abs(got / exact - 1).max()
    return float(relative), float(np.abs(rounded / exact - 1).max()), float((ulps == 0).mean()), float((ulps <= 1).mean())


def main() -> int:
    """Print the coefficients and the table, or compare."""
    assert FLOOR_MAGIC == 12582912.0
    derived = {degree: to_float32(minimax(degree)) for degree in COEFFICIENTS}
    if "--check" in sys.argv[1:]:
        for degree, coefficients in derived.items():
            if coefficients != COEFFICIENTS[degree]:
                print(f"degree {degree}: expected {coefficients}, got {COEFFICIENTS[degree]}")
                return 1
        return 0
    for degree, coefficients in derived.items():
        print(f"    {degree}: {coefficients},")
    print("\n| degree | max rel. error, float32 | after bfloat16 | equal to the right bfloat16 | within 1 ulp |\n|---|---|---|---|---|")
    for name, row in [*((str(d), error_row(c)) for d, c in derived.items()), ("exact", error_row(None))]:
        print(f"| {name} | {row[0]:.2e} | {row[1]:.2e} | {row[2]:.2%} | {row[3]:.2%} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
