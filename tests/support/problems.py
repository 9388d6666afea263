"""Problems from flat names: features of the mask beside the other facts, as tables of cases list them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fa4_backend import AttentionProblem, MaskFeatures

MASK_NAMES = frozenset(f.name for f in fields(MaskFeatures))


def make_problem(*shape: Any, **facts: Any) -> AttentionProblem:
    """An `AttentionProblem`; `facts` may hold fields of its mask."""
    mask = {name: facts.pop(name) for name in list(facts) if name in MASK_NAMES}
    return AttentionProblem(*shape, mask=MaskFeatures(**mask), **facts)
