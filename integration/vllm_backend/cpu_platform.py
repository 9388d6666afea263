"""Machines without a GPU: vLLM's CPU platform ignores the selected backend and takes its own, with a line in the log at most.

Its selection is wrapped so that FA4 means FA4; every other selection passes through untouched. On other platforms nothing is done:
CUDA's honours the selection and refuses with a reason.
"""

from __future__ import annotations

from typing import Any

from fa4_integration.vllm_backend.plugin import BACKEND_PATH, NAME


def honour_selection(member: Any) -> None:
    """Wrap the selection of the current platform if that is the CPU. May be called any number of times.

    Args:
        member: the member `FA4` of vLLM's enum of backends.
    """
    from vllm.platforms import current_platform

    platform_cls = type(current_platform)
    if not current_platform.is_cpu() or hasattr(platform_cls.get_attn_backend_cls, "fa4_wraps"):
        return
    stock = platform_cls.get_attn_backend_cls.__func__

    def get_attn_backend_cls(cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is not member:
            return stock(cls, selected_backend, attn_selector_config, *args, **kwargs)
        return select_fa4(attn_selector_config)

    get_attn_backend_cls.fa4_wraps = stock  # type: ignore[attr-defined]
    platform_cls.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def select_fa4(attn_selector_config: Any) -> str:
    """The path of our backend, once it has agreed to the layer's configuration; what CUDA's platform does, for the CPU.

    Raises:
        ValueError: the backend does not serve the configuration; the message lists the reasons.
    """
    from vllm.logger import init_logger

    from fa4_integration.vllm_backend.backend import FA4Backend

    reasons = FA4Backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
    if reasons:
        raise ValueError(f"Selected backend {NAME} is not valid for this configuration. Reason: {reasons}")
    init_logger("vllm.fa4").info_once("Using %s backend.", NAME)
    return BACKEND_PATH
