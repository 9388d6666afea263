"""A small model with multi-head latent attention and random weights: DeepSeek's shape, its MLPs dense, so that no router hides attention.

The latent is as wide as DeepSeek's (512 + 64), which kernels are made for; the rest is small. As in `tiny_models`, outputs must vary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.engines.tiny_models import VOCAB, _write_tokenizer

KV_LORA_RANK, ROPE, NOPE, V_DIM = 512, 64, 128, 128


def write_deepseek(
    folder: Path,
    *,
    num_heads: int = 4,
    q_lora_rank: int | None = None,
    hidden: int = 256,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> Path:
    """Weights, config and tokenizer of a DeepSeek-V3 whose layers are all dense.

    Args:
        q_lora_rank: of queries projected in two steps, as DeepSeek-V3's are; None: in one, as DeepSeek-V2-Lite's.
        config: further fields of the config, such as `index_topk`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1234)

    def linear(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    weights = {"model.embed_tokens.weight": torch.randn(VOCAB, hidden, generator=generator), "lm_head.weight": linear(VOCAB, hidden)}
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        q_width = num_heads * (NOPE + ROPE)
        # Logits with a standard deviation of about 4: with less, answers soon repeat one token.
        if q_lora_rank is None:
            weights[f"{layer}.self_attn.q_proj.weight"] = linear(q_width, hidden, gain=4.0)
        else:
            weights[f"{layer}.self_attn.q_a_proj.weight"] = linear(q_lora_rank, hidden)
            weights[f"{layer}.self_attn.q_a_layernorm.weight"] = torch.ones(q_lora_rank)
            weights[f"{layer}.self_attn.q_b_proj.weight"] = linear(q_width, q_lora_rank, gain=4.0)
        weights |= {
            f"{layer}.self_attn.kv_a_proj_with_mqa.weight": linear(KV_LORA_RANK + ROPE, hidden),
            f"{layer}.self_attn.kv_a_layernorm.weight": torch.ones(KV_LORA_RANK),
            f"{layer}.self_attn.kv_b_proj.weight": linear(num_heads * (NOPE + V_DIM), KV_LORA_RANK),
            f"{layer}.self_attn.o_proj.weight": linear(hidden, num_heads * V_DIM, gain=4.0),
            f"{layer}.mlp.gate_proj.weight": linear(2 * hidden, hidden),
            f"{layer}.mlp.up_proj.weight": linear(2 * hidden, hidden),
            f"{layer}.mlp.down_proj.weight": linear(hidden, 2 * hidden),
            f"{layer}.input_layernorm.weight": torch.ones(hidden),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    weights["model.norm.weight"] = torch.randint(0, 2, (hidden,), generator=generator) * 2.0 - 1.0
    from safetensors.torch import save_file

    save_file({name: weight.to(dtype) for name, weight in weights.items()}, folder / "model.safetensors")
    facts = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "kv_lora_rank": KV_LORA_RANK,
        "q_lora_rank": q_lora_rank,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": V_DIM,
        "first_k_dense_replace": num_layers,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(facts, indent=1))
    _write_tokenizer(folder)
    return folder
