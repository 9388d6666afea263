"""Compile FlashInfer's kernels before anything is timed: an engine that starts without them spends minutes in nvcc, module by module.

    python -m tests.device.build_flashinfer [--kv-dtype auto|fp8]

`auto`: what the Llama of `fa4 bench engine` needs, prefill and decode of 32/8 heads d128. `fp8`: what decode rows, alone and beside prefill
rows, of `fa4 bench decode` and `shapes` need with K and V in FP8. A process a module, all at once; each plans and runs a small batch as the
benchmarks do, which compiles what FlashInfer's cache lacks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from fa4_backend.bench.batch import E4M3_PROMPT_ERROR, BatchShape, BatchTensors
from fa4_backend.bench.decode_batches import uniform, with_chunk
from fa4_backend.bench.peers import FLASHINFER, prepare
from fa4_backend.bench.prefill_batches import PrefillBatch
from fa4_backend.problem import FP8

# FlashInfer takes one module for prompts and messages and another for decode rows; lengths and heads are arguments. Head dimensions and the
# dtype of K and V are not.
STEP = with_chunk("4 x 1K + 64 tokens of 1K", 4, 1024, 64, 1024)
BATCHES: dict[str, tuple[BatchShape, ...]] = {
    "auto": (PrefillBatch(2, 64, 1024), uniform(4, 1024)),
    "fp8": tuple(
        replace(batch, kv_dtype=FP8)
        for batch in (
            STEP,
            uniform(4, 1024),
            replace(uniform(4, 1024), num_q_heads=64, num_kv_heads=8, head_dim=64),
            replace(uniform(4, 1024), num_q_heads=16, num_kv_heads=2, head_dim=256),
        )
    ),
}


def build(batch: BatchShape) -> tuple[str, float]:
    """A batch's label, and the seconds until its kernel had run and was right.

    Raises:
        RuntimeError: it was wrong.
    """
    begin = time.monotonic()
    torch.manual_seed(0)
    tensors = BatchTensors.make(batch)
    call = prepare(FLASHINFER, batch, tensors)
    assert call is not None, batch.label
    call()
    error = tensors.worst_error(batch, FLASHINFER, must_hold=batch.kv_dtype != FP8)
    if not error <= E4M3_PROMPT_ERROR:  # the benchmarks' bound for peers with K and V in FP8
        raise RuntimeError(f"{batch.label}: expected an error of at most {E4M3_PROMPT_ERROR}, got {error}")
    return batch.label, time.monotonic() - begin


def main() -> None:
    """Build what the benchmarks of one dtype of K and V need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-dtype", choices=tuple(BATCHES), default="auto", help="of K and V; auto: that of q")
    batches = BATCHES[parser.parse_args().kv_dtype]
    with ProcessPoolExecutor(len(batches), mp_context=multiprocessing.get_context("spawn")) as pool:
        for label, seconds in pool.map(build, batches):
            print(f"{label}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
