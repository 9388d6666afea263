"""What scores would err by if K stayed e4m3 in Hopper's first product: `python -m scripts.e4m3_scores`.

A bfloat16 Q is the sum of two e4m3 numbers, exactly but for elements below 2^-18 of their row's largest, so S = Q K^T could be two products
by `wgmma.mma_async.f32.e4m3.e4m3` of K as it is stored. That instruction adds 32 exact products and its accumulator with FRACTION_BITS bits
below the largest one's first, what lies lower is cut off (DeepSeek-V3's report, 3.3.2, counts 14 bits in all). Modelled here, on a CPU.
"""

from __future__ import annotations

import argparse

import torch

FRACTION_BITS = 13
STEP = 32  # elements of a head in one instruction
HEAD_DIM, ROWS = 128, 64


def cut(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Multiples of `unit`, rounded to 0."""
    return torch.trunc(x / unit) * unit


def unit_of(x: torch.Tensor) -> torch.Tensor:
    """The last bit that is kept beside numbers as large as these."""
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp_min(1e-300))) - FRACTION_BITS)


def accumulate(q: torch.Tensor, k: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """total + q k^T, an instruction a step. q (m, d), k (n, d): e4m3 numbers as float64."""
    for first in range(0, q.shape[1], STEP):
        terms = q[:, None, first : first + STEP] * k[None, :, first : first + STEP]
        terms = torch.cat([terms, total[..., None]], dim=-1)
        total = cut(terms, unit_of(terms.abs().amax(-1, keepdim=True))).sum(-1)
        total = cut(total, unit_of(total))
    return total


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Rounded to e4m3, as float64."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()


def scores(q: torch.Tensor, k: torch.Tensor, *, is_apart: bool) -> torch.Tensor:
    """q k^T by way of two e4m3 terms of q, the small ones first; is_apart: each step alone, and float32 sums of all steps."""
    scale = torch.exp2(8 - torch.floor(torch.log2(q.abs().amax(-1, keepdim=True))))
    high = e4m3(q * scale)
    low = e4m3(q * scale - high)
    zero = torch.zeros(q.shape[0], k.shape[0], dtype=torch.float64)
    if not is_apart:
        return accumulate(high, k, accumulate(low, k, zero)) / scale
    parts = [(x[:, i : i + STEP], k[:, i : i + STEP]) for x in (low, high) for i in range(0, q.shape[1], STEP)]
    return sum((accumulate(x, y, zero).float() for x, y in parts), zero.float()).double() / scale


def attend(s: torch.Tensor, v: torch.Tensor, *, is_rounded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """O and lse of logits; is_rounded: weights and O in bfloat16, as torch has them."""
    largest = s.amax(-1, keepdim=True)
    p = torch.exp(s - largest)
    row_sum = p.sum(-1, keepdim=True)
    out = (p.bfloat16().double() if is_rounded else p) @ v / row_sum
    return out.bfloat16().double() if is_rounded else out, torch.log(row_sum) + largest


def cases() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Q and K by name."""
    q, k = torch.randn(ROWS, HEAD_DIM), torch.randn(512, HEAD_DIM)
    common = 3 * torch.randn(HEAD_DIM)
    pairs_q, pairs_k = q.clone(), k.clone()
    pairs_q[:, 1::2], pairs_k[:, 1::2] = q[:, ::2] * (1 + 2**-7), -k[:, ::2]
    return {
        "normal, 512 keys": (q, k),
        "normal, 8 keys": (q, k[:8]),
        "normal, 1 key": (q, k[:1]),
        "q times 30": (30 * q, k),
        "q and k off their mean by the same vector": (q + common, k + common),
        "pairs of products that cancel": (16 * pairs_q, pairs_k),
        "k is 448 or -448": (q, 448 * k.sign()),
    }


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    print("| | largest logit | error of a logit | out, of its budget | lse, of its budget | lse, each step alone |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (q, k) in cases().items():
        q, k, v = q.bfloat16().double(), e4m3(k), e4m3(torch.randn(k.shape[0], HEAD_DIM))
        scale = HEAD_DIM**-0.5
        want = q @ k.T * scale
        out, lse = attend(want, v, is_rounded=False)
        yardstick, _ = attend(want, v, is_rounded=True)
        # As `fa4_backend.error_budget` has them.
        out_budget = 2 * (yardstick - out).abs().max() + torch.finfo(torch.bfloat16).eps * out.abs().max()
        lse_budget = 2e-5 * max(1.0, lse.abs().max().item())
        shares = []
        for is_apart in (False, True):
            got = scores(q, k, is_apart=is_apart) * scale
            shares.append((attend(got, v, is_rounded=False)[1] - lse).abs().max().item() / lse_budget)
            if not is_apart:
                logit = (got - want).abs().max().item()
                of_out = ((attend(got, v, is_rounded=True)[0] - out).abs().max() / out_budget).item()
        print(f"| {name} | {want.abs().max():.1f} | {logit:.1e} | {of_out:.2f} | {shares[0]:.1f} | {shares[1]:.1f} |")


if __name__ == "__main__":
    main()
