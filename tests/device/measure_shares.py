"""Who adds up parts, and into how many parts rows are cut: variants of our kernels beside FA3 on the cells that depend on it.

    python -m tests.device.measure_shares --json FILE [--seconds 60] [--keys]

Variants are fields of the lists' shape. Every variant is checked against float32 before it is timed; kernels take
turns, L2 is clean before each call, every call is a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fa4_backend.bench.batch import BatchShape, BatchTensors
from fa4_backend.bench.decode_batches import ragged_batches, uniform
from fa4_backend.bench.ours import Ours, asked
from fa4_backend.bench.peers import FA3, FLASHINFER, Call, has_module, prepare, ready
from fa4_backend.bench.shape_cells import kinds
from fa4_backend.bench.timing import Flush, capture, cold_in_turns
from fa4_backend.compile_cache import ensure_objects
from fa4_backend.device import plan_on
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.plan import AttentionPlan, plan_attention

ARCH = "sm_90a"
NO_LIMIT = 1 << 16
OLD = "as if one added"
# name -> fields of the shape of the lists; of the key too with --keys
DECODE: dict[str, dict[str, int]] = {
    OLD: {"decode_part_blocks": 0, "decode_parts_ratio": 0},
    "ratio 8": {"decode_part_blocks": 2, "decode_parts_ratio": 8},
    "ratio 16": {"decode_part_blocks": 2, "decode_parts_ratio": 16},
    "ratio 16, always": {"decode_part_blocks": 2, "decode_parts_ratio": 16, "decode_share_vectors": 0},
    "2 tiles": {"decode_part_blocks": 2, "decode_parts_ratio": 0},
    "1 tile": {"decode_part_blocks": 1, "decode_parts_ratio": 0},
}
PREFILL: dict[str, dict[str, int]] = {
    OLD: {"most_part_quarters": NO_LIMIT},
    "4 quarters": {"most_part_quarters": 4},
    "10 quarters": {"most_part_quarters": 10},
    "10 quarters, 128 keys": {"most_part_quarters": 10, "min_part_blocks": 1},
}
# One row or few: in how many parts; of the lists alone, so that the kernel adds up as it is compiled.
IN_USE = "in use"
LONE: dict[str, dict[str, int]] = {IN_USE: {}} | {f"all from {n} vectors on": {"decode_share_vectors": n} for n in (64, 32, 24, 16, 0)}
LONE |= {
    "all, 1 tile": {"decode_share_vectors": 0, "decode_part_blocks": 1},
    "all, ratio 8": {"decode_share_vectors": 0, "decode_parts_ratio": 8},
    "all, ratio 32": {"decode_share_vectors": 0, "decode_parts_ratio": 32},
}
LONE_HEADS = ((16, 1, 128), (8, 1, 128), (16, 2, 128), (64, 8, 128), (32, 8, 128), (64, 8, 64))
ONE_ADDS = "one adds"
ONE_ADDS_DECODE, ONE_ADDS_PREFILL = {"share_vectors": 1 << 20}, {"share_parts": 0}


def cells() -> Iterator[BatchShape]:
    """What depends on it, shortest first."""
    for heads, kv_heads in ((32, 8), (16, 2)):
        for rows, kv in ((1, 1024), (1, 4096), (8, 1024), (8, 4096)):
            yield replace(uniform(rows, kv), num_q_heads=heads, num_kv_heads=kv_heads)
    for name in ("long-row", "one-kv-head"):
        yield from kinds()[name].batches
    yield from (batch for batch in kinds()["prefix"].batches if batch.max_query_len < 512)
    yield from ragged_batches()[2:4]
    yield from kinds()["drafts"].batches[:5]


def lone_cells() -> Iterator[BatchShape]:
    """One row, or four, of few KV heads."""
    for heads, kv_heads, head_dim in LONE_HEADS:
        for rows, kv in ((1, 4096), (1, 2048), (1, 1024), (1, 8192), (4, 4096)):
            yield replace(uniform(rows, kv), num_q_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)


def lone_variants(plan: AttentionPlan) -> dict[str, AttentionPlan]:
    """Variants of a plan's decode lists."""
    assert plan.kernels is not None
    works = {name: replace(plan.kernels.work, **fields) for name, fields in LONE.items()}
    return {name: replace(plan, kernels=replace(plan.kernels, work=work)) for name, work in works.items()}


