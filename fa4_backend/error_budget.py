"""How far a kernel's result may be from the oracle: the one place that says so.

    max|out - oracle| <= 2 max|torch in the same dtype - oracle| + eps(dtype) max|oracle| + float32 arithmetic (float32 only)
    max|lse - oracle| <= 2e-5 max(1, max|oracle|)

With 16-bit dtypes the errors are those of rounding P and O to 16 bits. The yardstick rounds the same values at the same places, whatever
the machine, and twice its error is a bound. With float32 there is no such rounding: what remains is the order of the sums, which is
each library's and each instruction set's own, so that one library's error says nothing of another's. See `float32_spread`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fa4_backend.arguments import AttentionArguments
from fa4_backend.reference import attention_oracle, logits, sequences, softmax_weights

UNIT_ROUNDOFF = 2.0**-24  # float32: the largest relative error of one operation
LARGEST_DEVIATION = 7.0  # standard deviations: 2 exp(-7^2 / 2) = 5e-11 for each element
EXP_ROUNDINGS = 4  # of exp near 0, in units of UNIT_ROUNDOFF: torch's `exp_u20` has 2.7
LSE_RELATIVE = 2e-5


class Judge(NamedTuple):
    """The oracle's result for the rows of a call, padding left out, and what a kernel's may differ by."""

    out: torch.Tensor  # (total_q, num_q_heads, head_dim_v) float32, or float64 for float32 tensors
    lse: torch.Tensor  # (num_q_heads, total_q), likewise
    out_budget: float
    lse_budget: float  # where the oracle is finite


def judge(arguments: AttentionArguments, *, is_causal: bool) -> Judge:
    """Oracle and budgets of one call; the dtype is that of `arguments.q`."""
    a, dtype = arguments, arguments.q.dtype
    rows = slice(0, int(a.cu_seqlens_q[-1]))
    accumulate = torch.float64 if dtype == torch.float32 else torch.float32  # what judges float32 has to be better than float32
    out, lse = attention_oracle(a, is_causal=is_causal, dtype=accumulate, accumulate=accumulate)
    yardstick, _ = attention_oracle(a, is_causal=is_causal, dtype=dtype)
    out, lse, yardstick = out[rows], lse[:, rows], yardstick[rows]
    if out.numel() == 0:
        return Judge(out, lse, 0.0, 0.0)
    budget = rounding_budget(yardstick, out, dtype).item()
    if dtype == torch.float32:
        budget += LARGEST_DEVIATION * UNIT_ROUNDOFF * float32_spread(a, is_causal=is_causal)
    largest_lse = lse[~lse.isneginf()].abs().max().item() if not lse.isneginf().all() else 0.0
    return Judge(out, lse, budget, LSE_RELATIVE * max(1.0, largest_lse))


def rounding_budget(yardstick: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Twice the yardstick's largest error and one rounding of the largest value: the budget of 16-bit dtypes. A scalar tensor."""
    return 2 * (yardstick - oracle).abs().max() + torch.finfo(dtype).eps * oracle.abs().max()


def float32_spread(arguments: AttentionArguments, *, is_causal: bool) -> float:
    """Bound on the standard deviation of an element of `out` computed in float32, in units of roundoff; the largest over all elements.

    To first order the error of O[c] is a sum over all roundings, each the result of one operation times its sensitivity. Roundings that
    are independent with mean 0 (N. Higham and T. Mary, 2019: sums of n terms err by sqrt(n) u, not n u) exceed
    t u sqrt(sum of squared sensitivities) with probability 2 exp(-t^2 / 2) at most (Azuma and Hoeffding). The squares, for the weights
    P[j], sum of P = 1 with the sink's share:

    * Score j moves O[c] by P[j] (V[j, c] - O[c]) for each unit of its own error. That is at most a product and a sum for each of `head_dim`
      terms, on partial sums whose mean square, in an order that knows nothing of the data, is at most s[j]^2 + sum of (q[i] k[j, i])^2; and
      scale, soft cap, ALiBi and the difference from the maximum: 4 operations on values up to |s|, |logit| and |logit - maximum|; and the
      exponential, whose argument reduction costs up to |logit - maximum| and whose polynomial costs EXP_ROUNDINGS.
    * O and the row sum take two roundings a key (one to add, one to rescale what was added before). Partial sums have mean squares of at
      most O[c]^2 + sum of (P[j] V[j, c])^2 and, for the row sum, whose error moves O[c] by O[c], of 1.
    """
    a, largest = arguments, 0.0
    for sequence in sequences(a, is_causal=is_causal):
        if not sequence.k.shape[0]:
            continue
        scores, lse = logits(a, sequence, is_causal, torch.float64, torch.float64)
        p = softmax_weights(scores, lse)
        seen = ~scores.isneginf()
        num_keys = seen.sum(-1, keepdim=True)
        q_per_kv = sequence.q.shape[1] // sequence.k.shape[1]
        q = sequence.q.double().transpose(0, 1)
        k, v = (x.double().repeat_interleave(q_per_kv, dim=1).transpose(0, 1) for x in (sequence.k, sequence.v))
        out = p @ v
        raw = (q @ k.transpose(1, 2) * a.softmax_scale).square()
        dot = 2 * q.shape[-1] * (raw + q.square() @ k.square().transpose(1, 2) * a.softmax_scale**2)
        below = (scores - scores.amax(-1, keepdim=True)).masked_fill(~seen, 0.0).square()
        other = 4 * (raw + scores.masked_fill(~seen, 0.0).square() + below)
        weight = p.square() * (dot + other + EXP_ROUNDINGS**2)
        # sum of weight (v - out)^2, without a tensor of (rows, keys, head_dim_v)
        from_scores = weight @ v.square() - 2 * out * (weight @ v) + out.square() * weight.sum(-1, keepdim=True)
        from_sums = 2 * num_keys * (2 * out.square() + p.square() @ v.square())
        variance = (from_scores + from_sums).masked_fill(num_keys == 0, 0.0)
        largest = max(largest, variance.max().item())
    return math.sqrt(largest)
