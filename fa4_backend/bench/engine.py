"""`fa4 bench engine`: a whole vLLM engine on FA4 and on its own attention backends, each in a process of its own.

A Llama of 8B shape, or DeepSeek-V3's layers with dense MLPs (`engine_models.py`), with few layers and random weights, so that attention is
the only part that differs. All engines start at the same time and live until the end; of each group of cases each has its turn while the
others hold their memory and wait, then comes the next group, then the next round. What an engine answers is given on at once, and the time
set ends the run wherever it is: what was measured is kept. A start with an empty cache of our kernels and one with a full one come last,
when vLLM's own caches are warm.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from fa4_backend import envs, plan_attention
from fa4_backend.bench.engine_models import MODELS, asked_of
from fa4_backend.bench.engine_steps import BATCHES, CHUNK, GROUPS, PREFIX, PROMPT, STEPS_BESIDE, EngineFigure
from fa4_backend.compile_cache import ensure_objects, find_prebuilt

MODES = ("0", "default")
MODEL, NUM_LAYERS = "llama", 4
COMMAND = [sys.executable, "-m", "fa4_backend.bench.engine_steps"]
PATIENCE = 240.0  # seconds for an engine's start, or for one group of cases
LEAST_FOR_A_START = 30.0  # seconds that have to be left for one
POLL_SECONDS = 0.05
FAILED_WORDS = 2500  # characters of a failed engine's log that are shown
FP8_SHARE_GOAL = 0.55  # of attention's time with 16 bits, 128 rows of 2K


class EngineBenchError(RuntimeError):
    """An engine did not start or answer, or ran other kernels than it was to; the message holds the end of its log."""


def write_config(folder: Path, num_layers: int = NUM_LAYERS, model: str = MODEL) -> Path:
    """A model's config.json with so many layers; vLLM makes up the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[model].config_of(num_layers)))
    return folder


def kv_cache_bytes(context: int, kv_cache_dtype: str, num_layers: int = NUM_LAYERS, model: str = MODEL) -> int:
    """What the cache keeps at most: the largest batch's contexts and what its rows generate, prompts beside them, and a cached prefix."""
    rows = max(BATCHES)
    generated = rows * context // (CHUNK - rows) + 16 + STEPS_BESIDE
    return (rows * (context + generated) + 2 * PROMPT + PREFIX) * num_layers * MODELS[model].token_bytes(kv_cache_dtype)


def compile_kernels(kv_cache_dtypes: list[str], arch: str, model: str = MODEL) -> list[str]:
    """Fill the cache with our kernels for the engines; needs neither GPU nor vLLM. Their names."""
    keys: dict[Any, None] = {}
    for kv_cache_dtype in kv_cache_dtypes:
        for problem, limits in asked_of(model, kv_cache_dtype, arch):
            keys |= dict.fromkeys(plan_attention(problem, limits).keys)
    ensure_objects(key for key in keys if find_prebuilt(key) is None)
    return [key.name for key in keys]


