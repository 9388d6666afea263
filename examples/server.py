"""`vllm serve` as a child process: started, waited for, asked, stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0

# What a server's last words mean for the user.
ADVICE = {
    "No space left on device": "The disk is full. Free some space and run the same command again.",
    "Address already in use": "The port was taken meanwhile. Choose another one.",
    "Unknown attention backend: 'FA4'": "vLLM does not know FA4: see `fa4 doctor`, and whether VLLM_PLUGINS leaves it out.",
    "Cannot allocate memory": "There is not enough memory for the model and its KV cache.",
}


class ServerError(Exception):
    """The server did not start; the text says why and what to do."""


def require_free_port(port: int) -> None:
    """Raises:
    ServerError: something listens on `port` already.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise ServerError(f"Port {port} is taken, perhaps by another server. Choose another one: make demo PORT={port + 1}") from error


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Server:
    """One `vllm serve`. Use as a context manager: leaving it stops the server and everything it started.

    Args:
        model: folder of the model.
        port: must be free.
        log: file that takes the server's output.
        arguments: of `vllm serve`, after the model.
        environment: variables on top of this process's.

    Raises:
        ServerError: the port is taken.
    """

    def __init__(self, model: Path, port: int, log: Path, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        require_free_port(port)
        self.model, self.port, self.log = model, port, log
        vllm = Path(sys.executable).with_name("vllm")
        command = [str(vllm), "serve", str(model), "--host", HOST, "--port", str(port), "--served-model-name", model.name, *arguments]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # a group of its own, so that the workers stop with it
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def wait_until_ready(self, on_wait: Callable[[], None] = lambda: None) -> float:
        """Seconds until the server answered; `on_wait` is called twice a second meanwhile.

        Raises:
            ServerError: the server stopped, or did not answer within START_TIMEOUT_S.
        """
        begin = time.monotonic()
        while time.monotonic() - begin < START_TIMEOUT_S:
            if self.process.poll() is not None:
                raise ServerError(self._last_words(f"The server stopped with exit status {self.process.returncode}."))
            try:
                with urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=2):
                    return time.monotonic() - begin
            except OSError:
                on_wait()
                time.sleep(0.5)
        raise ServerError(self._last_words(f"The server did not answer within {START_TIMEOUT_S:.0f} s."))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a JSON request, whole."""
        with self._open(path, body) as response:
            return json.load(response)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streaming request (server-sent events) as they come."""
        with self._open(path, {**body, "stream": True}) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    yield json.loads(data)

    def kernel(self) -> str | None:
        """Our own log line about the kernel that ran, or None if none ran."""
        found = re.search(r"FA4: .*", self.log.read_text(errors="replace"))
        return found.group(0).strip() if found else None

    def stop(self) -> None:
        """Ask the server to stop, then end whatever is left of its process group."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}{path}",
            data=json.dumps({"model": self.model.name, **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=START_TIMEOUT_S)

    def _last_words(self, what: str) -> str:
        text = self.log.read_text(errors="replace")
        advice = [sentence for sign, sentence in ADVICE.items() if sign in text]
        tail = "\n".join(text.splitlines()[-15:])
        return "\n".join([what, *advice, f"Its last lines (all of them in {self.log}):", tail])
