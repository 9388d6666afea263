"""Which MLA prefill backend an engine takes: `FA4` becomes a member of vLLM's enum of them, and the default where FA4 is the backend.

vLLM's CPU platform ignores what is selected and takes its own; there a selection of ours is made to count.
"""

from __future__ import annotations

from typing import Any

from fa4_integration.vllm_backend.names import NAME, PREFILL_PATH


def add_prefill_member() -> Any:
    """The member `FA4` of vLLM's enum of MLA prefill backends, added if it is not there; None where vLLM has no such enum.

    Raises:
        RuntimeError: the enum has a member of this name that is not ours.
    """
    try:
        from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
    except ModuleNotFoundError:  # before vLLM 0.33
        return None
    member = MLAPrefillBackendEnum.__members__.get(NAME) or MLAPrefillBackendEnum.register(NAME, PREFILL_PATH)
    if member.value != PREFILL_PATH:
        raise RuntimeError(f"MLA prefill backend {NAME}: expected no such backend in vLLM, got {member.value}")
    # As `plugin.add_member` says: a spawned process unpickles the configuration before it loads plugins.
    member.__reduce_ex__ = _reduce
    return member


def _reduce(protocol: int) -> tuple[Any, tuple[()]]:
    return add_prefill_member, ()


def choose_prefill(vllm_config: Any) -> None:
    """With FA4 as the backend of a model with MLA layers, take our prefill too, unless another is named or no kernel of ours serves it."""
    attention, model, member = vllm_config.attention_config, vllm_config.model_config, add_prefill_member()
    if member is not None and attention.mla_prefill_backend is None and model.use_mla:
        reasons = _reasons_against(model)
        if reasons:
            from vllm.logger import init_logger

            init_logger("vllm.fa4").info_once("MLA prefill: vLLM's choice, since FA4's does not serve the model: %s.", "; ".join(reasons))
        else:
            attention.mla_prefill_backend = member


def _reasons_against(model_config: Any) -> list[str]:
    """Why our prefill does not serve a model; empty if it does."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.mla.prefill.base import MLADimensions
    from vllm.v1.attention.backends.mla.prefill.selector import MLAPrefillSelectorConfig

    from fa4_integration.vllm_backend.mla_prefill import FA4PrefillBackend

    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    dimensions = MLADimensions(**{name: getattr(model_config.hf_text_config, name, 0) for name in names})
    capability = None if current_platform.is_cpu() else current_platform.get_device_capability()
    selector_config = MLAPrefillSelectorConfig(dtype=model_config.dtype, mla_dimensions=dimensions)
    return FA4PrefillBackend.validate_configuration(capability, selector_config)


def honour_prefill_on_cpu(platform_cls: Any) -> None:
    """Make the CPU platform's answer ours where the current engine's configuration names it. May be called any number of times."""
    stock_method = getattr(platform_cls, "get_mla_prefill_backend_cls", None)
    if stock_method is None or hasattr(stock_method, "fa4_wraps"):
        return
    stock = stock_method.__func__

    def get_mla_prefill_backend_cls(cls: Any, mla_selector_config: Any) -> Any:
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        named = None if config is None else config.attention_config.mla_prefill_backend
        return named.get_class() if named is add_prefill_member() else stock(cls, mla_selector_config)

    get_mla_prefill_backend_cls.fa4_wraps = stock  # type: ignore[attr-defined]
    platform_cls.get_mla_prefill_backend_cls = classmethod(get_mla_prefill_backend_cls)


def forget_cpu_answer() -> None:
    """vLLM remembers the platform's answer by the model's dimensions; another engine of the process may name another backend."""
    if add_prefill_member() is None:
        return
    from vllm.v1.attention.backends.mla.prefill import selector

    selector._auto_select_mla_prefill_backend.cache_clear()
