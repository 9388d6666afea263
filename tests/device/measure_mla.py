"""Where a latent decode kernel's time goes on a Hopper GPU, by differences: `python -m tests.device.measure_mla [--json FILE]`.

Short batches: one row of 0 keys (an empty list: launch, first look at the list), 64 (one block, nothing to add up), 128 (one block more),
and longer ones, cut into several numbers of parts; L2 full of other lines, and warm. FP8 latents: q in bfloat16 and in float16
beside 16-bit latents. Rows that differ in length: `tests.device.measure_cuts`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fa4_backend.bench.timing import Flush, capture, cold_in_turns, in_turns
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.kernels.mla_decode.config import NARROW_ROWS
from fa4_backend.problem import FP8
from tests.device.compiling import compile_lacking
from tests.device.mla_batches import Shape, Step, draw, judge

SHORT_KEYS = (0, 64, 128, 256, 512, 1024, 4096, 16384)
PARTS_RATIOS = (1, 4, 8, 16, 32, 64)
# (heads, queries, batch, keys) of FP8 latents
STORED = ((16, 1, 64, 16384), (16, 1, 64, 4096), (128, 1, 64, 4096), (128, 4, 64, 4096), (16, 1, 8, 4096), (16, 1, 1, 4096))
KINDS: dict[str, dict[str, Any]] = {"16 bits": {}, "e4m3": {"kv_dtype": FP8}, "e4m3, f16 q": {"kv_dtype": FP8, "dtype": "float16"}}
# Fields of the key, of at most `NARROW_ROWS` packed rows and of more.
NARROW_KINDS = {"e4m3, wgmma": (("narrow_rows", 0),)}
WIDE_KINDS = {f"e4m3, {blocks} ahead": (("prefetch_blocks", blocks),) for blocks in (0, 1)}


@dataclass(frozen=True)
class Row:
    """One line: times of the variants of a batch, us."""

    name: str
    cold: dict[str, float]
    warm: dict[str, float]


def prepared(shape: Shape, batch: int, keys: int, parts_ratio: int | None = None) -> Step:
    """A batch, its lists made, run once and judged."""
    a = draw(shape, [shape.query_len] * batch, [keys] * batch, 1)
    step = Step(shape, a, max(keys, 64), **({} if parts_ratio is None else {"decode_parts_ratio": parts_ratio}))
    step.refresh()
    step.run()
    if batch * keys <= 1 << 16:
        judge(a)
    return step


def short(heads: int) -> Iterator[Row]:
    """One row, as many parts as each ratio allows."""
    for keys in SHORT_KEYS:
        blocks = -(-keys // 64)
        ratios: dict[int, int] = {}
        for ratio in PARTS_RATIOS:
            ratios.setdefault(max(min(blocks, math.isqrt(ratio * blocks)), 1), ratio)
        steps = {f"{parts} parts": prepared(Shape(heads), 1, keys, ratio) for parts, ratio in ratios.items()}
        yield timed(f"h{heads} 1 x {keys}", steps)


def stored() -> Iterator[Row]:
    """FP8 latents."""
    for heads, queries, batch, keys in STORED:
        steps = {name: prepared(shape, batch, keys) for name, shape in kinds(heads, queries).items()}
        yield timed(f"h{heads} {batch} x {keys} q{queries}", steps)


def kinds(heads: int, queries: int) -> dict[str, Shape]:
    """Kernels to compare."""
    tuned = NARROW_KINDS if heads * queries <= NARROW_ROWS else WIDE_KINDS
    every = KINDS | {name: {"kv_dtype": FP8, "tuning": tuning} for name, tuning in tuned.items()}
    return {name: Shape(heads, queries, **kind) for name, kind in every.items()}


def timed(name: str, steps: dict[str, Step]) -> Row:
    """All in turns."""
    calls: dict[str, Callable[[], object]] = {label: capture(step.run) for label, step in steps.items()}
    return Row(name, cold_in_turns(calls, 4, Flush.READ), in_turns(calls, 3))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", default="short,stored", help="of them, comma-separated")
    parser.add_argument("--compile-only", action="store_true", help="compile the kernels, and do no more; needs no GPU")
    args = parser.parse_args()
    parts = args.parts.split(",")
    shapes = {Shape(16), Shape(128)}
    if "stored" in parts:
        shapes |= {shape for heads, queries, _, _ in STORED for shape in kinds(heads, queries).values()}
    compile_lacking(list({key for shape in shapes for key in shape.kernels(64, 16384)[0].keys}))
    if args.compile_only:
        return
    table = []
    every = {"short": (short(128), short(16)), "stored": (stored(),)}
    for rows in (rows for part in parts for rows in every[part]):
        for row in rows:
            table.append({"name": row.name, "cold": row.cold, "warm": row.warm})
            line = "  ".join(f"{label}: {us:.1f} ({row.warm[label]:.1f} warm)" for label, us in row.cold.items())
            print(f"{row.name:18s} {line}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"stamp": gpu_stamp(("schedule", "mla_decode")), "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
