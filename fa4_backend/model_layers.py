"""What each layer of a model asks of attention, as the libraries that know its config say: transformers, and vLLM where it is installed.

transformers' config classes know kinds, windows, chunks and values that vary by layer; vLLM's convertors know head counts, MLA and the
models whose images are seen in both directions. Only what neither says stands here by name (`_SINK_MODELS` and what follows it).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

from fa4_backend.model_quantisation import QUANTISATION_FILE, declared_kv_dtype

ATTENTION = "attention"
MLA = "mla"  # multi-head latent attention: decode rows see latents, prompts see keys and values made of them
# A layer of these kinds asks nothing of an attention backend.
NOT_ATTENTION = {
    "linear": "a recurrent or linear layer: the engine's own kernels, nothing is asked of attention",
    "conv": "a convolution: nothing is asked of attention",
    "none": "no attention in this layer",
}
NOT_SERVED = {
    "sparse": "attention over tokens that an indexer chooses is not served: it belongs to the engine's own sparse kernels",
    "dual-chunk": "dual-chunk attention is not served",
    "encoder": "attention in both directions (an encoder) is not served",
    "cross": "cross attention is not served",
    "encoder-decoder": "an encoder-decoder model of this family is not served",
    "image-prefix": "tokens of an image see each other in both directions, which is not served; plan with --text-only for text alone "
    "(vLLM: --language-model-only)",
}
_KINDS = {  # transformers' layer_types -> kind; any other name is its own kind, and not served
    "full_attention": ATTENTION,
    "sliding_attention": ATTENTION,
    "hybrid": ATTENTION,  # attention beside a recurrent state: zamba2, falcon_h1
    "hybrid_sliding": ATTENTION,
    "chunked_attention": ATTENTION,  # to its own chunk: vLLM makes each chunk a row, SGLang's contexts are of one chunk
    "linear_attention": "linear",
    "conv": "conv",
    "moe": "none",
    "mlp": "none",
    "indexed_attention": "sparse",
    "compressed_sparse_attention": "sparse",
    "heavily_compressed_attention": "sparse",
    "minimax_m3_sparse": "sparse",
}
_SINK_MODELS = ("gpt_oss",)  # has sinks, says so in no field
_MIMO = ("mimo_v2_flash", "mimo_v2")
_PLAIN_CONFIGS = ("nemotron-nas", "mimo_v2")  # vLLM reads them, no library has a config class
_UNREADABLE = (  # windows, biases or head dims that only the code of the model knows
    "blt", "cpmant", "diffllama", "doge", "gpt_neo", "inkling_text", "recurrent_gemma", "reformer", "xlnet", "zamba",
)  # fmt: skip
_BIDIRECTIONAL = (True, "all")  # of Gemma's use_bidirectional_attention; "vision" is about images only
_INSTALL = "install it with: pip install 'fa4-backend[{extra}]'"


class ModelConfigError(ValueError):
    """A config.json that cannot be read, or a family that no installed library knows; the message says which and what to do."""


@dataclass(frozen=True)
class Layer:
    """What one layer asks. Counts and sizes are zero unless `kind` is `ATTENTION` or `MLA`."""

    kind: str  # ATTENTION, MLA, a key of NOT_ATTENTION or NOT_SERVED, or transformers' name of a kind that is none of them
    num_q_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    head_dim_v: int = 0
    window: int | None = None  # visible tokens including the row's own, as configs count; None: all
    has_softcap: bool = False
    has_sinks: bool = False
    has_alibi: bool = False
    prompt_dims: tuple[int, int] | None = None  # head_dim and head_dim_v of the keys and values that MLA makes of a prompt's latents


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a language model in order; of an encoder-decoder model the encoder's, then the decoder's self and cross attention."""

    layers: list[Layer]
    dtype: str | None  # the config's, None where it says none
    kv_dtype: str | None  # of K and V, where the checkpoint declares one; see `declared_kv_dtype`


