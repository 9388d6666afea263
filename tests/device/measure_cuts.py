"""How decode row groups are cut between CTAs, by time: `python -m tests.device.measure_cuts [--json FILE]`.

Batches are those of an engine, rows that differ by a block, and ragged ones, beside rows of one length; of latent attention and of K and V.
Variants are fields of the lists' shape, beside what is in use; those whose lists another one has already made are not timed again. Every
variant is checked against float32 before. FA3 is called as vLLM does. Kernels take turns, L2 is clean before each call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fa4_backend import AttentionMetadata, paged_attention
from fa4_backend.bench.batch import BatchTensors
from fa4_backend.bench.decode_batches import DecodeBatch
from fa4_backend.bench.mla import FA3, PEERS
from fa4_backend.bench.mla_batches import MlaBatch
from fa4_backend.bench.ours import asked
from fa4_backend.bench.peers import Call, has_module, prepare, ready
from fa4_backend.bench.timing import Flush, capture, cold_in_turns
from fa4_backend.device import plan_on
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.kernels.schedule.work_list import NUM_ENTRIES, PARTIAL_SLOT, WorkLists
from fa4_backend.plan import plan_attention
from tests.device.compiling import compile_lacking
from tests.device.mla_batches import Shape, Step, draw, judge

ARCH = "sm_90a"
IN_USE, SCHEDULE = "in use", "schedule"
OLD = "parts not weighed"
LINES, PARTS, LONE = "decode_lines", "decode_part_quarters", "lone_block_eighths"
# name -> fields of the shape of the lists
LATENT: dict[str, dict[str, int]] = {
    "as one line, parts not weighed": {LINES: 1, PARTS: 0},
    "as one line": {LINES: 1},
    OLD: {PARTS: 0},
} | {f"parts {quarters}, lone {eighths}": {PARTS: quarters, LONE: eighths} for quarters in (6, 12, 20) for eighths in (4, 6, 8)}
PAGED: dict[str, dict[str, int]] = {OLD: {PARTS: 0}} | {
    f"parts {quarters}, lone {eighths}": {PARTS: quarters, LONE: eighths} for quarters in (1, 3, 6, 12) for eighths in (5, 8)
}
# (rows, keys) of equal rows, and of rows that differ by up to half a block either way
EQUAL = ((128, 2112), (64, 4160))
APART = ((128, 2112), (64, 4160), (32, 2112), (50, 4160), (100, 4160), (200, 2112), (8, 4160))
RAGGED = {"64 x 1K..7K": (64, 1024, 7168), "32 x 512..8K": (32, 512, 8192), "160 x 256..4K": (160, 256, 4096)}
HEADS = ((32, 8), (16, 2))  # of queries, and of K and V


@dataclass(frozen=True)
class Cell:
    """What one batch took, by variant."""

    name: str
    us: dict[str, float]
    parts: dict[str, int]  # entries that are parts of a row group
    same: dict[str, str]  # variants whose lists are another one's


def lengths() -> Iterator[tuple[str, list[int]]]:
    """Batches: a name, and the keys of each row."""
    rng = random.Random(11)
    for rows, keys in EQUAL:
        yield f"{rows} x {keys}", [keys] * rows
    for rows, keys in APART:
        yield f"{rows} x {keys} +- 32", [keys + rng.randint(-32, 32) for _ in range(rows)]
    for name, (rows, least, most) in RAGGED.items():
        yield name, [rng.randint(least, most) for _ in range(rows)]


def latent_cell(
    heads: int, name: str, lens: list[int], variants: Mapping[str, dict[str, int]], *, rounds: int, batch_invariant: bool
) -> Cell:
    """A batch of latent attention.

    Raises:
        AssertionError: a variant is wrong.
    """
    shape = Shape(heads, batch_invariant=batch_invariant)
    a = draw(shape, [1] * len(lens), lens, 1, poison=False)
    found = Found()
    for label, fields in {IN_USE: {}, **variants}.items():
        step = Step(shape, a, max(lens), **fields)
        step.refresh()
        if found.is_other(label, step.work):
            for _ in range(2):  # the second finds counters as the first left them
                a.out.fill_(float("nan"))
                step.run()
            judge(a)
            found.take(label, step.run, step.refresh)
    if has_module("vllm") and not batch_invariant:
        whole = a._replace(q=a.q[: len(lens)], q_rope=a.q_rope[: len(lens)])
        peer = ready(FA3, name, partial(PEERS[FA3], MlaBatch(heads, len(lens), max(lens)), whole))  # type: ignore[arg-type]
        found.take(FA3, peer)
    return found.timed(f"latent {heads} heads, {name}" + ", invariant" * batch_invariant, rounds)


def paged_cell(heads: tuple[int, int], name: str, lens: list[int], variants: Mapping[str, dict[str, int]], *, rounds: int) -> Cell:
    """A batch of decode rows over K and V.

    Raises:
        AssertionError: a variant is wrong.
    """
    batch = paged_batch(heads, name, lens)
    tensors = BatchTensors.make(batch)
    plan = plan_on(*asked(batch, ARCH), tensors.q.device)
    assert plan.kernels is not None
    found = Found()
    for label, fields in {IN_USE: {}, **variants}.items():
        changed = replace(plan, kernels=replace(plan.kernels, work=replace(plan.kernels.work, **fields)))
        metadata = AttentionMetadata.allocate(changed, tensors.q.device)
        t, lists = tensors, metadata.work
        assert lists is not None and t.page_table is not None
        refresh = partial(
            metadata.refresh, cu_seqlens_q=t.cu_seqlens_q, seqused_k=t.seqused_k, max_seqlen_q=1, max_seqlen_k=max(lens)
        )  # fmt: skip
        call = partial(
            paged_attention, t.q, t.k_cache, t.v_cache, t.page_table, t.cu_seqlens_q, t.seqused_k,
            plan=changed, metadata=metadata, out=t.out,
        )  # fmt: skip
        refresh()
        if found.is_other(label, lists):
            for _ in range(2):
                t.out.fill_(float("nan"))
                call()
            t.worst_error(batch, label, must_hold=True)
            found.take(label, call, refresh)
    found.take(FA3, ready(FA3, batch.label, partial(prepare, FA3, batch, tensors)))
    return found.timed(batch.label, rounds)


def paged_batch(heads: tuple[int, int], name: str, lens: list[int]) -> DecodeBatch:
    """Rows of one query."""
    return DecodeBatch(name, tuple(lens), (1,) * len(lens), num_q_heads=heads[0], num_kv_heads=heads[1])


class Found:
    """Variants of a batch that have lists of their own."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.kept: list[Call] = []  # a graph holds addresses, not tensors
        self.lists: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.parts: dict[str, int] = {}
        self.same: dict[str, str] = {}

    def is_other(self, label: str, work: WorkLists) -> bool:
        """Whether nobody has made these lists."""
        counts = work.decode_first[:, NUM_ENTRIES].cpu()
        entries = work.decode_tiles[: counts.sum(), :11].cpu()
        for other, (known_counts, known) in self.lists.items():
            if torch.equal(counts, known_counts) and torch.equal(entries, known):
                self.same[label] = other
                return False
        self.lists[label] = counts, entries
        self.parts[label] = int((entries[:, PARTIAL_SLOT] >= 0).sum())
        return True

    def take(self, label: str, call: Call | None, refresh: Call | None = None) -> None:
        """Capture what is to be timed."""
        for name, function in ((label, call), (f"{SCHEDULE}, {label}", refresh if label in (IN_USE, OLD) else None)):
            if function is not None:
                self.kept.append(function)
                self.calls[name] = capture(function)

    def timed(self, name: str, rounds: int) -> Cell:
        """All in turns."""
        return Cell(name, cold_in_turns(self.calls, rounds, Flush.READ), self.parts, self.same)


