"""Tiles of the Hopper prefill kernel and choices of the host in turns, FA3 and another checkout beside them: what the rows of
`kernels/sm90/tuning.py` and the schedule's rates come from.

    python -m tests.device.measure_tiles --kinds d96 --only "16K|32 x 1K" --tiles "tile_n=144,kv_stage=5" "tile_m=192,tile_n=112,kv_stage=6"
    python -m tests.device.measure_tiles --kinds mixed --tiles decode_tile_ticks=24 decode_full_sms=90
    python -m tests.device.measure_tiles --kinds packed-rows --tiles "prefill tiles" "prefill tiles,ping_pong=0,tile_m=64,kv_stage=12"
    python -m tests.device.measure_tiles --kinds full,heads --tiles "no pages"
    python -m tests.device.measure_tiles --kinds windows,mixed --other FOLDER

Cells are those of `fa4 bench shapes` and of `fa4 bench prefill`, "packed-rows" and "packed-mixed" of one KV head, and with "fp8-" before a
kind those with K and V in FP8; the first figure of a cell is of what is in use, narrow tiles included (`fa4_backend/narrow_tiles.py`),
which no variant has. A variant is a list of fields of `TileShape` or `WorkShape`, and of words:

    prefill tiles          decode rows go to the prefill kernel, whose tiles are cut along KV
    invariant              batch-invariant mode
    exact                  exact mode
    piece_keys=1024        keys of a short piece in both
    no pages               the same batch over dense K and V

FOLDER is as in `compare_versions`. Kernels that the cache lacks are compiled by several processes first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fa4_backend.bench import dense_peers
from fa4_backend.bench.batch import BatchShape, BatchTensors
from fa4_backend.bench.decode_batches import issue_batches, uniform, with_chunk
from fa4_backend.bench.ours import Ours, asked, gpu_arch
from fa4_backend.bench.peers import FA3, WIDE, prepare, ready
from fa4_backend.bench.prefill_batches import named_batches
from fa4_backend.bench.shape_cells import kinds
from fa4_backend.bench.timing import Flush, capture, cold_in_turns, matmul_tflop_per_s
from fa4_backend.compile import CompileError
from fa4_backend.compile_cache import ensure_object
from fa4_backend.device import plan_on
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.kernels.common.prefill_config import TileShape
from fa4_backend.kernels.schedule.work_list import WorkShape
from fa4_backend.kernels.sm90 import config as sm90_config
from fa4_backend.kernels.sm90.tuning import TILES, WINDOW_TILES
from fa4_backend.plan import AttentionPlan, plan_attention
from fa4_backend.problem import FP8, RAGGED, AttentionProblem, BatchLimits
from fa4_backend.prompt_tiles import OTHER_TILES
from tests.device.compare_versions import OTHER, borrow
from tests.support.fuzz import prefill_plan

IN_USE = "in use"
PREFILL_TILES, INVARIANT, EXACT, NO_PAGES = "prefill tiles", "invariant", "exact", "no pages"  # words of a variant
WORDS = (PREFILL_TILES, INVARIANT, EXACT, NO_PAGES)
PIECE_KEYS = "piece_keys"
PROCESSES = max(1, (os.cpu_count() or 2) - 2)  # that compile
Planner = Callable[[AttentionProblem, BatchLimits], AttentionPlan]
Shape = TypeVar("Shape", TileShape, WorkShape)


@contextmanager
def tile_of(batch: BatchShape, changes: str) -> Iterator[None]:
    """Plans made inside have the table's tile with other fields, "tile_n=144,kv_stage=5", whatever the heads; or what is in use."""
    dims = batch.head_dim, batch.value_dim
    table = WINDOW_TILES if batch.mask.window and dims in WINDOW_TILES else TILES
    kept, others = table[dims], dict(OTHER_TILES)
    table[dims] = changed(kept, changes)
    if changes != IN_USE:
        OTHER_TILES.clear()
    try:
        yield
    finally:
        table[dims] = kept
        OTHER_TILES.update(others)


@contextmanager
def pieces_of(words: list[str]) -> Iterator[None]:
    """Plans made inside have pieces as "piece_keys=1024" among the words says, or as the table does."""
    kept = sm90_config.PIECE_KEYS, sm90_config.DECODE_PIECE_KEYS
    for word in words:
        if word.startswith(f"{PIECE_KEYS}="):
            sm90_config.PIECE_KEYS = sm90_config.DECODE_PIECE_KEYS = int(word.split("=")[1])
    try:
        yield
    finally:
        sm90_config.PIECE_KEYS, sm90_config.DECODE_PIECE_KEYS = kept