class _Facts(Protocol):
    """Numbers of a whole model and of each layer."""

    num_layers: int
    is_mla: bool
    has_image_prefix: bool

    def heads(self, layer_idx: int) -> tuple[int, int, int]:
        """Query heads, KV heads and head dim of a layer."""


def read_layers(path: Path, *, text_only: bool = False) -> ModelLayers:
    """Read a Hugging Face config.json, or the folder that holds one, and `QUANTISATION_FILE` beside it. Nothing comes from a network.

    Args:
        text_only: a multimodal model will be given no images.

    Raises:
        ModelConfigError: transformers is missing, the file is not a language model's config, or no installed library knows its family.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModelConfigError(f"expected transformers, which knows models' configs, got none; {_INSTALL.format(extra='models')}")
    file = path / "config.json" if path.is_dir() else path
    raw = _read_json(file)
    if not raw.get("model_type") and not raw.get("architectures"):
        raise ModelConfigError(f"{file}: expected a model_type or architectures, got neither")
    separate = file.with_name(QUANTISATION_FILE)
    kv_dtype = declared_kv_dtype(raw, _read_json(separate) if separate.exists() else None)
    with_engine = importlib.util.find_spec("vllm") is not None
    try:
        # vLLM logs to the stdout of its first import; stdout belongs to the command that asks.
        with contextlib.redirect_stdout(sys.stderr):
            config = _load_config(raw, with_engine)
            layers = _layers(config, with_engine, text_only)
    except ModelConfigError:
        raise
    except Exception as error:  # config classes and convertors of hundreds of families raise errors of any type
        family = raw.get("model_type") or raw.get("architectures")
        raise ModelConfigError(f"{family}: expected a config that transformers or vLLM can read, got {_in_a_line(error)}") from error
    dtype = getattr(config, "dtype", None) or getattr(_text(config), "dtype", None)
    return ModelLayers(layers, None if dtype is None else str(dtype).removeprefix("torch."), kv_dtype)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        what = "a config.json or the folder that holds it (of a model on the Hub: download its config.json)"
        raise ModelConfigError(f"{path}: expected {what}, got no such file") from None
    except OSError as error:
        raise ModelConfigError(f"{path}: expected a readable file, got {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ModelConfigError(f"{path}: expected JSON, got an error in line {error.lineno}: {error.msg}") from error
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _load_config(raw: dict[str, Any], with_engine: bool) -> Any:
    """The config object of the family's own class; code that comes with a model is never run."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if with_engine:
        import vllm.config  # noqa: F401  first: vllm.transformers_utils alone is a circular import
    if raw.get("model_type") in _PLAIN_CONFIGS:
        if not with_engine:
            _refuse_without_vllm(raw["model_type"], "has no config class in transformers")
        config = PreTrainedConfig.from_dict({name: value for name, value in raw.items() if name != "block_configs"})
        config.model_type = raw["model_type"]
        if "block_configs" in raw:  # vLLM reads its items as attributes
            config.block_configs = json.loads(json.dumps(raw["block_configs"]), object_hook=lambda item: SimpleNamespace(**item))
        return config
    # The libraries read files; a folder of its own keeps them from whatever lies beside the file.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        if not with_engine or raw.get("model_type") in CONFIG_MAPPING_NAMES:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        from vllm.transformers_utils.config import HFConfigParser

        return HFConfigParser().parse(folder, trust_remote_code=False)[1]


def _text(config: Any) -> Any:
    """The language model's part of a multimodal config, or the config itself."""
    return config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()


def _check_family(config: Any, with_engine: bool) -> None:
    """Refuse a family whose layers would be guessed at."""
    family = _text(config).model_type
    if family in _UNREADABLE:
        raise ModelConfigError(f"{family}: expected a family whose masks its config states, got one whose masks only its code knows")
    # vLLM runs a family that it has no model of by transformers' code, which follows layer_types.
    if getattr(_text(config), "layer_types", None):
        return
    if with_engine and config.architectures:
        from vllm.model_executor.models.registry import ModelRegistry

        if ModelRegistry.get_supported_archs().isdisjoint(config.architectures):
            raise ModelConfigError(f"{config.model_type}: expected an architecture that vLLM has a model of, got {config.architectures}")
        return
    from transformers.models.auto import modeling_auto as auto

    named = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    if not any(name in names for name in (config.model_type, family) for names in named):
        raise ModelConfigError(f"{config.model_type}: expected a language model, got a family that transformers lists among none")


