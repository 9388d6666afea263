"""A whole engine of SGLang on a CPU: launcher, scheduler, radix cache, chunked prompts. Tokens are those of SGLang's own torch backend."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fa4_integration.sglang_backend.names import NAME
from tests.engine_sglang.engine import FIRST, NEW_TOKENS, SECOND
from tests.engine_sglang.planted import plant
from tests.engines.tiny_models import write_llama

ROOT = Path(__file__).parents[2]
PATIENCE = 1500  # seconds; an engine is up after 25 on two idle cores, and most of that is imports


class Started(NamedTuple):
    """An engine's process, with what it will write."""

    process: subprocess.Popen[bytes]
    out: Path
    trace: Path
    log: Path

    def tokens(self) -> list[list[int]]:
        """Wait for them."""
        if self.process.poll() is None:
            self.process.wait(PATIENCE)
        assert self.process.returncode == 0 and self.out.exists(), self.log.read_text()[-4000:]
        return json.loads(self.out.read_text())

    def trace_lines(self) -> list[str]:
        """Which kernels of ours ran, a line a process."""
        return self.trace.read_text().splitlines() if self.trace.exists() else []


def start(backend: str, model: Path, folder: Path, **variables: str) -> Started:
    """Start an engine; returns at once."""
    folder.mkdir()
    out, trace, log = folder / "tokens.json", folder / "trace", folder / "log"
    environment = {**os.environ, "FA4_BACKEND_TRACE_FILE": str(trace), "HF_HUB_OFFLINE": "1", **variables}
    command = [sys.executable, "-m", "tests.engine_sglang.engine", backend, str(model), str(out)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    return Started(process, out, trace, log)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """Both engines, started together."""
    folder = tmp_path_factory.mktemp("engines")
    started = {backend: start(backend, model, folder / backend) for backend in (NAME, "torch_native")}
    yield started
    for engine in started.values():
        with contextlib.suppress(ProcessLookupError):  # it has ended, and all that it started
            os.killpg(engine.process.pid, signal.SIGKILL)


def test_tokens_are_those_of_torch_native(engines: dict[str, Started]) -> None:
    ours, theirs = engines[NAME].tokens(), engines["torch_native"].tokens()
    assert [len(tokens) for tokens in ours] == [NEW_TOKENS] * (len(FIRST) + len(SECOND))
    assert all(len(set(tokens)) > NEW_TOKENS // 3 for tokens in ours), "a model that repeats itself proves nothing"
    assert ours == theirs


def test_our_kernel_ran_in_the_scheduler(engines: dict[str, Started]) -> None:
    lines = engines[NAME].trace_lines()
    assert len(lines) == 1 and "FA4: torch reference on cpu, 4/2 heads" in lines[0]
    assert int(lines[0].split()[0]) != engines[NAME].process.pid
    assert engines["torch_native"].trace_lines() == []


@pytest.mark.slow
def test_a_wrong_scale_changes_tokens(engines: dict[str, Started], model: Path, tmp_path: Path) -> None:
    planted = start(NAME, model, tmp_path / "planted", PYTHONPATH=plant(tmp_path / "site"))
    assert planted.tokens() != engines[NAME].tokens()
    assert planted.trace_lines()
