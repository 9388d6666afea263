"""Keys to objects and the cache around them; no GPU. One Hopper key is compiled for real, the others of the table in the slow run."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fa4_backend import compile_cache
from fa4_backend.compile import CompileError, link_shared
from fa4_backend.kernel_facts import disassemble, sass_counts
from fa4_backend.kernels.common.prefill_config import PrefillConfig, box_rows_of
from fa4_backend.kernels.sm90.tuning import TILES
from tests.support.sass import product_loops

BASE = PrefillConfig(
    "sm_90a", "bfloat16", 128, 128, 4, TILES[128, 128], 16, is_causal=True, has_window_left=False, has_window_right=False,
    has_softcap=False, has_sinks=False, has_alibi=False, has_lse=True, sinks_dtype="float32",
)  # fmt: skip


@dataclass(frozen=True)
class StubKey:
    """A key that needs no compiler."""

    value: int
    arch: str = "sm_90a"
    builder: str = "fa4_backend.kernels.sm90.kernel:build"

    @property
    def name(self) -> str:
        return f"stub-{self.value}"


@pytest.fixture
def stub_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[StubKey]:
    """A cache of its own and a compiler that only writes files; returns the keys it was asked for."""
    compiled: list[StubKey] = []

    def compile_stub(key: StubKey, stem: Path) -> compile_cache.KernelFacts:
        compiled.append(key)
        facts = compile_cache.KernelFacts(key.name, key.arch, 0.1, 0.1, 168, 0, 1024, 10)
        for suffix in (".ptx", ".cubin", ".so"):
            stem.with_suffix(suffix).write_text(key.name)
        stem.with_suffix(".json").write_text(json.dumps({"facts": facts.__dict__}))
        return facts

    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_cache, "compile_to_object", compile_stub)
    monkeypatch.setattr(compile_cache, "_sealed", False)
    return compiled


def test_a_key_is_compiled_once(stub_compiler: list[StubKey]) -> None:
    first = compile_cache.ensure_object(StubKey(1))
    assert compile_cache.ensure_object(StubKey(1)) == first and first.is_file()
    assert compile_cache.ensure_object(StubKey(2)) != first
    assert stub_compiler == [StubKey(1), StubKey(2)]


def test_a_source_change_is_another_object(stub_compiler: list[StubKey], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_cache.ensure_object(StubKey(1))
    monkeypatch.setattr(compile_cache, "source_fingerprint", lambda builder: "changed")
    compile_cache.ensure_object(StubKey(1))
    assert len(stub_compiler) == 2


def test_a_failed_compile_leaves_nothing_that_looks_whole(stub_compiler: list[StubKey], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(key: StubKey, stem: Path) -> None:
        stem.with_suffix(".so").write_text("half")
        raise CompileError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(compile_cache, "compile_to_object", fail)
        with pytest.raises(CompileError, match="out of memory"):
            compile_cache.ensure_object(StubKey(1))
    assert not compile_cache.object_stem(StubKey(1)).with_suffix(".so").exists()
    compile_cache.ensure_object(StubKey(1))
    assert stub_compiler == [StubKey(1)]


def test_a_compile_after_warm_up_is_an_error_in_strict_mode(stub_compiler: list[StubKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "_sealed", True)
    monkeypatch.setattr(compile_cache, "num_late_compiles", 0)
    compile_cache.ensure_object(StubKey(1))
    assert compile_cache.num_late_compiles == 1
    monkeypatch.setenv("FA4_BACKEND_STRICT", "1")
    compile_cache.ensure_object(StubKey(1))  # in the cache: no compile
    with pytest.raises(RuntimeError, match="before the end of warm-up"):
        compile_cache.ensure_object(StubKey(2))


def test_linking_says_what_the_linker_said(tmp_path: Path) -> None:
    (tmp_path / "broken.o").write_text("not an object")
    with pytest.raises(CompileError, match=r"broken\.o"):
        link_shared([tmp_path / "broken.o"], tmp_path / "broken.so")


@pytest.mark.parametrize(
    ("page_size", "tile_n", "rows"), [(16, 128, 16), (48, 128, 16), (528, 128, 16), (784, 64, 16), (64, 96, 32), (256, 128, 128)]
)
def test_boxes_divide_page_and_tile(page_size: int, tile_n: int, rows: int) -> None:
    assert box_rows_of(page_size, tile_n) == rows
    assert page_size % rows == 0 and tile_n % rows == 0


def _facts_and_code(
    key: PrefillConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[compile_cache.KernelFacts, str, dict[str, int]]:
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(folder))
    library = compile_cache.ensure_object(key)
    return compile_cache.read_facts(key), library.with_suffix(".ptx").read_text(), sass_counts(library.with_suffix(".cubin"))


def test_the_hopper_kernel_is_what_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers, roles and instructions in the compiled code of the key that serves Llama-like models."""
    facts, ptx, sass = _facts_and_code(BASE, tmp_path, monkeypatch)
    assert facts.registers == 168 and facts.spills == 0  # 65536 registers / 384 threads, rounded down to 8
    assert "setmaxnreg.dec.sync.aligned.u32 \t40" in ptx and "setmaxnreg.inc.sync.aligned.u32 \t232" in ptx
    # The stream's first block, masked blocks, whole ones, a tile's first: 8 wgmma for S each; 8 for O with all but the first.
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16") == 7 * 8
    # 8 boxes of 16 keys, of half a head for K and of a whole one for V.
    assert ptx.count("cp.async.bulk.tensor.5d") == 16 + 8
    if sass:
        assert sass["HGMMA"] == 7 * 8 and sass["LDL"] == sass["STL"] == 0
        # A lane's 64 weights and 2 row sums of a block, and 2 factors, off 1 where a maximum stays (`update_max`).
        for key, factors in ((BASE, 2), (replace(BASE, is_invariant=True), 0)):
            for body in product_loops(disassemble(compile_cache.ensure_object(key).with_suffix(".cubin")), 2 * 8):
                assert sum(bool(re.search(r"\bFFMA\b", text)) for text in body) == 64 + 2 + factors


