"""Entries of the cache: find, check, build. One process builds an entry, the others wait and use it.

Beside an entry's files stands its record, with what it was made from and the size and digest of each file. They are compared at every
look-up: an entry that does not fit its record is built again. A digest finds damage, not malice; that is `trust`'s part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from fa4_backend import envs
from fa4_backend.cache import prune
from fa4_backend.cache.errors import BrokenObjectError, CacheWriteError
from fa4_backend.cache.trust import check_file, check_trusted, make_folder

logger = logging.getLogger("fa4_backend")

MISSING = "missing"  # the fault of an entry that is not there

_in_use: set[Path] = set()  # folders of entries that this process asked for


@dataclass(frozen=True)
class Entry:
    """A place in the cache and what belongs there."""

    folder: Path
    files: tuple[str, ...]  # names inside the folder, beside the record
    identity: dict[str, Any]  # what it is made from, in JSON's types


def find_fault(entry: Entry, is_package: bool = False) -> str | None:
    """Why `entry` cannot be used: MISSING, or a sentence that names the file; None where it is whole.

    Args:
        is_package: it lies in this package. Who may write there may write the code that asks, so its owner says nothing.

    Raises:
        UntrustedCacheError: others may write it.
        OSError: it cannot be read.
    """
    if not entry.folder.exists():
        return MISSING
    folder = entry.folder if is_package else check_trusted(entry.folder)
    check = (lambda path: path) if is_package else check_file
    try:
        record = json.loads(check(folder / prune.RECORD).read_bytes())
        if record["identity"] != entry.identity:
            return f"{prune.RECORD} is of another key"
        for name in entry.files:
            found, expected = _fingerprint(check(folder / name)), record["files"][name]
            if found != expected:
                return f"{name}: expected {expected}, got {found}"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename).name}: expected a file, got {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{prune.RECORD} cannot be read: {type(error).__name__}: {error}"
    return None


def ensure(entry: Entry, build: Callable[[Path], dict[str, Any]], cannot_build: str | None = None) -> Path:
    """Folder of `entry`, whole; built where it is missing, and, with a log line, where it is damaged.

    Args:
        build: writes the entry's files into the folder it is given; what it returns is kept in the record as "facts".
        cannot_build: why nothing can be built here and what to do, a sentence; None where `build` can be tried.

    Raises:
        UntrustedCacheError: others may write the cache.
        BrokenObjectError: the entry is missing or damaged, and `cannot_build`.
        CacheWriteError: the disk is full, the folder is read-only, ...
        Exception: whatever `build` raises; nothing of the entry is left then.
    """
    try:
        fault = find_fault(entry)
        if fault is not None and cannot_build is not None:
            raise BrokenObjectError(f"{entry.folder}: {fault}. {cannot_build}")
        was_built = fault is not None and _build_once(entry, build)
    except OSError as error:
        raise CacheWriteError(
            f"the cache cannot read or keep {entry.folder}: {error}. "
            "Free some space, or set FA4_BACKEND_CACHE_DIR to a folder that this user can read and write."
        ) from error
    note_use(entry)
    if was_built:
        prune.prune(keep=_in_use)
    return entry.folder.resolve()


def note_use(entry: Entry) -> None:
    """Say that this process uses `entry`: it is the last to be pruned, and not by this process."""
    _in_use.add(entry.folder)
    with suppress(OSError):  # another user's folder, for example: nobody who could prune it depends on us
        os.utime(entry.folder / prune.RECORD)


def read_record(entry: Entry) -> dict[str, Any]:
    """The record of an entry that `ensure` returned: "identity", "facts", "files"."""
    return json.loads((entry.folder / prune.RECORD).read_bytes())


def _build_once(entry: Entry, build: Callable[[Path], dict[str, Any]]) -> bool:
    """Build `entry` unless another process does so first; whether it was built here."""
    envs.cache_limit_bytes()  # a bad setting is refused before the work
    make_folder(entry.folder.parent)
    # 256 files for all entries, so that none has ever to be removed; two entries that share one wait for each other.
    name = hashlib.blake2b(str(entry.folder).encode(), digest_size=1).hexdigest()
    with FileLock(make_folder(envs.cache_dir() / "locks") / f"{name}.lock", mode=0o644):
        fault = find_fault(entry)
        if fault is None:
            return False
        if fault != MISSING:
            logger.warning("cache: %s is damaged (%s) and is built again", entry.folder, fault)
        partial = prune.hidden_name(entry.folder, "partial")
        partial.mkdir(mode=0o755)
        try:
            facts = build(partial)
            write_record(entry, partial, facts)
            prune.remove(entry.folder)
            partial.rename(entry.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return True


def write_record(entry: Entry, folder: Path, facts: dict[str, Any]) -> None:
    """The record of an entry whose files lie in `folder`; nobody but their owner may write them afterwards."""
    files = {name: _fingerprint(folder / name) for name in entry.files}
    record = folder / prune.RECORD
    record.write_text(json.dumps({"identity": entry.identity, "facts": facts, "files": files}, indent=1))
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode & 0o755)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "blake2b": hashlib.file_digest(file, _digest).hexdigest()}


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16)
