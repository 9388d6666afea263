"""A message behind a cached context in a layer of latent attention, as decode and as prefill: `python -m tests.device.measure_messages`.

As decode: q to the latents' space, our latent kernel over rows of a few queries, out of that space. As prefill, in vLLM's steps: the
context's latents are gathered, made keys and values and joined with their rotary part, then attended to; the same of the new tokens; what
joins both results is not timed, and keys are joined by copies, as vLLM does but for 128 heads where FlashInfer is installed. Both give the
same numbers, which is checked first. The queries at which both take as long tell `message_queries` of `fa4_backend/split_rows.py`; the last
lines name them, between the two cells that lie about it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import torch

from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits, MaskFeatures, mla_decode, plan_attention, ragged_attention
from fa4_backend.bench.engine_models import LATENT_DIM, NOPE_DIM, ROPE_DIM, VALUE_DIM
from fa4_backend.bench.timing import capture, in_turns
from fa4_backend.compile import CompileKey
from fa4_backend.device import plan_on
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.problem import FP8, LATENT, RAGGED
from fa4_backend.split_rows import SplitRows, message_limits
from tests.device.compiling import compile_lacking

CONTEXTS, QUERIES = (2048, 8192, 32768), (64, 128, 192, 256, 320, 384, 512)
# Heads and how latents are stored.
KINDS = ((128, "bfloat16"), (16, "bfloat16"), (128, FP8), (16, FP8))
PAGE_SIZE = 64
SCALE = (NOPE_DIM + ROPE_DIM) ** -0.5
DTYPE = torch.bfloat16
ROUNDS = 3
FAMILIES = ("schedule", "mla_decode", "sm90")  # whose kernels are timed
# Of bfloat16 products over 512 latents twice, and of their results, which are some 0.05 where a context is long: both ways round.
LARGEST_SHARE = 0.03  # of the largest result


@dataclass(frozen=True)
class Layer:
    """Weights of a layer with so many heads."""

    to_keys: torch.Tensor  # (num_heads, NOPE_DIM, LATENT_DIM)
    to_values: torch.Tensor  # (num_heads, LATENT_DIM, VALUE_DIM)
    to_both: torch.Tensor  # (LATENT_DIM, num_heads * (NOPE_DIM + VALUE_DIM))

    @classmethod
    def draw(cls, num_heads: int) -> Layer:
        weight = torch.randn(LATENT_DIM, num_heads, NOPE_DIM + VALUE_DIM, device="cuda", dtype=DTYPE) * LATENT_DIM**-0.5
        keys, values = weight.split([NOPE_DIM, VALUE_DIM], dim=-1)
        return cls(keys.permute(1, 2, 0).contiguous(), values.transpose(0, 1).contiguous(), weight.flatten(1))


@dataclass(frozen=True)
class Message:
    """New tokens behind a context, and where their latents lie."""

    layer: Layer
    q: torch.Tensor  # (queries, num_heads, NOPE_DIM + ROPE_DIM)
    cache: torch.Tensor  # (num_pages, PAGE_SIZE, LATENT_DIM + ROPE_DIM), bfloat16 or e4m3 with a scale of 1
    table: torch.Tensor  # (1, num_pages) int32
    context: int

    @classmethod
    def draw(cls, layer: Layer, stored: str, queries: int, context: int) -> Message:
        pages = -(-(context + queries) // PAGE_SIZE)
        cache = torch.randn(pages, PAGE_SIZE, LATENT_DIM + ROPE_DIM, device="cuda", dtype=DTYPE).to(getattr(torch, stored))
        q = torch.randn(queries, layer.to_keys.shape[0], NOPE_DIM + ROPE_DIM, device="cuda", dtype=DTYPE)
        return cls(layer, q, cache, torch.randperm(pages, device="cuda").int()[None], context)

    @property
    def queries(self) -> int:
        return self.q.shape[0]

    def latents(self, begin: int, end: int) -> torch.Tensor:
        """(end - begin, LATENT_DIM + ROPE_DIM) of tokens in order, gathered, in bfloat16."""
        first, last = begin // PAGE_SIZE, -(-end // PAGE_SIZE)
        bits = self.cache.view(torch.uint8).index_select(0, self.table[0, first:last])  # torch selects no e4m3
        tokens = bits.view(self.cache.dtype).flatten(0, 1).to(DTYPE)
        return tokens[begin - first * PAGE_SIZE : end - first * PAGE_SIZE]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def problems(num_heads: int, stored: str) -> tuple[AttentionProblem, AttentionProblem, AttentionProblem]:
    """Decode of latents; attention among new tokens, and to their context."""
    latent = AttentionProblem(
        num_heads, 1, LATENT_DIM + ROPE_DIM, LATENT_DIM, "bfloat16", PAGE_SIZE, "sm_90a", kv_dtype=stored, kv_source=LATENT
    )
    made = (num_heads, num_heads, NOPE_DIM + ROPE_DIM, VALUE_DIM, "bfloat16", 1, "sm_90a")
    new, context = (AttentionProblem(*made, mask=MaskFeatures(is_causal=x), kv_source=RAGGED, has_lse=True) for x in (True, False))
    return latent, new, context


def split_limits(problem: AttentionProblem) -> BatchLimits:
    """Of an engine that takes steps of 2,048 tokens."""
    limits = message_limits(BatchLimits(256, 2048, 2 * max(CONTEXTS)), problem)
    assert limits is not None, problem
    return limits


def as_decode(m: Message) -> Callable[[], torch.Tensor]:
    """(queries, num_heads, VALUE_DIM)."""
    problem = problems(m.q.shape[1], str(m.cache.dtype).removeprefix("torch."))[0]
    limits = split_limits(problem)
    plan = plan_on(problem, limits, m.q.device)
    metadata = AttentionMetadata.allocate(plan, "cuda")
    rows = SplitRows.allocate(limits, PAGE_SIZE, m.q.device)
    keys = m.context + m.queries
    short = rows.split(ints(0, m.queries), ints(keys), m.table, rows.num_rows([m.queries]))
    metadata.refresh(cu_seqlens_q=short.cu_seqlens_q, seqused_k=short.seqused_k, max_seqlen_q=rows.queries, max_seqlen_k=keys)
    nope, rope = m.q.split([NOPE_DIM, ROPE_DIM], dim=-1)
    absorbed = m.q.new_empty(m.queries, m.q.shape[1], LATENT_DIM)

    def run() -> torch.Tensor:
        torch.bmm(nope.transpose(0, 1), m.layer.to_keys, out=absorbed.transpose(0, 1))
        out = mla_decode(
            absorbed,
            rope,
            m.cache,
            short.page_table,
            short.cu_seqlens_q,
            short.seqused_k,
            plan=plan,
            metadata=metadata,
            softmax_scale=SCALE,
        )[0]
        return torch.bmm(out.transpose(0, 1), m.layer.to_values).transpose(0, 1)

    return run


def as_prefill(m: Message) -> Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]:
    """out and lse of new tokens to each other, and to their context."""
    heads = m.q.shape[1]
    steps, starts = [], []
    for problem, keys in zip(problems(heads, "bfloat16")[1:], (m.queries, m.context), strict=True):
        step = AttentionMetadata.allocate(plan_on(problem, BatchLimits(256, 2048, 2 * max(CONTEXTS)), m.q.device), "cuda")
        starts.append([ints(0, m.queries), ints(0, keys)])
        step.refresh(cu_seqlens_q=starts[-1][0], cu_seqlens_k=starts[-1][1], max_seqlen_q=m.queries, max_seqlen_k=keys)
        steps.append(step)

    def attend(step: AttentionMetadata, lengths: list[torch.Tensor], begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        latents = m.latents(begin, end)
        both = (latents[:, :LATENT_DIM] @ m.layer.to_both).view(-1, heads, NOPE_DIM + VALUE_DIM)
        k = torch.empty(end - begin, heads, NOPE_DIM + ROPE_DIM, device="cuda", dtype=DTYPE)
        k[..., :NOPE_DIM], k[..., NOPE_DIM:] = both[..., :NOPE_DIM], latents[:, None, LATENT_DIM:]
        out, lse = ragged_attention(m.q, k, both[..., NOPE_DIM:], *lengths, plan=step.plan, metadata=step, softmax_scale=SCALE)
        assert lse is not None
        return out, lse

    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts = ((m.context, m.context + m.queries), (0, m.context))
        return [attend(step, lengths, *part) for step, lengths, part in zip(steps, starts, parts, strict=True)]

    return run


def check(decode: torch.Tensor, prefill: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Both ways agree."""
    lse = torch.stack([lse.T for _, lse in prefill])
    weights = lse.softmax(dim=0)[..., None]
    want = sum(out.float() * weight for (out, _), weight in zip(prefill, weights, strict=True))
    assert isinstance(want, torch.Tensor)
    error, largest = (decode.float() - want).abs().max().item(), want.abs().max().item()
    assert error <= LARGEST_SHARE * largest, f"expected an error of at most {LARGEST_SHARE} of {largest}, got {error}"


