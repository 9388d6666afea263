"""Variants of the Hopper prefill kernel in one run: `python -m tests.device.try_variants [--compile-only] [groups]`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from fa4_backend import plan_attention
from fa4_backend.bench.batch import BatchTensors, Mask
from fa4_backend.bench.ours import Ours, asked
from fa4_backend.bench.peers import prepare
from fa4_backend.bench.prefill_batches import PrefillBatch
from fa4_backend.bench.timing import Flush, capture, cold_in_turns
from fa4_backend.compile_cache import ensure_object
from fa4_backend.kernels import families

capped = PrefillBatch(8, 4096, 4096, num_q_heads=16, num_kv_heads=8, head_dim=256, mask=Mask(softcap=50.0))
d96 = PrefillBatch(8, 4096, 4096, num_q_heads=32, num_kv_heads=32, head_dim=96)
plain = PrefillBatch(2, 16384, 16384)
N64 = "tile_n=64,kv_stage=5"
SKIP = ["skip=1", "skip=1,rescale_threshold=8"]
D96 = ["", "tile_m=192,tile_n=112,kv_stage=6", "tile_m=192,tile_n=96,kv_stage=7", "tile_m=192,tile_n=128,kv_stage=5", "tile_n=144,kv_stage=5"]
wide = PrefillBatch(1, 16384, 16384, num_q_heads=16, num_kv_heads=2, head_dim=256)
GROUPS: dict[str, list[tuple[Any, list[str]]]] = {
    "cap": [
        (capped, ["", N64, "cap=8", "cap=8," + N64]),
        (replace(capped, rows=1, query_len=16384, kv_len=16384), ["", N64, "cap=8", "cap=8," + N64]),
        (replace(capped, rows=4, query_len=512, kv_len=8192), ["", N64, "cap=8"]),
        (replace(capped, mask=Mask(softcap=50.0, window=4096), rows=2, query_len=8192, kv_len=8192), ["", N64]),
    ],
    "d256": [
        (wide, ["", *SKIP]),
        (replace(wide, rows=4, query_len=512, kv_len=8192), ["", *SKIP]),
        (PrefillBatch(8, 4096, 4096, num_q_heads=8, num_kv_heads=4, head_dim=256), ["", SKIP[1]]),
    ],
    "d96": [
        (replace(d96, rows=2, query_len=16384, kv_len=16384), [*D96, SKIP[1]]),
        (d96, [*D96, SKIP[1]]),
        (replace(d96, rows=32, query_len=1024, kv_len=1024), D96),
        (replace(d96, rows=4, query_len=512, kv_len=8192), D96),
        (replace(d96, num_kv_heads=8), D96[:2]),
    ],
    "d128": [
        (replace(plain, mask=Mask(is_causal=False)), ["", SKIP[1]]),
        (plain, ["", SKIP[1]]),
        (replace(plain, rows=8, query_len=4096, kv_len=4096), ["", SKIP[1]]),
    ],
}  # fmt: skip


def use(variant: str) -> None:
    """Make `variant` what the next plan is."""
    parts = [p for p in variant.split(",") if p]
    os.environ["FA4_TILE"] = ",".join(p for p in parts if not p.startswith("l2="))
    share = [int(p[3:]) for p in parts if p.startswith("l2=")]
    families.L2_SHARE_BYTES = (share[0] if share else 24) << 20


def matmuls() -> None:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)

    def many(n: int):
        return capture(lambda: [torch.matmul(a, b, out=c) for _ in range(n)])

    us = cold_in_turns({str(n): many(n) for n in (1, 4, 12)}, 4, Flush.READ)
    print("matmul 8192^3 TFLOP/s, 1, 4, 12 in a row:", {n: round(int(n) * 2 * 8192**3 / t / 1e6) for n, t in us.items()}, flush=True)


def main() -> None:
    only_compile = "--compile-only" in sys.argv
    chosen = [a for a in sys.argv[1:] if not a.startswith("-")] or list(GROUPS)
    if not only_compile:
        print(torch.cuda.get_device_name(), flush=True)
        matmuls()
    for name in chosen:
        for batch, variants in GROUPS[name]:
            began = time.monotonic()
            if only_compile:
                for variant in variants:
                    use(variant)
                    for key in plan_attention(*asked(batch, "sm_90a")).kernels.keys:
                        ensure_object(key)
                print(batch.title, f"{time.monotonic() - began:.0f} s", flush=True)
                continue
            torch.manual_seed(0)
            tensors = BatchTensors.make(batch)
            replays, kept, errors = {}, [], {}
            for variant in [*variants, "fa3"]:
                use("" if variant == "fa3" else variant)
                tensors.out.fill_(float("nan"))
                try:
                    call = prepare("fa3", batch, tensors) if variant == "fa3" else Ours.make(batch, tensors).call
                    call()
                    torch.cuda.synchronize()
                    errors[variant] = tensors.worst_error(batch, variant, must_hold=False)
                    replays[variant] = capture(call)
                    kept.append(call)
                except Exception as error:
                    print(variant, "failed:", repr(error)[:300], flush=True)
            us = cold_in_turns(replays, 4, Flush.READ)
            print(f"{batch.title} ({time.monotonic() - began:.0f} s)", flush=True)
            for variant, t in us.items():
                print(f"  {variant or 'as it is':32s} {t:8.1f} us {batch.flops / t / 1e6:6.1f} TFLOP/s  {us['fa3'] / t:.3f} of fa3  error {errors[variant]:.2e}", flush=True)


if __name__ == "__main__":
    main()
