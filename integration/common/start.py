"""An engine's start and its end: buffers and kernels of each plan, then no compile any more.

An adapter calls `reserve` before its engine counts the memory that is left for a KV cache, where there is such a place; `open_warm_up` and
`allocate` where it makes the state of the cache, and `seal_warm_up` at the first batch.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from fa4_backend import AttentionMetadata, convert_room, envs
from fa4_backend.compile_cache import reopen, seal
from fa4_backend.device import plan_on
from fa4_backend.plan import bounded, plan_attention
from fa4_backend.problem import FP8

if TYPE_CHECKING:
    import torch

    from fa4_backend import AttentionProblem, BatchLimits
    from fa4_backend.convert_room import ConvertRoom


logger = logging.getLogger("fa4_backend")


def show_log_lines(engine_logger: str) -> None:
    """Let the core's log lines out where those of the logger called `engine_logger` go: engines give handlers to their own only."""
    logging.getLogger("fa4_backend").parent = logging.getLogger(engine_logger)


def open_warm_up() -> None:
    """An engine makes its state: compiles belong to its start. A second engine in a process starts like the first.

    Raises:
        ValueError: an environment variable holds what it may not.
    """
    for name, fault in envs.faults().items():
        if name in envs.VARIABLES:
            raise ValueError(fault)
        logger.warning(fault)  # set for another version, or a slip of the pen: an engine can do without
    reopen()


def reserve(problem: AttentionProblem, limits: BatchLimits, device: torch.device) -> ConvertRoom | None:
    """Allocate what plans share of memory, K and V that a step converts, if a plan of `problem` has such steps; no page size changes it.

    To be kept as long as the engine serves: it is freed with the last that holds it.

    Raises:
        UnsupportedProblem: no kernel serves the problem, or none serves batches of these limits.
    """
    return convert_room.reserve(plan_attention(problem, bounded(limits, problem)), device)


def allocate(problem: AttentionProblem, limits: BatchLimits, device: torch.device) -> AttentionMetadata:
    """Plan `problem` for `device`, make the buffers, load the kernels, and compile those that the cache on disk lacks.

    Raises:
        UnsupportedProblem: no kernel serves the problem, or none serves batches of these limits.
        CompileError, CacheError: as `AttentionMetadata.allocate`.
    """
    return AttentionMetadata.allocate(plan_on(problem, bounded(limits, problem), device), device)


def allocate_fused(step: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    """The same for layers whose out an engine wants in FP8: refreshed with `step`, whose buffers it shares.

    Raises:
        UnsupportedProblem, CompileError, CacheError: as `allocate`.
    """
    return step.sharing(plan_on(replace(step.plan.problem, out_dtype=FP8), step.plan.limits, device))


def seal_warm_up() -> None:
    """The engine hands out batches: from here on a compile is a degradation."""
    seal()