class RunningEngine:
    """An engine's process."""

    def __init__(self, request: dict[str, Any], folder: Path, more_environment: dict[str, str]) -> None:
        folder.mkdir(parents=True)
        self.request, self.answers, self.log = request, folder / "answers.jsonl", folder / "log"
        self.label = label(request["backend"], request["kv_cache_dtype"])
        place = folder / "request.json"
        place.write_text(json.dumps(request))
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "PYTHONUNBUFFERED": "1", "FA4_BACKEND_TRACE_FILE": str(folder / "trace"), **more_environment,
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, str(place)],
                env=envs.environment_of_child(environment, {"TORCHINDUCTOR_COMPILE_THREADS": "2"}),  # of each of several engines
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.answered = 0

    def ask(self, round_idx: int, group: str, seconds: float) -> list[EngineFigure]:
        """The figures of a group of cases.

        Raises:
            EngineBenchError: as `next_answer`.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # a process that has ended is told by `next_answer`
            self.process.stdin.write(f"{round_idx} {group}\n")
            self.process.stdin.flush()
        return self.next_answer(seconds, is_asked=True)

    def next_answer(self, seconds: float, is_asked: bool = False) -> list[EngineFigure]:
        """Wait for figures, `seconds` at most.

        Raises:
            EngineBenchError: the engine failed or was silent for so long, or it is FA4 and our kernels did not run, or not with this dtype
                of K and V.
        """
        begin = time.monotonic()
        while len(lines := self.answers.read_text().splitlines() if self.answers.exists() else []) <= self.answered:
            status = self.process.poll()
            if status is not None or time.monotonic() - begin > seconds:
                what = f"no answer within {seconds:.0f} s" if status is None else f"exit status {status}"
                raise EngineBenchError(f"{self.label}: {what}\n{self.log.read_text(errors='replace')[-FAILED_WORDS:]}")
            time.sleep(POLL_SECONDS)
        self.answered += 1
        read = json.loads(lines[self.answered - 1])
        wanted = "FA4: " if self.request["kv_cache_dtype"] == "auto" else self.request["fp8_words"]
        if self.request["backend"] == "FA4" and is_asked and not any(wanted in line for line in read["kernels"]):
            raise EngineBenchError(f"{self.label}: expected our kernels with {wanted!r} in their line, got {read['kernels']}")
        return [EngineFigure(**figure) for figure in read["figures"]]

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()


def label(backend: str, kv_cache_dtype: str) -> str:
    """What lines and errors call an engine."""
    return backend if kv_cache_dtype == "auto" else f"{backend} {kv_cache_dtype}"


class Clock:
    """The time of a run, on standard error before each of its lines."""

    def __init__(self, seconds: float) -> None:
        self.begin, self.seconds = time.monotonic(), seconds

    def left(self) -> float:
        return self.begin + self.seconds - time.monotonic()

    def say(self, words: str) -> None:
        print(f"[{time.monotonic() - self.begin:5.1f} s] {words}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class EngineRun:
    """What a run is to measure."""

    backends: list[str]  # vLLM's names
    kv_cache_dtypes: list[str]  # likewise; every backend has an engine of each
    context: int  # tokens of a decoding request
    mode: str  # of MODES
    rounds: int
    starts: bool  # after the rounds, start FA4 with an empty cache of our kernels and with a full one
    model: str = MODEL  # of MODELS
    num_layers: int = NUM_LAYERS
    groups: tuple[str, ...] = GROUPS
    seconds: float = math.inf  # after these the run ends
    logs: Path | None = None  # folder that keeps each engine's log


class Engines:
    """Processes of one run: started, asked within its time, ended with it."""

    def __init__(self, clock: Clock, folder: Path, asked: EngineRun) -> None:
        self.clock, self.folder, self.asked = clock, folder, asked
        place = write_config(folder / "model", asked.num_layers, asked.model)
        self.common = {"model": str(place), "context": asked.context, "mode": asked.mode, "fp8_words": MODELS[asked.model].fp8_words}
        self.every: list[RunningEngine] = []
        self.failures: list[EngineBenchError] = []  # of FA4's

    def start(self, backend: str, kv_cache_dtype: str, where: str, **environment: str) -> RunningEngine:
        """An engine that begins to start; its files lie in the folder `where`."""
        room = kv_cache_bytes(self.asked.context, kv_cache_dtype, self.asked.num_layers, self.asked.model)
        request = {**self.common, "backend": backend, "kv_cache_dtype": kv_cache_dtype, "kv_cache_bytes": room}
        engine = RunningEngine(request, self.folder / where, environment)
        self.every.append(engine)
        return engine

    def answer(self, engine: RunningEngine, ask: Callable[[float], list[EngineFigure]], what: str) -> list[EngineFigure]:
        """What `ask` gets within the time; nothing of an engine that fails, which ends."""
        begin = time.monotonic()
        try:
            figures = ask(min(PATIENCE, max(0.0, self.clock.left())))
        except EngineBenchError as error:
            engine.end()
            if self.clock.left() > 0 and engine.request["backend"] == "FA4":
                self.failures.append(error)
            self.clock.say(f"left out: {error}")
            return []
        self.clock.say(f"{engine.label}: {time.monotonic() - begin:.1f} s for {what}")
        return figures

    def end(self) -> None:
        for engine in self.every:
            engine.end()


def run(asked: EngineRun) -> Iterator[list[EngineFigure]]:
    """Figures as engines give them.

    Raises:
        EngineBenchError: at the end, an engine of FA4 failed, or its kernels did not run. Another backend that fails is said, and left out.
    """
    clock = Clock(asked.seconds)
    with tempfile.TemporaryDirectory() as name, ExitStack() as at_end:
        engines = Engines(clock, asked.logs or Path(name), asked)
        at_end.callback(engines.end)
        for kv_cache_dtype, backend in product(asked.kv_cache_dtypes, asked.backends):
            engines.start(backend, kv_cache_dtype, f"{backend}-{kv_cache_dtype}")
        yield from (engines.answer(engine, engine.next_answer, "its start") for engine in engines.every)
        for round_idx, group, engine in product(range(asked.rounds), asked.groups, engines.every):
            if engine.process.poll() is not None:
                continue
            if clock.left() <= 0:
                clock.say(f"the time is over before {engine.label}'s round {round_idx}, group {group}")
                break
            yield engines.answer(engine, partial(engine.ask, round_idx, group), f"round {round_idx}, group {group}")
        engines.end()
        for which in ("cold", "warm") if asked.starts else ():
            if clock.left() < LEAST_FOR_A_START:
                clock.say(f"the time is over before the {which} start")
                break
            engine = engines.start("FA4", asked.kv_cache_dtypes[0], which, FA4_BACKEND_CACHE_DIR=str(Path(name) / "cache"))
            yield [replace(figure, case=f"{which} {figure.case}") for figure in engines.answer(engine, engine.next_answer, "its start")]
            engine.end()
    if engines.failures:
        raise engines.failures[0]


def format_line(figures: list[EngineFigure]) -> str:
    """An engine's figures, a case a line."""
    return "\n".join(_format(figure) for figure in figures)


