"""Float32 results within the error budget whatever instruction set torch's libraries use: the budget is no property of one machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# What torch, oneDNN and MKL are told; what torch then says it uses.
WEAKEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
AVX512 = {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}
SETS = {"DEFAULT": WEAKEST, "AVX2": AVX2, "AVX512": AVX512}

# Every width of a dot product, few keys and many, all of softmax's terms.
CHECK = """
from dataclasses import replace
import torch
from tests.support.paged_case import PagedCase
case = PagedCase((1, 7, 40, 1), (50, 23, 200, 1000), num_q_heads=6, dtype="float32")
features = {"softcap": 5.0, "window_left": 63, "sinks": True, "alibi": True}
for head_dim in (64, 80, 96, 128, 192, 256):
    for more in ({}, features):
        built = replace(case, head_dim=head_dim, **more).build()
        built.check(*built.run())
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in SETS, reason="not an x86 CPU")
def test_float32_is_within_budget_on_every_instruction_set() -> None:
    here = list(SETS)[: list(SETS).index(torch.backends.cpu.get_cpu_capability()) + 1]
    runs = {
        name: subprocess.Popen(
            [sys.executable, "-c", CHECK], env={**os.environ, "OMP_NUM_THREADS": "1", **SETS[name]}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name in here
    }  # fmt: skip
    for name, run in runs.items():
        out, err = run.communicate(timeout=900)
        assert run.returncode == 0, f"{name}: {err}"
        assert out.split() == [name]
