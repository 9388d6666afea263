"""Garbage collections that look at an engine's own objects only.

vLLM asks for a full collection some ten times between an engine's start and its end, and each walks through everything that vLLM's and
torch's imports made: a third of the time of an engine of a small model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def settled_heap() -> Iterator[None]:
    """Leave out all objects that are there now. vLLM freezes and unfreezes the heap too, with its engines in it; here it does not."""
    gc.collect()
    gc.freeze()
    with mock.patch.object(gc, "freeze"), mock.patch.object(gc, "unfreeze"):
        yield
