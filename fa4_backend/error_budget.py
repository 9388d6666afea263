"""How far a kernel's result may be from the oracle: the one place that says so.

    max|out - oracle| <= 2 max|torch in the same dtype - oracle| + eps(dtype) max|oracle| + float32 arithmetic (float32 only)
    max|lse - oracle| <= 2e-5 max(1, max|oracle|)

and of kernels that round the softmax's weights to e4m3, for out, the error of that rounding on top: `e4m3_spread`.

With 16-bit dtypes the errors are those of rounding P and O to 16 bits. The yardstick rounds the same values at the same places, whatever
the machine, and twice its error is a bound. With float32 there is no such rounding: what remains is the order of the sums, which is
each library's and each instruction set's own, so that one library's error says nothing of another's. See `float32_spread`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from fa4_backend.arguments import AttentionArguments, LatentArguments
from fa4_backend.kernels.sm100.tuning import E4M3_LIFT
from fa4_backend.reference import as_paged, attention_oracle, latent_oracle, logits, sequences, softmax_weights

ROUNDING = 2.0**-24 / math.sqrt(3)  # float32: standard deviation of one operation's relative error, uniform within 2^-24
LARGEST_DEVIATION = 7.0  # standard deviations; a normal variable exceeds them with probability 3e-12
EXP_ROUNDINGS = 4  # of an exponential near 0, in units of ROUNDING: torch's `exp_u20` is within 2.7 * 2^-24
LSE_RELATIVE = 2e-5


class Judge(NamedTuple):
    """The oracle's result for the rows of a call, padding left out, and what a kernel's may differ by."""

    out: torch.Tensor  # (total_q, num_q_heads, head_dim_v) float32, or float64 for float32 tensors
    lse: torch.Tensor  # (num_q_heads, total_q), likewise
    out_budget: float
    lse_budget: float  # where the oracle is finite


def judge(arguments: AttentionArguments, *, is_causal: bool, e4m3_weights: bool = False) -> Judge:
    """Oracle, on dequantised values, and budgets of one call. The dtype is that of q, or of out where q is FP8.

    Args:
        e4m3_weights: a kernel serves rows that rounds the softmax's weights to e4m3, see `e4m3_spread`.
    """
    judged = _judge(arguments, partial(attention_oracle, arguments, is_causal=is_causal), is_causal=is_causal)
    if e4m3_weights and judged.out.numel():
        judged = judged._replace(out_budget=judged.out_budget + e4m3_spread(arguments, is_causal=is_causal))
    return judged


def judge_latent(arguments: LatentArguments) -> Judge:
    """The same of a call of latent attention."""
    return _judge(as_paged(arguments), partial(latent_oracle, arguments), is_causal=True)


def _judge(a: AttentionArguments, oracle: Callable[..., tuple[torch.Tensor, torch.Tensor]], *, is_causal: bool) -> Judge:
    dtype, rows = model_dtype(a), slice(0, int(a.cu_seqlens_q[-1]))
    accumulate = torch.float64 if dtype == torch.float32 else torch.float32  # what judges float32 has to be better than float32
    out, lse = oracle(dtype=accumulate, accumulate=accumulate)
    yardstick, _ = oracle(dtype=dtype)
    out, lse, yardstick = out[rows], lse[:, rows], yardstick[rows]
    if out.numel() == 0:
        return Judge(out, lse, 0.0, 0.0)
    budget = rounding_budget(yardstick, out, dtype).item()
    if dtype == torch.float32:
        budget += LARGEST_DEVIATION * ROUNDING * float32_spread(a, is_causal=is_causal)
    largest_lse = lse[~lse.isneginf()].abs().max().item() if not lse.isneginf().all() else 0.0
    return Judge(out, lse, budget, LSE_RELATIVE * max(1.0, largest_lse))


def model_dtype(a: AttentionArguments) -> torch.dtype:
    """The dtype of a call's model: of q, of out where q is FP8, bfloat16 where both are."""
    return next((x.dtype for x in (a.q, a.out) if x.dtype.itemsize > 1), torch.bfloat16)


