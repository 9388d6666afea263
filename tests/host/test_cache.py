"""The cache trusts nothing it finds: damaged, foreign, half-written, too many, many processes, a full disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fa4_backend import compile_cache, envs
from fa4_backend.cache import entry, prune, trust
from fa4_backend.cache.errors import BrokenObjectError, CacheError, CacheWriteError, UntrustedCacheError
from fa4_backend.compile import CompileError, _check_whole
from tests.support.stub_kernels import StubKey, call_stub, compile_stub

NOBODY = 65534
TIMEOUT = 600  # seconds that processes of a few seconds have, however many others the machine runs


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


def compiles(cache: Path) -> int:
    return len((cache.parent / "compiles").read_text().splitlines())


def object_of(value: int = 7) -> Path:
    """Folder of a stub's entry, compiled if need be."""
    return compile_cache.ensure_object(StubKey(value)).parent


def hidden(cache: Path) -> list[Path]:
    """Folders on their way in or out, which must not stay."""
    return [path for path in cache.rglob(".*") if path.is_dir()]


# -- what does not fit its record ---------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _of_another_key(path: Path) -> None:
    record = json.loads(path.read_text())
    record["identity"]["key"]["value"] += 1
    path.write_text(json.dumps(record))


def _without_files(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "library cut short": ("kernel.so", _cut),
    "library of no bytes": ("kernel.so", lambda path: path.write_bytes(b"")),
    "one bit of the library": ("kernel.so", _garble),
    "library missing": ("kernel.so", Path.unlink),
    "library a folder": ("kernel.so", lambda path: (path.unlink(), path.mkdir())),
    "garbage for PTX": ("kernel.ptx", lambda path: path.write_text("garbage")),
    "PTX of the same length": ("kernel.ptx", _garble),
    "cubin cut short": ("kernel.cubin", _cut),
    "record missing": ("entry.json", Path.unlink),
    "record of another key": ("entry.json", _of_another_key),
    "record without files": ("entry.json", _without_files),
    "record cut short": ("entry.json", _cut),
    "record no object": ("entry.json", lambda path: path.write_text("[]")),
    "record no text": ("entry.json", lambda path: path.write_bytes(b"\xff\xfe")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_built_again_with_one_log_line(
    cache: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], object]
) -> None:
    folder = object_of()
    damage(folder / name)
    with caplog.at_level(logging.WARNING):
        library = compile_cache.ensure_object(StubKey(7))
    assert compiles(cache) == 2 and call_stub(library) == 7
    (line,) = caplog.messages
    assert str(folder) in line and name in line
    compile_cache.ensure_object(StubKey(7))
    assert compiles(cache) == 2, "the second is whole"
    assert not hidden(cache)


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_named_where_nothing_can_be_compiled(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Path], object]
) -> None:
    folder = object_of()
    monkeypatch.setattr(compile_cache, "dsl_version", lambda: None)
    assert object_of() == folder, "found without the DSL"
    damage(folder / name)
    with pytest.raises(BrokenObjectError, match=rf"{folder.name}: {name}.*install it, or run `fa4 compile --arch sm_90a"):
        compile_cache.ensure_object(StubKey(7))
    with pytest.raises(BrokenObjectError, match=r"stub-8-.*: missing.*nvidia-cutlass-dsl is not installed"):
        compile_cache.ensure_object(StubKey(8))


def test_without_the_dsl_the_newest_version_counts_by_number(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "dsl_version", lambda: None)
    machine = os.uname().machine
    for name in (f"dsl-4.8.2-{machine}", f"dsl-4.8.10-{machine}", "dsl-4.9.0-another"):
        (cache / "kernels" / "sm_90a" / name).mkdir(parents=True)
    assert compile_cache.object_folder("sm_90a").name == f"dsl-4.8.10-{machine}"


def test_what_the_loader_refuses_is_a_named_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object as it was written, but for another host: no rebuild, and not the linker's bare words."""

    def foreign(key: StubKey, stem: Path) -> compile_cache.KernelFacts:
        facts = compile_stub(key, stem)
        stem.with_suffix(".so").write_text("a library of another machine" * 10)
        return facts

    monkeypatch.setattr(compile_cache, "compile_to_object", foreign)
    monkeypatch.setattr(compile_cache, "load_runtime", lambda: None)
    with pytest.raises(BrokenObjectError, match=r"kernel\.so: as it was compiled, but it cannot be loaded here: .*invalid ELF header"):
        compile_cache.load_kernel(StubKey(9))


def test_what_the_dsl_cut_short_is_refused() -> None:
    """The DSL hands PTX and cubin over through files and says nothing when the disk is full."""
    elf = b"\x7fELF" + bytes(28) + (64).to_bytes(8, "little") + (200).to_bytes(8, "little") + bytes(6)
    elf += (56).to_bytes(2, "little") + (1).to_bytes(2, "little") + (64).to_bytes(2, "little") + (2).to_bytes(2, "little") + bytes(2)
    whole = elf + bytes(328 - len(elf))
    _check_whole(StubKey(1), "{ { } }", whole)
    for ptx, cubin in (("{ { }", whole), ("{ } ret", whole), ("", whole), ("{ }", whole[:-1]), ("{ }", b"")):
        with pytest.raises(CompileError, match="Is the disk full"):
            _check_whole(StubKey(1), ptx, cubin)


