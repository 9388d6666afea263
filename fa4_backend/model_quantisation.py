"""The dtype of K and V that a checkpoint declares, as vLLM takes it where `--kv-cache-dtype` is not given."""

from __future__ import annotations

from typing import Any

from fa4_backend.problem import FP8

QUANTISATION_FILE = "hf_quant_config.json"  # beside config.json in checkpoints of ModelOpt before 0.31


def declared_kv_dtype(config: dict[str, Any], separate: dict[str, Any] | None = None) -> str | None:
    """`FP8`; another name, which no `AttentionProblem` takes, for what is not served; None where K and V are of q's dtype.

    Args:
        config: a checkpoint's config.json.
        separate: its `QUANTISATION_FILE`, if it has one; read where config.json says nothing of quantisation.
    """
    text = config.get("text_config") or {}
    stated = (config.get("quantization_config"), text.get("quantization_config"), config.get("compression_config"), separate)
    quantisation = next((found for found in stated if found), {})
    method = str(quantisation.get("quant_method") or "")
    if method.startswith("modelopt") or "quantization" in quantisation:
        return _of_modelopt(quantisation)
    scheme = quantisation.get("kv_cache_scheme") if method == "compressed-tensors" else None
    if not scheme:
        return None
    kind = _kind(scheme)
    return FP8 if kind == (8, "float") else f"{kind[0]}-bit {kind[1]}"


def _of_modelopt(quantisation: dict[str, Any]) -> str | None:
    """Its name of an algorithm, or a scheme as compressed-tensors has it; vLLM takes what it does not know for none."""
    inner = quantisation.get("quantization", quantisation)
    names = ("kv_cache_scheme", "kv_cache_quant_algo")
    declared = next((part[name] for name in names for part in (inner, quantisation) if part.get(name)), None)
    if isinstance(declared, dict):
        kind = _kind(declared)
        return FP8 if kind == (8, "float") and declared.get("dynamic") is False else "nvfp4" if kind == (4, "float") else None
    return {"fp8": FP8, "nvfp4": "nvfp4"}.get(str(declared).lower())


def _kind(scheme: dict[str, Any]) -> tuple[Any, Any]:
    return scheme.get("num_bits"), scheme.get("type")
