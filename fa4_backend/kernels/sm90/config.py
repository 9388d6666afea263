"""What is compiled into a Hopper prefill kernel, and how it follows from the problem. Imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.kernels.common.prefill_config import PrefillConfig, prefill_config
from fa4_backend.kernels.sm90.tuning import TILES
from fa4_backend.problem import AttentionProblem

CTAS_PER_ITEM = 1


@dataclass(frozen=True)
class Sm90Config:
    """Compile key of a Hopper prefill kernel."""

    kernel: PrefillConfig

    @property
    def arch(self) -> str:
        """Target arch."""
        return self.kernel.arch

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.sm90.kernel:build"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        return self.kernel.name

    @property
    def ctas_per_item(self) -> int:
        """CTAs that work on an entry of the work list together."""
        return CTAS_PER_ITEM

    @property
    def tokens_per_item(self) -> int:
        """Query tokens of a work item: what its `m_block` counts in."""
        return self.kernel.tokens_per_tile


def resolve(problem: AttentionProblem, *, is_dependent: bool) -> Sm90Config:
    """The compile key of `problem`'s kernel, alone or behind a decode kernel."""
    return Sm90Config(prefill_config(problem, TILES[problem.head_dim, problem.head_dim_v], is_dependent=is_dependent))
