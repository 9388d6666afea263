"""Room for K and V that a step brings from FP8 to 16 bits: one buffer of a process and device, for all plans.

A call writes its keys there and its own prefill kernel reads them, so nothing in it outlives a call, and calls on one stream may all have
the same. It is allocated where a plan is made, or before by `reserve`, where an engine still counts what it takes; never in a step.
"""

from __future__ import annotations

import logging
import math
import weakref
from typing import NamedTuple

import torch

from fa4_backend.plan import AttentionPlan, aligned_bytes

logger = logging.getLogger("fa4_backend")


class ConvertedKv(NamedTuple):
    """Where a plan's calls leave their converted K and V: views of the room."""

    keys: torch.Tensor  # (convert_keys, num_kv_heads, head_dim) in the model's dtype
    values: torch.Tensor  # (convert_keys, num_kv_heads, head_dim_v)
    room: ConvertRoom


class ConvertRoom:
    """The buffer of a device, freed with the last plan or layer that holds it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.storage = torch.empty(0, dtype=torch.uint8, device=device)
        self.last_stream: torch.cuda.Stream | None = None  # that used it

    def grow(self, num_bytes: int) -> None:
        """Hold `num_bytes` or more. Views made before keep the buffer that they were made of, as a captured graph keeps its address:
        whoever reserves for all plans before making the first has one buffer alone."""
        if num_bytes > self.storage.numel():
            self.storage = torch.empty(0, dtype=torch.uint8, device=self.device)  # the old one is free, if no view holds it
            self.storage = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            logger.info("FA4: room of %.0f MiB on %s for K and V brought from FP8 to 16 bits", num_bytes / 2**20, self.device)

    def views(self, plan: AttentionPlan) -> ConvertedKv:
        """K and V of a call of `plan`, one behind the other."""
        assert plan.converted_shapes is not None, plan
        keys, values = plan.converted_shapes
        dtype = getattr(torch, plan.problem.dtype)
        begin = aligned_bytes(keys, dtype.itemsize)
        k = self.storage[: math.prod(keys) * dtype.itemsize]
        v = self.storage[begin : begin + math.prod(values) * dtype.itemsize]
        return ConvertedKv(k.view(dtype).view(keys), v.view(dtype).view(values), self)

    def enter(self) -> None:
        """Make the current stream wait for the one that used the room last, if that was another; no host sync.

        Not while a graph is captured: the order of its replays is that of the streams on which they run.
        """
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self.device)
        if self.last_stream is not None and self.last_stream != stream:
            stream.wait_stream(self.last_stream)
        self.last_stream = stream


_rooms: weakref.WeakValueDictionary[torch.device, ConvertRoom] = weakref.WeakValueDictionary()


def reserve(plan: AttentionPlan, device: torch.device) -> ConvertRoom | None:
    """The room of `device`, large enough for `plan`; None where no step of it converts.

    It lasts as long as somebody holds it: an engine that reserves before it makes plans keeps what it is given until then.
    """
    if not plan.room_bytes:
        return None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    room = _rooms.get(device)
    if room is None:
        room = _rooms[device] = ConvertRoom(device)
    room.grow(plan.room_bytes)
    return room
