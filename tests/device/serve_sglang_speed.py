"""A whole SGLang engine with our backend and with its own: a prompt alone, decode steps, and what decode attention takes of the device.

    python -m tests.device.serve_sglang_speed --out speed.json [--kv-cache-dtype fp8_e4m3] [--backends fa4_plugin,fa3,triton]

A Llama of 8B shape with few layers and random weights, bfloat16, CUDA graphs for decode steps; engines run one after the other, each in a
process of its own. A step's time is the difference between two generations of different lengths over prompts from the radix cache: it holds
the whole model and SGLang's host work. The device time of its attention kernels is torch's profiler's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fa4_backend.bench.engine import NUM_LAYERS, write_config
from fa4_backend.bench.engine_steps import PROMPT, VOCAB
from fa4_backend.kernel_stamp import gpu_stamp
from tests.device.engine_lane import run_process
from tests.device.serve_sglang import OF_THE_BUNDLE

BACKENDS = ("fa4_plugin", "fa3", "triton")
CONTEXT, SHORT, LONG, PROFILED = 4096, 8, 72, 16  # tokens
BATCHES = (1, 32)
ROUNDS = 3
PATIENCE = 150.0  # seconds for one engine
# Ours, FlashAttention 3's with its schedule and merging, Triton's two stages.
ATTENTION_KERNELS = re.compile(r"kernel_cutlass_kernel_|flash::|_fwd_grouped_kernel|_fwd_kernel|FlashAttn")


class Engine:
    """An engine, and the prompts that it is asked."""

    def __init__(self, model: str, backend: str, kv_cache_dtype: str) -> None:
        import sglang

        self.engine = sglang.Engine(
            model_path=model, attention_backend=backend, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", random_seed=0,
            sampling_backend="pytorch", context_length=PROMPT + 256, chunked_prefill_size=PROMPT, kv_cache_dtype=kv_cache_dtype,
            max_running_requests=max(BATCHES), max_total_tokens=200_000, mem_fraction_static=0.7, disable_prefill_cuda_graph=True,
            cuda_graph_bs_decode=[1, 2, 4, 8, 16, 32], log_level="info",
        )  # fmt: skip
        self.draw = random.Random(0)

    def prompts(self, rows: int, length: int) -> list[list[int]]:
        return [[self.draw.randrange(2, VOCAB) for _ in range(length)] for _ in range(rows)]

    def milliseconds(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Of one generation."""
        sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": new_tokens}
        begin = time.perf_counter()
        replies = self.engine.generate(input_ids=prompts, sampling_params=sampling)
        seconds = time.perf_counter() - begin
        assert [len(reply["output_ids"]) for reply in replies] == [new_tokens] * len(prompts)
        return 1e3 * seconds

    def prompt_ms(self) -> float:
        """A new prompt's first token; the median of ROUNDS."""
        times = [self.milliseconds(self.prompts(1, PROMPT), 1) for _ in range(ROUNDS + 1)]
        return statistics.median(times[1:])

    def decode(self, rows: int, folder: Path) -> tuple[float, float, dict[str, float]]:
        """A step of `rows` decode rows, ms; the device time of its attention kernels, us; and of each kernel that takes most."""
        prompts = self.prompts(rows, CONTEXT)
        self.milliseconds(prompts, 1)
        times = [(self.milliseconds(prompts, LONG) - self.milliseconds(prompts, SHORT)) / (LONG - SHORT) for _ in range(ROUNDS)]
        self.engine.start_profile(output_dir=str(folder), activities=["GPU"], with_stack=False, record_shapes=False)
        self.milliseconds(prompts, 1 + PROFILED)
        self.engine.stop_profile()
        kernels = decode_kernels(folder)
        attention = sum(us for name, us in kernels.items() if ATTENTION_KERNELS.search(name))
        most = sorted(kernels.items(), key=lambda item: -item[1])[:12]
        return statistics.median(times), attention, {name[:90]: round(us, 1) for name, us in most}