class _EngineFacts:
    """vLLM's reading of a config, the one its ModelConfig uses."""

    def __init__(self, config: Any, text_only: bool) -> None:
        from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS, ModelArchConfigConvertorBase

        convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
        self.arch = convertor(config, _text(config)).convert(supports_multimodal=not text_only)
        self.num_layers = self.arch.total_num_hidden_layers
        self.is_mla = self.arch.is_deepseek_mla
        self.has_image_prefix = self.arch.is_mm_prefix_lm

    def heads(self, layer_idx: int) -> tuple[int, int, int]:
        layer = self.arch[layer_idx]
        return layer.total_num_attention_heads, layer.total_num_kv_heads, layer.head_size


class _PlainFacts:
    """Without vLLM: only families whose class states its KV heads under transformers' common name, and text alone."""

    is_mla = False
    has_image_prefix = False

    def __init__(self, config: Any) -> None:
        self.text = _text(config)
        if self.text is not config:
            _refuse_without_vllm(config.model_type, "is multimodal")
        self.num_layers = config.num_hidden_layers

    def heads(self, layer_idx: int) -> tuple[int, int, int]:
        layer = _of_layer(self.text, layer_idx)
        if not hasattr(layer, "num_key_value_heads"):
            _refuse_without_vllm(self.text.model_type, "states no num_key_value_heads")
        num_q_heads = layer.num_attention_heads
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // num_q_heads
        return num_q_heads, layer.num_key_value_heads or num_q_heads, head_dim


def _refuse_without_vllm(family: str, reason: str) -> NoReturn:
    raise ModelConfigError(f"{family}: {reason}; expected vLLM, which knows its layers, got none; {_INSTALL.format(extra='vllm')}")


def _of_layer(text: Any, layer_idx: int) -> Any:
    """The config as one layer sees it."""
    return text.per_layer_config[layer_idx] if getattr(text, "is_heterogeneous", False) else text


def _layers(config: Any, with_engine: bool, text_only: bool) -> list[Layer]:
    text = _text(config)
    if text is config and getattr(config, "is_encoder_decoder", False):
        return _encoder_decoder(config)
    if _is_masked(text):
        return [Layer("encoder")] * config.num_hidden_layers
    _check_family(config, with_engine)
    facts: _Facts = _EngineFacts(config, text_only) if with_engine else _PlainFacts(config)
    if not facts.num_layers:
        raise ModelConfigError(f"{config.model_type}: expected a number of layers, got {facts.num_layers}")
    layers = [_layer(text, facts, layer_idx) for layer_idx in range(facts.num_layers)]
    # An image's prefix first: PaliGemma states both, and its text is causal.
    kind = "image-prefix" if facts.has_image_prefix else "encoder" if _is_bidirectional(config, text) else ATTENTION
    return [Layer(kind) if layer.kind == ATTENTION and kind != ATTENTION else layer for layer in layers]


