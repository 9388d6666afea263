"""Whose files the cache loads, and where it builds: nothing that another user could have put there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from fa4_backend import compile_cache
from fa4_backend.cache import trust
from fa4_backend.cache.errors import UntrustedCacheError
from tests.support.stub_kernels import StubKey, call_stub, compiles, object_of

NOBODY = 65534


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
@pytest.mark.parametrize("part", ["cache", "kernels", "entry", "kernel.so", "kernel.ptx", "entry.json"])
def test_what_others_may_write_is_refused(cache: Path, part: str, mode: int) -> None:
    folder = object_of()
    path = {"cache": cache, "kernels": cache / "kernels", "entry": folder}.get(part, folder / part)
    before = path.stat().st_mode & 0o7777
    path.chmod(mode)
    with pytest.raises(UntrustedCacheError, match=rf"{path}: expected .* mode {mode:04o}.*FA4_BACKEND_CACHE_DIR.*chmod go-w"):
        object_of()
    assert compiles(cache) == 1, "neither used nor built over"
    path.chmod(before)
    object_of()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("part", ["above", "cache", "kernels", "entry", "kernel.so", "entry.json"])
def test_what_another_user_owns_is_refused(cache: Path, part: str) -> None:
    folder = object_of()
    path = {"above": cache.parent, "cache": cache, "kernels": cache / "kernels", "entry": folder}.get(part, folder / part)
    os.chown(path, NOBODY, -1)
    with pytest.raises(UntrustedCacheError, match=rf"{path}: expected .* of root that .* got owner .*{NOBODY}.*FA4_BACKEND_CACHE_DIR"):
        object_of()
    assert compiles(cache) == 1
    os.chown(path, 0, -1)


def test_nothing_is_built_in_a_folder_that_others_may_write(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(UntrustedCacheError):
        object_of()
    assert not list(cache.iterdir())


def test_folders_above_may_be_sticky_but_not_open(cache: Path) -> None:
    """In /tmp nobody else can rename our folder; in a folder open to all anybody can put another in its place."""
    object_of()
    cache.parent.chmod(0o1777)
    object_of()
    cache.parent.chmod(0o777)
    with pytest.raises(UntrustedCacheError, match=f"{cache.parent}: expected a folder"):
        object_of()
    cache.parent.chmod(0o700)


def test_folders_above_may_be_open_to_a_private_group_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """umask 002, the default of some systems, makes ~/.cache so."""
    object_of()
    cache.parent.chmod(0o770)
    monkeypatch.setattr(trust, "_is_private_group", lambda status: True)
    object_of()
    monkeypatch.setattr(trust, "_is_private_group", lambda status: False)
    with pytest.raises(UntrustedCacheError):
        object_of()
    cache.parent.chmod(0o700)


def test_a_link_out_of_the_cache_is_refused_and_the_cache_itself_may_be_one(cache: Path) -> None:
    folder = object_of()
    elsewhere = cache.parent / "elsewhere"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    with pytest.raises(UntrustedCacheError, match="expected a path inside the cache folder"):
        object_of()
    folder.unlink()
    shutil.move(elsewhere, folder)
    moved = cache.parent / "moved"
    shutil.move(cache, moved)
    cache.symlink_to(moved)
    assert object_of().is_relative_to(moved) and compiles(cache) == 1


def test_an_open_umask_does_not_open_the_cache(cache: Path) -> None:
    before = os.umask(0o002)
    try:
        object_of()
    finally:
        os.umask(before)
    assert all(not path.stat().st_mode & 0o022 for path in cache.rglob("*"))
    object_of()
    assert compiles(cache) == 1


def as_nobody(answers: Path) -> None:
    """In a child process: loads one stub that is there and one that is not, as a user without rights; a line each in `answers`."""
    file = answers.open("w")
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    for value in (7, 8):
        try:
            print(call_stub(compile_cache.ensure_object(StubKey(value))), file=file)
        except Exception as error:
            print(type(error).__name__, error, file=file)
    file.close()
    os._exit(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_load_what_root_made_and_cannot_add_to_it(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prebuilt objects for a whole machine: no write right is needed to load them, and a missing one is a named error."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o755)
        monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", f"{name}/shared")
        object_of()
        child = os.fork()
        if child == 0:
            as_nobody(tmp_path / "answers")
        assert os.waitpid(child, 0)[1] == 0
    first, second = (tmp_path / "answers").read_text().splitlines()
    assert first == "7"
    assert second.startswith("CacheWriteError") and "Permission denied" in second and "FA4_BACKEND_CACHE_DIR" in second
