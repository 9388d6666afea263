"""Who may import whom: a plan needs no torch, a server needs no compiler, a plugin neither."""

from __future__ import annotations

import subprocess
import sys

import pytest

GUARD = """
import builtins, sys
forbidden = {forbidden!r}
honest = builtins.__import__
def guarded(name, *rest, **more):
    if name.split(".")[0] in forbidden:
        raise AssertionError("imported " + name)
    return honest(name, *rest, **more)
builtins.__import__ = guarded
{code}
"""
PLAN = (
    "from fa4_backend import AttentionProblem, BatchLimits, plan_attention\n"
    "plan_attention(AttentionProblem(2, 1, 64, 64, 'bfloat16', 16, 'cpu'), BatchLimits(1, 1, 1))"
)


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        (PLAN, ["torch", "cutlass", "vllm", "numpy"]),
        ("import fa4_integration.vllm_backend.plugin", ["torch", "cutlass", "vllm", "numpy"]),
        ("import fa4_integration.sglang_backend.plugin", ["torch", "cutlass", "sglang", "numpy"]),
        ("from fa4_backend.cli import main\nmain(['--version'])", ["torch", "cutlass", "vllm"]),
        ("import fa4_backend.commands.plan, fa4_backend.commands.compile", ["transformers", "vllm", "cutlass"]),
        ("import fa4_backend.ops, fa4_backend.reference, fa4_backend.kernels.torch_reference", ["cutlass", "vllm", "triton"]),
    ],
)
def test_import_boundary(code: str, forbidden: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", GUARD.format(forbidden=forbidden, code=code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
