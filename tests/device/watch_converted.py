"""Whether an engine's steps bring K and V from FP8 to 16 bits once a call, and whether the room for it was there before its plans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fa4_backend.convert_room import ConvertRoom
from fa4_backend.metadata import AttentionMetadata
from fa4_integration.common import start


@contextmanager
def watch_converted() -> Iterator[dict[str, int]]:
    """Counts: "converted_steps" of all plans, "room_bytes" that were allocated, and of those "late_bytes" while a plan was made."""
    counts = {"converted_steps": 0, "room_bytes": 0, "late_bytes": 0}
    is_planning = False
    converts, grow, allocate = AttentionMetadata._converts, ConvertRoom.grow, start.allocate

    def count_step(self: AttentionMetadata, *bounds: Any) -> bool:
        found = converts(self, *bounds)
        counts["converted_steps"] += found
        return found

    def count_bytes(self: ConvertRoom, num_bytes: int) -> None:
        before = self.storage
        grow(self, num_bytes)
        if self.storage is not before:
            counts["room_bytes"] += num_bytes
            counts["late_bytes"] += num_bytes * is_planning

    def plan(*arguments: Any) -> AttentionMetadata:
        nonlocal is_planning
        is_planning = True
        try:
            return allocate(*arguments)
        finally:
            is_planning = False

    AttentionMetadata._converts, ConvertRoom.grow, start.allocate = count_step, count_bytes, plan  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        AttentionMetadata._converts, ConvertRoom.grow, start.allocate = converts, grow, allocate  # type: ignore[method-assign]
