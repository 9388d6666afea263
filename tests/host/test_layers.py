"""Who may import whom: kernels know nothing of plans, a family knows only what families share, and `cutlass` stays below the kernels.

An engine's adapter knows its engine, the operator and what adapters share.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fa4_backend"
KERNELS = PACKAGE / "kernels"
FAMILIES = ("sm90", "sm100", "decode", "mla_decode", "schedule", "convert_kv")
# Facts of a family that another one builds on: what a list holds, and no code that runs on the device.
SHARED_FACTS = {"fa4_backend.kernels.schedule.work_list"}
INTEGRATION = ROOT / "integration"
# Folder or module below integration/ -> the engine that it alone may import.
ENGINES = {"vllm_backend": "vllm", "sglang_backend": "sglang", "transformers_attention": "transformers"}
# The emulated machine: a warp knows its CTA and the CTA its warps, and so on up to the launch and across to what watches them for races.
MACHINE = frozenset(
    f"fa4_backend.emulator.{name}" for name in ("warp", "cta", "grid", "barrier_state", "wgmma_registers", "races", "global_races")
)


def imported_modules(path: Path, for_checkers: bool = False) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function; those for type checkers alone only where asked."""
    tree = ast.parse(path.read_text())
    checkers_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in checkers_only and not for_checkers:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def kernel_files() -> list[Path]:
    return sorted(KERNELS.rglob("*.py"))


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: str(path.relative_to(KERNELS)))
def test_kernels_do_not_know_plans(path: Path) -> None:
    above = ("plan", "metadata", "ops", "mla_ops", "validation", "step_validation", "support", "commands", "bench")
    found = [name for name in imported_modules(path) if any(name.startswith(f"fa4_backend.{module}") for module in above)]
    assert not found, f"{path.relative_to(ROOT)} imports upwards: {found}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_imports_no_other(family: str) -> None:
    others = tuple(f"fa4_backend.kernels.{other}." for other in FAMILIES if other != family)
    for path in sorted((KERNELS / family).rglob("*.py")):
        found = [name for name in imported_modules(path) if name.startswith(others)]
        found = [name for name in found if not any(name == fact or name.startswith(f"{fact}.") for fact in SHARED_FACTS)]
        assert not found, f"{path.relative_to(ROOT)} imports sideways: {found}"


def test_what_families_share_imports_none_of_them() -> None:
    families = tuple(f"fa4_backend.kernels.{family}." for family in FAMILIES)
    for path in sorted((KERNELS / "common").glob("*.py")):
        found = [name for name in imported_modules(path) if name.startswith(families)]
        found = [name for name in found if not any(name == fact or name.startswith(f"{fact}.") for fact in SHARED_FACTS)]
        assert not found, f"{path.relative_to(ROOT)} imports a family: {found}"


def test_the_compiler_is_imported_below_the_kernels_only() -> None:
    allowed = {PACKAGE / "compile.py"}
    for path in sorted(PACKAGE.rglob("*.py")):
        if KERNELS in path.parents or path in allowed or PACKAGE / "emulator" in path.parents:
            continue
        found = [name for name in imported_modules(path) if name.split(".")[0] == "cutlass"]
        assert not found, f"{path.relative_to(ROOT)} imports the compiler: {found}"


def integration_files() -> list[Path]:
    return sorted(INTEGRATION.rglob("*.py"))


@pytest.mark.parametrize("path", integration_files(), ids=lambda path: str(path.relative_to(INTEGRATION)))
def test_an_adapter_knows_its_own_engine(path: Path) -> None:
    name = path.relative_to(INTEGRATION).parts[0].removesuffix(".py")
    foreign = {engine for owner, engine in ENGINES.items() if owner != name}
    others = tuple(f"fa4_integration.{owner}" for owner in ENGINES if owner != name)
    imported = list(imported_modules(path))
    found = [module for module in imported if module.split(".")[0] in foreign or module.startswith(others)]
    assert not found, f"{path.relative_to(ROOT)} imports another engine: {found}"
    found = [module for module in imported if module.startswith("fa4_backend.kernels")]
    assert not found, f"{path.relative_to(ROOT)} imports past the operator: {found}"


def test_every_adapter_is_known() -> None:
    names = {path.name.removesuffix(".py") for path in INTEGRATION.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert names - {"common", "__pycache__", "__init__"} == set(ENGINES)


def module_names() -> dict[str, Path]:
    """Modules of the package and the adapters, by the name under which they are imported."""
    names = {}
    for folder, name in ((PACKAGE, "fa4_backend"), (INTEGRATION, "fa4_integration")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            names[".".join((name, *parts)).removesuffix(".__init__")] = path
    return names


def test_no_files_import_each_other_in_a_circle() -> None:
    """Arrows run one way for a reader too, so imports for type checkers count; a package's face only hands names on."""
    modules = module_names()
    faces = {name for name, path in modules.items() if path.name == "__init__.py"}
    assert modules.keys() >= MACHINE
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        if name in faces:
            continue
        below = {other for other in imported_modules(path, for_checkers=True) if other in modules and other not in faces}
        if name in MACHINE:
            graph.setdefault("the machine", set()).update(below - MACHINE)
        else:
            graph[name] = {"the machine" if other in MACHINE else other for other in below}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"files import each other in a circle: {' <- '.join(error.args[1])}")