def changed(shape: Shape, changes: str) -> Shape:
    """`shape` with those of the fields "tile_n=144,decode_full_sms=100" that are its own."""
    pairs = [item.split("=") for item in changes.split(",") if "=" in item]
    types = {f.name: type(getattr(shape, f.name)) for f in fields(shape)}
    return replace(shape, **{name: types[name](float(value)) for name, value in pairs if name in types})


def cells(kind_names: str, pattern: str) -> list[BatchShape]:
    """The cells of the kinds and sets whose title matches; sets of `fa4 bench decode` are called decode-NAME."""
    every = {name: list(kind.batches) for name, kind in kinds().items()} | {name: list(b) for name, b in named_batches().items()}
    every |= {f"decode-{name}": list(batches) for name, batches in issue_batches().items()}
    every |= {"packed-rows": packed_rows(), "packed-mixed": packed_mixed()}
    every |= {f"fp8-{name}": [replace(b, kv_dtype=FP8) for b in batches] for name, batches in every.items()}
    return [b for name in kind_names.split(",") for b in every[name] if re.search(pattern, b.title)]


def packed_rows() -> list[BatchShape]:
    """One KV head with 24 to 96 query heads, few rows and many; drafts of wide heads."""
    heads = ((24, 64), (32, 64), (48, 64), (64, 64), (96, 64), (48, 96), (96, 96), (32, 128), (48, 128), (96, 128))
    sizes = ((1, 4096), (8, 4096), (64, 1024), (64, 4096))
    of_one = [replace(uniform(*size), num_q_heads=n, num_kv_heads=1, head_dim=dim) for n, dim in heads for size in sizes]
    drafts = [uniform(rows, 4096, queries) for queries in (5, 8) for rows in (1, 16, 64)]
    return of_one + [replace(batch, num_q_heads=16, num_kv_heads=2, head_dim=256) for batch in drafts]


def packed_mixed() -> list[BatchShape]:
    """Such heads' decode rows beside a message and beside a chunk, where the decode kernel serves them."""
    steps = [with_chunk("32 x 4K + 64 tokens of 32K", 32, 4096, 64, 32768), with_chunk("32 x 4K + a 2K chunk of 6K", 32, 4096, 2048, 6144)]
    return [replace(step, num_q_heads=n, num_kv_heads=1, head_dim=dim) for n, dim in ((48, 64), (64, 64), (48, 96)) for step in steps]


def batch_of(variant: str, batch: BatchShape) -> BatchShape:
    """The batch that a variant is called with."""
    return replace(batch, kv_source=RAGGED) if NO_PAGES in variant.split(",") else batch


def plan_of(variant: str, batch: BatchShape, arch: str, planner: Planner) -> AttentionPlan:
    """What a variant's plan is, of `batch_of` it.

    Raises:
        ValueError: a word is no field of a shape and none of the variants.
    """
    words = variant.split(",")
    known = {f.name for shape in (TileShape, WorkShape) for f in fields(shape)} | {IN_USE, PIECE_KEYS, *WORDS}
    if strange := [w for w in words if w.split("=")[0] not in known]:
        raise ValueError(f"variant: expected fields of TileShape or WorkShape, or words that are explained above, got {', '.join(strange)}")
    is_exact = EXACT in words
    with tile_of(batch, variant), pieces_of(words):
        plan = planner(*asked(batch, arch, batch_invariant=is_exact or INVARIANT in words, exact=is_exact))
    plan = prefill_plan(plan) if PREFILL_TILES in words else plan
    assert plan.kernels is not None
    work = replace(plan.kernels.work, decode_query_len=0) if PREFILL_TILES in words else plan.kernels.work
    kernels = replace(plan.kernels, work=changed(work, variant))
    if kernels.converted is not None:
        kernels = replace(kernels, converted=replace(kernels.converted, work=changed(kernels.converted.work, variant)))
    return plan if variant == IN_USE else replace(plan, kernels=kernels, narrow=None, messages=None)


def call_of(variant: str, batch: BatchShape, tensors: BatchTensors) -> Callable[[], object] | None:
    """A variant's call of the operator, on tensors of its `batch_of`."""
    if variant in (FA3, WIDE):
        return prepare(variant, batch, tensors)
    if variant == dense_peers.FLASH_ATTN_4:
        return dense_peers.prepare(variant, batch, tensors)
    if variant == OTHER:
        return importlib.import_module(f"{OTHER}.bench.ours").Ours.make(batch, tensors).call
    plan = plan_of(variant, batch, gpu_arch(), lambda problem, limits: plan_on(problem, limits, tensors.q.device))
    return Ours.of_plan(plan, batch, tensors).call


