"""`fa4 plan --model` about published models: the right layers, heads, dims, windows and masks, or a refusal by name."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fa4_backend.cli import main
from fa4_backend.commands import compile as compile_command
from fa4_backend.model_config import LayerGroup, attention_problems, layer_groups
from fa4_backend.model_layers import ModelConfigError
from fa4_backend.plan import AttentionPlan
from fa4_backend.problem import DTYPE_BYTES, FP8, UnsupportedProblem
from tests.support.model_configs import CONFIGS

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="these families are known to vLLM only")


class Asked(NamedTuple):
    """What attention layers ask, as a plan must say it."""

    num_layers: int
    heads: str
    head_dim: str
    window: int | None = None
    masks: frozenset[str] = frozenset()
    dtype: str = "bfloat16"


def masks(*names: str) -> frozenset[str]:
    return frozenset(f"has_{name}" for name in names)


# Facts of the published models: attention layers, then layers of any other kind.
FACTS: dict[str, tuple[list[Asked], dict[str, int]]] = {
    "Llama-3.1-8B": ([Asked(32, "32/8", "128")], {}),
    "Qwen2.5-7B": ([Asked(28, "28/4", "128")], {}),
    "Qwen3-8B": ([Asked(36, "32/8", "128")], {}),
    "Mistral-7B-v0.1": ([Asked(32, "32/8", "128", 4096, masks("window_left"))], {}),
    "Phi-3-mini-4k": ([Asked(32, "32/32", "96", 2047, masks("window_left"))], {}),
    "Gemma-2-9B": ([Asked(21, "16/8", "256", 4096, masks("window_left", "softcap")), Asked(21, "16/8", "256", None, masks("softcap"))], {}),
    "Gemma-3-1B": ([Asked(22, "4/1", "256", 512, masks("window_left")), Asked(4, "4/1", "256")], {}),
    "EmbeddingGemma-300M": ([], {"encoder": 24}),
    "gpt-oss-20b": ([Asked(12, "64/8", "64", 128, masks("window_left", "sinks")), Asked(12, "64/8", "64", None, masks("sinks"))], {}),
    "MiMo-V2-Flash": ([Asked(9, "64/4", "192/128"), Asked(39, "64/8", "192/128", 128, masks("window_left", "sinks"))], {}),
    "Llama-4-Scout": ([Asked(48, "40/8", "128")], {}),
    "Falcon-7B": ([Asked(32, "71/1", "64")], {}),
    "Falcon-RW-1B": ([Asked(24, "32/32", "64", None, masks("alibi"))], {}),
    "Falcon-40B": ([Asked(60, "128/8", "64")], {}),
    "ChatGLM3-6B": ([Asked(28, "32/2", "128", dtype="float16")], {}),
    "Nemotron-NAS, eight layers": ([Asked(3, "64/8", "128"), Asked(1, "64/4", "128"), Asked(1, "64/2", "128")], {"none": 3}),
    "Qwen3-Next-80B": ([Asked(12, "16/2", "256")], {"linear": 36}),
    "Granite-4.0-H-Small": ([Asked(4, "32/8", "128")], {"linear": 36}),
    "DeepSeek-V3": ([Asked(61, "128/1", "576/512")], {}),
    "Kimi-K2": ([Asked(61, "64/1", "576/512")], {}),
    "Command-R7B": ([Asked(24, "32/8", "128", 4096, masks("window_left")), Asked(8, "32/8", "128")], {}),
    "StarCoder": ([Asked(40, "48/1", "128")], {}),
    "BLOOM-7B1": ([Asked(30, "32/32", "128", None, masks("alibi"), "float16")], {}),
    "DBRX": ([Asked(40, "48/8", "128")], {}),
    "PaliGemma-3B": ([], {"image-prefix": 18}),
    "GPT-2": ([Asked(12, "12/12", "64")], {}),
    "Mamba-2.8B": ([], {"linear": 64}),
    "BERT-base": ([], {"encoder": 12}),
    "Whisper-large-v3": ([Asked(32, "20/20", "64", dtype="float16")], {"encoder": 32, "cross": 32}),
    "T5-small": ([], {"encoder-decoder": 6}),
    "Gemma-3-27B": ([], {"image-prefix": 62}),
    "Gemma-4-31B": ([], {"image-prefix": 60}),
}
TEXT_ONLY: dict[str, list[Asked]] = {
    "Gemma-3-27B": [Asked(52, "32/16", "128", 1024, masks("window_left")), Asked(10, "32/16", "128")],
    "Gemma-4-31B": [Asked(50, "32/16", "256", 1024, masks("window_left")), Asked(10, "32/4", "512")],
}
# What sm_90a does not serve, with the words of the refusal.
NOT_SERVED = {
    "EmbeddingGemma-300M": "both directions",
    "BERT-base": "both directions", "Whisper-large-v3": "cross attention", "T5-small": "encoder-decoder", "Gemma-3-27B": "--text-only",
    "Gemma-4-31B": "--text-only", "PaliGemma-3B": "--text-only",
}  # fmt: skip
ENGINE_ONLY = {  # heads under names of their own, text inside a multimodal config, or a config class that transformers lacks
    "Gemma-3-27B", "Gemma-4-31B", "Llama-4-Scout", "Falcon-7B", "Falcon-40B", "ChatGLM3-6B", "Nemotron-NAS, eight layers", "Kimi-K2",
    "BLOOM-7B1", "Falcon-RW-1B", "GPT-2", "PaliGemma-3B",
}  # fmt: skip


def write(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIGS[name], **changes}))
    return path


def asked(groups: list[LayerGroup]) -> list[Asked]:
    rows = []
    for group in groups:
        if (p := group.problem) is not None:
            dims = str(p.head_dim) if p.head_dim == p.head_dim_v else f"{p.head_dim}/{p.head_dim_v}"
            present = masks(*[m for m in ("window_left", "window_right", "softcap", "sinks", "alibi") if getattr(p.mask, f"has_{m}")])
            rows.append(Asked(group.num_layers, f"{p.num_q_heads}/{p.num_kv_heads}", dims, group.window, present, p.dtype))
    return rows


def others(groups: list[LayerGroup]) -> dict[str, int]:
    assert all((group.problem is None) == (group.kind not in ("attention", "mla")) for group in groups)
    return {group.kind: group.num_layers for group in groups if group.problem is None}


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_each_config_has_its_facts() -> None:
    assert set(CONFIGS) == set(FACTS) and set(NOT_SERVED) <= set(FACTS)


@needs_vllm
@pytest.mark.parametrize("name", FACTS)
def test_layers_of_a_published_model(tmp_path: Path, name: str) -> None:
    groups = layer_groups(write(tmp_path, name), arch="sm_90a", page_size=16)
    attention, rest = FACTS[name]
    assert sorted(asked(groups), key=str) == sorted(attention, key=str)
    assert others(groups) == rest


SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
MODELOPT_FILE = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
# A checkpoint's quantization_config, and what K and V are; a name that is no dtype is refused.
DECLARED: dict[str, tuple[dict[str, Any], str]] = {
    "compressed-tensors": ({"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME}, FP8),
    "compressed-tensors, heads": ({"quant_method": "compressed-tensors", "kv_cache_scheme": {**SCHEME, "strategy": "attn_head"}}, FP8),
    "compressed-tensors, weights only": ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, "bfloat16"),
    "compressed-tensors, integers": ({"quant_method": "compressed-tensors", "kv_cache_scheme": {**SCHEME, "type": "int"}}, "8-bit int"),
    "ModelOpt, scheme": ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": SCHEME}, FP8),
    "ModelOpt, dynamic": ({"quant_method": "modelopt", "kv_cache_scheme": {**SCHEME, "dynamic": True}}, "bfloat16"),
    "ModelOpt, name": ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4", "kv_cache_quant_algo": "fp8"}, FP8),
    "ModelOpt, nested": ({"quant_method": "modelopt", **MODELOPT_FILE}, FP8),
    "ModelOpt, NVFP4": ({"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}, "nvfp4"),
    "ModelOpt, unknown": ({"quant_method": "modelopt", "kv_cache_quant_algo": "INT8"}, "bfloat16"),
    "ModelOpt, weights only": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "bfloat16"),
    "weights only": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "bfloat16"),
}


def kv_dtypes(path: Path, **arguments: Any) -> set[str]:
    return {group.problem.kv_dtype for group in layer_groups(path, arch="cpu", page_size=16, **arguments) if group.problem}


@pytest.mark.parametrize("declared", DECLARED)
def test_what_a_checkpoint_declares(tmp_path: Path, declared: str) -> None:
    quantisation, kv_dtype = DECLARED[declared]
    path = write(tmp_path, "Llama-3.1-8B", quantization_config=quantisation)
    if kv_dtype in DTYPE_BYTES:
        assert kv_dtypes(path) == {kv_dtype}
    else:
        with pytest.raises(UnsupportedProblem, match=f"kv_dtype: expected one of .*, got '{kv_dtype}'"):
            kv_dtypes(path)
    assert kv_dtypes(path, kv_dtype="auto") == {"bfloat16"}, "a dtype that is named is another choice"
    assert kv_dtypes(path, kv_dtype=FP8) == {FP8}


@pytest.mark.parametrize("name", DECLARED)
def test_vllm_takes_auto_for_the_same(name: str) -> None:
    """Its own reading, where it is installed. What it leaves at "auto" its layers resolve by the scheme of compressed-tensors."""
    torch_utils = pytest.importorskip("vllm.utils.torch_utils")
    quantisation, kv_dtype = DECLARED[name]
    resolved = torch_utils.get_kv_cache_quant_algo_string(quantisation) or "auto"
    if quantisation["quant_method"] == "compressed-tensors":
        assert resolved == "auto" and bool(quantisation["kv_cache_scheme"]) == (kv_dtype != "bfloat16")
        return
    assert {"fp8": FP8, "fp8_e4m3": FP8, "auto": "bfloat16"}.get(resolved, resolved) == kv_dtype


def test_declared_in_a_file_beside_the_config(tmp_path: Path) -> None:
    """As ModelOpt did; config.json goes first where both say something."""
    path = write(tmp_path, "Llama-3.1-8B")
    path.with_name("hf_quant_config.json").write_text(json.dumps(MODELOPT_FILE))
    assert kv_dtypes(path) == kv_dtypes(tmp_path) == {FP8}
    assert kv_dtypes(write(tmp_path, "Llama-3.1-8B", quantization_config={"quant_method": "fp8"})) == {"bfloat16"}


def test_plan_says_fp8(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(write(tmp_path, "Llama-3.1-8B", quantization_config=DECLARED["compressed-tensors"][0]))
    for arguments, words in (((), f"bfloat16 (K and V {FP8})"), (("--kv-dtype", "auto"), "head_dim 128, bfloat16, page")):
        code, out, _ = plan(capsys, "--model", path, *arguments)
        assert code == 0 and words in out, out
    path = str(write(tmp_path, "Llama-3.1-8B"))
    for name in ("fp8", "fp8_e4m3", FP8):
        code, out, _ = plan(capsys, "--model", path, "--kv-dtype", name)
        assert code == 0 and f"(K and V {FP8})" in out, out
    room = "room for converted K and V, one buffer for all layers: 256 MiB"
    for arguments, has_room in ((("--kv-dtype", "fp8"), True), ((), False), (("--kv-dtype", "fp8", "--batch-invariant"), False)):
        code, out, _ = plan(capsys, "--model", path, "--arch", "sm_90a", *arguments)
        assert code == 0 and (room in out) == has_room, out
    code, _, err = plan(capsys, "--model", path, "--kv-dtype", "fp8_e5m2")
    assert code == 1 and "kv_dtype: expected one of" in err and "got 'fp8_e5m2'" in err


@needs_vllm
@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_multimodal_model_without_images(tmp_path: Path, name: str) -> None:
    groups = layer_groups(write(tmp_path, name), arch="sm_90a", page_size=16, text_only=True)
    assert asked(groups) == TEXT_ONLY[name] and not others(groups)


@needs_vllm
@pytest.mark.parametrize("name", FACTS)
def test_exit_code_says_whether_all_attention_is_served(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    code, out, _ = plan(capsys, "--model", str(write(tmp_path, name)), "--arch", "sm_90a", "--json")
    rows = json.loads(out)
    refusals = [row["refusal"] for row in rows if row["refusal"]]
    assert code == (1 if name in NOT_SERVED else 0)
    assert bool(refusals) == (name in NOT_SERVED) and NOT_SERVED.get(name, "") in " ".join(refusals)
    for row in rows:
        assert sum(bool(row[field]) for field in ("plan", "remark", "refusal")) == 1, row
        assert bool(row["kernels"]) == bool(row["plan"])


def test_messages_and_prompts_of_mla_have_kernels_of_their_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A decode kernel of one GPU's heads, and one of rows that fill a tile; keys and values of prompts are in the model's dtype whatever
    latents are, and have no pages."""
    path = write(tmp_path, "DeepSeek-V3")
    call = ("--model", str(path), "--arch", "sm_90a", "--tp", "8", "--kv-dtype", "fp8", "--speculative-tokens", "1")
    code, out, _ = plan(capsys, *call, "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["kernels"][0] == "schedule-sm_90a-s256" and "-h16-q2-" in row["kernels"][1]
    messages, *prompts = row["steps"]
    assert messages["kernels"][0] == "schedule-sm_90a-s4096"
    assert "-h16-q4-" in messages["kernels"][1] and messages["refusal"] is None
    assert all("kve4m3" in names[1] and "-box64-" in names[1] for names in (row["kernels"], messages["kernels"]))
    for step, is_causal in zip(prompts, (True, False), strict=True):
        assert "16/16 heads, head_dim 192/128, bfloat16, ragged" in step["plan"] and step["refusal"] is None
        (kernel,) = (name for name in step["kernels"] if name.startswith("prefill"))
        assert "kve4m3" not in kernel and kernel.endswith("ragged") and ("causal" in kernel) == is_causal
    code, out, _ = plan(capsys, *call, "--batch-invariant")
    assert "    prompts: FA4: sm90 kernels" in out and "    prompts, to chunks of cached context: FA4: sm90 kernels" in out
    assert "messages" not in out, "what pays depends on a step's other rows"


def test_pages_are_vllms_where_none_are_named(tmp_path: Path) -> None:
    """16 tokens, and a tile's keys of latents, so that what is compiled ahead is what an engine asks for."""
    for name, own in (("DeepSeek-V3", 64), ("Llama-3.1-8B", 16)):
        path = write(tmp_path, name)
        for given, pages in ((None, own), (32, 32)):
            assert {group.problem.page_size for group in layer_groups(path, arch="sm_90a", page_size=given) if group.problem} == {pages}


def test_prompts_of_mla_that_no_kernel_serves_are_said_and_no_refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An engine takes another prefill backend for them."""
    code, out, _ = plan(capsys, "--model", str(write(tmp_path, "DeepSeek-V3", v_head_dim=192)), "--arch", "sm_90a")
    assert code == 0 and "prompts: not on FA4: head_dim/head_dim_v on sm_90a: expected one of" in out


def test_compile_takes_what_an_engine_plans_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A GPU's share of the heads, rows with drafts, prompts of MLA; a shape's drafts too."""
    plans: list[AttentionPlan] = []
    monkeypatch.setattr(compile_command, "compile_plans", lambda given: plans.extend(given) or [])
    model = ("--model", str(write(tmp_path, "DeepSeek-V3")), "--tp", "8")
    for arguments, names in (
        (model, ["mladecode-sm_90a-bfloat16-h16-q2", "mladecode-sm_90a-bfloat16-h16-q4", *["prefill-sm_90a-bfloat16-d192v128-g1"] * 2]),
        (("--heads", "32/8"), ["decode-sm_90a-bfloat16-d128-g4-q2", "prefill-sm_90a-bfloat16-d128-g4"]),
        (
            ("--heads", "32/8", "--fused-output"),
            [f"{kind}-sm_90a-bfloat16{out}-d128-g4" for out in ("", "-oute4m3") for kind in ("decode", "prefill")],
        ),
    ):
        plans.clear()
        command = ["compile", "--arch", "sm_90a", "--max-num-seqs", "1024", "--speculative-tokens", "1", *arguments]
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert not stop.value.code, capsys.readouterr().err
        found = [name for plan in plans for name in plan.kernel_names if not name.startswith("schedule")]
        assert len(found) == len(names) and all(name.startswith(start) for name, start in zip(found, names, strict=True)), found
        schedules = {plan.kernel_names[0] for plan in plans}
        assert schedules - {"schedule-sm_90a-s4096"} == {"schedule-sm_90a-s1024"}  # that of messages beside it


@needs_vllm
def test_gemma_4_is_refused_for_its_wide_layers_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = plan(capsys, "--model", str(write(tmp_path, "Gemma-4-31B")), "--arch", "sm_90a", "--text-only", "--json")
    narrow, wide = json.loads(out)
    assert code == 1
    assert narrow["num_layers"] == 50 and narrow["plan"] and narrow["refusal"] is None
    assert wide["num_layers"] == 10 and wide["plan"] is None and "got 512/512" in wide["refusal"]


@needs_vllm
def test_plan_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = plan(capsys, "--model", str(write(tmp_path, "Whisper-large-v3")))
    assert code == 1 and "32 layers (cross): not served: cross attention is not served" in out
    assert "32 layers: FA4: torch reference on cpu, 20/20 heads, head_dim 64" in out
    code, out, _ = plan(capsys, "--model", str(write(tmp_path, "Qwen3-Next-80B")))
    assert code == 0 and "36 layers (linear): a recurrent or linear layer" in out


@needs_vllm
def test_compile_refuses_a_model_of_which_it_would_serve_a_part(tmp_path: Path) -> None:
    groups = layer_groups(write(tmp_path, "Whisper-large-v3"), arch="sm_90a", page_size=16)
    with pytest.raises(UnsupportedProblem, match=r"32 layers \(encoder\): attention in both directions"):
        attention_problems(groups)
    groups = layer_groups(write(tmp_path, "Qwen3-Next-80B"), arch="sm_90a", page_size=16)
    assert [(p.num_q_heads, p.num_kv_heads, p.head_dim) for p in attention_problems(groups)] == [(16, 2, 256)]


@needs_vllm
@pytest.mark.parametrize(("tp", "heads"), [(1, "32/8"), (4, "8/2"), (8, "4/1"), (16, "2/1")])
def test_tensor_parallel_heads_of_one_gpu(tmp_path: Path, tp: int, heads: str) -> None:
    """8 KV heads over 16 GPUs: each is held twice."""
    assert asked(layer_groups(write(tmp_path, "Llama-3.1-8B"), arch="sm_90a", page_size=16, tp=tp)) == [Asked(32, heads, "128")]


@needs_vllm
@pytest.mark.parametrize(
    ("name", "tp", "words"),
    [("Falcon-7B", 2, "expected a divisor of 71 query heads, got 2"), ("Gemma-2-9B", 3, "16 query heads")],
)
def test_heads_that_cannot_be_shared(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, tp: int, words: str) -> None:
    code, out, _ = plan(capsys, "--model", str(write(tmp_path, name)), "--tp", str(tp), "--json")
    assert code == 1 and all(words in row["refusal"] for row in json.loads(out))


@needs_vllm
def test_kv_heads_that_cannot_be_shared(tmp_path: Path) -> None:
    path = write(tmp_path, "Llama-3.1-8B", num_attention_heads=24, num_key_value_heads=6, hidden_size=3072)
    (group,) = layer_groups(path, arch="cpu", page_size=16, tp=4)
    assert group.refusal == "tp: expected a divisor or a multiple of 6 KV heads, got 4"


@needs_vllm
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "num_attention_heads": 32},
            "baichuan: expected a config that",
        ),
        ({"model_type": "gpt_neo"}, "gpt_neo: expected a family whose masks its config states"),
        ({"model_type": "vit"}, "vit: expected a language model"),
        ({"model_type": "rwkv"}, "rwkv: expected attention heads in layer 0"),
        ({"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"]}, "ctrl: expected an architecture that vLLM has a model of"),
        ({**CONFIGS["MiMo-V2-Flash"], "hybrid_layer_pattern": None}, "mimo_v2_flash: expected a config that"),
        ({**CONFIGS["Nemotron-NAS, eight layers"], "block_configs": []}, "nemotron-nas: expected a config that"),
    ],
)
def test_a_family_that_no_library_knows_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = plan(capsys, "--model", str(tmp_path))
    assert code == 2 and not out and words in err


