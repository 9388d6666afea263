"""config.json of published models, cut down to what says how they attend. Numbers are those of the published files."""

from __future__ import annotations

from typing import Any

BF16 = {"torch_dtype": "bfloat16", "vocab_size": 32000}


def _nas_block(heads_in_group: int | None) -> dict[str, Any]:
    """A block of Nemotron-NAS: None is a layer without attention."""
    return {
        "attention": {"n_heads_in_group": heads_in_group, "no_op": heads_in_group is None, "replace_with_linear": False},
        "ffn": {"ffn_mult": 5.25, "no_op": False},
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        **BF16, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "Qwen2.5-7B": {  # a window that its switch turns off
        **BF16, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
    },
    "Qwen3-8B": {
        **BF16, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None, "use_sliding_window": False,
    },
    "Mistral-7B-v0.1": {
        **BF16, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
    },
    "Phi-3-mini-4k": {
        **BF16, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047, "pad_token_id": 31999,
    },
    "Gemma-2-9B": {  # without layer_types, as published
        **BF16, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    },
    "Gemma-3-1B": {
        **BF16, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6,
    },
    "Gemma-3-27B": {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 32,
            "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 27},
    },
    "EmbeddingGemma-300M": {
        **BF16, "architectures": ["Gemma3TextModel"], "model_type": "gemma3_text", "hidden_size": 768, "num_hidden_layers": 24,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "use_bidirectional_attention": True,
    },
    "Gemma-4-31B": {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma4_text", "hidden_size": 5376, "num_hidden_layers": 60, "num_attention_heads": 32,
            "num_key_value_heads": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True, "head_dim": 256,
            "global_head_dim": 512, "sliding_window": 1024, "use_bidirectional_attention": "vision",
        },
        "vision_config": {"model_type": "gemma4_vision"}, "audio_config": None,
    },
    "gpt-oss-20b": {
        **BF16, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    "MiMo-V2-Flash": {
        **BF16, "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "hidden_size": 4096, "num_hidden_layers": 48,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128, "swa_num_attention_heads": 64,
        "swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128, "sliding_window": 128, "sliding_window_size": 128,
        "attention_chunk_size": 128, "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "hybrid_layer_pattern": [0, 1, 1, 1, 1, *[0, 1, 1, 1, 1, 1] * 7, 0],
    },
    "Llama-4-Scout": {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "head_dim": 128, "attention_chunk_size": 8192, "no_rope_layers": [],
        },
        "vision_config": {"model_type": "llama4_vision_model"},
    },
    "Falcon-7B": {
        **BF16, "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32,
        "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True, "new_decoder_architecture": False, "alibi": False,
    },
    "Falcon-RW-1B": {
        **BF16, "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_kv_heads": 32, "multi_query": False, "new_decoder_architecture": False, "alibi": True,
    },
    "Falcon-40B": {
        **BF16, "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60,
        "num_attention_heads": 128, "num_kv_heads": 8, "multi_query": True, "new_decoder_architecture": True, "alibi": False,
    },
    "ChatGLM3-6B": {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "torch_dtype": "float16", "hidden_size": 4096, "num_layers": 28,
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}, "num_attention_heads": 32, "kv_channels": 128,
        "multi_query_attention": True, "multi_query_group_num": 2, "padded_vocab_size": 65024, "seq_length": 8192,
    },
    "Nemotron-NAS, eight layers": {
        **BF16, "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "hidden_size": 8192, "num_hidden_layers": 8,
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}, "num_attention_heads": 64, "num_key_value_heads": None,
        "block_configs": [_nas_block(n) for n in (8, None, 16, 8, None, None, 32, 8)],
    },
    "Qwen3-Next-80B": {
        **BF16, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "full_attention_interval": 4,
    },
    "Granite-4.0-H-Small": {
        **BF16, "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "hidden_size": 4096,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
        "layer_types": [*["mamba"] * 5, "attention", *["mamba"] * 4] * 4,
    },
    "DeepSeek-V3": {
        **BF16, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "Kimi-K2": {
        **BF16, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "hidden_size": 7168, "num_hidden_layers": 61,
        "num_attention_heads": 64, "num_key_value_heads": 64, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "Command-R7B": {
        **BF16, "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 4096, "sliding_window_pattern": 4,
        "bos_token_id": 5, "eos_token_id": 6,
    },
    "StarCoder": {
        "architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "torch_dtype": "float32", "n_embd": 6144, "n_layer": 40,
        "n_head": 48, "multi_query": True,
    },
    "BLOOM-7B1": {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "torch_dtype": "float16", "n_embed": 4096, "n_layer": 30,
        "num_attention_heads": 32,
    },
    "DBRX": {
        **BF16, "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    },
    "PaliGemma-3B": {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "torch_dtype": "float32",
        "text_config": {
            "model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "GPT-2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12},
    "Mamba-2.8B": {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 2560, "num_hidden_layers": 64,
    },
    "BERT-base": {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    },
    "Whisper-large-v3": {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "torch_dtype": "float16", "d_model": 1280,
        "is_encoder_decoder": True, "encoder_layers": 32, "encoder_attention_heads": 20, "decoder_layers": 32,
        "decoder_attention_heads": 20, "num_hidden_layers": 32, "vocab_size": 51866,
    },
    "T5-small": {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 512, "d_kv": 64, "num_heads": 8, "num_layers": 6,
        "is_encoder_decoder": True,
    },
}  # fmt: skip
