"""Which kernel really ran: one log line a plan, and on request one line in a file that tests read."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from fa4_backend import envs

if TYPE_CHECKING:
    from fa4_backend.metadata import AttentionMetadata
    from fa4_backend.plan import AttentionPlan

logger = logging.getLogger("fa4_backend")

_announced: set[AttentionPlan] = set()


def trace_forward(plan: AttentionPlan, metadata: AttentionMetadata) -> None:
    """Log `plan` at its first forward in this process; append it to FA4_BACKEND_TRACE_FILE where that is set."""
    if plan in _announced:
        return
    _announced.add(plan)
    logger.info(plan.describe())
    path = envs.trace_file()
    if path is not None:
        with path.open("a") as file:
            file.write(f"{os.getpid()} {plan.describe()} device={metadata.device}\n")