@pytest.mark.parametrize("name", FACTS)
def test_without_vllm_the_same_answer_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """transformers alone answers where its class states the heads; elsewhere it says that vLLM is needed."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    path = write(tmp_path, name)
    if name in ENGINE_ONLY:
        with pytest.raises(ModelConfigError):
            layer_groups(path, arch="sm_90a", page_size=16)
        return
    groups = layer_groups(path, arch="sm_90a", page_size=16)
    attention, rest = FACTS[name]
    assert sorted(asked(groups), key=str) == sorted(attention, key=str)
    assert others(groups) == rest


def test_falcon_without_vllm_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ModelConfigError, match=r"falcon: states no num_key_value_heads; expected vLLM, which .*pip install 'fa4-backend\[vllm\]'"
    ):
        layer_groups(write(tmp_path, "Falcon-7B"), arch="cpu", page_size=16)


def test_without_transformers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = plan(capsys, "--model", str(write(tmp_path, "Llama-3.1-8B")))
    assert code == 2 and "expected transformers" in err and "pip install 'fa4-backend[models]'" in err


def test_a_file_of_any_name(tmp_path: Path) -> None:
    path = write(tmp_path, "Qwen3-8B").rename(tmp_path / "qwen3.json")
    assert asked(layer_groups(path, arch="cpu", page_size=16, dtype="float32")) == [Asked(36, "32/8", "128", dtype="float32")]
