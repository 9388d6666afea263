"""One vLLM engine in this process, stepped by hand: what `fa4 bench engine` measures of one backend.

A step's time on the host holds scheduling, sampling and the launch of every kernel; its device time is the sum over its kernels, from
torch's profiler, and attention's share of it is told by kernel names. Hosts differ and are shared, so device times are what to compare.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fa4_backend import envs

VOCAB = 32000
CHUNK = 2048  # tokens of a step
PROMPT = 8192
BATCHES = (1, 32, 128)
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128]
DECODE_STEPS, PROFILED_STEPS = 48, 16
PROMPTS_A_CASE = 3
# Lengths of prompts and answers of the ragged load: log-uniform between these.
RAGGED_REQUESTS, RAGGED_PROMPTS, RAGGED_ANSWERS = 192, (32, 4096), (16, 256)
# Ours, FLASH_ATTN's with its schedule and the merging of parts, FlashInfer's, Triton's; not the write to the cache.
ATTENTION_KERNELS = re.compile(r"kernel_cutlass_kernel_|flash::|BatchDecode|BatchPrefill|MergeStates|unified_attention|reduce_segments")


@dataclass(frozen=True)
class EngineFigure:
    """A case on one backend; None where it has no such number."""

    backend: str
    round_idx: int
    case: str
    host_ms: float | None = None  # wall time: of a step, or of a prompt's first token
    device_ms: float | None = None  # all kernels of it
    attention_us: float | None = None  # attention's kernels of it
    tokens_per_s: float | None = None
    seconds: float | None = None  # of starts


class Steps:
    """An engine, stepped by hand."""

    def __init__(self, request: dict[str, Any]) -> None:
        from vllm import LLM

        graphs: dict[str, Any] = {"cudagraph_capture_sizes": CAPTURED}
        if request["mode"] == "0":
            graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        self.llm = LLM(
            request["model"], attention_backend=request["backend"], load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=PROMPT + 256, kv_cache_dtype=request["kv_cache_dtype"], max_num_seqs=max(BATCHES) + 1,
            max_num_batched_tokens=CHUNK, enable_prefix_caching=False, seed=0, compilation_config=graphs,
            kv_cache_memory_bytes=request["kv_cache_bytes"], gpu_memory_utilization=0.1,  # the share that has to be free at its start
        )  # fmt: skip
        self.engine, self.context = self.llm.llm_engine, request["context"]
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

    def decode(self, rows: int) -> dict[str, float]:
        """A step of `rows` decode rows."""
        self.start_decoding(rows, DECODE_STEPS + PROFILED_STEPS)
        times = [self.step()[0] for _ in range(DECODE_STEPS)]
        device = profiled(lambda: [self.step() for _ in range(PROFILED_STEPS)], PROFILED_STEPS)
        self.drain()
        return {"host_ms": statistics.median(times[4:]), **device}

    def prompt(self, rows: int) -> dict[str, float]:
        """A prompt up to its first token beside `rows` decoding requests, their steps included."""
        chunks = PROMPT // (CHUNK - rows) + 1
        if rows:
            self.start_decoding(rows, (PROMPTS_A_CASE + 2) * (chunks + 4))
        times = [self.first_token_ms(rows) for _ in range(PROMPTS_A_CASE + 1)]
        device = profiled(lambda: self.first_token_ms(rows), 1)
        self.drain()
        return {"host_ms": statistics.median(times[1:]), **device}

    def ragged(self) -> dict[str, float]:
        """Requests of ragged lengths, all there at once, to the last token."""
        lengths = [(self._draw_length(RAGGED_PROMPTS), self._draw_length(RAGGED_ANSWERS)) for _ in range(RAGGED_REQUESTS)]
        for prompt_len, new_tokens in lengths:
            self.add(prompt_len, new_tokens)
        begin = time.perf_counter()
        self.drain()
        seconds = time.perf_counter() - begin
        for prompt_len, new_tokens in lengths[: RAGGED_REQUESTS // 4]:
            self.add(prompt_len, new_tokens)
        device = profiled(self.drain, 1)
        return {"tokens_per_s": sum(map(sum, lengths)) / seconds, **{name: 4 * value for name, value in device.items()}}

    def _draw_length(self, bounds: tuple[int, int]) -> int:
        return round(bounds[0] * (bounds[1] / bounds[0]) ** self.draw.random())


def profiled(work: Callable[[], object], parts: int) -> dict[str, float]:
    """Device time of `work`, of one of its `parts`: of all kernels in ms, of attention's in us."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    times = [(event.key, event.self_device_time_total) for event in seen.key_averages()]
    return {
        "device_ms": sum(us for _, us in times) / 1e3 / parts,
        "attention_us": sum(us for name, us in times if ATTENTION_KERNELS.search(name)) / parts,
    }


class KernelClock:
    """Seconds that an engine's start spends on our buffers and kernels: compiled, or read from the cache."""

    def __init__(self) -> None:
        from fa4_backend import AttentionMetadata

        self.seconds, allocate = 0.0, AttentionMetadata.allocate

        def timed(*arguments: Any) -> AttentionMetadata:
            begin = time.perf_counter()
            try:
                return allocate(*arguments)
            finally:
                self.seconds += time.perf_counter() - begin

        AttentionMetadata.allocate = timed  # type: ignore[method-assign, assignment]


class Backend:
    """One backend's engine, and its figures: of its start, and of as many rounds as are asked for."""

    def __init__(self, request: dict[str, Any]) -> None:
        import vllm  # noqa: F401  its import is no part of an engine's start

        clock, begin = KernelClock(), time.perf_counter()
        self.name, self.steps = request["backend"], Steps(request)
        self.start = {"start": time.perf_counter() - begin, "start, our kernels": clock.seconds}

    def of_start(self) -> list[EngineFigure]:
        return [EngineFigure(self.name, 0, case, seconds=round(seconds, 3)) for case, seconds in self.start.items()]

    def of_round(self, round_idx: int) -> list[EngineFigure]:
        """All cases once."""
        steps, context = self.steps, self.steps.context
        cases: dict[str, Callable[[], dict[str, float]]] = {
            f"prompt of {PROMPT} beside {rows} x {context}": partial(steps.prompt, rows) for rows in (0, *BATCHES[1:])
        }
        cases |= {f"decode step, {rows} x {context}": partial(steps.decode, rows) for rows in BATCHES}
        cases["ragged load"] = steps.ragged
        figures = []
        for case, run in cases.items():
            numbers: dict[str, Any] = {name: round(value, 3) for name, value in run().items()}
            figures.append(EngineFigure(self.name, round_idx, case, **numbers))
        return figures


def kernels_that_ran() -> list[str]:
    """Lines of our trace file."""
    trace = envs.trace_file()
    lines = trace.read_text().splitlines() if trace is not None and trace.exists() else []
    return sorted({line.split(" ", 1)[1] for line in lines})


def serve(place: Path) -> None:
    """An engine of the request at `place`: its start's figures, then those of a round for each line of standard input, which names it.
    Each answer is a line of `answers.jsonl` beside the request."""

    def write(figures: list[EngineFigure]) -> None:
        with place.with_name("answers.jsonl").open("a") as file:
            file.write(json.dumps({"figures": [asdict(figure) for figure in figures], "kernels": kernels_that_ran()}) + "\n")

    backend = Backend(json.loads(place.read_text()))
    write(backend.of_start())
    for line in sys.stdin:
        write(backend.of_round(int(line)))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
