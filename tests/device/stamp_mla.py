"""Where the time of a short latent decode goes, by the SMs' clocks: `python -m tests.device.stamp_mla [--compile-only] [--json FILE]`.

The kernel of 16-bit latents is compiled with stamps: a thread of the load warp and one of the consumers write the SM's cycle counter and
the global timer behind the work list as they pass. Given are medians over launches, L2 cold and warm, of the CTAs' medians: cycles since
the CTA's first instruction, in microseconds at `MHZ`; and how far apart CTAs begin and end.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import cutlass
import cutlass.cute as cute
import numpy as np
import torch
from cutlass import Int32
from cutlass._mlir.extras import types as T

from fa4_backend import envs
from fa4_backend.bench.timing import Flush, capture, cold_in_turns, in_turns
from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.mla_decode.consumer_warpgroup import ConsumerWarpgroup
from fa4_backend.kernels.mla_decode.load_warp import LoadWarp
from fa4_backend.kernels.mla_decode.merge import Merge
from fa4_backend.kernels.mla_decode.part_weights import PartWeights
from fa4_backend.kernels.mla_decode.storage import MlaStorage
from fa4_backend.kernels.schedule.work_list import DECODE_INTS
from tests.device.compiling import compile_lacking
from tests.device.mla_batches import Shape, Step, draw, judge

LOADER, CONSUMER = 0, 128  # threads that stamp
# (role, method, what has been done when it begins and when it ends; "": no stamp)
WATCHED: tuple[tuple[type, str, str, str], ...] = (
    (LoadWarp, "_load_query", "load: entry known", "load: Q asked for"),
    (LoadWarp, "_load_block", "", "load: block asked for"),
    (ConsumerWarpgroup, "_rows", "Q there", ""),
    (ConsumerWarpgroup, "_weights", "scores", "softmax"),
    (ConsumerWarpgroup, "_publish", "", "weights handed on"),
    (Merge, "finish_piece", "products with V", "slot written"),
    (Merge, "join_parts", "", "end"),
    (Merge, "_add_up", "all parts have come", "share written"),
    (PartWeights, "weigh", "statistics there", "parts weighed"),
    (Merge, "_await_vectors", "", "share there"),
)
PLACES = ("begin", "roles", *(name for _, _, *both in WATCHED for name in both if name))
SHAPES = ((128, 0), (128, 64), (128, 1024), (128, 4096), (128, 16384), (16, 0), (16, 64), (16, 4096))
MAX_CTAS, LAUNCHES = 256, 9
MHZ = 1980.0  # the highest clock, near which short kernels run
STAMP_ROWS = -(-MAX_CTAS * len(PLACES) * 2 // DECODE_INTS)  # of the work list, at its end
STEPS: list[Any] = []  # of the kernel that is being traced
BEGIN: list[tuple[Int32, Int32]] = []


def now() -> tuple[Int32, Int32]:
    """The SM's cycles and the GPU's nanoseconds, low words."""
    return tuple(Int32(ptx.inline_asm(f"mov.u32 $0, %{name};", [], T.i32(), "=r")) for name in ("clock", "globaltimer_lo"))  # type: ignore[return-value]


@cute.jit
def write(tiles: cute.Tensor, place: cutlass.Constexpr[int], thread: cutlass.Constexpr[int], cycles: Int32, nanoseconds: Int32):
    """Write a stamp behind the work list."""
    if cute.arch.thread_idx()[0] == thread:
        at = (cute.arch.block_idx()[0] * len(PLACES) + place) * 2
        row = tiles.shape[0] - STAMP_ROWS + at // DECODE_INTS
        tiles[row, at % DECODE_INTS], tiles[row, at % DECODE_INTS + 1] = cycles, nanoseconds


def stamp(name: str, thread: int, when: tuple[Int32, Int32] | None = None) -> None:
    """A stamp of this name, where there is one."""
    if name:
        write(STEPS[-1].mTiles, PLACES.index(name), thread, *(when or now()))


def watch(role: type, method: str, before: str, after: str) -> None:
    """Put a method between its stamps."""
    original, thread = getattr(role, method), LOADER if role is LoadWarp else CONSUMER

    def watched(*arguments: Any, **named: Any) -> Any:
        stamp(before, thread)
        result = original(*arguments, **named)
        stamp(after, thread)
        return result

    setattr(role, method, watched)


def change_kernels() -> None:
    """Let this process compile and run kernels with stamps; their objects go to a cache of their own."""
    folder = f"stamps-{sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"
    if envs.cache_dir().name != folder:  # a process that this one starts inherits it
        os.environ["FA4_BACKEND_CACHE_DIR"] = str(envs.cache_dir() / folder)
    allocate, look_up, run = MlaStorage.allocate, LoadWarp.look_up, ConsumerWarpgroup.run

    def first(self: MlaStorage) -> Any:
        BEGIN.append(now())
        return allocate(self)

    def second(self: LoadWarp, step: Any, *others: Any) -> Any:
        STEPS.append(step)
        return look_up(self, step, *others)

    def third(self: ConsumerWarpgroup, *arguments: Any) -> Int32:
        stamp("begin", CONSUMER, BEGIN[-1])
        stamp("roles", CONSUMER)
        return run(self, *arguments)

    MlaStorage.allocate, LoadWarp.look_up, ConsumerWarpgroup.run = first, second, third  # type: ignore[method-assign, assignment]
    for watched in WATCHED:
        watch(*watched)


def stamps_of(step: Step, is_cold: bool) -> np.ndarray:
    """(CTAs that stamped, places, 2): cycles and nanoseconds of one launch; zeros where a CTA did not pass."""
    stamped = step.work.decode_tiles[-STAMP_ROWS:]
    stamped.zero_()
    if is_cold:
        cold_in_turns({"": step.run}, 1, Flush.READ)
    else:
        for _ in range(8):
            step.run()
        torch.cuda.synchronize()
    every = stamped.flatten()[: MAX_CTAS * len(PLACES) * 2].view(MAX_CTAS, len(PLACES), 2).cpu().numpy()
    return every[every[:, 0, 0] != 0]


def measure(heads: int, keys: int, is_cold: bool) -> dict[str, Any]:
    """One row, L2 cold or warm: us since a CTA's begin, of its places; the launch's span, and when CTAs that have work begin."""
    shape = Shape(heads)
    a = draw(shape, [1], [keys], 1)
    step = Step(shape, a, max(keys, 64))
    tiles = step.work.decode_tiles
    step.work = replace(step.work, decode_tiles=torch.cat([tiles, tiles.new_zeros(STAMP_ROWS, tiles.shape[1])]))
    step.refresh()
    step.run()
    judge(a)
    found: dict[str, list[float]] = {}
    for _ in range(LAUNCHES):
        every = stamps_of(step, is_cold).astype(np.int64)
        last = every[:, :, 1].max(axis=1)
        busy = every[(every[:, PLACES.index("Q there"), 0] != 0)]
        for place, name in enumerate(PLACES):
            passed = busy[busy[:, place, 0] != 0]
            if len(passed):
                found.setdefault(name, []).append(float(np.median((passed[:, place, 0] - passed[:, 0, 0]) % 2**32)) / MHZ)
        found.setdefault("first CTA begins to last stamp", []).append(float(last.max() - every[:, 0, 1].min()) / 1e3)
        found.setdefault("last CTA begins after the first", []).append(float(every[:, 0, 1].max() - every[:, 0, 1].min()) / 1e3)
        found.setdefault("CTAs with work", []).append(len(busy))
    calls = {"": capture(step.run)}
    us = cold_in_turns(calls, 2, Flush.READ)[""] if is_cold else in_turns(calls, 3)[""]
    return {
        "name": f"h{heads} 1 x {keys} {'cold' if is_cold else 'warm'}",
        "us": us,
        **{name: round(float(np.median(values)), 2) for name, values in found.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="compile the kernels, and do no more; needs no GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    change_kernels()
    keys = [key for heads in (16, 128) for key in Shape(heads).kernels(1, 16384)[0].keys]
    compile_lacking(list(dict.fromkeys(keys)), change_kernels)
    if args.compile_only:
        return
    rows = []
    for (heads, kv_len), is_cold in product(SHAPES, (True, False)):
        rows.append(measure(heads, kv_len, is_cold))
        print(*(f"{name}: {value}" for name, value in rows[-1].items()), sep="\n  ", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
