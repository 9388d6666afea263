"""Kernels that come with an installation: found before the cache, left where they do not fit, and a real wheel without a compiler."""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fa4_backend import AttentionProblem, BatchLimits, compile_cache, plan_attention, prebuilt
from fa4_backend.arch import ARCHS
from fa4_backend.compile import CompileError
from fa4_backend.model_config import prompt_problems
from fa4_backend.problem import FP8, LATENT, PAGED
from fa4_backend.split_rows import message_limits
from fa4_backend.support import LATENT_PAGE
from scripts import build_wheel
from tests.support.stub_kernels import StubKey, call_stub, compile_stub

ROOT = Path(__file__).parents[2]
OTHER_MACHINE = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation's folder and a cache, both empty; kernels are the C compiler's."""
    monkeypatch.setattr(compile_cache, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compile_cache, "compile_to_object", compile_stub)
    return tmp_path / "prebuilt"


def test_what_came_with_the_installation_is_loaded(folder: Path, tmp_path: Path) -> None:
    """Neither the cache nor the compiler is asked; another key is not there."""
    place = prebuilt.add(StubKey(1))
    assert sorted(path.name for path in place.iterdir()) == ["entry.json", "kernel.so"]
    shutil.rmtree(tmp_path / "cache")
    library = compile_cache.find_prebuilt(StubKey(1))
    assert library is not None and library.is_relative_to(folder) and call_stub(library) == 1
    assert compile_cache.find_prebuilt(StubKey(2)) is None
    assert not (tmp_path / "cache").exists()


def test_the_loader_asks_the_installation_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub is no tvm-ffi module: what the loader says of it names the file that it tried."""
    prebuilt.add(StubKey(3))
    for key, where in ((StubKey(3), str(folder)), (StubKey(4), str(folder.with_name("cache")))):
        with pytest.raises(compile_cache.BrokenObjectError, match=rf"{where}/.*kernel.so: as it was compiled"):
            compile_cache.load_kernel(key)


