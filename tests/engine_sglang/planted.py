"""A plugin that plants an error into ours: softmax scales 5 % too large. For the control of `test_engine.py`."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Wrap our operator where the adapter calls it."""
    from fa4_integration.sglang_backend import backend

    operator = backend.paged_attention

    def wrong(*args: Any, softmax_scale: float, **kwargs: Any) -> Any:
        return operator(*args, softmax_scale=1.05 * softmax_scale, **kwargs)

    backend.paged_attention = wrong
