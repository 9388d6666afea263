"""Compile FlashInfer's kernels before anything is timed: an engine that starts without them spends minutes in nvcc, module by module.

    python -m tests.device.build_flashinfer

It makes what the Llama of `fa4 bench engine` needs, prefill and decode of 32/8 heads d128. A process a module, all at once; each plans
and runs a small batch as the benchmarks do, which compiles what FlashInfer's cache lacks.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from fa4_backend.bench.batch import BatchShape, BatchTensors
from fa4_backend.bench.decode_batches import uniform
from fa4_backend.bench.peers import FLASHINFER, prepare
from fa4_backend.bench.prefill_batches import PrefillBatch

# FlashInfer takes one module for prompts and messages and another for decode rows; lengths are arguments.
BATCHES: tuple[BatchShape, ...] = (PrefillBatch(2, 64, 1024), uniform(4, 1024))


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
    tensors.worst_error(batch, FLASHINFER, must_hold=True)
    return batch.label, time.monotonic() - begin


def main() -> None:
    with ProcessPoolExecutor(len(BATCHES), mp_context=multiprocessing.get_context("spawn")) as pool:
        for label, seconds in pool.map(build, BATCHES):
            print(f"{label}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
