"""The adapter against the vLLM it is served with on GPUs (0.33.0, as recorded) and against the one installed here (0.32 for CPUs)."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from fa4_integration.vllm_backend import backend as backend_module
from fa4_integration.vllm_backend import limits, metadata_builder, mla_messages, mla_metadata_builder, selection
from fa4_integration.vllm_backend.backend import FA4Backend
from fa4_integration.vllm_backend.impl import FA4Impl
from fa4_integration.vllm_backend.metadata_builder import SERVED_SPECS, FA4MetadataBuilder
from fa4_integration.vllm_backend.mla_backend import FA4MLABackend
from fa4_integration.vllm_backend.mla_impl import FA4MLAImpl
from fa4_integration.vllm_backend.mla_metadata_builder import SERVED_SPEC, FA4MLAMetadataBuilder
from tests.engines.vllm_contract import read_contract

OURS = {
    "AttentionBackend": FA4Backend,
    "AttentionMetadataBuilder": FA4MetadataBuilder,
    "AttentionImpl": FA4Impl,
    "MLACommonBackend": FA4MLABackend,
    "MLACommonMetadataBuilder": FA4MLAMetadataBuilder,
    "MLAAttentionImpl": FA4MLAImpl,
    "MLACommonImpl": FA4MLAImpl,
}
BY_NAME = ("MLAAttentionImpl.__init__", "MLACommonImpl.__init__")  # vLLM gives a layer's numbers by name
# Of the base class's builder, ours to give.
NOT_PASSED = {"MLACommonMetadataBuilder.__init__": ("metadata_cls", "supports_dcp_with_varlen")}


@pytest.fixture(scope="module", params=["0.33.0", "installed"])
def contract(request: pytest.FixtureRequest) -> Any:
    if request.param == "0.33.0":
        return json.loads((Path(__file__).parent / "vllm_0_33_contract.json").read_text())
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return read_contract(Path(spec.origin).parent)


def test_our_methods_take_what_vllm_passes(contract: Any) -> None:
    """Every parameter of vLLM's declaration, by position and by name."""
    checked = 0
    for name, parameters in contract["parameters"].items():
        class_name, _, method = name.partition(".")
        if class_name not in OURS:
            continue
        parameters = [parameter for parameter in parameters if parameter.rstrip("=") not in NOT_PASSED.get(name, ())]
        names = [parameter.rstrip("=") for parameter in parameters]
        required = [parameter for parameter in parameters if not parameter.endswith("=")]
        signature = inspect.signature(getattr(OURS[class_name], method))
        receiver = [None] if "self" in signature.parameters else []
        if name not in BY_NAME:
            signature.bind(*receiver, *names)
            signature.bind(*receiver, *required)
        if class_name not in ("AttentionBackend", "MLACommonBackend") and name != "MLAAttentionImpl.do_kv_cache_update":
            signature.bind(*receiver, **dict.fromkeys(names))
        checked += 1
    assert checked >= 28


def test_abstract_methods_are_implemented(contract: Any) -> None:
    for class_name, names in contract["abstract"].items():
        for name in names:
            assert not getattr(getattr(OURS[class_name], name), "__isabstractmethod__", False), f"{class_name}.{name}"
    assert contract["abstract"]["AttentionImpl"] == ["__init__", "forward"]
    assert contract["abstract"]["MLAAttentionImpl"] == ["__init__", "forward_mqa"]


def test_every_selector_field_can_be_validated(contract: Any) -> None:
    """A platform passes all of them by name, with the device's capability."""
    passed = {*contract["fields"]["AttentionSelectorConfig"], "device_capability"}
    assert passed <= {name.rstrip("=") for name in contract["parameters"]["AttentionBackend.validate_configuration"]}


def read_of(module: Any, variable: str) -> set[str]:
    """Attributes that `module` reads of anything called `variable`."""
    tree = ast.parse(inspect.getsource(module))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == variable
    }


@pytest.mark.parametrize(
    ("module", "variable", "class_name"),
    [
        (metadata_builder, "batch", "CommonAttentionMetadata"),
        (limits, "scheduler", "SchedulerConfig"),
        (limits, "compilation", "CompilationConfig"),
    ],
)
def test_what_the_builder_reads_exists(contract: Any, module: Any, variable: str, class_name: str) -> None:
    read = read_of(module, variable)
    assert read and read <= set(contract["fields"][class_name])


def test_what_messages_are_told_by_exists(contract: Any) -> None:
    properties = {name.partition(".")[2] for name in contract["parameters"] if name.startswith("ParallelConfig.")}
    read = {variable: read_of(mla_messages, variable) for variable in ("batch", "parallel")}
    assert read["batch"] and read["batch"] <= set(contract["fields"]["CommonAttentionMetadata"])
    assert read["parallel"] and read["parallel"] <= {*contract["fields"]["ParallelConfig"], *properties}


def test_names_we_use_exist(contract: Any) -> None:
    fields = contract["fields"]
    assert {"max_model_len", "multimodal_config"} <= set(fields["ModelConfig"])
    assert {"ALWAYS", "NEVER"} <= set(fields["AttentionCGSupport"]) and read_of(metadata_builder, "AttentionCGSupport") <= set(
        fields["AttentionCGSupport"]
    )
    assert read_of(backend_module, "KVCacheLayout") <= set(fields["KVCacheLayout"])
    assert "DECODER" in fields["AttentionType"]
    assert {*SERVED_SPECS, SERVED_SPEC} <= set(fields)
    assert "VARLEN" in fields["QueryLenSupport"] and {"NEVER", "UNIFORM_BATCH"} == read_of(mla_metadata_builder, "AttentionCGSupport")
    assert {"block_table", "seq_lens"} <= set(fields["MLACommonDecodeMetadata"]) and "decode" in fields["MLACommonMetadata"]


def test_functions_we_call_have_the_parameters_we_pass(contract: Any) -> None:
    parameters = contract["parameters"]
    assert parameters["reshape_and_cache_flash"] == [
        "key",
        "value",
        "key_cache",
        "value_cache",
        "slot_mapping",
        "kv_cache_dtype",
        "k_scale",
        "v_scale",
    ]
    assert parameters["get_layers_from_vllm_config"][:3] == ["vllm_config", "layer_type", "layer_names="]
    assert parameters["AttentionBackendEnum.register"] == ["name", "value"]
    assert parameters["AttentionMetadataBuilder._init_reorder_batch_threshold"][:2] == [
        "reorder_batch_threshold=",
        "supports_spec_as_decode=",
    ]


@pytest.mark.parametrize("platform", ["CpuPlatform", "CudaPlatformBase"])
def test_selection_wraps_the_signatures_it_finds(contract: Any, platform: str) -> None:
    assert contract["parameters"][f"{platform}.get_attn_backend_cls"][:2] == ["selected_backend", "attn_selector_config"]
    assert contract["parameters"][f"{platform}.check_and_update_config"] == ["vllm_config"]
    assert {"use_mla", "use_sparse"} <= set(contract["fields"]["AttentionSelectorConfig"])
    source = inspect.getsource(selection)
    assert "selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any" in source
    assert "check_and_update_config(cls: Any, vllm_config: Any)" in source
