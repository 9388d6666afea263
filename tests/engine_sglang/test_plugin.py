"""The plugin is found in every process of an engine, once, and says what is wrong with it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from fa4_integration.sglang_backend import draft, plugin, resolution


def look(plugins: str | None) -> dict[str, Any]:
    """In a new process: what SGLang knows of our backend once it has loaded its plugins, as its launcher and scheduler do."""
    if plugins is not None:
        os.environ["SGLANG_PLUGINS"] = plugins
    from sglang.srt.plugins import load_plugins

    heavy = [name for name in ("vllm", "cutlass") if name in sys.modules]
    load_plugins()
    load_plugins()
    from sglang.srt.arg_groups import choices, resolution_hooks
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache import kv_cache_dtype
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    return {
        "choices": [names.count(plugin.NAME) for names in plugin.names_lists(choices)],
        "registered": ATTENTION_BACKENDS.get(plugin.NAME) is plugin.create_backend,
        "page sizes": resolution_hooks._HOOKS.get(resolution.STEP, []).count(resolution.resolve),
        "drafts": hasattr(DraftBackendFactory._create_backend, "__wrapped__"),
        "room": hasattr(kv_cache_dtype.configure_kv_cache_dtype, "__wrapped__"),
        "heavy": heavy,
        "backend imported": "fa4_integration.sglang_backend.backend" in sys.modules,
    }


@pytest.fixture(scope="module")
def processes() -> dict[str | None, dict[str, Any]]:
    """What two spawned processes see: with all plugins, and with ours left out by SGLang's own switch."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        seen = {plugins: pool.submit(look, plugins) for plugins in (None, "another")}
        return {plugins: future.result() for plugins, future in seen.items()}


def test_found_in_a_spawned_process(processes: dict[str | None, dict[str, Any]]) -> None:
    assert processes[None] == {
        "choices": [1, 1, 1],
        "registered": True,
        "page sizes": 1,
        "drafts": True,
        "room": True,
        "heavy": [],
        "backend imported": False,
    }


def test_disabled(processes: dict[str | None, dict[str, Any]]) -> None:
    found = processes["another"]
    assert (found["choices"], found["registered"], found["page sizes"]) == ([0, 0, 0], False, 0)
    assert not found["drafts"] and not found["room"]


def test_registered_twice(kit: Any) -> None:
    from sglang.srt.arg_groups import choices, resolution_hooks
    from sglang.srt.plugins.hook_registry import HookRegistry

    plugin.register()
    plugin.register()
    assert [names.count(plugin.NAME) for names in plugin.names_lists(choices)] == [1, 1, 1]
    assert resolution_hooks._HOOKS[resolution.STEP].count(resolution.resolve) == 1
    assert [hook for _, hook, _ in HookRegistry._hooks[draft.LOOK_UP]].count(draft.add_ours) == 1


def test_a_name_that_is_taken() -> None:
    with pytest.raises(RuntimeError, match="attention backend fa4_plugin: expected no such backend in SGLang, got"):
        plugin.take_name({plugin.NAME: object()}, plugin.NAME)


def test_an_sglang_without_what_plugins_extend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups", None)
    with pytest.raises(RuntimeError, match=r"fa4_plugin: expected an SGLang of 0\.5\.23 or newer"):
        plugin.register()


def test_a_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fa4_integration.sglang_backend.backend", None)
    with pytest.raises(RuntimeError, match=r"fa4_plugin: expected an importable backend .*fa4 doctor"):
        plugin.create_backend(None)
