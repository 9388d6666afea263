"""Check that programs are legal PTX: hand them to ptxas."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.emulator.programs.program import HEADER, Program


def module_text(programs: list[Program]) -> str:
    """One module with every program as an entry; all must share target and version."""
    targets = {(p.target, p.version) for p in programs}
    assert len(targets) == 1, targets
    target, version = targets.pop()
    shared = ".extern .shared .align 1024 .b8 smem[];\n"
    body = "".join(p.text.replace(shared, "") for p in programs)
    return HEADER.format(version=version, target=target) + (shared if any(p.smem_bytes for p in programs) else "") + body


def by_target(programs: list[Program]) -> dict[tuple[str, str], list[Program]]:
    groups: dict[tuple[str, str], list[Program]] = {}
    for program in programs:
        groups.setdefault((program.target, program.version), []).append(program)
    return groups


def find_ptxas() -> str | None:
    """ptxas of the system, of PyPI's nvidia-cuda-nvcc, or of triton."""
    found = shutil.which("ptxas")
    if found:
        return found
    import sysconfig

    site = Path(sysconfig.get_paths()["purelib"])
    candidates = [*site.glob("nvidia/*/bin/ptxas"), *site.glob("triton/backends/nvidia/bin/ptxas*")]
    return str(candidates[0]) if candidates else None


def assemble(text: str, target: str) -> str:
    """Run ptxas; returns its messages, empty when it accepted the text."""
    ptxas = find_ptxas()
    assert ptxas, "no ptxas found"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "m.ptx"
        source.write_text(text)
        result = subprocess.run(
            [ptxas, f"-arch={target}", "-O1", "-o", "/dev/null", str(source)], capture_output=True, text=True, check=False
        )
    return "" if result.returncode == 0 else result.stderr or f"exit status {result.returncode}"
