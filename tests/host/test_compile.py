"""Keys to objects and the cache around them; no GPU. Hopper's keys that emulated tests compile too are looked into, the others of
the table in the slow run."""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fa4_backend import compile_cache, driver
from fa4_backend.arch import ARCHS
from fa4_backend.cache import entry
from fa4_backend.cache.errors import CacheWriteError
from fa4_backend.compile import CompileError, find_c_compiler, link_shared, trace_and_compile
from fa4_backend.kernel_facts import KernelFacts, disassemble, launch_smem_bytes, sass_counts, tmem_columns
from fa4_backend.kernels.common.prefill_config import PrefillConfig, box_rows_of
from fa4_backend.kernels.schedule.limits import NUM_THREADS, SEQ_BYTES
from fa4_backend.kernels.sm90.config import Sm90Config
from fa4_backend.kernels.sm90.tuning import CONVERTED_TILES, SHARE_PARTS, TILES, TILES_FP8, WINDOW_TILES
from fa4_backend.plan import plan_attention
from fa4_backend.problem import FP8, AttentionProblem, BatchLimits, MaskFeatures
from tests.support.sass import product_loops
from tests.support.stub_kernels import StubKey, compile_stub

KERNEL = PrefillConfig(
    "sm_90a", "bfloat16", "bfloat16", "bfloat16", "bfloat16", 128, 128, 4, TILES[128, 128], 16, mask=MaskFeatures(), has_lse=True,
    sinks_dtype="float32", has_parts=True,
)  # fmt: skip
BASE = Sm90Config(KERNEL)
NO_DISASSEMBLY = "expected instructions of the cubin, got none: nvdisasm is in no package here (triton carries one)"


@pytest.fixture
def stub_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[StubKey]:
    """A cache of its own whose objects the C compiler makes; returns the keys it was asked for."""
    compiled: list[StubKey] = []

    def compile_and_note(key: StubKey, stem: Path) -> KernelFacts:
        compiled.append(key)
        return compile_stub(key, stem)

    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_cache, "compile_to_object", compile_and_note)
    monkeypatch.setattr(compile_cache, "_sealed", False)
    return compiled


def test_a_key_is_compiled_once(stub_compiler: list[StubKey]) -> None:
    first = compile_cache.ensure_object(StubKey(1))
    assert compile_cache.ensure_object(StubKey(1)) == first and first.is_file()
    assert compile_cache.ensure_object(StubKey(2)) != first
    assert stub_compiler == [StubKey(1), StubKey(2)]


def test_missing_keys_are_compiled_side_by_side(stub_compiler: list[StubKey], monkeypatch: pytest.MonkeyPatch) -> None:
    """One by the process itself; several, each once, by processes of their own; what is there by nobody."""
    asked: list[tuple[int, list[StubKey]]] = []
    prepared: list[Callable[[], None] | None] = []

    class Pool:
        def __init__(self, jobs: int, mp_context: object, initializer: Callable[[], None] | None) -> None:
            self.jobs = jobs
            prepared.append(initializer)

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_error: object) -> None: ...

        def map(self, function: Callable[[StubKey], Path], keys: list[StubKey]) -> list[Path]:
            asked.append((self.jobs, keys))
            return [function(key) for key in keys]

    def ended(*_arguments: object) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(compile_cache, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1})
    assert compile_cache.ensure_objects([StubKey(1)]) == 1
    assert stub_compiler == [StubKey(1)] and not asked
    assert compile_cache.ensure_objects([StubKey(4), StubKey(1), StubKey(2), StubKey(4), StubKey(3)]) == 3
    assert asked == [(2, [StubKey(4), StubKey(2), StubKey(3)])] and stub_compiler == [StubKey(n) for n in (1, 4, 2, 3)]
    assert compile_cache.ensure_objects([StubKey(1), StubKey(2)], prepare=ended) == 0
    assert len(asked) == 1 and len(stub_compiler) == 4
    # What a process has to do first is done in one of its own, also for a lone key.
    assert compile_cache.ensure_objects([StubKey(7)], prepare=ended) == 1
    assert compile_cache.ensure_objects(map(StubKey, (8, 9, 10, 11)), jobs=3) == 4
    assert [jobs for jobs, _ in asked] == [2, 1, 3] and prepared == [None, ended, None]
    monkeypatch.setattr(Pool, "map", ended)
    with pytest.raises(CompileError, match=r"expected 2 processes to compile 2 kernels, got one that was ended .* on fewer cores"):
        compile_cache.ensure_objects([StubKey(5), StubKey(6)])


