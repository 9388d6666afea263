"""Kernels whose lanes all arrive (`tests/device/racecheck_lanes.py`) on the emulator: one whose barriers count otherwise than its roles
arrive hangs here, and not first on a GPU under compute-sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

# In a process of its own, since the classes of all kernels change.
RUN = """
from dataclasses import replace
from tests.device import racecheck_lanes
racecheck_lanes.change_kernels()
from tests.emulated.test_sm90_prefill import BASE, run_prefill
drawn = replace(BASE, query_lens=(31, 33), kv_lens=(127, 129), kv_dtype={kv_dtype!r})
run_prefill(drawn).check()
print("right")
"""


@pytest.mark.parametrize("kv_dtype", ["auto", "float8_e4m3fn"])
def test_prefill(kv_dtype: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", RUN.format(kv_dtype=kv_dtype)], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert ended.returncode == 0 and ended.stdout.endswith("right\n"), ended.stderr[-3000:]
