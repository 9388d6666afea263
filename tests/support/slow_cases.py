"""Which cases of a table `make test` runs, and which wait for `make test-slow`.

A case that alone asks for its compiled kernel costs 3 to 15 s of a core on a machine with an empty cache. It waits where other cases, or
the same case on another chip, run what it is about.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def with_slow(cases: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """`cases` as parameters of a test, those of `slow` marked so; a case of several parameters is a tuple.

    Raises:
        ValueError: `slow` names what is no case, which a renamed case would leave behind.
    """
    cases = list(cases)
    if strangers := [case for case in slow if case not in cases]:
        raise ValueError(f"slow cases: expected some of {cases}, got {strangers}")
    return [pytest.param(*_tuple(case), marks=pytest.mark.slow) if case in slow else pytest.param(*_tuple(case)) for case in cases]


def _tuple(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
