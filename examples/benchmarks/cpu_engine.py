"""SmolLM2 through vLLM on a CPU: our torch reference beside vLLM's own attention, in one process, engines in turn.

    python -m examples.benchmarks.cpu_engine [--rounds 3] [--dtype bfloat16]
    OMP_NUM_THREADS=1 taskset -c 1 python -m examples.benchmarks.cpu_engine     # on a busy machine: one thread, read the CPU time

Prints, for each backend, the median and the spread over the rounds: a 2,000-token prefill and a decode step with 1 and with 8 sequences, in
milliseconds of wall time, and of CPU time (user and system), which other work on the machine disturbs less.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
import time
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")

PREFILL_TOKENS, DECODE_TOKENS, CONTEXT = 2000, 32, 200


class Seconds(NamedTuple):
    """One measurement."""

    wall: float
    cpu: float


class Round(NamedTuple):
    """What one engine of one backend measured."""

    prefill: Seconds  # 2,000 tokens, one sequence
    decode_1: Seconds  # a step with one sequence of about 200 tokens
    decode_8: Seconds  # a step with eight


def main(
    rounds: Annotated[int, typer.Option(help="engines started for each backend")] = 3,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
) -> None:
    """Measure, alternating the backends, and print the table."""
    from examples.smollm2 import smollm2

    model = str(smollm2())
    results: dict[str, list[Round]] = {"CPU_ATTN": [], "FA4": []}
    for _ in range(rounds):
        for backend, measured in results.items():
            measured.append(measure(model, backend, dtype))
    table = Table("backend", "quantity", "wall ms", "cpu ms", "against CPU_ATTN (wall, cpu)")
    for backend, measured in results.items():
        for field in Round._fields:
            mine = [getattr(one, field) for one in measured]
            stock = [getattr(one, field) for one in results["CPU_ATTN"]]
            ratios = [statistics.median(x[i] for x in mine) / statistics.median(x[i] for x in stock) for i in (0, 1)]
            table.add_row(backend, field, spread([x.wall for x in mine]), spread([x.cpu for x in mine]), "{:.2f}x, {:.2f}x".format(*ratios))
    Console(width=120).print(table)


def measure(model: str, backend: str, dtype: str) -> Round:
    """Start an engine, measure, stop it."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model, attention_backend=backend, dtype=dtype, enforce_eager=True, max_model_len=4096, max_num_batched_tokens=4096, max_num_seqs=8,
        enable_prefix_caching=False,
    )  # fmt: skip
    rng = random.Random(0)
    generate(llm, rng, 1, 32, 2)
    prefill = generate(llm, rng, 1, PREFILL_TOKENS, 1)
    measured = Round(prefill, decode_step(llm, rng, 1), decode_step(llm, rng, 8))
    print(f"{backend}: {measured}", file=sys.stderr, flush=True)
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return measured


def decode_step(llm: Any, rng: random.Random, count: int) -> Seconds:
    """One step with `count` sequences: a long answer less the same prompts' prefill."""
    long, short = generate(llm, rng, count, CONTEXT, DECODE_TOKENS + 1), generate(llm, rng, count, CONTEXT, 1)
    return Seconds((long.wall - short.wall) / DECODE_TOKENS, (long.cpu - short.cpu) / DECODE_TOKENS)


def generate(llm: Any, rng: random.Random, count: int, length: int, tokens: int) -> Seconds:
    """Time of `count` random prompts of `length` tokens, answered with `tokens` tokens each."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [rng.randrange(100, 40000) for _ in range(length)]} for _ in range(count)]
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    wall, cpu = time.perf_counter(), time.process_time()
    llm.generate(prompts, parameters, use_tqdm=False)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def spread(seconds: list[float]) -> str:
    low, middle, high = (1000 * x for x in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.1f} ({low:.1f}..{high:.1f})"


if __name__ == "__main__":
    typer.run(main)
