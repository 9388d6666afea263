"""`fa4 bench engine`: a whole vLLM engine on FA4 and on its own attention backends, each in a process of its own.

A Llama of 8B shape with few layers and random weights, so that attention is the only part that differs. A start with an empty cache of
kernels and one with a full one come first, alone. Then all engines start, and live until the end; in every round each works in its turn
while the others hold their memory and wait.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from fa4_backend import envs
from fa4_backend.bench.engine_steps import BATCHES, CHUNK, PROMPT, VOCAB, EngineFigure

BACKENDS = ("FA4", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
MODES = ("0", "default")
NUM_LAYERS, KV_HEADS, HEAD_DIM = 8, 8, 128
COMMAND = [sys.executable, "-m", "fa4_backend.bench.engine_steps"]
PATIENCE = 240.0  # seconds for an engine's start, or for one round
POLL_SECONDS = 0.05
FAILED_WORDS = 2500  # characters of a failed engine's log that are shown


class EngineBenchError(RuntimeError):
    """An engine did not start or answer, or ran other kernels than it was to; the message holds the end of its log."""


def write_config(folder: Path) -> Path:
    """A Llama-3-8B's config.json with NUM_LAYERS layers; vLLM makes up the weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 32, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def kv_cache_bytes(context: int, kv_cache_dtype: str) -> int:
    """What the largest batch keeps in the cache: tokens of its rows' contexts, of what they generate, and of a prompt beside them."""
    rows = max(BATCHES)
    generated = rows * context // (CHUNK - rows) + 256
    token = NUM_LAYERS * 2 * KV_HEADS * HEAD_DIM * (2 if kv_cache_dtype == "auto" else 1)
    return (rows * (context + generated) + 2 * PROMPT) * token