def test_what_is_damaged_is_said_and_left(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = prebuilt.add(StubKey(1)) / "kernel.so"
    library.write_bytes(library.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert compile_cache.find_prebuilt(StubKey(1)) is None
    (line,) = caplog.messages
    assert str(library.parent) in line and "damaged (kernel.so" in line


def test_objects_of_other_sources_are_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt.add(StubKey(1))
    assert prebuilt.describe(prebuilt.records()) == (True, "1 for sm_90a")
    monkeypatch.setattr(compile_cache, "source_fingerprint", lambda: "changed")
    assert compile_cache.find_prebuilt(StubKey(1)) is None
    assert prebuilt.describe(prebuilt.records()) == (False, "none that can be used here, 1 of other sources, not used")


def test_objects_for_another_host_are_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = prebuilt.add(StubKey(1)).parent
    place.rename(place.with_name(place.name.replace(platform.machine(), OTHER_MACHINE)))
    assert compile_cache.find_prebuilt(StubKey(1)) is None
    assert prebuilt.describe(prebuilt.records()) == (False, f"none that can be used here, 1 for {OTHER_MACHINE}, not used")
    prebuilt.add(StubKey(1))
    monkeypatch.setattr(compile_cache, "dsl_version", lambda: "9.9.9")
    assert compile_cache.find_prebuilt(StubKey(1)) is None
    assert "1 for another launch runtime" in prebuilt.describe(prebuilt.records())[1]


def test_a_key_that_the_installation_lacks_is_compiled_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        compile_cache.ensure_object(StubKey(1))
        prebuilt.add(StubKey(1))
        compile_cache.ensure_object(StubKey(2))
    first, second = (line for line in caplog.messages if line.startswith("compiled"))
    assert first.endswith(" s"), "no word of an installation that carries nothing"
    assert second.startswith("compiled stub-2") and second.endswith("it is not among the kernels that came with the installation")


IR = """; a launcher
target datalayout = "e-m:e-p270:32:32-S128"
target triple = "x86_64-unknown-linux-gnu"
declare i32 @_cudaGetDevice(ptr) local_unnamed_addr
declare void @llvm.memcpy.p0.p0.i64(ptr noalias, ptr noalias, i64, i1 immarg)
declare ptr @TVMFFIEnvGetStream(i32, i32) local_unnamed_addr
"""


def test_host_code_for_another_machine_names_it_alone() -> None:
    text = prebuilt.retarget(IR, prebuilt.TRIPLES["aarch64"])
    assert "datalayout" not in text and 'target triple = "aarch64-unknown-linux-gnu"' in text
    assert text.count("\n") == IR.count("\n") - 1


@pytest.mark.parametrize("line", ["declare i32 @f(i1 zeroext)", "declare { i64, i64 } @f(ptr)", "declare double @f(double)"])
def test_what_two_machines_may_pass_differently_is_refused(line: str) -> None:
    with pytest.raises(CompileError, match="expected functions of integers and pointers"):
        prebuilt.retarget(f"{IR}{line}\n", prebuilt.TRIPLES["aarch64"])
    with pytest.raises(CompileError, match="expected one line of a data layout"):
        prebuilt.retarget("define void @f() {}", prebuilt.TRIPLES["aarch64"])


@pytest.mark.parametrize("arch", ARCHS)
def test_a_wheel_has_what_engines_plan_for_where_users_name_nothing(arch: str) -> None:
    """Pages, sequences and prompts of MLA as vLLM and SGLang have them, of shapes that the wheel's list names; one GPU of eight."""
    asked = (build_wheel.COMMON, [arch], build_wheel.DECODE_QUERY_LENS, build_wheel.PAGE_SIZES, build_wheel.MAX_NUM_SEQS)
    keys = set(build_wheel.keys_of(*asked))
    latent = AttentionProblem(16, 1, 576, 512, "bfloat16", LATENT_PAGE, arch, kv_source=LATENT)
    needed = [latent, *prompt_problems(latent, 192, 128)]
    needed += [AttentionProblem(4, 1, 128, 128, "bfloat16", page_size, arch, kv_dtype=kv) for page_size in (16, 64) for kv in ("auto", FP8)]
    needed += [replace(problem, out_dtype=FP8) for problem in needed if problem.kv_source == PAGED]  # of quantised checkpoints, in vLLM
    asked_limits = [BatchLimits(seqs, 8192, 40960, 1 + drafts, 32768) for seqs in (256, 1024, 4096) for drafts in (0, 1, 3, 7)]
    steps = [*itertools.product(needed, asked_limits)]
    steps += [(latent, message_limits(limits, latent)) for limits in asked_limits]
    for problem, limits in steps:
        needed_keys = plan_attention(problem, limits).keys
        assert needed_keys and not set(needed_keys) - keys, (problem, limits)


@pytest.mark.parametrize("shape", ["32,128", "32/8", "32/8,128x", "32/8,128:fp4"])
def test_a_shape_that_cannot_be_read_is_told_what_was_expected(shape: str) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got "):
        build_wheel.problems_of(shape, "sm_90a", (16,))


LOAD = """
import builtins, json, sys
honest = builtins.__import__
def guarded(name, *rest, **more):
    if name.split(".")[0] == "cutlass":
        raise AssertionError("imported " + name)
    return honest(name, *rest, **more)
builtins.__import__ = guarded
import fa4_backend, fa4_integration
from fa4_backend import AttentionProblem, BatchLimits, compile_cache, plan_attention, prebuilt
plan = plan_attention(AttentionProblem(64, 16, 128, 128, "bfloat16", 16, "sm_90a"), BatchLimits(64, 2048, 4096))
loaded = [compile_cache.load_kernel(key) for key in plan.keys]
print(json.dumps([fa4_backend.__file__, fa4_integration.__path__[0], len(loaded), prebuilt.describe(prebuilt.records())[1]]))
"""


@pytest.mark.slow
def test_a_wheel_serves_without_a_compiler(tmp_path: Path) -> None:
    """Built from a copy of the tree; installed into a folder of its own; another model of the same shapes than the wheel's.

    Its process cannot import the DSL, finds no C compiler and no cache, and loads every kernel of a plan up to the launch.
    """
    tree, site, cache = tmp_path / "tree", tmp_path / "site", tmp_path / "cache"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in files:
        if name and not name.startswith("tests/") and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    make = [sys.executable, "scripts/build_wheel.py", "--out", str(tmp_path / "dist"), "--arch", "sm_90a", "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    subprocess.run(
        [*make, "--shape", "32/8,128", "--query-len", "1", "--page-size", "16", "--max-num-seqs", "64"],
        cwd=tree,
        env=environment,
        check=True,
    )
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith(f"-py3-none-manylinux_2_28_{platform.machine()}.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    bare = {"PYTHONPATH": str(site), "PATH": "", "FA4_BACKEND_CACHE_DIR": str(cache), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, adapter, count, words = json.loads(done.stdout.splitlines()[-1])
    assert Path(package).is_relative_to(site) and Path(adapter).is_relative_to(site)
    assert count == 3 and words == "3 for sm_90a"
    assert not (cache / "kernels").exists(), "something was compiled or copied"
    ask_doctor = [sys.executable, "-m", "fa4_backend.cli", "doctor", "--json"]
    doctor = subprocess.run(ask_doctor, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert '"3 for sm_90a"' in doctor.stdout, doctor.stderr
