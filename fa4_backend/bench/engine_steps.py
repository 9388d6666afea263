"""One vLLM engine in this process, stepped by hand: what `fa4 bench engine` measures of one backend.

A step's time on the host holds scheduling, sampling and the launch of every kernel; its device time is the time during which a kernel of
it ran, from torch's profiler, and attention's share of it is told by kernel names. Kernels that run side by side count once: our decode
and prefill kernels share the chip in a mixed step. Hosts differ and are shared, so device times are what to compare.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fa4_backend import envs

VOCAB = 32000
CHUNK = 2048  # tokens of a step
PROMPT = 8192
PREFIX, MESSAGE = 32768, 64  # tokens that are cached, and those that come after them
MAX_LEN = PREFIX + 512
BATCHES = (1, 32, 128)
BESIDE_PROMPTS, BESIDE_MESSAGES = (0, 32, 128), (0, 32)  # rows that decode meanwhile
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128]
DECODE_STEPS, PROFILED_STEPS = 48, 16
PROMPTS_A_CASE, MESSAGES_A_CASE = 3, 5
# Steps that a batch of rows lives through at most while it is measured: its own, and those of prompts, of a prefix and of messages.
STEPS_BESIDE = 256
# Lengths of prompts and answers of the ragged load: log-uniform between these.
RAGGED_REQUESTS, RAGGED_PROMPTS, RAGGED_ANSWERS = 96, (32, 4096), (16, 256)
# Ours, FLASH_ATTN's with its schedule and the merging of parts, FlashInfer's, Triton's; of latent attention FlashMLA's, Triton's, and
# vLLM's merging of what new tokens and their context give; not the write to the cache.
ATTENTION_KERNELS = re.compile(
    r"kernel_cutlass_kernel_|flash::|BatchDecode|BatchPrefill|MergeStates|kernel_unified_attention|reduce_segments"
    r"|flash_fwd|get_mla_metadata|_fwd_grouped_kernel_stage|_fwd_kernel_stage|merge_attn_states"
)
RAGGED = "ragged"
GROUPS = ("0", "1", "32", "128", RAGGED)  # of cases: rows that decode meanwhile, and the ragged load
NUM_KERNELS_SAID = 14  # kernels of a profile that the log names, the longest first


@dataclass(frozen=True)
class EngineFigure:
    """A case on one backend; None where it has no such number."""

    backend: str
    round_idx: int
    case: str
    host_ms: float | None = None  # wall time: of a step, or from a prompt's arrival to its first token
    device_ms: float | None = None  # during which a kernel of it ran
    attention_us: float | None = None  # during which a kernel of attention ran
    attention_sum_us: float | None = None  # attention's kernels one by one: more where they run side by side
    tokens_per_s: float | None = None
    seconds: float | None = None  # of starts
    kv_cache_dtype: str = "auto"


class Steps:
    """An engine, stepped by hand. Prefix caching is on, and prompts are drawn anew: only what is asked for twice comes from the cache."""

    def __init__(self, request: dict[str, Any]) -> None:
        from vllm import LLM

        graphs: dict[str, Any] = {"cudagraph_capture_sizes": CAPTURED}
        if request["mode"] == "0":
            graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        self.llm = LLM(
            request["model"], attention_backend=request["backend"], load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=MAX_LEN, kv_cache_dtype=request["kv_cache_dtype"], max_num_seqs=max(BATCHES) + 1,
            max_num_batched_tokens=CHUNK, enable_prefix_caching=True, seed=0, compilation_config=graphs,
            kv_cache_memory_bytes=request["kv_cache_bytes"], gpu_memory_utilization=0.05,  # the share that has to be free at its start
        )  # fmt: skip
        self.engine, self.context = self.llm.llm_engine, request["context"]
        self.draw = random.Random(0)
        self.number = 0

    def tokens(self, length: int) -> list[int]:
        """Random tokens, others each time."""
        return [self.draw.randrange(2, VOCAB) for _ in range(length)]

    def add(self, prompt: list[int], new_tokens: int) -> None:
        """Queue a request."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self.number += 1
        self.engine.add_request(str(self.number), {"prompt_token_ids": prompt}, sampling)

    def step(self) -> tuple[float, list[Any]]:
        """Milliseconds of one step, and the requests that got a token."""
        begin = time.perf_counter()
        outputs = self.engine.step()
        return 1e3 * (time.perf_counter() - begin), outputs

    def drain(self) -> None:
        """Finish every request."""
        while self.engine.has_unfinished_requests():
            self.step()

    def start_decoding(self, rows: int, steps: int) -> None:
        """`rows` requests of `context` tokens, past their prompts, with `steps` tokens to come at least."""
        while_others_begin = rows * self.context // (CHUNK - rows) + 16
        for _ in range(rows):
            self.add(self.tokens(self.context), while_others_begin + steps)
        while len(self.step()[1]) < rows:
            pass

    def first_token(self, prompt: list[int]) -> tuple[float, int]:
        """Milliseconds from a prompt's arrival to its first token, and how many of its tokens came from the cache. All steps together: the
        engine prepares a step while the one before runs, so a single step's time says little."""
        begin = time.perf_counter()
        self.add(prompt, 1)
        while True:
            done = [output for output in self.step()[1] if output.finished]
            if done:
                return 1e3 * (time.perf_counter() - begin), done[0].num_cached_tokens or 0

    def decode(self) -> dict[str, float]:
        """A step of the rows that decode."""
        times = [self.step()[0] for _ in range(DECODE_STEPS)]
        device = profiled(lambda: [self.step() for _ in range(PROFILED_STEPS)], PROFILED_STEPS)
        return {"host_ms": statistics.median(times[4:]), **device}

    def prompt(self) -> dict[str, float]:
        """A prompt up to its first token beside the rows that decode, their steps included."""
        times = [self.first_token(self.tokens(PROMPT))[0] for _ in range(PROMPTS_A_CASE + 1)]
        last = self.tokens(PROMPT)
        device = profiled(lambda: self.first_token(last), 1)
        return {"host_ms": statistics.median(times[1:]), **device}

    def message(self) -> dict[str, float]:
        """A message behind a prefix that is cached, up to its first token; beside the rows that decode, their steps included.

        Raises:
            RuntimeError: the prefix did not come from the cache.
        """
        prefix = self.tokens(PREFIX)
        self.first_token(prefix)
        messages = [self.tokens(MESSAGE) for _ in range(MESSAGES_A_CASE + 2)]
        seen = [self.first_token(prefix + message) for message in messages[1:]]
        if any(cached != PREFIX for _, cached in seen):
            raise RuntimeError(f"tokens from the prefix cache: expected {PREFIX}, got {[cached for _, cached in seen]}")
        device = profiled(lambda: self.first_token(prefix + messages[0]), 1)
        return {"host_ms": statistics.median(ms for ms, _ in seen[1:]), **device}

    def beside(self, rows: int) -> dict[str, dict[str, float]]:
        """All that is measured while `rows` requests decode, case -> numbers."""
        cases: dict[str, Callable[[], dict[str, float]]] = {}
        beside = f" beside {rows} x {self.context}" if rows else ""
        if rows:
            self.start_decoding(rows, STEPS_BESIDE)
            cases[f"decode step, {rows} x {self.context}"] = self.decode
        if rows in BESIDE_MESSAGES:
            cases[f"message of {MESSAGE} behind {PREFIX}{beside}"] = self.message
        if rows in BESIDE_PROMPTS:
            cases[f"prompt of {PROMPT}{beside}"] = self.prompt
        numbers = {}
        for case, run in cases.items():
            begin = time.perf_counter()
            say(f"{case}:")
            numbers[case] = run()
            say(f"{case}: {numbers[case]}, {time.perf_counter() - begin:.1f} s")
        self.drain()
        return numbers

    def ragged(self) -> dict[str, dict[str, float]]:
        """Requests of ragged lengths, all there at once, to the last token."""
        lengths = [(self._draw_length(RAGGED_PROMPTS), self._draw_length(RAGGED_ANSWERS)) for _ in range(RAGGED_REQUESTS)]
        prompts = [(self.tokens(prompt_len), new_tokens) for prompt_len, new_tokens in lengths]
        begin = time.perf_counter()
        for prompt, new_tokens in prompts:
            self.add(prompt, new_tokens)
        self.drain()
        seconds = time.perf_counter() - begin
        for prompt_len, new_tokens in lengths[: RAGGED_REQUESTS // 4]:
            self.add(self.tokens(prompt_len), new_tokens)
        say("ragged load:")
        device = profiled(self.drain, 1)
        return {"ragged load": {"tokens_per_s": sum(map(sum, lengths)) / seconds, **{name: 4 * value for name, value in device.items()}}}

    def _draw_length(self, bounds: tuple[int, int]) -> int:
        return round(bounds[0] * (bounds[1] / bounds[0]) ** self.draw.random())


def say(words: str) -> None:
    """A line of the engine's log, with the time of day as vLLM's lines have it."""
    print(time.strftime("%H:%M:%S"), words, flush=True)


class Interval(NamedTuple):
    """A kernel's run on the device, in ns."""

    begin: int
    end: int
    name: str


def profiled(work: Callable[[], object], parts: int) -> dict[str, float]:
    """Device time of `work`, of one of its `parts`, see `device_times`. The log names the longest kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    # The raw events: grouping them by `key_averages` takes seconds for the steps of a whole load.
    kernels = [
        Interval(event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in seen.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for begin, end, name in kernels:
        times[name] += end - begin
        calls[name] += 1
    for name, ns in times.most_common(NUM_KERNELS_SAID):
        print(f"    {ns / 1e3 / parts:10.1f} us in {calls[name] / parts:7.1f} calls: {name[:150]}", flush=True)
    return device_times(kernels, parts)


def device_times(kernels: list[Interval], parts: int) -> dict[str, float]:
    """Of one of `parts`: ms during which a kernel ran, us during which one of attention did, and the sum over attention's kernels."""
    attention = [kernel for kernel in kernels if ATTENTION_KERNELS.search(kernel.name)]
    return {
        "device_ms": busy_ns(kernels) / 1e6 / parts,
        "attention_us": busy_ns(attention) / 1e3 / parts,
        "attention_sum_us": sum(kernel.end - kernel.begin for kernel in attention) / 1e3 / parts,
    }


def busy_ns(kernels: list[Interval]) -> int:
    """The time during which at least one of `kernels` ran."""
    total, until = 0, 0
    for begin, end, _ in sorted(kernels):
        total += max(0, end - max(begin, until))
        until = max(until, end)
    return total


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
    """One backend's engine, and its figures: of its start, and of as many groups of cases as are asked for."""

    def __init__(self, request: dict[str, Any]) -> None:
        import vllm  # noqa: F401  its import is no part of an engine's start

        clock, begin = KernelClock(), time.perf_counter()
        self.request, self.steps = request, Steps(request)
        self.start = {"start": time.perf_counter() - begin, "start, our kernels": clock.seconds}

    def of_start(self) -> list[EngineFigure]:
        return [self._figure(0, case, {"seconds": seconds}) for case, seconds in self.start.items()]

    def of_group(self, round_idx: int, group: str) -> list[EngineFigure]:
        """The cases of a group once."""
        numbers = self.steps.ragged() if group == RAGGED else self.steps.beside(int(group))
        return [self._figure(round_idx, case, of_case) for case, of_case in numbers.items()]

    def _figure(self, round_idx: int, case: str, numbers: dict[str, float]) -> EngineFigure:
        rounded: dict[str, Any] = {name: round(value, 3) for name, value in numbers.items()}
        return EngineFigure(self.request["backend"], round_idx, case, **rounded, kv_cache_dtype=self.request["kv_cache_dtype"])


def kernels_that_ran() -> list[str]:
    """Lines of our trace file."""
    trace = envs.trace_file()
    lines = trace.read_text().splitlines() if trace is not None and trace.exists() else []
    return sorted({line.split(" ", 1)[1] for line in lines})


def serve(place: Path) -> None:
    """An engine of the request at `place`: its start's figures, then those of a group of cases for each line of standard input, which
    names the round and the group. Each answer is a line of `answers.jsonl` beside the request. Ends with its standard input."""

    def write(figures: list[EngineFigure]) -> None:
        with place.with_name("answers.jsonl").open("a") as file:
            file.write(json.dumps({"figures": [asdict(figure) for figure in figures], "kernels": kernels_that_ran()}) + "\n")

    backend = Backend(json.loads(place.read_text()))
    write(backend.of_start())
    for line in sys.stdin:
        round_idx, group = line.split()
        write(backend.of_group(int(round_idx), group))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
