"""What SGLang's arguments become where our backend is chosen, through SGLang's own parser and resolution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fa4_backend import UnsupportedProblem
from fa4_integration.sglang_backend import plugin, resolution

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
GPT_OSS = LLAMA | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
DEEPSEEK = LLAMA | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.fixture(autouse=True)
def registered(kit: Any) -> None:
    """`kit` has registered the plugin."""


@pytest.fixture
def overriding(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own name `fa4` means our backend."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    monkeypatch.setitem(ATTENTION_BACKENDS, "fa4", ATTENTION_BACKENDS["fa4"])  # put back at the end
    monkeypatch.setenv("FA4_BACKEND_SGLANG_OVERRIDE_FA4", "1")
    plugin.register()


def resolve(folder: Path, config: dict[str, Any], *arguments: str) -> Any:
    """The arguments of a server for a model of this configuration, resolved."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    (folder / "config.json").write_text(json.dumps(config))
    args = prepare_server_args(["--model-path", str(folder), "--device", "cpu", "--skip-tokenizer-init", *arguments])
    args.resolve_once()
    return resolved_view(args)


@pytest.mark.parametrize(("arguments", "page_size"), (((), 64), *((("--page-size", str(n)), n) for n in (16, 32, 64, 128))))
def test_page_size_is_the_users(tmp_path: Path, arguments: tuple[str, ...], page_size: int) -> None:
    view = resolve(tmp_path, LLAMA, "--attention-backend", plugin.NAME, *arguments)
    assert (view.attention_backend, view.page_size) == (plugin.NAME, page_size)


@pytest.mark.parametrize("page_size", (1, 8, 48))
def test_other_page_sizes_are_refused(tmp_path: Path, page_size: int) -> None:
    with pytest.raises(UnsupportedProblem, match=f"--page-size: expected 16, 32, 64, 128 .*got {page_size}"):
        resolve(tmp_path, LLAMA, "--attention-backend", plugin.NAME, "--page-size", str(page_size))


@pytest.mark.parametrize("phase", ("prefill", "decode"))
def test_one_phase_on_our_backend(tmp_path: Path, phase: str) -> None:
    assert resolve(tmp_path, LLAMA, "--attention-backend", "torch_native", f"--{phase}-attention-backend", plugin.NAME).page_size == 64


def test_other_backends_keep_their_page_size(tmp_path: Path) -> None:
    assert resolve(tmp_path, LLAMA, "--attention-backend", "torch_native").page_size == 1


def test_deterministic_mode(tmp_path: Path) -> None:
    view = resolve(tmp_path, LLAMA, "--attention-backend", plugin.NAME, "--enable-deterministic-inference")
    assert (view.attention_backend, view.disable_radix_cache) == (plugin.NAME, True)


def test_deterministic_mode_keeps_the_radix_cache_where_bits_do_not_depend_on_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.arg_groups import choices

    names = choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND
    monkeypatch.setenv("FA4_BACKEND_EXACT", "1")
    plugin.register()
    try:
        view = resolve(tmp_path, LLAMA, "--attention-backend", plugin.NAME, "--enable-deterministic-inference")
        assert view.disable_radix_cache is False
    finally:
        names.remove(plugin.NAME)


@pytest.mark.parametrize("argument", ("--attention-backend", "--prefill-attention-backend"))
def test_prompts_of_mla_are_refused_before_a_model_loads(tmp_path: Path, argument: str) -> None:
    with pytest.raises(UnsupportedProblem, match=r"prefill of a model with MLA: expected another backend.*--decode-attention-backend"):
        resolve(tmp_path, DEEPSEEK, "--attention-backend", "triton", argument, plugin.NAME)


def test_decode_of_mla(tmp_path: Path) -> None:
    view = resolve(tmp_path, DEEPSEEK, "--attention-backend", "triton", "--decode-attention-backend", plugin.NAME)
    assert (view.decode_attention_backend, view.page_size) == (plugin.NAME, 64)


def test_a_model_with_a_list_of_backends_wants_the_name_fa4(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=f"GptOssForCausalLM requires one of[^$]*{plugin.NAME}"):
        resolve(tmp_path, GPT_OSS, "--attention-backend", plugin.NAME)


def test_our_backend_under_the_name_fa4(tmp_path: Path, overriding: None) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    assert ATTENTION_BACKENDS["fa4"] is plugin.create_backend
    view = resolve(tmp_path, GPT_OSS, "--attention-backend", "fa4")
    assert (view.attention_backend, view.page_size) == ("fa4", 64)


@pytest.mark.parametrize(("wanted", "page_size"), ((None, 64), (16, 16)))
def test_pages_of_128_are_not_forced_on_the_name_fa4(
    tmp_path: Path, overriding: None, monkeypatch: pytest.MonkeyPatch, wanted: int | None, page_size: int
) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view
    from sglang.srt.server_args import prepare_server_args

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    args = prepare_server_args(["--model-path", str(tmp_path), "--device", "cpu", "--attention-backend", "fa4", "--skip-tokenizer-init"])
    declare_resolution(args, "test", page_size=wanted)
    # On Blackwell SGLang's step does this to its own fa4.
    resolution.resolve(args, lambda args: declare_resolution(args, "test", page_size=128))
    assert resolved_view(args).page_size == page_size
