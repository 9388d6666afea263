"""Which kernel really ran: one log line for the metadata of a plan, and on request one line in a file that tests read."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from fa4_backend import envs

if TYPE_CHECKING:
    from fa4_backend.metadata import AttentionMetadata

logger = logging.getLogger("fa4_backend")


def announce(metadata: AttentionMetadata) -> None:
    """Log the plan at its first forward; append it to FA4_BACKEND_TRACE_FILE where that is set."""
    if metadata.is_announced:
        return
    metadata.is_announced = True
    plan = metadata.plan
    logger.info(plan.describe())
    path = envs.trace_file()
    if path is not None:
        with path.open("a") as file:
            file.write(f"{os.getpid()} {plan.describe()} device={metadata.device}\n")
