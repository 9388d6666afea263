"""What both benchmarks do with a peer that is installed but does not run a batch: say so, and time the others."""

from __future__ import annotations

import sys
from collections.abc import Callable

Call = Callable[[], object]


def ready(peer: str, batch: str, prepare: Callable[[], Call | None], *, must_run: bool = False) -> Call | None:
    """A kernel's call, run once; None where a peer has no answer to the batch or refuses it, which is printed with its reason.

    Raises:
        Exception: the kernel's own, where it `must_run`.
    """
    try:
        call = prepare()
        if call is not None:
            call()
    except Exception as error:  # a peer may refuse in any way it likes
        if must_run:
            raise
        reason = str(error).strip().splitlines() or [""]
        print(f"{batch}: {peer} did not run: {type(error).__name__}: {reason[0][:200]}", file=sys.stderr, flush=True)
        return None
    return call
