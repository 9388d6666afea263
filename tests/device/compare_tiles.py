"""A tile of FP8 prefill on Hopper beside a variant of it, on one GPU: the same batches, checked, then timed in turns.

    python -m tests.device.compare_tiles --head-dim 256 --field value_columns=128

At head dimension 256 that is seven convert warps for three: one wgmma of 256 columns does not assemble with the 128 registers that 512
threads begin with, two of 128 do.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from fa4_backend.bench.batch import BatchTensors
from fa4_backend.bench.ours import Ours
from fa4_backend.bench.prefill_batches import PrefillBatch
from fa4_backend.bench.timing import capture, in_turns
from fa4_backend.kernels.sm90.tuning import TILES_FP8
from fa4_backend.problem import FP8

WIDE = PrefillBatch(8, 4096, 4096, kv_dtype=FP8, num_q_heads=16, num_kv_heads=2, head_dim=256)


def batches(head_dim: int) -> list[PrefillBatch]:
    """32K tokens as whole prompts."""
    heads = WIDE if head_dim == 256 else replace(WIDE, num_q_heads=32, num_kv_heads=8, head_dim=head_dim)
    return [replace(heads, rows=32768 // n, query_len=n, kv_len=n) for n in (1024, 4096, 16384)]


def main() -> None:
    """TFLOP/s of both, and of bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=256)
    parser.add_argument("--field", default="value_columns=128", help="of a TileShape, and its value")
    options = parser.parse_args()
    name, value = options.field.split("=")
    dims = options.head_dim, options.head_dim
    tiles = {"in use": TILES_FP8[dims], options.field: replace(TILES_FP8[dims], **{name: int(value)})}
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    for batch in batches(options.head_dim):
        tensors = BatchTensors.make(batch)
        kept = {"bf16": (replace(batch, kv_dtype="bfloat16"), tensors.in_bf16())} | dict.fromkeys(tiles, (batch, tensors))
        replays, errors, calls = {}, {}, []  # a graph holds addresses: what its call reads must outlive it
        for version, (shape, own) in kept.items():
            if version in tiles:
                TILES_FP8[dims] = tiles[version]
            call = Ours.make(shape, own).call
            call()
            torch.cuda.synchronize()
            errors[version] = own.worst_error(batch, version, must_hold=True)
            replays[version] = capture(call)
            calls.append(call)
        us = in_turns(replays, 6)
        shown = (f"{v}: {batch.flops / t / 1e6:.0f} ({us['bf16'] / t:.3f} of bf16, error {errors[v]:.1e})" for v, t in us.items())
        print(batch.label, *shown, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
