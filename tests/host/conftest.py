"""What tests of several files here start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fa4_backend import compile_cache
from fa4_backend.cache import entry
from fa4_backend.kernels import loading
from tests.support.stub_kernels import compile_stub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own whose kernels the C compiler makes; `compiles` tells how often."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(folder))
    monkeypatch.setenv("STUB_COMPILES", str(tmp_path / "compiles"))
    monkeypatch.setattr(compile_cache, "compile_to_object", compile_stub)
    monkeypatch.setattr(compile_cache, "_sealed", False)
    monkeypatch.setattr(entry, "_in_use", set())
    return folder


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple]]:
    """(kernel, arguments) of every launch; no kernel is compiled or run."""
    seen: list[tuple[str, tuple]] = []

    def load(key: Any, *, emulated: bool) -> Callable[..., None]:
        return lambda *arguments: seen.append((key.name, arguments))

    monkeypatch.setattr(loading, "load", load)
    return seen
