"""A 16-bit number as a sum of e4m3 and e5m2 (`kernels/common/fp8.py`, Note [Two terms]): the arithmetic that latent decode relies on.

Every bfloat16 of the exponents that a scaled row of Q may have; torch rounds to nearest even, as the conversions of a GPU do.
"""

from __future__ import annotations

import torch


def split(x: torch.Tensor, lo_dtype: torch.dtype = torch.float8_e5m2) -> torch.Tensor:
    """The sum of both terms, float32."""
    hi = x.to(torch.float8_e4m3fn).float()
    return hi + (x - hi).to(lo_dtype).float()


def bfloat16s(first: int, last: int) -> torch.Tensor:
    """All positive ones with exponents first .. last."""
    return torch.arange((127 + first) << 7, (128 + last) << 7).to(torch.int16).view(torch.bfloat16).float()


def test_a_bfloat16_is_the_sum_of_its_terms() -> None:
    x, below = bfloat16s(-6, 7), bfloat16s(-40, -7)
    assert len(x) == 14 * 128 and x[-1] == 255.0
    assert torch.equal(split(x), x) and torch.equal(split(-x), -x)
    assert (split(below) - below).abs().max() <= 2.0**-14
    with_e4m3 = split(x, torch.float8_e4m3fn)
    assert torch.equal(with_e4m3[4 * 128 :], x[4 * 128 :]) and not torch.equal(with_e4m3[3 * 128 :], x[3 * 128 :]), "exact from 2^-2 on"


def test_a_weight_is_rounded_as_to_bfloat16() -> None:
    """Up to 2^8.75, where hi ends; half a unit of bfloat16's last place."""
    x = torch.cat([torch.linspace(2.0**-6, 1.0, 20_001), torch.linspace(1.0, 430.0, 20_001)])
    unit = torch.exp2(x.log2().floor() - 7)
    assert ((split(x) - x).abs() <= unit / 2).all()
    below = torch.linspace(0.0, 2.0**-6, 20_001)
    assert (split(below) - below).abs().max() <= 2.0**-14
    beyond = torch.linspace(448.0, 8192.0, 1001)  # a reference that is large and rounded: hi is cut, lo has the rest
    cut = beyond.clamp(max=448.0)
    rest = (beyond - cut).to(torch.float8_e5m2).float()
    assert ((cut + rest - beyond).abs() <= beyond / 8).all()


def test_a_float16_is_not() -> None:
    x = torch.arange(16 << 10, 17 << 10).to(torch.int16).view(torch.float16).float() * 128
    assert (split(x) != x).any()
