"""Errors of the two forms of attention over K and V in FP8, simulated in float32: 16-bit products of dequantised values, and FP8 products.

    python -m scripts.fp8_forms

Root mean square and largest error of O against float32 on the same Q (bfloat16) and the same stored K and V, so that the error of storing
them in FP8, which every form shares, is not in it but in a line of its own. Rows of random queries, random keys and values, one scale a
tensor that maps the largest magnitude to 448. P in e4m3 is scaled by 2^8, the most that holds a weight of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

ROWS, HEAD_DIM = 64, 128
LARGEST, P_SHIFT = 448.0, 2.0**8  # of e4m3
Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """One head: q (ROWS, HEAD_DIM) in bfloat16's numbers, k and v (keys, HEAD_DIM) as drawn, all float32."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def draw(keys: int, peaked: float) -> Inputs:
        """peaked: factor on queries; large values give rows whose softmax is few keys."""
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(n, HEAD_DIM, generator=generator) for n in (ROWS, keys, keys))
        return Inputs(to_bfloat16(q * peaked), k, v)


def to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Rounded to bfloat16."""
    return x.bfloat16().float()


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """What x stands for when it is stored in e4m3 with one scale."""
    scale = x.abs().max() / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def weights_to_fp8(p: torch.Tensor) -> torch.Tensor:
    """Weights of at most 1 rounded to e4m3."""
    return (p * P_SHIFT).to(torch.float8_e4m3fn).float() / P_SHIFT


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, round_weights: Rounding = lambda p: p) -> torch.Tensor:
    """Attention in float32 but for the weights, whose sum is taken before they are rounded."""
    scores = q @ k.T * HEAD_DIM**-0.5
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    return round_weights(p) @ v / p.sum(-1, keepdim=True)


def forms(x: Inputs) -> dict[str, torch.Tensor]:
    """Form -> O; the first is what the others are compared with."""
    k, v = to_fp8(x.k), to_fp8(x.v)
    scores = x.q @ to_bfloat16(k).T * HEAD_DIM**-0.5
    return {
        "float32": attention(x.q, k, v),
        "(a) exact K and V, P in bfloat16": attention(x.q, k, v, to_bfloat16),
        "torch in bfloat16 on dequantised K and V": to_bfloat16(torch.softmax(scores, -1)) @ to_bfloat16(v),
        "(b) Q and P in e4m3": attention(to_fp8(x.q), k, v, weights_to_fp8),
        "of which Q": attention(to_fp8(x.q), k, v),
        "of which P": attention(x.q, k, v, weights_to_fp8),
        "K and V stored in e4m3, beside the drawn ones": attention(x.q, x.k, x.v),
    }


def main() -> None:
    """Print a table for each length and peakedness."""
    for keys in (1024, 8192):
        for peaked in (1.0, 4.0):
            found = forms(Inputs.draw(keys, peaked))
            want = found.pop("float32")
            print(f"{keys} keys, queries times {peaked:g}, largest |O| {want.abs().max():.2g}")
            for name, out in found.items():
                error = out - want
                print(f"  {name:<48} rms {error.square().mean().sqrt():.1e}, largest {error.abs().max():.1e}")


if __name__ == "__main__":
    main()
