"""The one buffer in which steps leave K and V that they bring from FP8 to 16 bits: who shares it, how large it is, when it is made."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fa4_backend import AttentionMetadata, AttentionPlan, BatchLimits, convert_room, plan_attention
from fa4_backend.convert_room import ConvertRoom, reserve
from fa4_backend.kernels import loading
from fa4_backend.problem import FP8
from tests.support.problems import make_problem

CPU = torch.device("cpu")
KEYS = 300


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of an emulated GPU, none of whose kernels is compiled; no room of another test is found."""
    monkeypatch.setattr(loading, "load", lambda key, *, emulated: lambda *arguments: None)
    monkeypatch.setattr(convert_room, "_rooms", weakref.WeakValueDictionary())


def plan_of(
    kv_heads: int = 8, dim: int = 128, kv_dtype: str = FP8, arch: str = "emulated-sm_90a", keys: int = KEYS, **facts: Any
) -> AttentionPlan:
    problem = make_problem(2 * kv_heads, kv_heads, dim, dim, "bfloat16", 16, arch, kv_dtype=kv_dtype, **facts)
    return plan_attention(problem, BatchLimits(4, 512, 1024, convert_keys=keys))


def bytes_of(kv_heads: int, dim: int, keys: int = KEYS) -> int:
    return 2 * keys * kv_heads * dim * 2


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the buffers that rooms allocate."""
    sizes: list[int] = []
    grow = ConvertRoom.grow

    def counting(self: ConvertRoom, num_bytes: int) -> None:
        before = self.storage
        grow(self, num_bytes)
        if self.storage is not before:
            sizes.append(self.storage.numel())

    with monkeypatch.context() as patch:
        patch.setattr(ConvertRoom, "grow", counting)
        yield sizes


def test_plans_share_one_buffer_that_was_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine does: all layers reserve, then all plans are made. Windows, head dimensions and limits of plans differ."""
    small, large, windowed = plan_of(), plan_of(4, 256, keys=400), plan_of(has_window_left=True)
    with counted(monkeypatch) as sizes:
        held = [reserve(plan, CPU) for plan in (small, large, windowed)]
        assert sizes == [bytes_of(8, 128), bytes_of(4, 256, 400)]
        sizes.clear()
        assert (small.room_bytes, large.room_bytes) == (bytes_of(8, 128), bytes_of(4, 256, 400))
        steps = [AttentionMetadata.allocate(plan, CPU) for plan in (small, large, windowed)]
        assert sizes == [], "a plan allocated although there was room"
    room = held[0]
    assert room is not None and all(one is room for one in held)
    for step, (keys, heads, dim) in zip(steps, ((KEYS, 8, 128), (400, 4, 256), (KEYS, 8, 128)), strict=True):
        assert step.converted is not None and step.converted.room is room
        k, v = step.converted.keys, step.converted.values
        assert k.shape == v.shape == (keys, heads, dim) and k.dtype == v.dtype == torch.bfloat16
        assert k.is_contiguous() and v.is_contiguous()
        assert k.data_ptr() == room.storage.data_ptr() and v.data_ptr() >= k.data_ptr() + k.numel() * 2
        assert v.data_ptr() + v.numel() * 2 <= room.storage.data_ptr() + room.storage.numel()


def test_k_and_v_of_unlike_width_lie_apart() -> None:
    problem = make_problem(2, 2, 192, 128, "float16", 16, "emulated-sm_90a", kv_dtype=FP8)
    step = AttentionMetadata.allocate(plan_attention(problem, BatchLimits(4, 512, 1024, convert_keys=1)), CPU)
    assert step.converted is not None
    k, v, room = step.converted
    assert k.shape == (1, 2, 192) and v.shape == (1, 2, 128) and k.dtype == torch.float16
    assert v.data_ptr() - k.data_ptr() == 768 and room.storage.numel() == 768 + 512
    assert k.data_ptr() % 16 == v.data_ptr() % 16 == 0
    k.fill_(1)
    v.fill_(2)
    assert (k == 1).all() and (v == 2).all()


def test_growth_leaves_addresses_that_a_graph_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made later that wants more gets another buffer; only making a plan does that."""
    first = AttentionMetadata.allocate(plan_of(), CPU)
    assert first.converted is not None
    keys = first.converted.keys
    address = keys.data_ptr()
    keys.fill_(3)
    with counted(monkeypatch) as sizes:
        second = AttentionMetadata.allocate(plan_of(dim=256), CPU)
        assert sizes == [bytes_of(8, 256)]
    assert second.converted is not None and second.converted.room is first.converted.room
    second.converted.keys.fill_(5)
    assert first.converted.keys is keys and keys.data_ptr() == address and (keys == 3).all()
    # A smaller plan after that takes what there is.
    third = AttentionMetadata.allocate(plan_of(), CPU)
    assert third.converted is not None and third.converted.keys.data_ptr() == second.converted.keys.data_ptr()


def test_layers_that_write_fp8_share_it_too() -> None:
    step = AttentionMetadata.allocate(plan_of(), CPU)
    follower = step.sharing(plan_of(out_dtype=FP8))
    assert follower.converted is step.converted is not None


@pytest.mark.parametrize(
    "plan",
    [plan_of(kv_dtype="bfloat16"), plan_of(keys=0), plan_of(arch="emulated-sm_100a"), plan_of(batch_invariant=True), plan_of(arch="cpu")],
    ids=["16 bits", "no room asked", "Blackwell", "batch-invariant", "torch kernel"],
)
def test_who_has_none(plan: AttentionPlan) -> None:
    assert reserve(plan, CPU) is None and plan.room_bytes == 0
    assert AttentionMetadata.allocate(plan, CPU).converted is None
    assert not convert_room._rooms


def test_it_goes_with_the_last_that_holds_it() -> None:
    room = reserve(plan_of(), CPU)
    step = AttentionMetadata.allocate(plan_of(), CPU)
    del room
    assert list(convert_room._rooms) == [CPU]
    del step
    gc.collect()
    assert not convert_room._rooms


def test_each_device_has_its_own() -> None:
    """Two GPUs of one process; nothing is allocated on them here."""
    rooms = [ConvertRoom.__new__(ConvertRoom) for _ in range(2)]
    for index, room in enumerate(rooms):
        room.device, room.storage, room.last_stream = torch.device("cuda", index), torch.empty(bytes_of(8, 128), dtype=torch.uint8), None
        convert_room._rooms[room.device] = room
    plan = plan_of()
    assert [reserve(plan, torch.device("cuda", index)) for index in range(2)] == rooms


class FakeStream:
    """What `enter` asks of a stream."""

    def __init__(self) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


def test_another_stream_waits_for_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = FakeStream(), FakeStream()
    room = ConvertRoom(CPU)
    room.enter()  # no streams on a CPU
    room.device = torch.device("cuda", 0)
    captures, streams = False, [one]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
    for streams[0] in (one, one, other, other, one):
        room.enter()
    assert (one.waited, other.waited) == ([other], [one])
    captures, streams[0] = True, other
    room.enter()  # a capture may not wait for a stream outside of it, and runs nothing itself
    assert other.waited == [one] and room.last_stream is one
