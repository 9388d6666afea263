"""The cache trusts nothing it finds: damaged, half-written, many processes, a full disk; and where it lies."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fa4_backend import compile_cache, envs
from fa4_backend.cache import entry, prune
from fa4_backend.cache.errors import BrokenObjectError, CacheError, CacheWriteError, UntrustedCacheError
from fa4_backend.compile import CompileError, _check_whole
from tests.support.stub_kernels import StubKey, call_stub, compile_stub, compiles, hidden, object_of

TIMEOUT = 600  # seconds that processes of a few seconds have, however many others the machine runs


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
