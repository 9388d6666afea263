"""Steps of a model with MLA that have kernels of their own, beside those of decode rows: what vLLM's adapter plans for at its start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fa4_backend.model_config import LayerGroup
from fa4_backend.problem import AttentionProblem, BatchLimits
from fa4_backend.split_rows import message_limits

PROMPTS = {True: "prompts", False: "prompts, to chunks of cached context"}  # by whether the mask is causal
MESSAGES = "messages behind long contexts"


class LatentStep(NamedTuple):
    """A kind of step."""

    name: str
    problem: AttentionProblem
    limits: BatchLimits


def latent_steps(group: LayerGroup, limits: BatchLimits) -> Iterator[LatentStep]:
    """The steps of a group of layers whose decode rows are served within `limits`; none where its layers are not of MLA."""
    if group.problem is None or not group.prompts:
        return
    messages = message_limits(limits, group.problem)
    if messages is not None:
        yield LatentStep(MESSAGES, group.problem, messages)
    for problem in group.prompts:
        yield LatentStep(PROMPTS[problem.mask.is_causal], problem, limits)
