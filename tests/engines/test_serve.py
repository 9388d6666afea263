"""`vllm serve` as a user starts it: API server, engine and worker in processes of their own, each spawned and each loading the plugin."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.server import Server, free_port
from tests.engines.engine import KV_CACHE_BYTES, MAX_BATCHED_TOKENS, generate, tokens
from tests.engines.prompts import make_prompts
from tests.engines.tiny_models import write_llama

pytestmark = pytest.mark.engine

PROMPTS = make_prompts()
MAX_TOKENS = 16
ARGUMENTS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
ARGUMENTS += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
# The conftest's one-process setting is for engines inside a test; a server gets what a user gets.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server on FA4, the name in lower case, that writes down which kernel ran in which process."""
    model = write_llama(folder / "llama")
    environment = {**ENVIRONMENT, "FA4_BACKEND_TRACE_FILE": str(folder / "trace")}
    arguments = ["--attention-backend", "fa4", *ARGUMENTS]
    with Server(model, free_port(), folder / "log", arguments, environment) as started:
        started.wait_until_ready()
        yield started


def test_served_tokens_equal_stock_and_our_kernel_ran_in_the_worker(server: Server, folder: Path) -> None:
    request = {"prompt": PROMPTS, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = server.post("/v1/completions", request)
    served = [tuple(choice["token_ids"]) for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    assert served == tokens(generate(folder / "llama", "CPU_ATTN", PROMPTS, max_tokens=MAX_TOKENS))

    (line,) = (folder / "trace").read_text().splitlines()
    pid, kernel = line.split(" ", 1)
    assert kernel.startswith("FA4: torch reference on cpu, 4/2 heads, head_dim 64, float32, page 128")
    log = server.log.read_text()
    assert re.search(rf"Worker[^)]* pid={pid}\)", log), "the kernel ran outside the worker process"
    assert int(pid) != server.process.pid
    assert (server.kernel() or "").startswith("FA4: torch reference on cpu"), "the log line that tells users which kernel runs is missing"
    assert "Using FA4 backend." in log and "CPU_ATTN" not in log


def test_stopping_leaves_no_process(folder: Path) -> None:
    """A server stopped while it starts takes its children along."""
    import os

    server = Server(folder / "llama", free_port(), folder / "log2", ["--attention-backend", "FA4", *ARGUMENTS], ENVIRONMENT)
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