def test_a_cache_that_cannot_be_read_is_told_by_its_own_error(stub_compiler: list[StubKey], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several keys as of one: no bare OSError."""

    def unreadable(*_arguments: object, **_more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(entry, "find_fault", unreadable)
    with pytest.raises(CacheWriteError, match="set FA4_BACKEND_CACHE_DIR"):
        compile_cache.ensure_objects([StubKey(1)])
    assert not stub_compiler


def test_a_source_change_is_another_object(stub_compiler: list[StubKey], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_cache.ensure_object(StubKey(1))
    monkeypatch.setattr(compile_cache, "source_fingerprint", lambda: "changed")
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
    assert not compile_cache.object_entry(StubKey(1)).folder.exists()
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


def test_the_compiler_is_told_the_chip_and_asks_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the DSL's own search for a chip, compiles side by side on a machine whose GPUs are hidden were seen not to end in minutes."""
    seen: list[str | None] = []

    def no_kernel(key: StubKey) -> None:
        seen.append(os.environ.get("CUTE_DSL_ARCH"))
        raise CompileError("far enough")

    monkeypatch.delenv("CUTE_DSL_ARCH", raising=False)
    monkeypatch.setattr("tests.support.stub_kernels.no_kernel", no_kernel, raising=False)
    with pytest.raises(CompileError, match="far enough"):
        trace_and_compile(StubKey(1, builder="tests.support.stub_kernels:no_kernel"), tmp_path)
    monkeypatch.delenv("CUTE_DSL_ARCH")
    assert seen == ["sm_90a"]


@pytest.mark.parametrize(
    ("installed", "newest", "chosen"),
    [
        (("cu12", "cu13"), (13, 0), "cu13"),
        (("cu12", "cu13"), (12, 9), "cu12"),
        (("cu12", "cu13"), (14, 1), "cu13"),
        (("cu12", "cu13"), None, "cu13"),  # no driver
        (("cu13",), (12, 9), "expected a variant for CUDA 12, the newest that the driver runs, found cu13; update the driver"),
        ((), (13, 0), "expected in the package nvidia-cutlass-dsl"),
    ],
)
def test_the_launch_runtime_is_one_that_the_driver_runs(
    installed: tuple[str, ...], newest: tuple[int, int] | None, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant in installed:
        (tmp_path / variant / "lib").mkdir(parents=True)
        (tmp_path / variant / "lib" / "libcute_dsl_runtime.so").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", {"nvidia_cutlass_dsl": spec}.get)
    monkeypatch.setattr(driver, "cuda_version", lambda: newest)
    if chosen.startswith("cu"):
        assert compile_cache.find_runtime() == tmp_path / chosen / "lib" / "libcute_dsl_runtime.so"
    else:
        with pytest.raises(FileNotFoundError, match=chosen):
            compile_cache.find_runtime()


def test_linking_says_what_the_linker_said(tmp_path: Path) -> None:
    (tmp_path / "broken.o").write_text("not an object")
    with pytest.raises(CompileError, match=r"broken\.o"):
        link_shared([tmp_path / "broken.o"], tmp_path / "broken.so")


def test_the_c_compiler_is_the_one_that_cc_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -DX='a b' -O1")
    assert find_c_compiler()[1:] == ["-DX=a b", "-O1"]
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    with pytest.raises(CompileError, match="expected no-such-compiler -O1 on PATH, found none"):
        find_c_compiler()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompileError, match="expected cc, gcc or clang on PATH"):
        find_c_compiler()


@pytest.mark.parametrize(
    ("page_size", "tile_n", "rows"), [(16, 128, 16), (48, 128, 16), (528, 128, 16), (784, 64, 16), (64, 96, 32), (256, 128, 128)]
)
def test_boxes_divide_page_and_tile(page_size: int, tile_n: int, rows: int) -> None:
    assert box_rows_of(page_size, tile_n) == rows
    assert page_size % rows == 0 and tile_n % rows == 0


def _facts_and_code(key: Sm90Config) -> tuple[KernelFacts, str, dict[str, int]]:
    """From the cache of this machine, where the emulated tests look too."""
    library = compile_cache.ensure_object(key)
    return compile_cache.read_facts(key), library.with_suffix(".ptx").read_text(), sass_counts(library.with_suffix(".cubin"))


@pytest.mark.parametrize("has_pieces", [True, False])
def test_the_hopper_kernel_is_what_it_claims(has_pieces: bool) -> None:
    """Registers, roles and instructions in the compiled code of the keys that serve Llama-like models."""
    from fa4_backend.kernels.sm90.storage import Storage

    problem = AttentionProblem(8, 2, 128, 128, "bfloat16", 16, "sm_90a", has_lse=True, batch_invariant=has_pieces)
    plan = plan_attention(problem, BatchLimits(16, 256, 1024))
    assert plan.kernels is not None
    key = plan.kernels.prefill
    assert isinstance(key, Sm90Config) and key.kernel.has_parts and key.kernel.has_pieces == has_pieces
    facts, ptx, sass = _facts_and_code(key)
    assert facts.registers == 168 and facts.spills == 0  # 65536 registers / 384 threads, rounded down to 8
    # The storage leaves room for barriers and alignment, of which the struct takes what it needs.
    assert facts.smem_bytes is not None and 0 <= Storage(key.kernel).num_bytes - facts.smem_bytes <= 1024 and facts.tmem_columns == 0
    assert "setmaxnreg.dec.sync.aligned.u32 \t40" in ptx and "setmaxnreg.inc.sync.aligned.u32 \t232" in ptx
    # The stream's first block, masked blocks, whole ones, a tile's first: 8 wgmma for S each; 8 for O with all but the first, and alone
    # behind a CTA's last tile.
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16") == 8 * 8
    # 8 boxes of 16 keys, of half a head for K and of a whole one for V.
    assert ptx.count("cp.async.bulk.tensor.5d") == 16 + 8
    assert sass, NO_DISASSEMBLY
    assert sass["HGMMA"] == 8 * 8 and sass["LDL"] == sass["STL"] == 0
    # A lane's 64 weights and 2 row sums of a block; none for a factor, which is a difference of references (`update_max`).
    for body in product_loops(disassemble(compile_cache.ensure_object(key).with_suffix(".cubin")), 2 * 8):
        assert sum(bool(re.search(r"\bFFMA\b", text)) for text in body) == 64 + 2


SPILL_CASES = {
    **{f"{dims}": (KERNEL.dtype, dims, tile, MaskFeatures()) for dims, tile in TILES.items()},
    **{f"{dims} FP8": (FP8, dims, tile, MaskFeatures()) for dims, tile in TILES_FP8.items()},
    **{f"{dims} converted": (KERNEL.dtype, dims, tile, MaskFeatures()) for dims, tile in CONVERTED_TILES.items()},
    **{f"{dims} window": (KERNEL.dtype, dims, tile, MaskFeatures(has_window_left=True)) for dims, tile in WINDOW_TILES.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("piece_blocks", [0, 32])
@pytest.mark.parametrize("name", SPILL_CASES)
def test_every_hopper_tile_compiles_without_spilling_in_its_loop(name: str, piece_blocks: int) -> None:
    kv_dtype, dims, tile, mask = SPILL_CASES[name]
    in_use = {"share_parts": SHARE_PARTS, "piece_blocks": piece_blocks}
    key = Sm90Config(replace(KERNEL, kv_dtype=kv_dtype, head_dim=dims[0], head_dim_v=dims[1], tile=tile, mask=mask, **in_use))  # type: ignore[arg-type]
    facts, _, sass = _facts_and_code(key)
    assert facts.spills is not None and facts.spills <= 96, facts  # d256 keeps 88 bytes of per-tile values, d64 40, outside the loops
    assert sass, NO_DISASSEMBLY
    num_wgmma = dims[0] // 16 + tile.tile_n // 16
    code = disassemble(compile_cache.ensure_object(key).with_suffix(".cubin"))
    loops = product_loops(code, num_wgmma)
    assert len(loops) == 2 + mask.has_window_left, "over masked and over whole blocks"
    assert not any(re.search(r"\b(LDL|STL)\b", text) for body in loops for text in body)
    if kv_dtype == FP8:
        # An instruction for two values of K and of V, of which a lane has 16 of a part.
        conversions = product_loops(code, 8 * (dims[1] // key.kernel.part_elems(dims[1])), "F2FP.F16.E4M3.UNPACK_B")
        assert conversions and not any(re.search(r"\b(LDL|STL)\b", text) for body in conversions for text in body)


# Imported for types of arguments, to load what was compiled, or by the torch kernel: nothing of theirs is compiled in.
HOST_ONLY = {"arguments.py", "reference.py", "plan.py", "metadata.py", "compile_cache.py", "envs.py"}


def test_the_fingerprint_covers_every_source_that_a_kernel_imports() -> None:
    """An import that the fingerprint does not read would serve a stale object after an edit."""
    package = Path(compile_cache.__file__).parent
    covered = set(compile_cache.fingerprinted_files())
    assert covered >= set((package / "kernels").rglob("*.py")) and all(path.is_file() for path in covered)
    for path in sorted(covered):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fa4_backend"):
                continue
            base = package.joinpath(*node.module.split(".")[1:])
            candidates = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
            for source in filter(Path.is_file, candidates):
                name = str(source.relative_to(package))
                host_only = name in HOST_ONLY or name.startswith("emulator/")
                assert source in covered or host_only, f"{path.name} imports {name}, which the fingerprint does not read"


def test_an_edit_anywhere_in_the_kernels_is_another_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file added, renamed, edited; text moved from the end of one file to the start of the next."""
    package = tmp_path / "package"
    shutil.copytree(Path(compile_cache.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "emulator", "bench"))
    monkeypatch.setattr(compile_cache, "_PACKAGE", package)
    fingerprint = compile_cache.source_fingerprint.__wrapped__
    seen = {fingerprint()}

    def is_another() -> bool:
        before = len(seen)
        seen.add(fingerprint())
        return len(seen) == before + 1

    tuning = package / "kernels" / "sm100" / "tuning.py"
    tuning.write_text(tuning.read_text().replace("1", "2", 1))
    assert is_another()
    deep = package / "kernels" / "new" / "deep"
    deep.mkdir(parents=True)
    (deep / "a.py").write_text("x = 1\n")
    assert is_another()
    (deep / "a.py").rename(deep / "b.py")
    assert is_another()
    assert not is_another()


def test_facts_are_those_of_the_compiled_kernel() -> None:
    """Shared memory as the kernel's storage lays it out and a launch asks for it, and tensor memory; a name that tells the arch."""
    from fa4_backend.commands.compile import compile_plans
    from fa4_backend.kernels.sm100.kernel import O_STAGE
    from fa4_backend.kernels.sm100.storage import Storage

    plan = plan_attention(AttentionProblem(8, 2, 128, 128, "bfloat16", 16, "sm_100a", has_lse=True), BatchLimits(16, 256, 1024))
    for key in plan.keys:  # here: processes beside this one would import the compiler first
        compile_cache.ensure_object(key)
    kernels = {kernel["name"].split("-")[0]: kernel for kernel in compile_plans([plan])}
    keys = "name arch seconds cpu_seconds registers spills smem_bytes tmem_columns ptx_instructions sass_counts".split()
    for kind, kernel in kernels.items():
        assert sorted(kernel) == sorted(keys)
        assert kernel["name"].startswith(f"{kind}-sm_100a-") and kernel["arch"] == "sm_100a"
        assert kernel["smem_bytes"] <= ARCHS["sm_100a"].smem_bytes
    assert {kind: kernel["tmem_columns"] for kind, kernel in kernels.items()} == {"schedule": 0, "decode": 0, "prefill": 512}
    assert kernels["prefill"]["smem_bytes"] == Storage.of(plan.kernels.prefill, O_STAGE).num_bytes
    assert kernels["schedule"]["smem_bytes"] >= SEQ_BYTES * 256 + 4 * 4 * NUM_THREADS  # tables of sequences and of cuts


def test_shared_memory_in_ptx_and_in_the_launch_is_added() -> None:
    config = "!llvm.struct<(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32)>"
    host = f"""
      %9 = llvm.mlir.constant(7 : i64) : i64
    }}
      %9 = llvm.mlir.constant(16480 : i64) : i64
      %26 = llvm.getelementptr %20[0, 2] : (!llvm.ptr) -> !llvm.ptr, {config}
      llvm.store %9, %26 : i64, !llvm.ptr
    }}
      %9 = llvm.mlir.constant(8 : i64) : i64"""
    ptx = ".extern .shared .align 1024 .b8 dynamic[];\n\t.shared .align 16 .b8 a[100];\n.shared .align 4 .b8 b[20];"
    assert launch_smem_bytes(ptx, host) == 16480 + 120
    assert launch_smem_bytes(ptx, host.replace("16480 : i64", "16480 : i32").replace("7 : i64", "7 : i32")) is None
    assert launch_smem_bytes(ptx, "") is None


def test_tensor_memory_is_the_sum_of_the_allocations() -> None:
    alloc = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 \t[__dynamic_shmem__0+16], {};"
    assert tmem_columns("") == 0
    assert tmem_columns(f"mov.b32 \t%r1, 256;\n{alloc.format('%r1')}\n{alloc.format('64')}") == 320
    assert tmem_columns(alloc.format("%r1")) is None