def rounding_budget(yardstick: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Twice the yardstick's largest error and one rounding of the largest value: the budget of 16-bit dtypes. A scalar tensor."""
    return 2 * (yardstick - oracle).abs().max() + torch.finfo(dtype).eps * oracle.abs().max()


def float32_spread(arguments: AttentionArguments, *, is_causal: bool) -> float:
    """Standard deviation of an element of `out` computed in float32, in units of `ROUNDING`; the largest over all elements.

    To first order the error of O[c] is the sum of all roundings, each the result of one operation times the sensitivity of O[c] to it.
    Taken as independent with mean 0 (so that n terms err by sqrt(n), not n, roundings: N. Higham and T. Mary, "A new approach to
    probabilistic rounding error analysis", 2019) their variances add up. With P the weights, whose sum with a sink's share is 1:

    * An error of logit[j] moves O[c] by P[j] (V[j, c] - O[c]) times that error. It has these variances:
      the dot product s[j] of n = head_dim terms t[i], n products and n sums. In an order that knows nothing of the data, the partial sums
      have a mean square of s^2 / 3 + sum(t^2) / 6: together n (s^2 / 3 + sum(t^2) / 6) + sum(t^2). Blocks and trees of sums make it less;
      scale, soft cap, ALiBi, difference from the maximum, argument reduction: 4 operations on up to |s|, |logit| and |logit - maximum|;
      the exponential: EXP_ROUNDINGS^2.
    * O and the row sum take two roundings a key, one to add and one to rescale what was added before. By the same mean squares, of O[c]
      for the one and of a sum of 1 that moves O[c] by O[c] for the other, n keys make n (2 O[c]^2 + sum((P[j] V[j, c])^2)) at most.
    """
    a, largest = arguments, 0.0
    for sequence in sequences(a, is_causal=is_causal):
        if not sequence.k.shape[0]:
            continue
        scores, _ = logits(a, sequence, is_causal, torch.float64, torch.float64)
        p = softmax_weights(scores, a.sinks)
        seen = ~scores.isneginf()
        num_keys = seen.sum(-1, keepdim=True)
        q_per_kv = sequence.q.shape[1] // sequence.k.shape[1]
        q = sequence.q.double().transpose(0, 1)
        k, v = (x.double().repeat_interleave(q_per_kv, dim=1).transpose(0, 1) for x in (sequence.k, sequence.v))
        out = p @ v
        dot = (q @ k.transpose(1, 2) * a.softmax_scale).square()
        terms = q.square() @ k.square().transpose(1, 2) * a.softmax_scale**2
        logit = scores.masked_fill(~seen, 0.0).square()
        below = (scores - scores.amax(-1, keepdim=True)).masked_fill(~seen, 0.0).square()
        of_logit = q.shape[-1] * (dot / 3 + terms / 6) + terms + 4 * (dot + logit + below) + EXP_ROUNDINGS**2
        weight = p.square() * of_logit
        # sum of weight (v - out)^2, without a tensor of (rows, keys, head_dim_v)
        from_logits = weight @ v.square() - 2 * out * (weight @ v) + out.square() * weight.sum(-1, keepdim=True)
        from_sums = num_keys * (2 * out.square() + p.square() @ v.square())
        variance = (from_logits + from_sums).masked_fill(num_keys == 0, 0.0)
        largest = max(largest, variance.max().item())
    return math.sqrt(largest)


def e4m3_spread(arguments: AttentionArguments, *, is_causal: bool) -> float:
    """How far rounding the weights to e4m3 moves an element of `out`; the largest over all elements.

    With P the weights, whose sum with a sink's share is 1, O[c] moves by sum(error[j] V[j, c]). A weight is rounded to 4 bits: by at most
    2^-4 of itself, or half of the smallest number, 2^-10, in units in which the row's largest weight is at least 2^E4M3_LIFT
    (`kernels.sm100.tuning`; when earlier weights were rounded, the unit was no larger). Taken as independent and uniform, these errors
    have a variance of a third of the bound's square, and O[c] moves by `LARGEST_DEVIATION` standard deviations at most; nor can it move
    by more than the sum of all bounds, which is less for rows of few keys.
    """
    a, largest = arguments, 0.0
    for sequence in sequences(a, is_causal=is_causal):
        if not sequence.k.shape[0]:
            continue
        scores, _ = logits(a, sequence, is_causal, torch.float32, torch.float32)
        p = softmax_weights(scores, a.sinks)
        bound = torch.maximum(2.0**-4 * p, 2.0**-10 * 2.0**-E4M3_LIFT * p.amax(-1, keepdim=True)).masked_fill(scores.isneginf(), 0.0)
        v = sequence.v.float().repeat_interleave(sequence.q.shape[1] // sequence.v.shape[1], dim=1).transpose(0, 1)
        likely = LARGEST_DEVIATION * (bound.square() @ v.square() / 3).sqrt()
        largest = max(largest, torch.minimum(likely, bound @ v.abs()).max().item())
    return largest