def compile_in_processes(jobs: list[tuple[str, str, str, str, str, int]], processes: int) -> None:
    """`compile_kernels` of each job."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_kernels, jobs))


def compile_kernels(job: tuple[str, str, str, str, str, int]) -> None:
    """Compile a cell's kernels of one variant, in a process of its own; kernels are those for `num_sms`. A tile that does not compile is
    named and left out."""
    folder, variant, arch, kind_names, title, num_sms = job
    batch = batch_of(variant, next(b for b in cells(kind_names, "") if b.title == title))
    ensure = ensure_object
    if variant == OTHER:
        sys.path.insert(0, folder)
        ask = importlib.import_module(f"{OTHER}.bench.ours").asked
        plan = importlib.import_module(f"{OTHER}.plan").plan_attention(*ask(batch, arch), num_sms=num_sms)
        keys = plan.keys if hasattr(plan, "keys") else plan.kernels.keys
        ensure = importlib.import_module(f"{OTHER}.compile_cache").ensure_object
    else:
        keys = plan_of(variant, batch, arch, partial(plan_attention, num_sms=num_sms)).keys
    try:
        for key in keys:
            ensure(key)
    except CompileError as error:
        print(f"{batch.title}, {variant}: {str(error)[-300:]}", flush=True)


def time_cell(batch: BatchShape, variants: list[str], rounds: int) -> dict[str, tuple[float, float]]:
    """Variant -> (microseconds, largest error); FA3's last, where it is installed.

    Raises:
        RuntimeError: the tile in use or the other checkout is wrong.
    """
    torch.manual_seed(0)
    paged = BatchTensors.make(batch)
    replays, kept, errors = {}, [], {}
    for variant in [*variants, FA3, *([WIDE] if batch.kv_dtype == FP8 else [])]:
        own = batch_of(variant, batch)
        tensors = paged if own is batch else BatchTensors.make(own)
        tensors.out.fill_(float("nan"))
        call = ready(variant, batch.label, partial(call_of, variant, own, tensors), must_run=variant in (IN_USE, OTHER))
        if call is not None:
            errors[variant] = tensors.worst_error(own, variant, must_hold=variant in (IN_USE, OTHER))
            kept.append(call)
            replays[variant] = capture(call)
    return {name: (us, errors[name]) for name, us in cold_in_turns(replays, rounds, Flush.READ).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", required=True, help="comma-separated kinds of `fa4 bench shapes`, sets of `fa4 bench prefill`, decode-SET"
    )
    parser.add_argument("--only", default="", help="cells whose title matches this regular expression")
    parser.add_argument("--tiles", nargs="*", default=[], help="variants: tile_n=144,kv_stage=5 or decode_full_sms=90 or prefill tiles")
    parser.add_argument("--other", type=Path, help="another checkout, timed beside this one")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--compile-for", default="", help="compile for this arch and time nothing")
    parser.add_argument("--num-sms", type=int, default=132, help="of the GPU that --compile-for compiles for")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = cells(options.kinds, options.only)
    variants = [IN_USE, *options.tiles, *([OTHER] if options.other else [])]
    with tempfile.TemporaryDirectory() as folder:
        if options.other:
            borrow(options.other, Path(folder))
        arch, num_sms = options.compile_for, options.num_sms
        if not arch:
            arch = gpu_arch()
            num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        compile_in_processes([(folder, v, arch, options.kinds, b.title, num_sms) for b in chosen for v in variants], options.processes)
        if not options.compile_for:
            rows = measure(chosen, variants, options.rounds)
            if options.json:
                options.json.write_text(json.dumps({"stamp": gpu_stamp(), "rows": rows}, indent=1) + "\n")


def measure(chosen: list[BatchShape], variants: list[str], rounds: int) -> list[dict[str, Any]]:
    """Time and print every cell; a row a cell."""
    matmul, rows = matmul_tflop_per_s(), []
    print(f"{torch.cuda.get_device_name()}, matmul {matmul:.0f} TFLOP/s", flush=True)
    for batch in chosen:
        times = time_cell(batch, variants, rounds)
        base = FA3 if FA3 in times else OTHER if OTHER in times else IN_USE
        print(batch.title)
        for name, (us, error) in times.items():
            rate = batch.flops / us / 1e6
            share = f"{rate:6.1f} TFLOP/s, {rate / matmul:.2f} of the matmul"
            print(f"  {name:34s} {us:8.1f} us {share}, {times[base][0] / us:.3f} of {base}, error {error:.1e}", flush=True)
        rows.append({"cell": batch.title, "us": {name: round(us, 2) for name, (us, _) in times.items()}, "matmul_tflop_per_s": matmul})
    return rows


if __name__ == "__main__":
    main()