def _is_masked(text: Any) -> bool:
    """Whether a model is trained to fill gaps, as BERT is."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", False)


def _is_bidirectional(config: Any, text: Any) -> bool:
    states = [getattr(part, "is_causal", True) for part in (config, text)]
    return False in states or getattr(text, "use_bidirectional_attention", None) in _BIDIRECTIONAL


def _encoder_decoder(config: Any) -> list[Layer]:
    if not hasattr(config, "encoder_layers"):  # T5's family: biases that no kernel here adds
        return [Layer("encoder-decoder")] * config.num_hidden_layers
    num_heads = config.decoder_attention_heads
    head_dim = config.d_model // num_heads
    own = Layer(ATTENTION, num_heads, num_heads, head_dim, head_dim)
    return [Layer("encoder")] * config.encoder_layers + [own] * config.decoder_layers + [Layer("cross")] * config.decoder_layers


def _layer(text: Any, facts: _Facts, layer_idx: int) -> Layer:
    own = _of_layer(text, layer_idx)
    name = _kind_name(text, own, layer_idx)
    kind = _KINDS.get(name, name)
    if kind == ATTENTION and (facts.is_mla or getattr(own, "kv_lora_rank", None) is not None):
        return _latent_layer(own)
    if kind == ATTENTION and getattr(own, "dual_chunk_attention_config", None):
        kind = "dual-chunk"
    if kind != ATTENTION:
        return Layer(kind)
    slides = "sliding" in name
    num_q_heads, num_kv_heads, head_dim = facts.heads(layer_idx)
    head_dim_v = getattr(own, "v_head_dim", None) or head_dim
    if slides and own.model_type in _MIMO:  # layers with a window have heads of their own
        num_q_heads, num_kv_heads = own.swa_num_attention_heads, own.swa_num_key_value_heads
        head_dim, head_dim_v = own.swa_head_dim, own.swa_v_head_dim
    if getattr(own, "block_configs", None):  # Nemotron-NAS
        num_kv_heads = num_q_heads // own.block_configs[layer_idx].attention.n_heads_in_group
    if getattr(own, "num_attention_heads_per_layer", None):  # Laguna
        num_q_heads = own.num_attention_heads_per_layer[layer_idx]
    if min(num_q_heads, num_kv_heads, head_dim) < 1:
        raise ModelConfigError(
            f"{own.model_type}: expected attention heads in layer {layer_idx}, got {num_q_heads}/{num_kv_heads} of dim {head_dim}"
        )
    return Layer(
        ATTENTION,
        num_q_heads,
        num_kv_heads,
        head_dim,
        head_dim_v,
        window=own.sliding_window if slides else None,
        has_softcap=bool(getattr(own, "attn_logit_softcapping", None)),
        has_sinks=_has_sinks(own, slides),
        has_alibi=own.model_type == "bloom" or bool(getattr(own, "alibi", False)),
    )


def _latent_layer(own: Any) -> Layer:
    """A layer of MLA in absorbed form: one KV head, the latent and its rotary part. DeepSeek-V3.2 and what follows it choose tokens."""
    if getattr(own, "index_topk", None):
        return Layer("sparse")
    latent, rope = own.kv_lora_rank, own.qk_rope_head_dim
    return Layer(MLA, own.num_attention_heads, 1, latent + rope, latent, prompt_dims=(own.qk_nope_head_dim + rope, own.v_head_dim))


def _kind_name(text: Any, own: Any, layer_idx: int) -> str:
    """One of transformers' layer_types."""
    if text.model_type in _MIMO:
        return "sliding_attention" if text.hybrid_layer_pattern[layer_idx] == 1 else "full_attention"
    if getattr(text, "block_configs", None):  # Nemotron-NAS
        attention = text.block_configs[layer_idx].attention
        if getattr(attention, "window_length", None):
            raise ModelConfigError(f"{text.model_type}: expected no window_length in layer {layer_idx}, got {attention.window_length}")
        return "mlp" if attention.no_op or getattr(attention, "replace_with_linear", False) else "full_attention"
    if layer_idx in (getattr(text, "cross_attention_layers", None) or ()):
        return "cross"
    window = getattr(own, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    name = text.layer_types[layer_idx] if getattr(text, "layer_types", None) else default
    if "sliding" in name and not window:
        return "full_attention"
    return name


def _has_sinks(own: Any, slides: bool) -> bool:
    if own.model_type in _MIMO:
        return bool(own.add_swa_attention_sink_bias if slides else own.add_full_attention_sink_bias)
    plan = getattr(own, "base_model_tp_plan", None) or {}
    return own.model_type in _SINK_MODELS or any(name.endswith(".sinks") for name in plan)


def _in_a_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}" if text else type(error).__name__
