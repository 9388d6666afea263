"""A model's config.json -> the attention problems of its layers. For planning ahead of serving; an engine passes its own facts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fa4_backend.problem import DTYPE_BYTES, AttentionProblem, MaskFeatures

ALIBI_MODELS = ("bloom", "falcon-rw", "mpt")
SINK_MODELS = ("gpt_oss",)


class ModelConfigError(ValueError):
    """The file is not a decoder model's config.json; the message says what is missing."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers that ask the same of attention."""

    problem: AttentionProblem
    num_layers: int
    window: int | None  # visible tokens including the row's own, as configs count; None: all


def layer_groups(path: Path, *, arch: str, page_size: int, dtype: str | None = None, **modes: Any) -> list[LayerGroup]:
    """Read a Hugging Face config.json (or the folder that holds one) and group its layers by what they ask.

    Args:
        dtype: a key of `DTYPE_BYTES`; default: the config's own, bfloat16 where it says none.
        modes: what no config says, such as `batch_invariant`; fields of `AttentionProblem`.

    Raises:
        ModelConfigError: the file is missing, not JSON, or lacks a field.
        UnsupportedProblem: the config's numbers contradict each other.
    """
    config = _read(path)
    num_q_heads = _integer(config, "num_attention_heads", "n_head")
    num_kv_heads = int(config.get("num_key_value_heads") or num_q_heads)
    head_dim = config.get("head_dim") or _integer(config, "hidden_size", "n_embd") // num_q_heads
    dtype = dtype or str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ModelConfigError(f"dtype: expected one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    windows = Counter(_layer_windows(config))
    model_type = str(config.get("model_type", ""))
    return [
        LayerGroup(
            AttentionProblem(
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=int(head_dim),
                head_dim_v=int(config.get("v_head_dim") or head_dim),
                dtype=dtype,
                page_size=page_size,
                arch=arch,
                mask=MaskFeatures(
                    has_window_left=window is not None,
                    has_softcap=bool(config.get("attn_logit_softcapping")),
                    has_sinks=model_type in SINK_MODELS,
                    has_alibi=model_type in ALIBI_MODELS or bool(config.get("alibi")),
                ),
                **modes,
            ),
            num_layers,
            window,
        )
        for window, num_layers in windows.items()
    ]


def _read(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ModelConfigError(f"{path}: expected a readable config.json, got {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ModelConfigError(f"{path}: expected JSON, got an error in line {error.lineno}: {error.msg}") from error
    if not isinstance(config, dict):
        raise ModelConfigError(f"{path}: expected a JSON object, got {type(config).__name__}")
    # Multimodal models keep their language model's numbers one level down.
    return config.get("text_config") or config


def _integer(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return config[name]
    raise ModelConfigError(f"expected an integer {' or '.join(names)}, got {[config.get(n) for n in names]}")


def _layer_windows(config: dict[str, Any]) -> list[int | None]:
    """Window of each layer, None where it sees everything."""
    num_layers = _integer(config, "num_hidden_layers", "n_layer")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types")
    if kinds is None and window and str(config.get("model_type")) == "gemma2":
        # Gemma 2's own rule, for configs written before layer_types existed: even layers slide.
        kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(num_layers)]
    if kinds is None:
        return [window] * num_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
