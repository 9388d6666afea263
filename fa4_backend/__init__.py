"""fa4-backend: FlashAttention-4 forward for LLM servers, over paged and ragged K and V.

The names below are the public API. Importing this package imports neither torch nor a compiler; the operators and the
device metadata load torch on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fa4_backend.plan import AttentionPlan, plan_attention
from fa4_backend.problem import AttentionProblem, BatchLimits, MaskFeatures, UnsupportedProblem

if TYPE_CHECKING:
    from fa4_backend.metadata import AttentionMetadata
    from fa4_backend.mla_ops import mla_decode
    from fa4_backend.ops import paged_attention, ragged_attention

__version__ = "0.1.0"

__all__ = [
    "AttentionMetadata",
    "AttentionPlan",
    "AttentionProblem",
    "BatchLimits",
    "MaskFeatures",
    "UnsupportedProblem",
    "mla_decode",
    "paged_attention",
    "plan_attention",
    "ragged_attention",
]

_NEEDS_TORCH = {
    "AttentionMetadata": "fa4_backend.metadata",
    "mla_decode": "fa4_backend.mla_ops",
    "paged_attention": "fa4_backend.ops",
    "ragged_attention": "fa4_backend.ops",
}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        import importlib

        return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
