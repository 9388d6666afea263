"""Small models with random weights, written to disk the way vLLM reads them.

Their outputs must vary, or equal tokens would prove nothing: see `_write` for what keeps them from repeating a token and makes attention
matter. `test_tokens.py` checks both, with a planted error as the control.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fa4_backend.problem import FP8_MAX

VOCAB = 512
HIDDEN, INTERMEDIATE, HEAD_DIM = 256, 512, 64
LARGEST_INPUT = 8.0  # of a linear layer in FP8
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def write_llama(
    folder: Path, kv_scales: list[tuple[float, ...]] | None = None, heads: tuple[int, int] = (4, 2), num_layers: int = 2
) -> Path:
    """Two layers, 4 query and 2 KV heads of 64: the plain causal decoder.

    Args:
        heads: query heads, KV heads.
        kv_scales: make it a checkpoint of compressed-tensors that declares FP8 K and V, with these scales of K in each layer and twice as
            large ones of V: one for all heads, or one a KV head.
    """
    config = _llama_config(heads, num_layers)
    weights: dict[str, torch.Tensor] = {}
    if kv_scales is not None:
        per_head = len(kv_scales[0]) > 1
        scheme = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": False, "strategy": "attn_head" if per_head else "tensor"}
        config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
        for index, scales in enumerate(kv_scales):
            for name, factor in (("k_scale", 1.0), ("v_scale", 2.0)):
                weights[f"model.layers.{index}.self_attn.{name}"] = torch.tensor(scales).mul(factor).view(-1, *[1] * 2 * per_head)
    return _write(folder, config, norms=("input_layernorm", "post_attention_layernorm"), embedding_std=1.0, more=weights)


def write_quantised_llama(folder: Path) -> Path:
    """`write_llama` with the layers' weights and inputs in FP8, a scale each: what follows a layer's attention is a static quantisation,
    which vLLM fuses where a backend writes FP8. For a GPU: vLLM's CPU build has no such linear layers."""
    from safetensors.torch import load_file, save_file

    write_llama(folder)
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        weights[name] = weight
        if "_proj." in name:
            scale = weight.abs().max() / FP8_MAX
            weights |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
            weights[name.replace("weight", "input_scale")] = torch.tensor(LARGEST_INPUT / FP8_MAX)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _llama_config(heads: tuple[int, int], num_layers: int) -> dict[str, Any]:
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "num_hidden_layers": num_layers}
    return _config("LlamaForCausalLM", "llama", **shape, hidden_act="silu", tie_word_embeddings=False)


def write_eagle(folder: Path, heads: tuple[int, int] = (4, 2)) -> Path:
    """An EAGLE head for `write_llama`'s model: a layer over the target's hidden state and the next token's embedding, which is the
    target's, as its output matrix is. Its weights are random, so that what it drafts is mostly rejected."""
    from safetensors.torch import load_file, save_file

    config = _llama_config(heads, 1)
    _write(folder, config, norms=("post_attention_layernorm",), embedding_std=1.0)
    weights = load_file(folder / "model.safetensors")
    layer = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.layers.")}
    fusion = torch.randn(HIDDEN, 2 * HIDDEN, generator=torch.Generator().manual_seed(5)) * HIDDEN**-0.5
    save_file({"fc.weight": fusion, **layer}, folder / "model.safetensors")
    return folder


def write_lora(folder: Path, seed: int, heads: tuple[int, int] = (4, 2), num_layers: int = 2, rank: int = 8) -> Path:
    """A LoRA adapter of `write_llama`'s model, on all its projections, large enough to change what the model says."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    query, kv = heads[0] * HEAD_DIM, heads[1] * HEAD_DIM
    attention = {"q_proj": (query, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN), "o_proj": (HIDDEN, query)}
    mlp = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
    weights = {}
    for index in range(num_layers):
        for part, shapes in (("self_attn", attention), ("mlp", mlp)):
            for name, (rows, columns) in shapes.items():
                module = f"base_model.model.model.layers.{index}.{part}.{name}"
                weights[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * columns**-0.5
                weights[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.5 * rank**-0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none", "lora_dropout": 0.0}
    config |= {"target_modules": [*attention, *mlp], "base_model_name_or_path": "llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_wide_llama(folder: Path) -> Path:
    """Two layers, 32 query and 8 KV heads of 128: a Llama-3-8B's attention."""
    config = _llama_config((32, 8), 2) | {"head_dim": 128}
    return _write(folder, config, norms=("input_layernorm", "post_attention_layernorm"), embedding_std=1.0)


def write_gemma2(folder: Path) -> Path:
    """Gemma-2's shape: soft cap on the logits, a window of 64 tokens in every other layer, so two KV cache groups."""
    config = _config(
        "Gemma2ForCausalLM",
        "gemma2",
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=HEAD_DIM,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    return _write(folder, config, norms=norms, embedding_std=0.06, norm_offset=-1.0)


def _config(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    common = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    return common | more


def _write(
    folder: Path,
    config: dict[str, Any],
    norms: tuple[str, ...],
    embedding_std: float,
    norm_offset: float = 0.0,
    more: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Weights (and `more` of them), config and tokenizer. `norm_offset`: Gemma's norms multiply by 1 + weight."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1234)
    q_width, kv_width = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))

    def linear(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    weights = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator) * embedding_std}
    if not config.get("tie_word_embeddings", True):
        weights["lm_head.weight"] = linear(VOCAB, HIDDEN)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        weights |= {
            # Peaked but not one-hot: logits with a standard deviation of about 2.
            f"{layer}.self_attn.q_proj.weight": linear(q_width, HIDDEN, gain=2.0),
            f"{layer}.self_attn.k_proj.weight": linear(kv_width, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": linear(kv_width, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": linear(HIDDEN, q_width, gain=4.0),
            f"{layer}.mlp.gate_proj.weight": linear(INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.up_proj.weight": linear(INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.down_proj.weight": linear(HIDDEN, INTERMEDIATE),
        }
        weights |= {f"{layer}.{norm}.weight": torch.full((HIDDEN,), 1.0 + norm_offset) for norm in norms}
    # Random signs: with tied embeddings (Gemma-2's always are) a plain norm would let the last token predict itself.
    signs = torch.randint(0, 2, (HIDDEN,), generator=generator) * 2.0 - 1.0
    weights["model.norm.weight"] = signs + norm_offset
    from safetensors.torch import save_file

    save_file(weights | (more or {}), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """One word a token id; the tests talk in ids and need a tokenizer only because a server wants one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(SPECIAL.values())}
    words |= {f"w{index:03}": index for index in range(len(words), VOCAB)}  # of one length: none is the beginning of another
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL["bos_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}))
