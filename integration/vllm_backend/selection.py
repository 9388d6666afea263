"""What a selection of FA4 means: for each layer the backend of its kind, on every platform; and models whose attention is their own.

vLLM has one name for all layers of a model and asks the platform for each layer's backend. CUDA's platform would hold the backend of K and
V heads against a layer of latent attention, which is another backend here, so the question is put to the one that serves the layer's kind;
its answer, and its refusal, stay the platform's. The CPU platform ignores what is selected and takes its own, with a line in the log at
most; there FA4's answer is the platform's. Every other selection passes through untouched.
"""

from __future__ import annotations

from typing import Any

from fa4_backend.problem import UnsupportedProblem
from fa4_integration.vllm_backend.mla_prefill_selection import choose_prefill, forget_cpu_answer, honour_prefill_on_cpu
from fa4_integration.vllm_backend.names import MLA_NAME, NAME
from fa4_integration.vllm_backend.owned_models import owner_of


def honour_selection(members: dict[str, Any]) -> None:
    """Wrap the current platform's selection. May be called any number of times.

    Args:
        members: ours of vLLM's enum of backends, by name: `NAME` and `MLA_NAME`.
    """
    from vllm.platforms import current_platform

    wrap_platform(type(current_platform), members)


def wrap_platform(platform_cls: Any, members: dict[str, Any]) -> None:
    """The same for a class of platforms."""
    if hasattr(platform_cls.get_attn_backend_cls, "fa4_wraps"):
        return
    stock_select = platform_cls.get_attn_backend_cls.__func__
    stock_check = platform_cls.check_and_update_config.__func__
    ours = tuple(members.values())

    def get_attn_backend_cls(cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> str:
        if not any(selected_backend is member for member in ours):
            return stock_select(cls, selected_backend, attn_selector_config, *args, **kwargs)
        member = members[MLA_NAME if attn_selector_config.use_mla else NAME]
        if cls._enum is platform_enum().CPU:
            return select_on_cpu(member, attn_selector_config)
        return stock_select(cls, member, attn_selector_config, *args, **kwargs)

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        model = vllm_config.model_config
        if model is not None and any(vllm_config.attention_config.backend is member for member in ours):
            refuse_owned(model)
            choose_prefill(vllm_config)
        if cls._enum is platform_enum().CPU:
            forget_cpu_answer()
        stock_check(cls, vllm_config)

    get_attn_backend_cls.fa4_wraps = stock_select  # type: ignore[attr-defined]
    if platform_cls._enum is platform_enum().CPU:
        honour_prefill_on_cpu(platform_cls)
    platform_cls.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    platform_cls.check_and_update_config = classmethod(check_and_update_config)


def platform_enum() -> Any:
    """vLLM's enum of platforms."""
    from vllm.platforms.interface import PlatformEnum

    return PlatformEnum


def select_on_cpu(member: Any, attn_selector_config: Any) -> str:
    """The path of our backend `member`, once it has agreed to the layer's configuration; what CUDA's platform does, for the CPU.

    Raises:
        ValueError: the backend does not serve the configuration; the message lists the reasons.
    """
    from vllm.logger import init_logger

    reasons = member.get_class().validate_configuration(device_capability=None, **attn_selector_config._asdict())
    if reasons:
        raise ValueError(f"Selected backend {member.name} is not valid for this configuration. Reason: {reasons}")
    init_logger("vllm.fa4").info_once("Using %s backend.", member.name)
    return member.get_path()


def refuse_owned(model_config: Any) -> None:
    """Refuse a model whose attention layers no selection reaches, before its weights are loaded.

    Raises:
        UnsupportedProblem: the sentence says whose they are.
    """
    owner = owner_of(model_config.hf_text_config)
    if owner is not None:
        raise UnsupportedProblem(f"attention backend: expected a model whose attention vLLM's backends serve, got {owner}")
