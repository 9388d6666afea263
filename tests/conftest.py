"""How processes of tests share the cores, and what every run says at its end."""

from __future__ import annotations

import os

import pytest

from tests.device.proofs import old_proofs

if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core: threads of torch on top would wait for each other, ten times as long as they work. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the committed results that other kernels than the tree's have made."""
    lines = old_proofs()
    if lines:
        terminalreporter.section("results older than the kernels (python -m tests.device.proofs)", yellow=True)
        for line in lines:
            terminalreporter.write_line(line)
