"""The models of `fa4 bench engine`: shapes of layers whose weights are made up, what their KV cache takes, and the kernels they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fa4_backend import AttentionProblem, BatchLimits, MaskFeatures
from fa4_backend.bench.engine_steps import BATCHES, CHUNK, MAX_LEN, PREFIX, VOCAB
from fa4_backend.plan import bounded
from fa4_backend.problem import FP8, LATENT, MAX_CONVERT_KEYS, RAGGED, SAME_AS_Q
from fa4_backend.split_rows import message_limits
from fa4_backend.support import LATENT_PAGE

PAGE_SIZE = 16  # vLLM's default
LATENT_DIM, ROPE_DIM, NOPE_DIM, VALUE_DIM = 512, 64, 128, 128  # DeepSeek's
COMMON = {
    "vocab_size": VOCAB, "max_position_embeddings": 2 * PREFIX, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
Asked = list[tuple[AttentionProblem, BatchLimits]]


@dataclass(frozen=True)
class EngineModel:
    """A model, so many of whose layers an engine serves."""

    backends: tuple[str, ...]  # of vLLM, ours first
    config: dict[str, Any]  # of config.json, but for the number of layers
    token_elements: int  # that a token has in a layer's KV cache
    fp8_words: str  # in the line of our kernels where the cache is FP8
    problems: Callable[[str, str], Asked]  # of `kv_dtype` and arch: what its layers ask of our kernels
    families: tuple[str, ...] | None = None  # of our kernels, as `write_csv` has them

    def config_of(self, num_layers: int) -> dict[str, Any]:
        """config.json."""
        dense = {"first_k_dense_replace": num_layers} if "kv_lora_rank" in self.config else {}
        return {**COMMON, **self.config, "num_hidden_layers": num_layers, **dense}

    def token_bytes(self, kv_cache_dtype: str) -> int:
        """Of a token in a layer's KV cache."""
        return self.token_elements * (2 if kv_cache_dtype == "auto" else 1)


def _limits(max_len: int = MAX_LEN) -> BatchLimits:
    return BatchLimits(max(BATCHES) + 1, CHUNK, max_len, convert_keys=MAX_CONVERT_KEYS)


def _paged(heads: tuple[int, int], head_dim: int, kv_dtype: str, arch: str) -> Asked:
    problem = AttentionProblem(*heads, head_dim, head_dim, "bfloat16", PAGE_SIZE, arch, kv_dtype=kv_dtype)
    return [(problem, bounded(_limits(), problem))]


def _latent(num_heads: int, kv_dtype: str, arch: str) -> Asked:
    """Decode of latents, of messages too, and prefill of keys and values made of them: new tokens to each other, and to their context."""
    stored = (LATENT_DIM + ROPE_DIM, LATENT_DIM, "bfloat16")
    latent = AttentionProblem(num_heads, 1, *stored, LATENT_PAGE, arch, kv_dtype=kv_dtype, kv_source=LATENT)
    messages = message_limits(_limits(), latent)
    assert messages is not None, latent
    asked = [(latent, _limits()), (latent, messages)]
    for is_causal in (True, False):
        made = (NOPE_DIM + ROPE_DIM, VALUE_DIM, "bfloat16")
        mask = MaskFeatures(is_causal=is_causal)
        asked.append((AttentionProblem(num_heads, num_heads, *made, 1, arch, mask=mask, kv_source=RAGGED, has_lse=True), _limits()))
    return asked


def _deepseek(num_heads: int) -> EngineModel:
    """DeepSeek-V3's layers with dense MLPs and so many heads: 128, or a GPU's 16 where eight share them."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
        "num_attention_heads": num_heads, "num_key_value_heads": num_heads, "kv_lora_rank": LATENT_DIM, "q_lora_rank": 1536,
        "qk_nope_head_dim": NOPE_DIM, "qk_rope_head_dim": ROPE_DIM, "v_head_dim": VALUE_DIM, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    }  # fmt: skip
    backends = ("FA4", "FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA")
    return EngineModel(
        backends, config, LATENT_DIM + ROPE_DIM, f"(latents {FP8})", partial(_latent, num_heads), ("schedule", "mla_decode", "sm90")
    )


MODELS = {
    "llama": EngineModel(
        ("FA4", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"),
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        },
        2 * 8 * 128,
        f"(K and V {FP8})",
        partial(_paged, (32, 8), 128),
    ),
    "mla16": _deepseek(16),
    "mla128": _deepseek(128),
}  # fmt: skip


def asked_of(model: str, kv_cache_dtype: str, arch: str) -> Asked:
    """What a model's layers ask of our kernels, for vLLM's name of the cache's dtype."""
    return MODELS[model].problems(SAME_AS_Q if kv_cache_dtype == "auto" else FP8, arch)
