"""Another project's sm90 kernels on the emulator against their own results on an H200 (tests/device/results)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.device.upstream_sm90 import CASES, compare, run_on_emulator

RESULTS = Path(__file__).parents[1] / "device/results"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn-4 is not installed"),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upstream's kernels, compiled in a process of their own: the DSL reads its target once."""
    folder = tmp_path_factory.mktemp("upstream")
    subprocess.run([sys.executable, "-m", "tests.device.upstream_sm90", "compile", "--folder", str(folder)], check=True)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_emulator_agrees_with_the_gpu(objects: Path, name: str) -> None:
    """All but a thousandth of the outputs have the same bits; the rest differ by the last bit of bfloat16.

    What differs is ex2.approx: the hardware's is within 2 units in the last place, the emulator's is correctly rounded. It moves P and
    the row sums by 1e-7 relative, which flips the rounding of an output now and then.
    """
    recorded = np.load(RESULTS / "upstream_sm90_h200.npz")
    gpu = {
        "out": (recorded[f"{name}/out"].astype(np.uint32) << 16).view(np.float32),
        "lse": recorded[f"{name}/lse"],
    }
    facts = compare(CASES[name], gpu, run_on_emulator(CASES[name], objects))
    assert facts["out_bits_equal"] > 0.998, facts
    assert facts["out_difference"] <= 2.0**-7 * np.abs(gpu["out"]).max(), facts
    assert facts["lse_difference"] < 2e-6, facts
    assert facts["emulated_out_error"] <= 1.1 * facts["gpu_out_error"], facts