def cells(kinds: list[str], rounds: int) -> Iterator[Callable[[], Cell]]:
    """Of the kinds asked for, one after the other."""
    two_lines = {"two lines": {LINES: 2}}
    for kind, (name, lens) in itertools.product(kinds, lengths()):
        if kind == "latent":
            yield from (partial(latent_cell, heads, name, lens, LATENT, rounds=rounds, batch_invariant=False) for heads in (128, 16))
        elif kind == "invariant":
            yield partial(latent_cell, 128, name, lens, two_lines, rounds=rounds, batch_invariant=True)
        elif kind == "paged":
            yield from (partial(paged_cell, heads, name, lens, PAGED, rounds=rounds) for heads in HEADS)
        else:
            raise ValueError(f"kind: expected latent, invariant or paged, got {kind!r}")


def compile_all(kinds: list[str]) -> None:
    """Every kernel, in several processes."""
    keys: dict[Any, None] = {}
    for kind, heads in (("latent", 128), ("latent", 16), ("invariant", 128)):
        if kind in kinds:
            keys |= dict.fromkeys(Shape(heads, batch_invariant=kind == "invariant").kernels(64, 8192)[0].keys)
    for _, lens in lengths():
        for paged_heads in HEADS if "paged" in kinds else ():
            plan = plan_attention(*asked(paged_batch(paged_heads, "", lens), ARCH))
            assert plan.kernels is not None
            keys |= dict.fromkeys(plan.kernels.keys)
    compile_lacking(list(keys))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kinds", default="latent,paged", help="of latent, invariant, paged; comma-separated")
    parser.add_argument("--variants", choices=("all", "few"), default="all", help="few: what is in use and parts not weighed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90a and stop; needs no GPU")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    compile_all(kinds)
    if args.compile_only:
        return
    if args.variants == "few":
        for table in (LATENT, PAGED):
            for name in [name for name in table if name.startswith("parts ") and name != OLD]:
                del table[name]
    torch.manual_seed(0)
    found: list[Cell] = []
    for cell in cells(kinds, args.rounds):
        try:
            found.append(cell())
        except AssertionError as failure:
            print(f"WRONG: {failure}", file=sys.stderr, flush=True)
            continue
        print(line(found[-1]), flush=True)
        if args.json:
            stamp = gpu_stamp(("schedule", "mla_decode", "decode"))
            args.json.write_text(json.dumps({"stamp": stamp, "cells": [asdict(c) for c in found]}, indent=1) + "\n")


def line(cell: Cell) -> str:
    """A batch: us and parts of each variant, and which lists are the same."""
    words = [f"{label}: {us:.1f}" + (f" ({cell.parts[label]})" if label in cell.parts else "") for label, us in cell.us.items()]
    same = "; ".join(f"{label} = {other}" for label, other in cell.same.items())
    return f"{cell.name} | {' | '.join(words)}" + (f" | {same}" if same else "")


if __name__ == "__main__":
    main()