class RunningEngine:
    """An engine's process."""

    def __init__(self, request: dict[str, Any], folder: Path, more_environment: dict[str, str]) -> None:
        folder.mkdir()
        self.request, self.answers, self.log = request, folder / "answers.jsonl", folder / "log"
        place = folder / "request.json"
        place.write_text(json.dumps(request))
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "FA4_BACKEND_TRACE_FILE": str(folder / "trace"), **more_environment,
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, str(place)],
                env=envs.environment_of_child(environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.answered = 0

    def ask(self, round_idx: int) -> list[EngineFigure]:
        """The figures of a round.

        Raises:
            EngineBenchError: as `next_answer`.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # a process that has ended is told by `next_answer`
            self.process.stdin.write(f"{round_idx}\n")
            self.process.stdin.flush()
        return self.next_answer(is_round=True)

    def next_answer(self, is_round: bool = False) -> list[EngineFigure]:
        """Wait for figures.

        Raises:
            EngineBenchError: the engine failed, was silent for PATIENCE, or it is FA4 and our kernels did not run, or not with this dtype
                of K and V.
        """
        begin = time.monotonic()
        while len(lines := self.answers.read_text().splitlines() if self.answers.exists() else []) <= self.answered:
            if self.process.poll() is not None or time.monotonic() - begin > PATIENCE:
                code = self.process.poll()
                self.end()
                what = f"no answer within {PATIENCE:.0f} s" if code is None else f"exit status {code}"
                raise EngineBenchError(f"{what}\n{self.log.read_text(errors='replace')[-FAILED_WORDS:]}")
            time.sleep(POLL_SECONDS)
        self.answered += 1
        read = json.loads(lines[self.answered - 1])
        wanted = "FA4: " if self.request["kv_cache_dtype"] == "auto" else "(K and V float8_e4m3fn)"
        if self.request["backend"] == "FA4" and is_round and not any(wanted in line for line in read["kernels"]):
            raise EngineBenchError(f"expected our kernels with {wanted!r} in their line, got {read['kernels']}")
        return [EngineFigure(**figure) for figure in read["figures"]]

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()


def run(
    backends: list[str], *, kv_cache_dtype: str, context: int, mode: str, rounds: int, starts: bool, seconds: float = math.inf
) -> Iterator[list[EngineFigure]]:
    """Figures as engines give them.

    Args:
        starts: start FA4 with an empty cache and with a full one before the rounds.
        seconds: after these no round begins.

    Raises:
        EngineBenchError: FA4 failed, or its kernels did not run. Another backend that fails is said, and left out.
    """
    deadline = time.monotonic() + seconds
    common = {"kv_cache_dtype": kv_cache_dtype, "context": context, "mode": mode}
    common |= {"kv_cache_bytes": kv_cache_bytes(context, kv_cache_dtype)}
    with tempfile.TemporaryDirectory() as name, ExitStack() as at_end:
        folder = Path(name)
        model = str(write_config(folder / "model"))
        for which in ("cold", "warm") if starts else ():
            empty = {"FA4_BACKEND_CACHE_DIR": str(folder / "cache")}
            engine = RunningEngine({**common, "model": model, "backend": "FA4"}, folder / which, empty)
            at_end.callback(engine.end)
            yield [replace(figure, case=f"{which} {figure.case}") for figure in engine.next_answer()]
            engine.end()
        engines = {backend: RunningEngine({**common, "model": model, "backend": backend}, folder / backend, {}) for backend in backends}
        for engine in engines.values():
            at_end.callback(engine.end)
        for backend in backends:
            figures = answer_or_leave_out(engines, backend, RunningEngine.next_answer)
            if figures:
                yield figures
        for round_idx in range(rounds):
            for backend in [*engines]:
                if time.monotonic() > deadline:
                    print(f"the time is over before {backend}'s round {round_idx}", file=sys.stderr, flush=True)
                    return
                begin = time.monotonic()
                figures = answer_or_leave_out(engines, backend, lambda engine: engine.ask(round_idx))  # noqa: B023  called at once
                print(f"{backend}: {time.monotonic() - begin:.0f} s for round {round_idx}", file=sys.stderr, flush=True)
                if figures:
                    yield figures


def answer_or_leave_out(
    engines: dict[str, RunningEngine], backend: str, ask: Callable[[RunningEngine], list[EngineFigure]]
) -> list[EngineFigure]:
    """What `ask` gets of an engine; of another backend than FA4 that fails nothing, and it is taken out of `engines`.

    Raises:
        EngineBenchError: FA4 failed.
    """
    try:
        return ask(engines[backend])
    except EngineBenchError as error:
        if backend == "FA4":
            raise
        engines.pop(backend)
        print(f"{backend} is left out: {error}", file=sys.stderr, flush=True)
        return []


def format_line(figures: list[EngineFigure]) -> str:
    """An engine's figures, a case a line."""
    return "\n".join(_format(figure) for figure in figures)


def _format(figure: EngineFigure) -> str:
    numbers = (
        (figure.host_ms, "ms on the host"), (figure.device_ms, "ms on the device"), (figure.attention_us, "us of it attention"),
        (figure.tokens_per_s, "tokens/s"), (figure.seconds, "s"),
    )  # fmt: skip
    given = [(number, unit) for number, unit in numbers if number is not None]
    words = ", ".join(f"{number:,.4g} {unit}" if number < 1e4 else f"{number:,.0f} {unit}" for number, unit in given)
    return f"{figure.backend} [{figure.round_idx}] {figure.case}: {words}"


def summary(figures: list[EngineFigure]) -> str:
    """Medians over rounds: attention's device time of each case and backend, and FA4's ratio to the best of the others."""
    times: dict[str, dict[str, list[float]]] = {}
    for figure in figures:
        if figure.attention_us:
            times.setdefault(figure.case, {}).setdefault(figure.backend, []).append(figure.attention_us)
    lines = []
    for case, of_backend in times.items():
        medians = {backend: statistics.median(values) for backend, values in of_backend.items()}
        others = [median for backend, median in medians.items() if backend != "FA4"]
        ratio = f", best other / FA4 = {min(others) / medians['FA4']:.2f}" if others and "FA4" in medians else ""
        lines.append(f"{case}: " + ", ".join(f"{backend} {median:,.0f} us" for backend, median in medians.items()) + ratio)
    return "\n".join(lines)