def _format(figure: EngineFigure) -> str:
    numbers = (
        (figure.host_ms, "ms on the host"), (figure.device_ms, "ms on the device"), (figure.attention_us, "us of it attention"),
        (figure.attention_sum_us, "us summed over attention's kernels"), (figure.tokens_per_s, "tokens/s"), (figure.seconds, "s"),
    )  # fmt: skip
    given = [(number, unit) for number, unit in numbers if number is not None]
    words = ", ".join(f"{number:,.4g} {unit}" if number < 1e4 else f"{number:,.0f} {unit}" for number, unit in given)
    return f"{label(figure.backend, figure.kv_cache_dtype)} [{figure.round_idx}] {figure.case}: {words}"


def medians(figures: list[EngineFigure], number: str) -> dict[tuple[str, str], dict[str, float]]:
    """(case, dtype of K and V) -> backend -> the median over rounds of a figure's `number`."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for figure in figures:
        if (value := getattr(figure, number)) is not None:
            found.setdefault((figure.case, figure.kv_cache_dtype), {}).setdefault(figure.backend, []).append(value)
    return {key: {backend: statistics.median(values) for backend, values in rows.items()} for key, rows in found.items()}


def summary(figures: list[EngineFigure]) -> str:
    """Medians over rounds of each case: times on the host and on the device, attention's and FA4's ratio to the best of the others, and
    what FP8 leaves of attention's time with 16 bits."""
    host, device, attention = (medians(figures, number) for number in ("host_ms", "device_ms", "attention_us"))
    lines = []
    for key, times in attention.items():
        case, kv_cache_dtype = key
        others = [median for backend, median in times.items() if backend != "FA4"]
        ratio = f", best other / FA4 = {min(others) / times['FA4']:.2f}" if others and "FA4" in times else ""
        words = ", ".join(
            f"{backend} {host.get(key, {}).get(backend, math.nan):.2f} / {device[key][backend]:.2f} ms / {us:,.0f} us"
            for backend, us in times.items()
        )
        lines.append(f"{label(case, kv_cache_dtype)}: {words}{ratio}")
        share_of = attention.get((case, "auto"), {}).get("FA4")
        if kv_cache_dtype != "auto" and share_of and "FA4" in times:
            lines[-1] += f", {times['FA4'] / share_of:.3f} of FA4's 16 bits (goal at 128 x 2048: {FP8_SHARE_GOAL})"
    return "\n".join(["host / device / attention on the device", *lines]) if lines else ""
