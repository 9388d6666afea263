"""A whole vLLM engine with FA4 and with its own attention backends: a prompt in chunks, alone and beside decoding requests; decode steps.

    python -m tests.device.serve_speed --out speed.json [--kv-cache-dtype fp8] [--context 2048]

A Llama of 8B shape with few layers and random weights, bfloat16, CUDA graphs for decode steps. Engines run one after the other, each in a
process of its own. A step's time holds the whole model: attention is the only part that differs. Its device time in decode steps is taken
apart, by torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fa4_backend.kernel_stamp import gpu_stamp

BACKENDS = ("FA4", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
NUM_LAYERS, VOCAB = 8, 32000
CHUNK = 2048  # tokens of a step
PROMPT = 8192
CONTEXT, DECODE_STEPS = 4096, 48
BATCHES = (1, 32, 128)
ROUNDS = 3
PROFILED_STEPS = 16
# Ours, FLASH_ATTN's with its schedule and the merging of parts, FlashInfer's, Triton's; not the write to the cache.
ATTENTION_KERNELS = re.compile(r"kernel_cutlass_kernel_|flash::|BatchDecode|BatchPrefill|MergeStates|unified_attention|reduce_segments")


def write_config(folder: Path) -> Path:
    """A Llama-3-8B's config.json with NUM_LAYERS layers; vLLM makes up the weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCAB,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Steps:
    """An engine, stepped by hand."""

    def __init__(self, model: str, backend: str, kv_cache_dtype: str, context: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            model, attention_backend=backend, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=PROMPT + 256,
            kv_cache_dtype=kv_cache_dtype, max_num_seqs=max(BATCHES) + 1, max_num_batched_tokens=CHUNK, enable_prefix_caching=False,
            gpu_memory_utilization=0.8, seed=0,
            compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]},
        )  # fmt: skip
        self.engine, self.context = self.llm.llm_engine, context
        self.draw = random.Random(0)
        self.number = 0

    def add(self, prompt_len: int, new_tokens: int) -> None:
        """Queue a request of random tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self.number += 1
        prompt = {"prompt_token_ids": [self.draw.randrange(2, VOCAB) for _ in range(prompt_len)]}
        self.engine.add_request(str(self.number), prompt, sampling)

    def step(self) -> tuple[float, int]:
        """Milliseconds of one step, and how many requests got a token."""
        begin = time.perf_counter()
        outputs = self.engine.step()
        return 1e3 * (time.perf_counter() - begin), len(outputs)

    def drain(self) -> None:
        """Finish every request."""
        while self.engine.has_unfinished_requests():
            self.step()

    def start_decoding(self, rows: int, steps: int) -> None:
        """`rows` requests of `context` tokens, past their prompts, with `steps` tokens to come at least."""
        while_others_begin = rows * self.context // (CHUNK - rows) + 16
        for _ in range(rows):
            self.add(self.context, while_others_begin + steps)
        while self.step()[1] < rows:
            pass

    def first_token_ms(self, rows: int) -> float:
        """From a prompt's arrival to its first token, while `rows` requests decode. All steps together: the engine prepares a step while
        the one before runs, so a single step's time says little."""
        self.add(PROMPT, 1)
        total = 0.0
        while True:
            milliseconds, tokens = self.step()
            total += milliseconds
            if tokens > rows:
                return total

    def decode(self, rows: int) -> tuple[float, float, list[str]]:
        """A step of `rows` decode rows, ms; the device time of its attention kernels, us; and their names."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        self.start_decoding(rows, DECODE_STEPS + PROFILED_STEPS)
        times = [self.step()[0] for _ in range(DECODE_STEPS)]
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(PROFILED_STEPS):
                self.step()
            torch.cuda.synchronize()
        self.drain()
        kernels = {event.key: event.self_device_time_total for event in seen.key_averages() if ATTENTION_KERNELS.search(event.key)}
        return statistics.median(times[4:]), sum(kernels.values()) / PROFILED_STEPS, sorted(name[:100] for name in kernels)

    def prompt_ms(self, rows: int) -> float:
        """A prompt's first token beside `rows` decoding requests; the median of ROUNDS prompts."""
        chunks = PROMPT // (CHUNK - rows) + 1
        if rows:
            self.start_decoding(rows, (ROUNDS + 1) * (chunks + 4))
        times = [self.first_token_ms(rows) for _ in range(ROUNDS + 1)]
        self.drain()
        return statistics.median(times[1:])


def measure(model: str, backend: str, kv_cache_dtype: str, context: int) -> dict[str, Any]:
    """All figures of one backend, in milliseconds, attention's apart in microseconds; which kernels ran is read from our trace file."""
    steps = Steps(model, backend, kv_cache_dtype, context)
    figures: dict[str, Any] = {}
    for rows in (0, *BATCHES[1:]):
        figures[f"first token of a prompt of {PROMPT} beside {rows} x {context}"] = steps.prompt_ms(rows)
    attention: dict[str, float] = {}
    names: set[str] = set()
    for rows in BATCHES:
        case = f"decode step, {rows} x {context}"
        figures[case], attention[case], seen = steps.decode(rows)
        names.update(seen)
    trace = Path(os.environ["FA4_BACKEND_TRACE_FILE"])
    kernels = sorted({line.split(" ", 1)[1] for line in trace.read_text().splitlines()}) if trace.exists() else []
    return {
        "ms": {name: round(ms, 3) for name, ms in figures.items()},
        "attention_us": {case: round(us, 1) for case, us in attention.items()},
        "attention_kernels": sorted(names),
        "kernels": kernels,
    }


def in_own_process(model: Path, backend: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """One engine, one process, with our own options for it; the end of its log if it fails."""
    answer = folder / f"{backend}.json"
    env = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "FA4_BACKEND_TRACE_FILE": str(folder / f"{backend}.trace"),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.device.serve_speed", "--model", str(model), "--backend", backend, "--out", str(answer)]
    done = subprocess.run([*command, *options], env=env, capture_output=True, text=True)
    if done.returncode or not answer.exists():
        return {"failed": (done.stdout + done.stderr)[-2500:]}
    return json.loads(answer.read_text())


def main() -> int:
    """Measure every backend, print a table, write the JSON; 1 when FA4 failed or its kernels did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a decoding request")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend:
        options.out.write_text(json.dumps(measure(options.model, options.backend, options.kv_cache_dtype, options.context)))
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_config(folder / "model")
        for backend in options.backends.split(","):
            begin = time.perf_counter()
            passed_on = ["--kv-cache-dtype", options.kv_cache_dtype, "--context", str(options.context)]
            results[backend] = in_own_process(model, backend, folder, passed_on)
            results[backend]["seconds"] = round(time.perf_counter() - begin, 1)
            print(backend, results[backend], flush=True)
            options.out.write_text(
                json.dumps({"stamp": gpu_stamp(), "runs": results}, indent=1) + "\n"
            )  # a machine's time may end before the last one
    lines = results.get("FA4", {}).get("kernels", [])
    return 0 if any("(K and V float8_e4m3fn)" in line or options.kv_cache_dtype == "auto" for line in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