def test_checks_cost_less_than_a_fifth_of_a_second_of_start(cache: Path) -> None:
    """Ten kernels of 1 MB, four times what a large model loads; CPU time, so that a busy machine does not count."""
    entries = []
    for value in range(10):
        folder = cache / "emulator" / f"big-{value}"
        place = entry.Entry(folder, ("kernel.so",), {"value": value})
        entry.ensure(place, lambda partial: {"bytes": (partial / "kernel.so").write_bytes(os.urandom(1 << 20))})
        entries.append(place)
    begin = time.process_time()
    assert [entry.find_fault(place) for place in entries] == [None] * 10
    assert time.process_time() - begin < 0.2


# -- whose files ---------------------------------------------------------------------------------------------------------------------


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


# -- several processes, a full disk -----------------------------------------------------------------------------------------------


def start(value: int, limit_bytes: int | None = None) -> subprocess.Popen[str]:
    """A process that compiles, loads and calls a stub."""

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "-m", "tests.support.stub_kernels", str(value)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


def test_eight_processes_that_start_at_once_with_an_empty_cache(cache: Path) -> None:
    """Each ends with a working kernel; each key is compiled by one of them."""
    processes = [start(value) for value in (1, 2, 1, 2, 1, 2, 1, 2)]
    answers = [process.communicate(timeout=TIMEOUT) for process in processes]
    assert [out.strip() for out, _ in answers] == ["1", "2"] * 4, answers
    assert compiles(cache) == 2
    assert len(list(cache.glob("kernels/*/*/*"))) == 2 and not hidden(cache)


def test_a_process_killed_in_the_middle_leaves_nothing_that_looks_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(key: StubKey, stem: Path) -> compile_cache.KernelFacts:
        compile_stub(key, stem)
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(compile_cache, "compile_to_object", die)
        object_of()
    assert os.waitpid(child, 0)[1] == 9 << 8
    (dead,) = hidden(cache)
    assert (dead / "kernel.so").exists()
    assert call_stub(object_of() / "kernel.so") == 7, "built anew, and no lock is left"
    long_ago = time.time() - 2 * prune.PARTIAL_SECONDS
    os.utime(dead, (long_ago, long_ago))
    object_of(8)
    assert not hidden(cache), "swept at the next build, an hour later"


@pytest.mark.parametrize("limit_bytes", [0, 100, 12_000])
def test_a_limit_on_files_ends_in_a_named_error(cache: Path, limit_bytes: int) -> None:
    """Not even the C source fits, the library does not, only the PTX does not; the next process starts from nothing half-written."""
    out, err = start(7, limit_bytes).communicate(timeout=TIMEOUT)
    assert out.startswith(("CacheWriteError", "CompileError")), (out, err)
    assert not list(cache.glob("kernels/*/*/*"))
    assert call_stub(object_of() / "kernel.so") == 7


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # a library of it is loaded


@pytest.mark.parametrize("used_bytes", [0, 20_000, 50_000, 65_536])
def test_a_full_disk_ends_in_a_named_error(cache: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, used_bytes: int) -> None:
    """However far it gets: two processes, each with a working kernel or a named error, and nothing half-written."""
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(small_disk / "cache"))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(used_bytes))
    answers = [process.communicate(timeout=TIMEOUT) for process in [start(7) for _ in range(2)]]
    for out, err in answers:
        assert out.strip() == "7" or out.startswith(("CacheWriteError", "CompileError")), (out, err)
    if used_bytes == 65_536:
        assert all("No space left" in out for out, _ in answers)
    assert not hidden(small_disk)
    ballast.unlink()
    assert call_stub(object_of() / "kernel.so") == 7


def test_no_space_for_the_record(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are written and only the last does not fit: the entry is not there."""
    honest = Path.write_text

    def full(path: Path, text: str) -> int:
        if path.name == prune.RECORD:
            honest(path, text[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return honest(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(CacheWriteError, match=r"No space left on device.*Free some space, or set FA4_BACKEND_CACHE_DIR"):
            object_of()
    assert not list(cache.glob("kernels/*/*/*"))
    assert call_stub(object_of() / "kernel.so") == 7


# -- how much ------------------------------------------------------------------------------------------------------------------------


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


# -- one folder ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"FA4_BACKEND_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"FA4_BACKEND_CACHE_DIR": "~/b"}, "/home/me/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/fa4-backend"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/fa4-backend"),
        ({"FA4_BACKEND_CACHE_DIR": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/fa4-backend"),
        ({}, "/home/me/.cache/fa4-backend"),
    ],
)
def test_one_folder_for_all(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], folder: str) -> None:
    for name in ("FA4_BACKEND_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **settings}.items():
        monkeypatch.setenv(name, value)
    assert envs.cache_dir() == Path(folder)
    assert compile_cache.object_folder("sm_90a").is_relative_to(folder)


def test_the_emulators_core_is_kept_the_same_way(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The same folder, the same checks: a damaged core is built again, one that others may write is refused."""
    from fa4_backend.emulator import native_core

    def compile_stub_core(compiler: list[str], work: Path, sources: list[Path], library: Path) -> None:
        assert all(source.exists() for source in sources)
        library.write_text("a core")

    monkeypatch.setattr(native_core, "_compile", compile_stub_core)
    find = native_core.library_path.__wrapped__
    library = find()
    assert library.is_relative_to(cache / "emulator") and sorted(path.name for path in library.parent.iterdir()) == [
        "core.so",
        "entry.json",
    ]
    library.write_text("x")
    with caplog.at_level(logging.WARNING):
        assert find().read_text() == "a core"
    assert len(caplog.messages) == 1
    library.chmod(0o666)
    with pytest.raises(UntrustedCacheError):
        find()


def test_all_errors_are_the_caches() -> None:
    assert all(issubclass(error, CacheError) for error in (BrokenObjectError, CacheWriteError, UntrustedCacheError))