@pytest.mark.slow
@pytest.mark.parametrize("dims", list(TILES))
def test_every_hopper_tile_compiles_without_spilling_in_its_loop(
    dims: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = replace(BASE, head_dim=dims[0], head_dim_v=dims[1], tile=TILES[dims])
    facts, _, sass = _facts_and_code(key, tmp_path, monkeypatch)
    assert facts.spills is not None and facts.spills <= 96, facts  # d256 keeps 88 bytes of per-tile values, d64 40, outside the loops
    if sass:
        num_wgmma = key.head_dim // 16 + key.tile.tile_n // 16
        loops = product_loops(disassemble(compile_cache.ensure_object(key).with_suffix(".cubin")), num_wgmma)
        assert len(loops) == 2, "over masked and over whole blocks"
        assert not any(re.search(r"\b(LDL|STL)\b", text) for body in loops for text in body)


BUILDERS = (
    "fa4_backend.kernels.sm90.kernel:build",
    "fa4_backend.kernels.sm100.kernel:build",
    "fa4_backend.kernels.decode.kernel:build",
    "fa4_backend.kernels.schedule.kernel:build",
)
# Imported for the types of arguments that only host code around a kernel touches, or to size buffers for a plan.
HOST_ONLY = {"arguments.py", "plan.py", "metadata.py", "kernels/tuning.py", "kernels/launch.py", "kernels/decode/config.py"}


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_fingerprint_covers_every_source_that_a_kernel_imports(builder: str) -> None:
    """An import that no fingerprint reads would serve a stale object after an edit."""
    package = Path(compile_cache.__file__).parent
    covered = set(compile_cache.fingerprinted_files(builder))
    assert all(path.is_file() for path in covered)
    for path in sorted(covered):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fa4_backend"):
                continue
            base = package.joinpath(*node.module.split(".")[1:])
            candidates = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
            for source in filter(Path.is_file, candidates):
                name = str(source.relative_to(package))
                assert source in covered or name in HOST_ONLY, f"{path.name} imports {name}, which {builder}'s fingerprint does not read"
