"""Compile keys whose objects the C compiler makes in a few milliseconds: for tests of the cache, by many processes, without the DSL."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from fa4_backend import compile_cache
from fa4_backend.compile import OBJECT_FUNCTION, link_shared
from fa4_backend.kernel_facts import KernelFacts


@dataclass(frozen=True)
class StubKey:
    """A key that needs no DSL; its kernel returns `value`."""

    value: int
    arch: str = "sm_90a"
    builder: str = "fa4_backend.kernels.sm90.kernel:build"

    @property
    def name(self) -> str:
        return f"stub-{self.value}"


def compile_stub(key: StubKey, stem: Path) -> KernelFacts:
    """Stands in for `fa4_backend.compile.compile_to_object`; notes each call in the file that STUB_COMPILES names."""
    if log := os.environ.get("STUB_COMPILES"):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {key.name}\n")
    source = stem.with_suffix(".c")
    source.write_text(f"int {OBJECT_FUNCTION}(void) {{ return {key.value}; }}\n")
    link_shared([source], stem.with_suffix(".so"))
    source.unlink()
    stem.with_suffix(".ptx").write_text(f"// {key.name}\n" * 1000)
    stem.with_suffix(".cubin").write_bytes(b"\x7fELF" + key.name.encode() * 1000)
    return KernelFacts(key.name, key.arch, 0.1, 0.1, 168, 0, 1024, 0, 10)


def call_stub(library: Path) -> int:
    """What the stub's kernel returns, through the dynamic linker."""
    return getattr(ctypes.CDLL(str(library)), OBJECT_FUNCTION)()


def compiles(cache: Path) -> int:
    """How many stubs were compiled for the folder of the fixture `cache`."""
    return len((cache.parent / "compiles").read_text().splitlines())


def object_of(value: int = 7) -> Path:
    """Folder of a stub's entry, compiled if need be."""
    return compile_cache.ensure_object(StubKey(value)).parent


def hidden(cache: Path) -> list[Path]:
    """Folders on their way in or out, which must not stay."""
    return [path for path in cache.rglob(".*") if path.is_dir()]


if __name__ == "__main__":
    import sys

    # A process of its own: `value` compiled or found, loaded and called. Prints what it returns, or the error's name.
    compile_cache.compile_to_object = compile_stub  # type: ignore[assignment]
    try:
        print(call_stub(compile_cache.ensure_object(StubKey(int(sys.argv[1])))))
    except Exception as error:
        print(type(error).__name__, error)
