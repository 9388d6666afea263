"""What every test run says at its end."""

from __future__ import annotations

import pytest

from tests.device.proofs import old_proofs


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the committed results that other kernels than the tree's have made."""
    lines = old_proofs()
    if lines:
        terminalreporter.section("results older than the kernels (python -m tests.device.proofs)", yellow=True)
        for line in lines:
            terminalreporter.write_line(line)
