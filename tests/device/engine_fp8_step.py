"""Device time of attention in a whole engine's decode step, K and V in FP8 beside 16 bits: `python -m tests.device.engine_fp8_step`.

A Llama of 8B shape with few layers (`fa4 bench engine`'s), 128 rows of 2K, full decode graphs; an engine a process, one after the other.
Attention's time is the sum over its kernels in torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fa4_backend.bench.engine import kv_cache_bytes, write_config
from fa4_backend.bench.engine_steps import Steps

ROWS, CONTEXT = 128, 2048
GOAL = 0.55  # of attention's time with 16 bits
ENGINES = (("FA4", "auto"), ("FA4", "fp8"), ("FLASH_ATTN", "fp8"), ("FLASH_ATTN", "auto"))


def measure(request: dict[str, Any]) -> dict[str, float]:
    """A decode step of one engine, in this process."""
    room = kv_cache_bytes(CONTEXT, request["kv_cache_dtype"])
    return Steps({**request, "context": CONTEXT, "mode": "0", "kv_cache_bytes": room}).decode(ROWS)


def in_own_process(request: dict[str, Any], folder: Path, seconds: float) -> dict[str, float] | None:
    """The same in another; None with its last words where it failed."""
    place, answer, trace = (folder / f"{name}-{request['backend']}-{request['kv_cache_dtype']}" for name in ("request", "answer", "trace"))
    place.write_text(json.dumps({**request, "answer": str(answer)}))
    environment = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "FA4_BACKEND_TRACE_FILE": str(trace),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.device.engine_fp8_step", "--request", str(place)]
    with (folder / "log").open("w+") as log:
        try:
            subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            print(f"no end within {seconds:.0f} s")
        if not answer.exists():
            log.seek(0)
            print(log.read()[-2500:], flush=True)
            return None
    lines = trace.read_text().splitlines() if trace.exists() else []
    print(sorted({line.split(" ", 1)[1] for line in lines}), flush=True)
    return json.loads(answer.read_text())


def main() -> int:
    """Print a line an engine and FP8's share of 16 bits; 1 where ours is above the goal or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=len(ENGINES), help="how many, in the order FA4 16 bits, FA4 FP8, FLASH_ATTN FP8, 16")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        request = json.loads(options.request.read_text())
        Path(request["answer"]).write_text(json.dumps(measure(request)))
        return 0
    seen: dict[tuple[str, str], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        model = write_config(Path(name) / "model")
        for backend, kv_cache_dtype in ENGINES[: options.engines]:
            begin = time.perf_counter()
            request = {"model": str(model), "backend": backend, "kv_cache_dtype": kv_cache_dtype}
            figure = in_own_process(request, Path(name), options.limit)
            if figure is not None:
                seen[backend, kv_cache_dtype] = figure
            print(f"{backend} {kv_cache_dtype}: {figure}, {time.perf_counter() - begin:.0f} s in all", flush=True)
    ours = [seen.get(("FA4", kv_cache_dtype)) for kv_cache_dtype in ("auto", "fp8")]
    if ours[0] is None or ours[1] is None:
        return 1
    share = ours[1]["attention_us"] / ours[0]["attention_us"]
    print(f"attention with FP8 K and V: {share:.3f} of its time with 16 bits, goal {GOAL}")
    return int(share > GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
