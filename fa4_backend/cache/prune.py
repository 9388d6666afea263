"""Keep the cache below its limit (FA4_BACKEND_CACHE_GIB): entries go whole, the least recently used first.

Every build looks. Never removed: what this process uses, and what anybody used in the last minute, since it may be on its way from the
check to the loader. A library that a process has loaded stays usable after its file is gone.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fa4_backend import envs
from fa4_backend.cache.trust import make_folder

logger = logging.getLogger("fa4_backend")

RECORD = "entry.json"  # of every entry; its time of change is the entry's last use
GRACE_SECONDS = 60
PARTIAL_SECONDS = 3600  # a hidden folder this old belongs to a process that died: no build takes that long


@dataclass(frozen=True)
class Item:
    """An entry, or something else that lies where entries lie."""

    path: Path
    num_bytes: int
    last_use: float  # seconds since the epoch


def items() -> list[Item]:
    """Everything that the limit counts, hidden folders included."""
    root = envs.cache_dir()
    found = [*root.glob("kernels/*/*/*"), *root.glob("emulator/*")]
    return [item for path in found if (item := _item(path)) is not None]


def prune(keep: Collection[Path]) -> None:
    """Remove the least recently used entries but those in `keep` until the rest fits the limit; one log line says what went.

    What cannot be removed is a log line, no error: the entry that was just built is good.

    Raises:
        ValueError: the limit is no positive number.
    """
    limit = envs.cache_limit_bytes()
    try:
        with FileLock(make_folder(envs.cache_dir() / "locks") / "prune.lock", timeout=0, mode=0o644):
            removed = _prune(limit, keep)
    except Timeout:
        return  # another process is at it
    except OSError as error:
        logger.warning("cache: not pruned to %.2f GiB: %s", limit / 2**30, error)
        return
    if removed:
        num_bytes, names = sum(item.num_bytes for item in removed), ", ".join(item.path.name for item in removed)
        logger.info(
            "cache: %d entries, %.1f MiB, removed to stay below %.2f GiB: %s", len(removed), num_bytes / 2**20, limit / 2**30, names
        )


def hidden_name(path: Path, kind: str) -> Path:
    """A name beside `path` that nothing has, for a folder on its way in ("partial") or out ("removed")."""
    return path.with_name(f".{kind}-{uuid.uuid4().hex[:12]}")


def remove(path: Path) -> None:
    """Take an entry, or what lies in its place, away at once; nothing happens where there is none."""
    doomed = hidden_name(path, "removed")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    if doomed.is_dir():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink(missing_ok=True)


def _prune(limit: int, keep: Collection[Path]) -> list[Item]:
    left = sorted(items(), key=lambda item: item.last_use)
    total, removed = sum(item.num_bytes for item in left), []
    for item in left:
        is_dead = item.path.name.startswith(".")
        if (total <= limit and not is_dead) or item.path in keep:
            continue
        current = _item(item.path)  # another process may have come to use it
        if current is None or time.time() - current.last_use < (PARTIAL_SECONDS if is_dead else GRACE_SECONDS):
            continue
        try:
            remove(item.path)
        except OSError as error:  # another user's, in a folder that several fill
            logger.warning("cache: %s cannot be removed: %s", item.path, error)
            continue
        total -= item.num_bytes
        removed.append(item)
    return removed


def _item(path: Path) -> Item | None:
    """None where it has gone meanwhile."""
    try:
        if not path.is_dir():
            return Item(path, path.stat().st_size, path.stat().st_mtime)
        record = path / RECORD
        times = (record if record.exists() else path).stat()
        return Item(path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), times.st_mtime)
    except FileNotFoundError:
        return None
