"""Tiles of the Hopper prefill kernel in turns, FA3 beside them: what the rows of `kernels/sm90/tuning.py` come from.

    python -m tests.device.measure_tiles --kinds d96 --only "16K|32 x 1K" --tiles "tile_n=144,kv_stage=5" "tile_m=192,tile_n=112,kv_stage=6"

Cells are those of `fa4 bench shapes` and of `fa4 bench prefill`; the first figure of a cell is of the tile in use. Kernels that the cache
lacks are compiled.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fa4_backend.bench.batch import BatchTensors
from fa4_backend.bench.ours import Ours, asked
from fa4_backend.bench.peers import FA3, prepare, ready
from fa4_backend.bench.prefill_batches import PrefillBatch, named_batches
from fa4_backend.bench.shape_cells import kinds
from fa4_backend.bench.timing import Flush, capture, cold_in_turns, matmul_tflop_per_s
from fa4_backend.compile_cache import ensure_object
from fa4_backend.kernels.sm90.tuning import TILES
from fa4_backend.plan import plan_attention

IN_USE = "in use"


@contextmanager
def tile_of(batch: PrefillBatch, changes: str) -> Iterator[None]:
    """Plans made inside have a tile with other fields: "tile_n=144,kv_stage=5"."""
    dims = batch.head_dim, batch.value_dim
    kept = TILES[dims]
    fields: dict[str, Any] = {} if changes == IN_USE else {name: float(x) for name, x in (item.split("=") for item in changes.split(","))}
    TILES[dims] = replace(kept, **{name: x if name == "rescale_threshold" else type(getattr(kept, name))(x) for name, x in fields.items()})
    try:
        yield
    finally:
        TILES[dims] = kept


def time_cell(batch: PrefillBatch, variants: list[str], rounds: int) -> dict[str, tuple[float, float]]:
    """Variant -> (microseconds, largest error); FA3's last.

    Raises:
        RuntimeError: a variant is wrong.
    """
    torch.manual_seed(0)
    tensors = BatchTensors.make(batch)
    replays, kept, errors = {}, [], {}
    for variant in [*variants, FA3]:
        tensors.out.fill_(float("nan"))
        with tile_of(batch, IN_USE if variant == FA3 else variant):
            maker = partial(prepare, FA3, batch, tensors) if variant == FA3 else lambda: Ours.make(batch, tensors).call
            call = ready(variant, batch.label, maker, must_run=variant != FA3)
        if call is not None:
            errors[variant] = tensors.worst_error(batch, variant, must_hold=variant != FA3)
            kept.append(call)
            replays[variant] = capture(call)
    return {name: (us, errors[name]) for name, us in cold_in_turns(replays, rounds, Flush.READ).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", required=True, help="comma-separated kinds of `fa4 bench shapes` or sets of `fa4 bench prefill`")
    parser.add_argument("--only", default="", help="cells whose title matches this regular expression")
    parser.add_argument("--tiles", nargs="*", default=[], help="fields of TileShape: tile_n=144,kv_stage=5")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--compile-for", default="", help="compile for this arch and time nothing")
    options = parser.parse_args()
    every = {name: list(kind.batches) for name, kind in kinds().items()} | {name: list(b) for name, b in named_batches().items()}
    cells = [b for name in options.kinds.split(",") for b in every[name] if re.search(options.only, b.title)]
    variants = [IN_USE, *options.tiles]
    if not options.compile_for:
        print(f"{torch.cuda.get_device_name()}, matmul {matmul_tflop_per_s():.0f} TFLOP/s", flush=True)
    for batch in (b for b in cells if isinstance(b, PrefillBatch)):
        if options.compile_for:
            for variant in variants:
                with tile_of(batch, variant):
                    kernels = plan_attention(*asked(batch, options.compile_for)).kernels
                for key in kernels.keys if kernels else ():
                    ensure_object(key)
            continue
        times = time_cell(batch, variants, options.rounds)
        print(batch.title)
        for name, (us, error) in times.items():
            ratio = f"{times[FA3][0] / us:.3f} of FA3, " if FA3 in times else ""
            print(f"  {name:34s} {us:8.1f} us {batch.flops / us / 1e6:6.1f} TFLOP/s, {ratio}error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
