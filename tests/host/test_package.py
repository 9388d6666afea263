"""What a user installs: the wheel holds every source, each under its own package, and the entry points."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".c", ".h", ".typed"}
BENCH_PEERS = {"flash_attn", "flash_attn_interface", "flashinfer", "triton", "matplotlib"}  # timed or drawn with where they are installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that no build folder appears in the tree."""
    import shutil

    source = tmp_path_factory.mktemp("source")
    for name in ("fa4_backend", "integration"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("fa4_backend-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_source(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    for folder, package in (("fa4_backend", "fa4_backend"), ("integration", "fa4_integration")):
        sources = [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES and "__pycache__" not in path.parts]
        assert len(sources) > 5
        missing = [path for path in sources if f"{package}/{path.relative_to(ROOT / folder)}" not in held]
        assert not missing, "packages need an __init__.py, other files a line in setup.py"


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fa4_backend", "fa4_integration"}


def test_wheel_names_its_entry_points_and_touches_no_pin_of_vllm(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "fa4 = fa4_integration.vllm_backend.plugin:register" in text and "fa4 = fa4_backend.cli:main" in text
    assert "[sglang.srt.plugins]\nfa4_plugin = fa4_integration.sglang_backend.plugin:register" in text
    metadata = wheel.read(name.replace("entry_points.txt", "METADATA")).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not [line for line in required if "==" in line], "an exact version of ours would fight with the engine's"
    assert [line for line in required if "nvidia-cutlass-dsl" in line and ">=4.8.0" in line]


def test_what_the_package_imports_is_required() -> None:
    """By itself, as an engine's package, or where it is installed only."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    ours = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}  # a package's name, where its distribution has another
    elsewhere = {*sys.stdlib_module_names, "fa4_backend", "fa4_integration", "vllm", "sglang", "transformers", *BENCH_PEERS}
    for path in (*(ROOT / "fa4_backend").rglob("*.py"), *(ROOT / "integration").rglob("*.py")):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
        for top in {name.split(".")[0] for name in names} - elsewhere:
            assert ours.get(top, top) in required, f"{path.relative_to(ROOT)} imports {top}, which pyproject.toml does not require"