def variants(plan: AttentionPlan, batch: BatchShape, *, with_keys: bool) -> dict[str, AttentionPlan]:
    """The plan's variants of the family that serves the batch's rows."""
    kernels = plan.kernels
    assert kernels is not None and kernels.prefill is not None
    is_decode = kernels.decode is not None and batch.max_query_len <= kernels.work.decode_query_len
    found = {
        name: replace(plan, kernels=replace(kernels, work=replace(kernels.work, **work)))
        for name, work in (DECODE if is_decode else PREFILL).items()
    }
    if with_keys:
        old = found[OLD].kernels
        assert old is not None
        if is_decode:
            old = replace(old, decode=replace(old.decode, **ONE_ADDS_DECODE))  # type: ignore[type-var]
        else:
            old = replace(old, prefill=replace(old.prefill, kernel=replace(kernels.prefill.kernel, **ONE_ADDS_PREFILL)))  # type: ignore[type-var]
        found[ONE_ADDS] = replace(plan, kernels=old)
    return found


def compile_all(arch: str, *, with_keys: bool, lone: bool) -> None:
    """Every kernel of every variant, in several processes."""
    keys: dict[Any, None] = {}
    for batch in lone_cells() if lone else cells():
        plan = plan_attention(*asked(batch, arch))
        for variant in (lone_variants(plan) if lone else variants(plan, batch, with_keys=with_keys)).values():
            keys |= dict.fromkeys(variant.keys)
    print(f"{len(keys)} kernels", flush=True)
    ensure_objects(keys)


def measure(batch: BatchShape, rounds: int, *, with_keys: bool, lone: bool) -> dict[str, float]:
    """Microseconds of every variant and of the peers."""
    tensors = BatchTensors.make(batch)
    problem, limits = asked(batch, ARCH)
    replays: dict[str, Call] = {}
    kept: list[Call] = []
    plan = plan_on(problem, limits, tensors.q.device)
    for name, variant in (lone_variants(plan) if lone else variants(plan, batch, with_keys=with_keys)).items():
        call = Ours.of_plan(variant, batch, tensors).call
        for _ in range(2):  # the second finds counters as the first left them
            tensors.out.fill_(float("nan"))
            call()
            tensors.worst_error(batch, name, must_hold=True)
        kept.append(call)
        replays[name] = capture(call)
    for peer in [FA3, *[FLASHINFER] * (lone and has_module("flashinfer"))]:
        peer_call = ready(peer, batch.label, partial(prepare, peer, batch, tensors))
        if peer_call is not None:
            kept.append(peer_call)
            replays[peer] = capture(peer_call)
    return cold_in_turns(replays, rounds, Flush.READ)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--keys", action="store_true", help="beside kernels in which the one that comes last adds up all, which are compiled for it"
    )
    parser.add_argument("--lone", action="store_true", help="rows that are cut into many parts, beside FA3 and FlashInfer")
    parser.add_argument("--compile", action="store_true", help="compile for sm_90a and stop; needs no GPU")
    parser.add_argument("--seconds", type=float, default=90.0, help="after which no cell is begun; compilation included")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    begin = time.monotonic()
    compile_all(ARCH, with_keys=arguments.keys, lone=arguments.lone)
    if arguments.compile:
        return
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    torch.manual_seed(0)
    found: dict[str, dict[str, float]] = {}
    for batch in lone_cells() if arguments.lone else cells():
        if time.monotonic() - begin > arguments.seconds:
            print(f"time is over before {batch.title}", file=sys.stderr)
            break
        us = found[batch.title] = measure(batch, arguments.rounds, with_keys=arguments.keys, lone=arguments.lone)
        print(f"{batch.title} | " + ", ".join(f"{name} {value:.1f}" for name, value in us.items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"stamp": gpu_stamp(None), "us": found}, indent=1))


if __name__ == "__main__":
    main()