def decode_kernels(folder: Path) -> dict[str, float]:
    """Microseconds a decode step that each kernel takes, from the traces in `folder`: kernels that ran in every step, or in every layer of
    every step. A prompt's step, which a trace also holds, is one among PROFILED."""
    spent: dict[str, list[float]] = {}
    for path in folder.rglob("*.json.gz"):
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
            if event.get("cat") == "kernel":
                spent.setdefault(event["name"], []).append(event["dur"])
    return {
        name: statistics.median(times) * round(len(times) / PROFILED) for name, times in spent.items() if len(times) >= PROFILED
    }  # fmt: skip


def measure(model: str, backend: str, kv_cache_dtype: str) -> dict[str, Any]:
    """All figures of one backend; which kernels of ours ran is read from our trace file. The engine is left running: its shutdown ends the
    process that calls it with a signal, and whoever started that ends its group."""
    begin = time.perf_counter()
    engine = Engine(model, backend, kv_cache_dtype)
    started = time.perf_counter() - begin
    figures = {f"first token of a prompt of {PROMPT}": round(engine.prompt_ms(), 3)}
    attention: dict[str, float] = {}
    most: dict[str, dict[str, float]] = {}
    for rows in BATCHES:
        case = f"decode step, {rows} x {CONTEXT}"
        with tempfile.TemporaryDirectory() as folder:
            milliseconds, microseconds, most[case] = engine.decode(rows, Path(folder))
        figures[case], attention[case] = round(milliseconds, 3), round(microseconds, 1)
    trace = Path(os.environ["FA4_BACKEND_TRACE_FILE"])
    kernels = sorted({line.split(" ", 1)[1] for line in trace.read_text().splitlines()}) if trace.exists() else []
    return {"ms": figures, "attention_us": attention, "most_us": most, "kernels": kernels, "start_seconds": round(started, 1)}


def in_own_process(model: Path, backend: str, folder: Path, kv_cache_dtype: str) -> dict[str, Any]:
    """One engine, one process; the end of its log if it has no figures within PATIENCE."""
    answer, log = folder / f"{backend}.json", folder / f"{backend}.log"
    environment = {**OF_THE_BUNDLE, "HF_HUB_OFFLINE": "1", "FA4_BACKEND_TRACE_FILE": str(folder / f"{backend}.trace")}
    command = [sys.executable, "-m", "tests.device.serve_sglang_speed", "--model", str(model), "--backend", backend, "--out", str(answer)]
    is_done = run_process([*command, "--kv-cache-dtype", kv_cache_dtype], environment, log, PATIENCE)
    if not answer.exists():
        return {"failed": ("" if is_done else f"not done within {PATIENCE} s\n") + log.read_text(errors="replace")[-3000:]}
    return json.loads(answer.read_text())


def main() -> int:
    """Measure every backend, print and write what was seen; 1 when an engine failed or our kernels did not run in ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8_e4m3"), default="auto")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend:
        options.out.write_text(json.dumps(measure(options.model, options.backend, options.kv_cache_dtype)))
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_config(folder / "model")
        for backend in options.backends.split(","):
            begin = time.perf_counter()
            results[backend] = in_own_process(model, backend, folder, options.kv_cache_dtype)
            results[backend]["seconds"] = round(time.perf_counter() - begin, 1)
            print(backend, results[backend], flush=True)
            written = {"stamp": gpu_stamp(), "layers": NUM_LAYERS, "kv_cache_dtype": options.kv_cache_dtype, "runs": results}
            options.out.write_text(json.dumps(written, indent=1) + "\n")  # a machine's time may end before the last one
    failed = [backend for backend, result in results.items() if "failed" in result]
    marker = "(K and V float8_e4m3fn)" if options.kv_cache_dtype != "auto" else "FA4: "
    ours = results.get("fa4_plugin", {"kernels": [marker]}).get("kernels", [])
    return int(bool(failed) or not any(marker in line for line in ours))


if __name__ == "__main__":
    raise SystemExit(main())
