"""Room for converted K and V is reserved when SGLang settles their dtype, which is before it sizes its pools."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache import kv_cache_dtype
from sglang.srt.plugins import load_plugins

from fa4_backend import convert_room
from fa4_integration.sglang_backend.names import NAME


class TwoLayers(torch.nn.Module):
    """A model's attention layers of 8 query and 2 KV heads of 128, one with a window."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.layers = torch.nn.ModuleList(
            RadixAttention(8, 128, 1.0, 2, layer_id, sliding_window_size=window) for layer_id, window in enumerate((-1, 64))
        )


@pytest.fixture
def settle(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's step as a model runner calls it, with Hopper's kernels on a CPU and our backend for prompts."""
    load_plugins()
    monkeypatch.setenv("FA4_BACKEND_CPU", "emulate-sm90")
    monkeypatch.setenv("FA4_BACKEND_CONVERT_MIB", "32")  # 32,768 keys of 2 heads of 128
    monkeypatch.setattr(convert_room, "_rooms", weakref.WeakValueDictionary())
    schedule, server = SimpleNamespace(page_size=64, max_running_requests=None), SimpleNamespace(context_length=None)
    monkeypatch.setattr(runtime_context, "get_schedule", lambda: schedule)
    monkeypatch.setattr(runtime_context, "get_model", lambda: server)
    deterministic = SimpleNamespace(enable_deterministic_inference=False)
    monkeypatch.setattr(runtime_context, "get_exec", lambda: SimpleNamespace(deterministic=deterministic))

    def settle(
        model: torch.nn.Module | None, dtype: str = "fp8_e4m3", backend: str = NAME, requests: int | None = None, **draft: Any
    ) -> Any:
        schedule.max_running_requests = requests
        server.context_length = 4096
        monkeypatch.setattr(runtime_context, "attention_backends", lambda: (backend, "another"))
        drafter = {"is_draft_worker": False, "speculative_draft_attention_backend": None, **draft}
        return kv_cache_dtype.configure_kv_cache_dtype(
            server_args_kv_cache_dtype=dtype, model=model, model_dtype=torch.bfloat16, is_dflash=False, **drafter
        )

    return settle


def test_layers_share_room_that_the_model_holds(settle: Any) -> None:
    model = TwoLayers()
    assert settle(model) == (None, torch.float8_e4m3fn)
    (room,) = convert_room._rooms.values()
    assert model.fa4_convert_rooms == [room, room] and room.storage.numel() == 2 * 32768 * 2 * 128 * 2
    del model, room
    assert not convert_room._rooms


@pytest.mark.parametrize(("requests", "keys"), [(2, 2 * 4096), (8, 32768), (9, 32768)])
def test_room_is_for_what_a_server_holds_at_most(settle: Any, requests: int, keys: int) -> None:
    """In a context of 4096 tokens, of which 8 sequences fill what there is room for."""
    model = TwoLayers()
    settle(model, requests=requests)
    assert model.fa4_convert_rooms[0].storage.numel() == 2 * keys * 2 * 128 * 2


def test_a_drafter_has_a_backend_of_its_own(settle: Any) -> None:
    model = TwoLayers()
    settle(model, backend="triton", is_draft_worker=True, speculative_draft_attention_backend=NAME)
    assert len(convert_room._rooms) == 1
    other = TwoLayers()
    settle(other, is_draft_worker=True, speculative_draft_attention_backend="triton")
    assert not hasattr(other, "fa4_convert_rooms")


@pytest.mark.parametrize("changes", [{"dtype": "auto"}, {"backend": "triton"}, {"model": None}], ids=str)
def test_who_has_none(settle: Any, changes: dict[str, Any]) -> None:
    model = TwoLayers()
    settle(**{"model": model, **changes})
    assert not convert_room._rooms
