"""Makes `.venv-sglang`: SGLang beside this project on a machine without a GPU. Run by the project's own interpreter.

    .venv/bin/python scripts/setup_sglang.py      # does nothing when `.venv-sglang` is up to date; `make test-sglang` runs it

SGLang's wheel pins CUDA's torch and dozens of kernel packages. None of them is needed to import it, to run its attention tests or to start
an engine on a CPU, so it is installed without what it requires and takes torch, transformers and the rest from `.venv`, whose packages it
sees behind its own. Only what `.venv` lacks is installed here. The traps, and what is done about each:

* PyPI's torchvision is built for CUDA's torch: beside a CPU torch its registration of meta kernels raises. An empty module in its place
  is put in when an interpreter starts; SGLang uses torchvision for images only.
* Outside of CUDA SGLang takes the rotary embedding from `vllm._custom_ops`: `.venv` has vLLM's CPU build.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-sglang"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fa4-setup.stamp"

SGLANG = ["sglang==0.5.23", "torchvision==0.28.0"]  # without what they require
NEEDED = ["orjson", "ipython", "xxhash"]  # what SGLang imports at once and `.venv` lacks
EMPTY_MODULE = "torchvision._meta_registrations"
INPUTS = ("scripts/setup_sglang.py", "pyproject.toml", "setup.py")


class SetupError(Exception):
    """The environment could not be made; the text tells the user what to do."""


def fingerprint() -> str:
    """Changes when an input of the environment does, or the environment that it leans on."""
    digest = hashlib.sha256(sys.prefix.encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def run(*command: str | Path) -> None:
    """Runs a command, its output shown only if it fails. Raises SetupError."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise SetupError(f"$ {' '.join(map(str, command))}\n{done.stdout[-4000:]}")


def pip_install(*what: str) -> None:
    run(PYTHON, "-m", "pip", "install", "--quiet", "--no-compile", *what)  # bytecode: as in setup_env.py


def install() -> None:
    if sys.prefix == sys.base_prefix:
        raise SetupError("expected the interpreter of the project's environment (make setup), got the system's")
    shutil.rmtree(VENV, ignore_errors=True)
    step("a virtual environment in .venv-sglang that sees the packages of this one")
    run(sys.executable, "-m", "venv", "--without-pip", VENV)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(VENV)}))
    # As a folder of packages, not as a path: the compiler in it is found by a .pth file of its own. Sorts after this project's.
    (site_packages / "behind.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    stub = f'import sys, types; sys.modules["{EMPTY_MODULE}"] = types.ModuleType("{EMPTY_MODULE}")\n'
    (site_packages / "no_meta_kernels.pth").write_text(stub)
    step(f"{', '.join(SGLANG)}, without what they require")
    pip_install("--no-deps", *SGLANG)
    step(f"{', '.join(NEEDED)} and this project")
    pip_install(*NEEDED)
    pip_install("--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def step(text: str) -> None:
    print(f"set-up of SGLang: {text}", flush=True)


def main() -> int:
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    try:
        install()
    except SetupError as error:
        print(f"set-up of SGLang: {error}", file=sys.stderr)
        return 1
    STAMP.write_text(wanted)
    step("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
