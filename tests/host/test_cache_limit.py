"""How much the cache keeps: the least recently used go, and nothing that is in use."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from fa4_backend.cache import entry, prune
from tests.support.stub_kernels import hidden, object_of


def _age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / prune.RECORD, (then, then))


@pytest.fixture
def aged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Four entries of an old version, the first used longest ago, that no process uses."""
    folders = [object_of(value) for value in range(4)]
    entry._in_use.clear()
    for number, folder in enumerate(folders):
        _age(folder, 1000 - 100 * number)
    return folders


def _limit(monkeypatch: pytest.MonkeyPatch, num_entries: float) -> None:
    size = max(item.num_bytes for item in prune.items())
    monkeypatch.setenv("FA4_BACKEND_CACHE_GIB", repr(num_entries * size / 2**30))


def test_the_least_recently_used_go(
    cache: Path, aged: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    object_of(0)
    assert time.time() - (aged[0] / prune.RECORD).stat().st_mtime < 900, "a look-up is a use"
    entry._in_use.clear()
    _age(aged[0], 50 + prune.GRACE_SECONDS)
    _limit(monkeypatch, 3.5)
    with caplog.at_level(logging.INFO):
        new = object_of(5)
    assert [folder.exists() for folder in aged] == [True, False, False, True] and new.exists()
    (line,) = [message for message in caplog.messages if "removed" in message]
    assert line.startswith("cache: 2 entries") and aged[1].name in line and aged[2].name in line
    assert not hidden(cache)


def test_what_this_process_uses_and_what_was_just_used_stays(cache: Path, aged: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    object_of(0)  # this process uses it, however long ago
    _age(aged[0], 5000)
    _age(aged[1], prune.GRACE_SECONDS / 2)  # another process may be about to load it
    _limit(monkeypatch, 0.5)
    new = object_of(5)
    assert [folder.exists() for folder in aged] == [True, True, False, False] and new.exists()


def test_another_process_that_prunes_is_not_waited_for(cache: Path, aged: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _limit(monkeypatch, 0.5)
    with prune.FileLock(cache / "locks" / "prune.lock"):
        object_of(5)
    assert all(folder.exists() for folder in aged)


def test_objects_of_another_layout_are_pruned_too(cache: Path, aged: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    flat = aged[0].parent / "prefill-old.so"
    flat.write_bytes(bytes(100))
    os.utime(flat, (0, 0))
    _limit(monkeypatch, 4.9)
    object_of(5)
    assert not flat.exists() and aged[1].exists()


@pytest.mark.parametrize("text", ["0", "-1", "much", "inf", "nan"])
def test_a_limit_that_is_no_size_is_refused_before_the_work(cache: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FA4_BACKEND_CACHE_GIB", text)
    with pytest.raises(ValueError, match=f"FA4_BACKEND_CACHE_GIB: expected a positive number of GiB, got '{text}'"):
        object_of()
    assert not (cache.parent / "compiles").exists()
