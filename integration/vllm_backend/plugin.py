"""The entry point that vLLM calls in each of its processes: makes `FA4` a known attention backend, `FA4_MLA` for layers with MLA.

Nothing heavy is imported here: a failing import of a plugin is only logged by vLLM, which then says "Unknown attention backend".
"""

from __future__ import annotations

from enum import Enum
from functools import partial
from typing import Any

from fa4_integration.vllm_backend.names import NAME, PATHS


def register() -> None:
    """Register both backends and make a selection of FA4 count for every kind of layer. May be called any number of times.

    Raises:
        RuntimeError: vLLM itself has a backend of one of these names.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from fa4_integration.vllm_backend.mla_prefill_selection import add_prefill_member
    from fa4_integration.vllm_backend.selection import honour_selection

    add_prefill_member()
    honour_selection({name: add_member(AttentionBackendEnum, name) for name in PATHS})


def add_member(enum_cls: Any, name: str = NAME) -> Any:
    """The member `name`, a key of PATHS, of vLLM's enum of backends, added if it is not there.

    Raises:
        RuntimeError: the enum has a member of this name that is not ours.
    """
    member = enum_cls.__members__.get(name)
    if member is None:
        # `register` came after vLLM 0.26; before, the enum has to be extended by hand.
        member = enum_cls.register(name, PATHS[name]) if hasattr(enum_cls, "register") else _extend(enum_cls, name)
    if member.value != PATHS[name]:
        raise RuntimeError(
            f"attention backend {name}: expected no such backend in vLLM, got {member.value}. "
            "Set VLLM_PLUGINS to the plugins wanted, without fa4, to use vLLM's own."
        )
    # An enum member pickles as a call of its class with its value. vLLM spawns its workers with a pickled configuration and loads plugins
    # only after unpickling it, so there the class does not know the value yet. A call into this module registers first.
    member.__reduce_ex__ = partial(_reduce, name)
    return member


def load_member(name: str) -> Any:
    """What the pickled member calls in the process that unpickles it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[name]


def _reduce(name: str, protocol: int) -> tuple[Any, tuple[str]]:
    return load_member, (name,)


def _extend(enum_cls: Any, name: str) -> Enum:
    member = object.__new__(enum_cls)
    member._name_, member._value_ = name, PATHS[name]
    member.__objclass__, member._sort_order_ = enum_cls, len(enum_cls._member_names_)
    setattr(enum_cls, name, member)
    enum_cls._member_names_.append(name)
    enum_cls._member_map_[name] = member
    enum_cls._value2member_map_[PATHS[name]] = member
    return member
