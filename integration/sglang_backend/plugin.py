"""The entry point that SGLang calls in each of its processes: makes `fa4_plugin` a known attention backend.

SGLang logs what a plugin raises and goes on; its command line then says "invalid choice" and no more. So the name becomes a choice first,
and whatever fails afterwards is said by the backend's constructor, where it stops the engine.
"""

from __future__ import annotations

from typing import Any

from fa4_backend import envs
from fa4_integration.sglang_backend.factory import create_backend
from fa4_integration.sglang_backend.names import NAME, served_names


def register() -> None:
    """Register the backend under `fa4_plugin`, and on request under SGLang's own `fa4` too. May be called any number of times.

    Raises:
        RuntimeError: this SGLang lacks what plugins extend, or another plugin has taken the name.
    """
    try:
        from sglang.srt.arg_groups import choices
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        from fa4_integration.sglang_backend import resolution
        from fa4_integration.sglang_backend.draft import extend_draft_backends
        from fa4_integration.sglang_backend.room import reserve_with_models
    except ImportError as error:
        raise RuntimeError(
            f"{NAME}: expected an SGLang of 0.5.23 or newer, whose lists of attention backends plugins may extend, got {error}"
        ) from error
    for names in names_lists(choices):
        if NAME not in names:
            names.append(NAME)
    for name in served_names():
        take_name(ATTENTION_BACKENDS, name)
    resolution.install()
    extend_draft_backends()
    reserve_with_models()


def names_lists(choices: Any) -> list[list[str]]:
    """SGLang's lists that the name belongs on: SGLang hands them out for plugins to extend.

    Its deterministic mode plans batch-invariant kernels. A prefix from the radix cache keeps a request's bits only where a token's bits do
    not depend on the chunk that it came in, which is the exact mode.
    """
    lists = [
        choices.ATTENTION_BACKEND_CHOICES,
        choices.DRAFT_ATTENTION_BACKEND_CHOICES,
        choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
    ]
    if envs.exact():
        lists.append(choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND)
    return lists


def take_name(registry: dict[str, Any], name: str) -> None:
    """Put our constructor into SGLang's registry of backends.

    Raises:
        RuntimeError: `fa4_plugin` belongs to somebody else.
    """
    there = registry.get(name)
    if name == NAME and there not in (None, create_backend):
        raise RuntimeError(f"attention backend {NAME}: expected no such backend in SGLang, got {there}; see SGLANG_PLUGINS")
    registry[name] = create_backend
