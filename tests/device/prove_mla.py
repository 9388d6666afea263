"""Proof of the latent decode kernel on a Hopper GPU: `python -m tests.device.prove_mla --json FILE`.

Parts: `fuzz`, random poisoned batches against a float32 oracle, each a replay of a captured graph (`latent_fuzz.py`); `long`, some of one
row of up to 131,072 keys, one by one; `bits`, the same bits for every page size, and in batch-invariant mode alone and in a batch;
`graphs`, a captured step replayed with other lengths; `small`, a batch of every shape, drawn and judged on the CPU. Many batches:
`--parts fuzz --batches 20000 --seconds 90`. Times: `fa4 bench mla`, and `tests.device.measure_mla`.

Shapes are dealt out to `--processes`, over all visible GPUs in turns: while one makes its graphs the others replay theirs.

For compute-sanitizer, which makes everything slow that it watches: `compute-sanitizer --tool memcheck --kernel-name kns=kernel_cutlass
python -m tests.device.prove_mla --parts small --seconds 45`, and racecheck likewise (`racecheck_mla.py` says what of it is a false alarm);
`--first 11` begins with another shape. With the filter it watches our two kernels alone; batches have 1 to 3 rows and CTAs without work.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fa4_backend.bench.timing import capture
from fa4_backend.compile import CompileKey
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.problem import FP8
from tests.device.compiling import compile_lacking
from tests.device.latent_fuzz import KINDS, fuzz_graphs
from tests.device.mla_batches import DEVICE, Shape, Step, draw, judge
from tests.support.emulated_mla import DIM, Latent

# Every number of heads that fills a tile otherwise, 1 to 8 queries, pages of 16 to 128 and one that no tile is a multiple of.
FUZZ_SHAPES = (
    Shape(16), Shape(128), Shape(128, 4), Shape(16, 4, 16), Shape(64, 8, 128), Shape(8, 3, 48), Shape(24, 3, 32),
    Shape(128, 2, batch_invariant=True), Shape(16, 1, 16, batch_invariant=True), Shape(32, 2, dtype="float16"),
    Shape(16, kv_dtype=FP8), Shape(128, 2, 16, kv_dtype=FP8), Shape(8, 8, 32), Shape(40, 5), Shape(96, 6, 16), Shape(128, 8, 32),
    Shape(64, 7), Shape(16, 2, kv_dtype=FP8), Shape(8, 1, 16, kv_dtype=FP8), Shape(64, 3, 128, kv_dtype=FP8),
    Shape(16, 1, 32, dtype="float16", kv_dtype=FP8), Shape(16, 1, batch_invariant=True, kv_dtype=FP8),
    Shape(48, 1, 32), Shape(56, 3, 16), Shape(72, 2, 128), Shape(80, 4, kv_dtype=FP8), Shape(88, 5, 16), Shape(104, kv_dtype=FP8),
    Shape(112, 7, 32), Shape(120, 1, 16, dtype="float16"), Shape(20, 2), Shape(33, 1, 16), Shape(100, kv_dtype=FP8),
)  # fmt: skip
PAGES = (16, 32, 64, 128, 48)
GRAPH_SHAPE = Shape(128, 2)
# (rows, longest KV) of a batch, and the chance of it
LONG_ROWS = {(1, 131072): 1}
SMALL_ROWS = {(3, 200): 1, (2, 330): 1, (1, 700): 1}
FEW_PARTS = 1  # `WorkShape.decode_parts_ratio`: CTAs of a short row have several blocks


def lengths(shape: Shape, rng: random.Random, rows_of: dict[tuple[int, int], int]) -> tuple[list[int], list[int]]:
    """Query and KV lengths of a batch: ragged, many of them 0, 1 or at an edge of a block."""
    rows, longest = rng.choices(list(rows_of), list(rows_of.values()))[0]
    query_lens = [rng.randint(0, shape.query_len) for _ in range(rows)]
    kv_lens = []
    for _ in range(rows):
        any_length = rng.randint(1, longest)
        edge = min(longest, max(0, any_length // 64 * 64 + rng.randint(-1, 1)))
        kv_lens.append(rng.choice((0, 1, longest, edge, any_length, any_length)))
    return query_lens, kv_lens


def fuzz(
    first: int,
    batches: int,
    seconds: float,
    rows_of: dict[tuple[int, int], int],
    device: str = DEVICE,
    parts_ratio: int | None = None,
) -> dict[str, Any]:
    """Random batches `first .. first + batches` of every shape in turns, each run twice, or as many as `seconds` allow.

    Args:
        device: that draws and judges; on a CPU nothing but copies and our kernels runs on the GPU.
        parts_ratio: `WorkShape.decode_parts_ratio`; None: as the kernel is tuned.

    Raises:
        AssertionError: a batch is wrong; the message has all that makes it.
    """
    begin, worst, seen = time.monotonic(), [0.0, 0.0], Counter[str]()
    work = {} if parts_ratio is None else {"decode_parts_ratio": parts_ratio}
    index = first
    while index < first + batches and time.monotonic() - begin < seconds:
        shape = FUZZ_SHAPES[index % len(FUZZ_SHAPES)]
        rng = random.Random(index)
        query_lens, kv_lens = lengths(shape, rng, rows_of)
        a = on(DEVICE, draw(shape, query_lens, kv_lens, index, peaked=rng.choice((1.0, 1.0, 20.0)), device=device))
        step = Step(shape, a, max(*kv_lens, 1), **work)
        step.refresh()
        for _ in range(2):  # counters are back at 0
            a.out.fill_(math.nan)
            a.lse.fill_(math.nan)
            step.run()
        try:
            shares = judge(on(device, a))
        except AssertionError as failure:
            raise AssertionError(f"batch {index}, {shape}, query_lens {query_lens}, kv_lens {kv_lens}: {failure}") from failure
        worst = [max(x, y) for x, y in zip(worst, shares, strict=True)]
        seen[str(shape)] += 1
        seen["rows"] += len(kv_lens)
        seen["rows without a key"] += kv_lens.count(0)
        seen["rows of one token"] += kv_lens.count(1)
        seen["rows without a query"] += query_lens.count(0)
        seen["longest row"] = max(seen["longest row"], *kv_lens)
        index += 1
    return {
        "first": first, "next": index, "batches": index - first, "worst_share_out": worst[0], "worst_share_lse": worst[1],
        "seconds": round(time.monotonic() - begin), "seen": dict(seen),
    }  # fmt: skip


def on(device: str, a: Latent) -> Latent:
    """The same batch on a device."""
    return Latent(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in a))


def same_bits() -> dict[str, Any]:
    """Every page size, repeated launches, and in batch-invariant mode alone and in a batch."""

    def run(shape: Shape, a: Latent) -> torch.Tensor:
        step = Step(shape, a, 6000)
        step.refresh()
        step.run()
        return a.out[:-3].clone()

    first = None
    for page_size in PAGES:
        shape = Shape(128, 1, page_size)
        a = draw(shape, [1, 1], [5000, 777], 5, poison=False)
        # The same tokens whatever the pages: written through the page table.
        generator = torch.Generator(DEVICE).manual_seed(9)
        for i, n in enumerate((5000, 777)):
            tokens = torch.randn(n, DIM, generator=generator, device=DEVICE, dtype=torch.bfloat16)
            at = torch.arange(n, device=DEVICE)
            a.latent_cache[a.page_table[i, at // page_size].long(), at % page_size] = tokens
        a.q.copy_(torch.randn(a.q.shape, generator=generator, device=DEVICE, dtype=a.q.dtype))
        a.q_rope.copy_(torch.randn(a.q_rope.shape, generator=generator, device=DEVICE, dtype=a.q.dtype))
        for _ in range(3):
            out = run(shape, a)
            first = out if first is None else first
            assert torch.equal(out, first), f"page size {page_size}: other bits"
    for shape in (Shape(128, 2, batch_invariant=True), Shape(16, 1, 16, batch_invariant=True)):
        kv_lens = [5000, 900, 3000, 64, 1, 4097]
        queries = [shape.query_len] * len(kv_lens)
        a = draw(shape, queries, kv_lens, 6)
        together = run(shape, a)
        for i, n in enumerate(kv_lens):
            rows = slice(i * shape.query_len, (i + 1) * shape.query_len)
            padded = slice(rows.start, rows.stop + 3)
            alone = a._replace(
                q=a.q[padded], q_rope=a.q_rope[padded], page_table=a.page_table[i : i + 1], seqused_k=a.seqused_k[i : i + 1].clone(),
                cu_seqlens_q=torch.tensor([0, shape.query_len], device=DEVICE).int(), out=torch.empty_like(a.out[padded]),
                lse=torch.empty(shape.heads, shape.query_len + 3, device=DEVICE),
            )  # fmt: skip
            assert torch.equal(run(shape, alone), together[rows]), f"{shape}, row of {n}: other bits alone"
    return {"page_sizes": len(PAGES)}


def graphs() -> dict[str, Any]:
    """A captured schedule and launch, replayed with other lengths."""
    shape, count = GRAPH_SHAPE, 0
    a = draw(shape, [2] * 8, [3000] * 8, 7, poison=False)
    step = Step(shape, a, 3000)
    replay = capture(lambda: (step.refresh(), step.run()))
    for seed in range(20):
        rng = random.Random(seed)
        a.seqused_k.copy_(torch.tensor([rng.randint(0, 3000) for _ in range(8)]))
        lens = [rng.randint(0, 2) for _ in range(8)]
        a.cu_seqlens_q.copy_(torch.tensor([0, *lens]).cumsum(0))
        a.out.fill_(math.nan)
        a.lse.fill_(math.nan)
        replay()
        a.q[int(a.cu_seqlens_q[-1]) :].nan_to_num_()
        judge(a)
        count += 1
    return {"replays": count}


def fuzz_side_by_side(processes: int, batches: int, seconds: float, seed: int) -> dict[str, Any]:
    """`fuzz_graphs` of all shapes, which processes share; each draws from a seed of its own.

    Raises:
        AssertionError: a batch was wrong.
    """
    begin = time.monotonic()
    shares = [FUZZ_SHAPES[i::processes] for i in range(processes)]
    counts = [-(-batches * len(share) // len(FUZZ_SHAPES)) for share in shares]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(fuzz_share, range(processes), shares, counts, [seconds] * processes, [seed + i for i in range(processes)]))
    summed = ("batches", "rows", "rows without a key", "rows of one token", "rows without a query", "failures")
    highest = ("longest row", "worst_share_out", "worst_share_lse")
    return {
        **{name: sum(result[name] for result in results) for name in summed}, **{name: max(r[name] for r in results) for name in highest},
        "seeds": [result["seed"] for result in results], "seconds": round(time.monotonic() - begin),
        "seen": {shape: count for result in results for shape, count in result["seen"].items()},
    }  # fmt: skip


def fuzz_share(index: int, shapes: tuple[Shape, ...], batches: int, seconds: float, seed: int) -> dict[str, Any]:
    """One process's shapes, on the GPU whose turn it is."""
    torch.cuda.set_device(index % torch.cuda.device_count())
    return fuzz_graphs(shapes, batches, seconds, seed)


