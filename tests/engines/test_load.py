"""`vllm serve` on FA4 with 500 users at once: answers that depend on the request alone, memory that stays, nothing left over at the end."""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from examples.server import HOST, Server, free_port
from tests.engines.random_load import DrawnRequest, RandomLoad
from tests.engines.tiny_models import write_llama

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_USERS = 500
SAMPLE = 40  # answers that are asked for again, one after the other
# Few blocks: some of 64 running sequences have to go back to the queue.
ARGUMENTS = ["--attention-backend", "FA4", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "16"]
ARGUMENTS += ["--max-num-batched-tokens", "256", "--max-num-seqs", "64", "--num-gpu-blocks-override", "64"]
ARGUMENTS += ["--kv-cache-memory-bytes", str(64 << 20)]
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "FA4_BACKEND_STRICT": "1"}
# Sums of other batches differ by about 1e-5 in float32 logits; where the two best tokens are nearer than this, either is right.
TIE = 1e-3
AGAIN = 250  # users who ask the same once more; by then oneDNN has kept a compiled product for most numbers of tokens that a step has
GROWTH = 64 << 20  # bytes of the worker meanwhile, the rest of such products; the first users make it grow by more than twice as much


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("load")
    environment = {**ENVIRONMENT, "FA4_BACKEND_TRACE_FILE": str(folder / "trace")}
    with Server(write_llama(folder / "llama"), free_port(), folder / "log", ARGUMENTS, environment) as started:
        started.wait_until_ready()
        yield started


def ask(server: Server, request: DrawnRequest) -> dict[str, Any] | None:
    """The answer's tokens and the two best at each place; None for a user who left."""
    body = {"prompt": request.prompt, "max_tokens": request.new_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    if request.leaves_after is not None:
        for index, _ in enumerate(server.stream("/v1/completions", body)):
            if index >= request.leaves_after:
                return None
        return None
    (choice,) = server.post("/v1/completions", {**body, "logprobs": 2})["choices"]
    return {"tokens": choice["token_ids"], "best": [sorted(places.values()) for places in choice["logprobs"]["top_logprobs"]]}


def metric(server: Server, name: str) -> float:
    """Sum of a metric over its labels."""
    with urllib.request.urlopen(f"http://{HOST}:{server.port}/metrics", timeout=60) as response:
        values = re.findall(rf"^vllm:{name}(?:\{{.*\}})? ([0-9.e+-]+)$", response.read().decode(), flags=re.MULTILINE)
    assert values, f"vLLM has no metric {name}"
    return sum(map(float, values))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_500_users_at_once(server: Server) -> None:
    load = RandomLoad(seed=0, longest_prompt=160, longest_answer=24)
    requests = [load.next() for _ in range(NUM_USERS)]
    with ThreadPoolExecutor(NUM_USERS) as users:
        answers = list(users.map(lambda request: ask(server, request), requests))
        worker = int((server.log.parent / "trace").read_text().split()[0])
        before = resident_bytes(worker)
        list(users.map(lambda request: ask(server, request), requests[:AGAIN]))
    after = resident_bytes(worker)
    print(f"the worker grew by {(after - before) / 2**20:.1f} MiB")

    stayed = [(request, answer) for request, answer in zip(requests, answers, strict=True) if request.leaves_after is None]
    assert 0 < len(stayed) < NUM_USERS
    assert all(answer is not None and len(answer["tokens"]) == request.new_tokens for request, answer in stayed)
    assert metric(server, "num_preemptions_total") > 0, "the load was too light"
    assert metric(server, "prefix_cache_hits_total") > 0
    assert after - before <= GROWTH, f"the worker grew by {(after - before) >> 20} MiB"
    assert metric(server, "num_requests_running") == metric(server, "num_requests_waiting") == 0
    assert metric(server, "kv_cache_usage_perc") == 0, "blocks of requests that are gone"
    for request, answer in stayed[:: max(1, len(stayed) // SAMPLE)]:
        alone = ask(server, request)
        assert answer is not None and alone is not None
        place = next((i for i, pair in enumerate(zip(answer["tokens"], alone["tokens"], strict=True)) if pair[0] != pair[1]), None)
        assert place is None or alone["best"][place][-1] - alone["best"][place][-2] < TIE, f"{request}: {answer} for {alone}"
    assert len((server.log.parent / "trace").read_text().splitlines()) == 1, "another kernel than at first, or another process"
    assert "Traceback" not in server.log.read_text()
