"""`fa4 bench engine`: a whole vLLM engine on FA4 and on its own attention backends, each in a process of its own, one after the other.

A Llama of 8B shape with few layers and random weights, so that attention is the only part that differs. Backends take turns in every
round; a start with an empty cache of kernels and one with a full one come first.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fa4_backend import envs
from fa4_backend.bench.engine_steps import VOCAB, EngineFigure

BACKENDS = ("FA4", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
MODES = ("0", "default")
NUM_LAYERS = 8
FAILED_WORDS = 2500  # characters of a failed engine's log that are shown


class EngineBenchError(RuntimeError):
    """An engine did not start or answer, or ran other kernels than it was to; the message holds the end of its log."""


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


def run(backends: list[str], *, kv_cache_dtype: str, context: int, mode: str, rounds: int, starts: bool) -> Iterator[list[EngineFigure]]:
    """Figures of one engine after the other.

    Args:
        starts: start FA4 with an empty cache and with a full one before the rounds.

    Raises:
        EngineBenchError: FA4 failed, or its kernels did not run. Another backend that fails is said, and left out.
    """
    common = {"kv_cache_dtype": kv_cache_dtype, "context": context, "mode": mode, "is_start_only": False}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_config(folder / "model")
        if starts:
            empty = {"FA4_BACKEND_CACHE_DIR": str(folder / "cache")}
            for which in ("cold", "warm"):
                request = {**common, "model": str(model), "backend": "FA4", "round_idx": 0, "is_start_only": True}
                figures = in_own_process(request, folder / which, empty)
                yield [EngineFigure(**{**vars(figure), "case": f"{which} {figure.case}"}) for figure in figures]
        for round_idx in range(rounds):
            for backend in backends:
                request = {**common, "model": str(model), "backend": backend, "round_idx": round_idx}
                try:
                    yield in_own_process(request, folder / f"{backend}-{round_idx}", {})
                except EngineBenchError as error:
                    if backend == "FA4":
                        raise
                    print(f"{backend} is left out: {error}", file=sys.stderr, flush=True)


def in_own_process(request: dict[str, Any], folder: Path, more_environment: dict[str, str]) -> list[EngineFigure]:
    """One engine, one process.

    Raises:
        EngineBenchError: it failed, or it is FA4 and our kernels did not run, or not with this dtype of K and V.
    """
    folder.mkdir()
    place = folder / "request.json"
    place.write_text(json.dumps(request))
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "FA4_BACKEND_TRACE_FILE": str(folder / "trace"), **more_environment,
    }  # fmt: skip
    begin = time.perf_counter()
    command = [sys.executable, "-m", "fa4_backend.bench.engine_steps", str(place)]
    done = subprocess.run(command, env=envs.environment_of_child(environment), capture_output=True, text=True)
    answer = folder / "answer.json"
    if done.returncode or not answer.exists():
        raise EngineBenchError(f"exit status {done.returncode}\n{(done.stdout + done.stderr)[-FAILED_WORDS:]}")
    read = json.loads(answer.read_text())
    wanted = "FA4: " if request["kv_cache_dtype"] == "auto" else "(K and V float8_e4m3fn)"
    if request["backend"] == "FA4" and not request["is_start_only"] and not any(wanted in line for line in read["kernels"]):
        raise EngineBenchError(f"expected our kernels with {wanted!r} in their line, got {read['kernels']}")
    print(f"{request['backend']}: {time.perf_counter() - begin:.0f} s in all", file=sys.stderr, flush=True)
    return [EngineFigure(**figure) for figure in read["figures"]]


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