def measure(num_heads: int, stored: str, context: int, queries: int) -> dict[str, float]:
    """Microseconds of a layer, both ways in turns."""
    m = Message.draw(Layer.draw(num_heads), stored, queries, context)
    ways: dict[str, Callable[[], object]] = {"decode": as_decode(m), "prefill": as_prefill(m)}
    check(ways["decode"](), ways["prefill"]())  # type: ignore[arg-type]
    return in_turns({name: capture(way) for name, way in ways.items()}, ROUNDS)


def break_even(cells: dict[int, dict[str, float]]) -> float | None:
    """Queries at which both ways take as long, between the two cells about it; None where one way is the faster everywhere."""
    ahead = {queries: us["prefill"] - us["decode"] for queries, us in cells.items()}
    for (q0, a0), (q1, a1) in pairwise(ahead.items()):
        if a0 > 0 >= a1:
            return q0 + (q1 - q0) * a0 / (a0 - a1)
    return None


def keys() -> list[CompileKey]:
    """Of all kernels."""
    found: dict[CompileKey, None] = {}
    for kind in KINDS:
        latent, *made = problems(*kind)
        plans = [plan_attention(latent, split_limits(latent))]
        plans += [plan_attention(problem, BatchLimits(256, 2048, 2 * max(CONTEXTS))) for problem in made]
        for plan in plans:
            found |= dict.fromkeys(plan.keys)
    return list(found)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="compile the kernels, and do no more; needs no GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    compile_lacking(keys())
    if args.compile_only:
        return
    torch.manual_seed(0)
    table, lines = [], []
    with torch.no_grad():
        for (num_heads, stored), context in product(KINDS, CONTEXTS):
            cells = {}
            name = f"h{num_heads}{' e4m3' if stored == FP8 else ''}"
            for queries in QUERIES:
                us = cells[queries] = measure(num_heads, stored, context, queries)
                table.append({"heads": num_heads, "stored": stored, "context": context, "queries": queries, **us})
                words = f"decode {us['decode']:7.0f} us, prefill {us['prefill']:7.0f}, ratio {us['prefill'] / us['decode']:.2f}"
                print(f"{name} {queries:4d} behind {context:6d}: {words}", flush=True)
            even = break_even(cells)
            lines.append(f"{name} behind {context}: as long at {'no cell' if even is None else f'{even:.0f} queries'}")
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps({"stamp": gpu_stamp(FAMILIES), "cells": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