def all_keys() -> list[CompileKey]:
    """Of every part."""
    shapes = (*FUZZ_SHAPES, *(Shape(128, 1, page) for page in PAGES), GRAPH_SHAPE)
    limits = [(kind.rows, kind.longest) for kind in KINDS] + [*LONG_ROWS, *SMALL_ROWS]
    return list(dict.fromkeys(key for shape in shapes for limit in limits for key in shape.kernels(*limit)[0].keys))


def small_keys() -> list[CompileKey]:
    """Of part `small`."""
    return list(dict.fromkeys(key for shape in FUZZ_SHAPES for limit in SMALL_ROWS for key in shape.kernels(*limit)[0].keys))


def small(first: int, seconds: float) -> dict[str, Any]:
    """A batch of every shape, rows in few parts: what a sanitizer can watch."""
    return fuzz(first, len(FUZZ_SHAPES), seconds, SMALL_ROWS, "cpu", FEW_PARTS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="fuzz,long,bits,graphs", help="of fuzz, long, bits, graphs, small; comma-separated")
    parser.add_argument("--batches", type=int, default=2200, help="of fuzz")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which fuzz, or small, starts no batch")
    parser.add_argument("--processes", type=int, default=3, help="that share fuzz")
    parser.add_argument("--first", type=int, default=0, help="seed of fuzz; number of the first batch of small")
    parser.add_argument("--compile-only", action="store_true", help="compile all kernels for sm_90a, and do no more; needs no GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.parts.split(",")
    compile_lacking(all_keys())
    if args.compile_only:
        return
    results: dict[str, Any] = {"stamp": gpu_stamp(("schedule", "mla_decode"))}
    parts: dict[str, Callable[[], Any]] = {
        "fuzz": lambda: fuzz_side_by_side(args.processes, args.batches, args.seconds, args.first), "bits": same_bits, "graphs": graphs,
        "long": lambda: fuzz(0, 2 * len(FUZZ_SHAPES), args.seconds, LONG_ROWS),
        "small": lambda: small(args.first, args.seconds),
    }  # fmt: skip
    for name in names:
        begin = time.monotonic()
        try:
            results[name] = parts[name]()
        except AssertionError as failure:
            results[name] = {"failed": str(failure)}
        print(name, results[name], f"{time.monotonic() - begin:.0f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
