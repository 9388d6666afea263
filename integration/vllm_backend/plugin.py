"""The entry point that vLLM calls in each of its processes: makes `FA4` a known attention backend.

Nothing heavy is imported here: a failing import of a plugin is only logged by vLLM, which then says "Unknown attention backend".
"""

from __future__ import annotations

from enum import Enum
from typing import Any

NAME = "FA4"
BACKEND_PATH = "fa4_integration.vllm_backend.backend.FA4Backend"


def register() -> None:
    """Register the backend and, on a CPU platform, make its selection count. May be called any number of times.

    Raises:
        RuntimeError: vLLM itself has a backend of this name.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from fa4_integration.vllm_backend.cpu_platform import honour_selection

    member = add_member(AttentionBackendEnum)
    honour_selection(member)


def add_member(enum_cls: Any) -> Any:
    """The member `FA4` of vLLM's enum of backends, added if it is not there.

    Raises:
        RuntimeError: the enum has a member of this name that is not ours.
    """
    member = enum_cls.__members__.get(NAME)
    if member is None:
        # `register` came after vLLM 0.26; before, the enum has to be extended by hand.
        member = enum_cls.register(NAME, BACKEND_PATH) if hasattr(enum_cls, "register") else _extend(enum_cls)
    if member.value != BACKEND_PATH:
        raise RuntimeError(
            f"attention backend {NAME}: expected no such backend in vLLM, got {member.value}. "
            "Set VLLM_PLUGINS to the plugins wanted, without fa4, to use vLLM's own."
        )
    # An enum member pickles as a call of its class with its value. vLLM spawns its workers with a pickled configuration and loads plugins
    # only after unpickling it, so there the class does not know the value yet. A call into this module registers first.
    member.__reduce_ex__ = _reduce
    return member


def load_member() -> Any:
    """What the pickled member calls in the process that unpickles it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[NAME]


def _reduce(protocol: int) -> tuple[Any, tuple[()]]:
    return load_member, ()


def _extend(enum_cls: Any) -> Enum:
    member = object.__new__(enum_cls)
    member._name_, member._value_ = NAME, BACKEND_PATH
    member.__objclass__, member._sort_order_ = enum_cls, len(enum_cls._member_names_)
    setattr(enum_cls, NAME, member)
    enum_cls._member_names_.append(NAME)
    enum_cls._member_map_[NAME] = member
    enum_cls._value2member_map_[BACKEND_PATH] = member
    return member
