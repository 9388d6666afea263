"""Batches with large logits: one channel of q and k makes them, the others are zero or random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fa4_backend.error_budget import e4m3_spread, model_dtype
from fa4_backend.reference import attention_oracle
from tests.support.paged_case import BuiltCase, PagedCase

LARGEST_FP8 = 448.0
# The channel's factor by key; keys as a float64 column 0 .. kv_len - 1 of a sequence.
KeyFactor = Callable[[torch.Tensor], torch.Tensor]


def level(keys: torch.Tensor) -> torch.Tensor:
    """Every key alike."""
    return torch.ones_like(keys)


def growing(keys: torch.Tensor) -> torch.Tensor:
    """From 1/16 to 1: the maximum of a row moves with every block, up with positive logits, down with negative ones."""
    return 1 / 16 + keys / keys.numel() * 15 / 16


def falling(keys: torch.Tensor) -> torch.Tensor:
    """From 1 to 1/16: for kernels that take the last keys first."""
    return growing(keys).flip(0)


def crossing(keys: torch.Tensor) -> torch.Tensor:
    """From 1 to -1: the last keys' logits are at the lower end of a soft cap, the first keys' at the upper."""
    return 1.0 - 2.0 * keys / max(len(keys) - 1, 1)


@dataclass(frozen=True)
class Channel:
    """Channel 0 of q and k, and what the others hold."""

    q: float
    k: float
    factor: KeyFactor = level
    is_random: bool = False  # other channels and V as drawn; else zero, and V = 1
    signs: bool = False  # V = +-1
    sink: float | None = None
    case: dict[str, object] = field(default_factory=dict)  # of PagedCase


CHANNELS = {
    "level": Channel(448, -544),
    "signs": Channel(448, -544, signs=True),
    "random": Channel(448, -544, is_random=True),
    "random, smaller": Channel(214, -272, is_random=True),
    "random, positive": Channel(448, 544, is_random=True),
    "growing": Channel(448, 544, growing, is_random=True),
    "falling": Channel(448, 544, falling, is_random=True),
    "rising from below": Channel(448, -544, falling, is_random=True),
    "sink": Channel(448, -544, is_random=True, sink=-21540.0),
    "sink above": Channel(448, -544, is_random=True, sink=30000.0),
    "softcap": Channel(448, 544, growing, is_random=True, case={"softcap": 6000.0}),
    "softcap, end to end": Channel(448, 544, crossing, is_random=True, case={"softcap": 55.0}),
    "softcap, other end": Channel(448, -544, crossing, is_random=True, case={"softcap": 55.0}),
    "alibi": Channel(448, -544, is_random=True, case={"alibi": True}),
    "fp16, largest": Channel(60000, 60000, growing, is_random=True, case={"dtype": "float16"}),
    "fp16, lowest": Channel(60000, -60000, signs=True, case={"dtype": "float16"}),
    "1e12": Channel(1e7, -1e6, signs=True),
    "3e37": Channel(1e19, 3e19, signs=True),
    "-3e37": Channel(1e19, -3e19, growing, signs=True),
}


def fill(built: BuiltCase, channel: Channel) -> BuiltCase:
    """Overwrite the channel, and what else `channel` names, in place; padding and unused rows stay poisoned."""
    a = built.arguments
    q, dtype = a.q[: built.total_q], a.k_cache.dtype
    largest = 1.0  # K stored for a key whose factor is 1 is channel.k / largest
    if a.k_scale is not None and a.v_scale is not None:
        largest = abs(channel.k) / LARGEST_FP8
        _rescale(a.k_cache, a.k_scale, largest)
        if not channel.is_random:
            a.v_scale.fill_(1.0)
    if not channel.is_random:
        q.fill_(0.0)
    q_value = channel.q
    if a.q_scale is not None:
        _rescale(q, a.q_scale, channel.q / LARGEST_FP8)
        q_value = LARGEST_FP8
    q[..., 0] = q_value
    page_size = built.case.page_size
    for seq_idx, kv_len in enumerate(built.case.kv_lens):
        values = (channel.k / largest * channel.factor(torch.arange(kv_len, dtype=torch.float64))).to(dtype)
        for logical in range(-(-kv_len // page_size)):
            keys = slice(logical * page_size, min((logical + 1) * page_size, kv_len))
            page, count = int(a.page_table[seq_idx, logical]), keys.stop - keys.start
            if not channel.is_random:
                a.k_cache[page, :count] = 0
                a.v_cache[page, :count] = a.v_cache[page, :count].float().sign().to(dtype) if channel.signs else 1
            a.k_cache[page, :count, :, 0] = values[keys, None].to(a.k_cache.device)
    if channel.sink is not None:
        assert a.sinks is not None
        a.sinks.fill_(channel.sink)
    return built


def _rescale(cache: torch.Tensor, scale: torch.Tensor, changed: float) -> None:
    """The same values, as FP8 can hold them, with another scale."""
    of_heads = scale.repeat_interleave(cache.shape[-2] // scale.shape[0])
    cache.copy_((cache.float() * (of_heads / changed)[:, None]).clamp(-LARGEST_FP8, LARGEST_FP8))
    scale.fill_(changed)


def build(name: str, device: torch.device | str = "cpu", **changes: object) -> BuiltCase:
    """A batch of `CHANNELS[name]`; `changes` are fields of its PagedCase."""
    channel = CHANNELS[name]
    fields = {"head_dim": 128, "sinks": channel.sink is not None, **channel.case, **changes}
    return fill(PagedCase(**fields).build(device), channel)  # type: ignore[arg-type]


def check(built: BuiltCase, out: torch.Tensor, lse: torch.Tensor) -> tuple[float, float]:
    """Largest error of `out`, and what is allowed: twice that of the same mathematics rounded to the kernel's dtype, or half a unit in
    the last place of the largest value, which the last rounding alone costs; with Q in FP8 the rounding of weights on top. The lse to
    2^-22 of its size, or 2e-5.

    Scores at the end of a soft cap are all alike, and so is the rounding of their weights, which no sum averages: where a row's reference
    is not one of those scores (`wgmma_fragment`, Note [Fixed references]) it costs half a unit more.

    Judged by an oracle in float64: float32 rounds a logit of 2e4 by 2^-11.

    Raises:
        AssertionError: an error is larger.
    """
    a, case, rows = built.arguments, built.case, slice(0, built.total_q)
    want, want_lse = attention_oracle(a, is_causal=case.is_causal, dtype=torch.float64, accumulate=torch.float64)
    dtype = model_dtype(a)
    rounded, _ = attention_oracle(a, is_causal=case.is_causal, dtype=dtype)
    want, want_lse = want[rows], want_lse[:, rows]
    error = (out[rows].double() - want).abs().max().item()
    allowed = max(2 * (rounded[rows] - want).abs().max().item(), torch.finfo(dtype).eps / 2 * want.abs().max().item())
    if case.softcap and not built.is_decoded:
        allowed += torch.finfo(dtype).eps / 2 * want.abs().max().item()
    if a.q_scale is not None and not built.is_decoded:
        allowed += e4m3_spread(a, is_causal=case.is_causal)
    assert error <= allowed, f"out: {error} where {allowed} is allowed"
    off, size = (lse[:, rows].double() - want_lse).abs().max().item(), want_lse.abs().max().item()
    assert off <= max(2e-5, size * 2**-22), f"lse of {size}: {off}"
    return error, allowed
