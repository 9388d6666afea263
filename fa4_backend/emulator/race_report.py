"""What the race detectors say of a conflict that `native/shadow.c` found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fa4_backend.emulator.report import Report

KINDS = (
    "is overwritten while it may still be read",
    "is written twice without order",
    "is read before its write is known to be complete",
    "that nobody wrote is read",
    "is read by ld.global.nc, but the same launch writes it",
    "holds an mbarrier in use and is overwritten",
    "holds an mbarrier in use and is read like other memory",
)
UNWRITTEN, OVER_BARRIER, READ_BARRIER = 3, 5, 6


def note_conflict(report: Report, memory: str, kind: int, later: str, earlier: Callable[[], str]) -> None:
    """Report a conflict; `later`, `earlier`: who met whom, the second where there is one."""
    if kind == UNWRITTEN:
        report.note("uninitialised", f"{memory} {KINDS[kind]} by {later}")
    elif kind in (OVER_BARRIER, READ_BARRIER):
        report.note("race", f"{memory} {KINDS[kind]} by {later}")
    else:
        report.note("race", f"{memory} {KINDS[kind]}\n  first:  {earlier()}\n  second: {later}")
