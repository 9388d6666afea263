"""A process that holds the DSL's real launch runtime can still run kernels on the emulator."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from fa4_backend.compile_cache import load_runtime
load_runtime()
from tests.support.paged_case import PagedCase
case = PagedCase((5, 1), (40, 33), num_q_heads=8, head_dim=128, arch="emulated-sm_90a")
built = case.build()
built.check(*built.run(case.plan(num_sms=2)))
"""


def test_kernels_run_on_the_emulator_where_the_real_runtime_was_loaded_first() -> None:
    """Both define the same symbols, and the first in a process's global scope would win: a launch would ask for a GPU."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
