"""The names and signatures of vLLM that the adapter leans on, read from vLLM's sources without importing them.

    python -m tests.engines.vllm_contract FOLDER_OF_VLLM > tests/engines/vllm_0_33_contract.json

`test_vllm_contract.py` holds the adapter against the recorded version and against the installed one.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

# file -> class -> methods whose parameters matter; fields of a class under FIELDS.
METHODS = {
    "v1/attention/backend.py": {
        "AttentionBackend": [
            "get_name", "get_impl_cls", "get_builder_cls", "get_supported_kernel_block_sizes", "supported_kv_cache_layouts",
            "supports_head_size", "supports_dtype", "supports_sink", "supports_sliding_window", "supports_batch_invariance",
            "supports_attn_type", "supports_compute_capability", "supports_combination", "validate_configuration",
        ],
        "AttentionMetadataBuilder": ["__init__", "build", "get_cudagraph_support", "_init_reorder_batch_threshold"],
        "AttentionImpl": ["__init__", "forward"],
        "MLAAttentionImpl": ["__init__", "forward_mqa", "do_kv_cache_update"],
    },
    "model_executor/layers/attention/mla_attention.py": {
        "MLACommonBackend": ["get_supported_head_sizes", "is_mla"],
        "MLACommonMetadataBuilder": ["__init__", "build", "_build_decode"],
        "MLACommonImpl": ["__init__"],
    },
    "platforms/cuda.py": {"CudaPlatformBase": ["get_attn_backend_cls", "check_and_update_config"]},
    "platforms/cpu.py": {"CpuPlatform": ["get_attn_backend_cls", "check_and_update_config"]},
    "v1/attention/backends/registry.py": {"AttentionBackendEnum": ["register"]},
    "config/parallel.py": {"ParallelConfig": ["use_ubatching"]},
}  # fmt: skip
FUNCTIONS = {
    "config/vllm.py": ["get_layers_from_vllm_config"],
    "_custom_ops.py": ["reshape_and_cache_flash"],
}
FIELDS = {
    "v1/attention/backend.py": ["CommonAttentionMetadata", "AttentionCGSupport", "AttentionType"],
    "v1/attention/selector.py": ["AttentionSelectorConfig"],
    "v1/kv_cache_layout.py": ["KVCacheLayout"],
    "v1/kv_cache_interface.py": ["FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"],
    "model_executor/layers/attention/mla_attention.py": ["MLACommonDecodeMetadata", "MLACommonMetadata", "QueryLenSupport"],
    "config/scheduler.py": ["SchedulerConfig"],
    "config/compilation.py": ["CompilationConfig"],
    "config/model.py": ["ModelConfig"],
    "config/parallel.py": ["ParallelConfig"],
}


def read_contract(vllm: Path) -> dict[str, Any]:
    """Methods and functions with their parameters, abstract methods, and fields, of the vLLM in folder `vllm`."""
    contract: dict[str, Any] = {"parameters": {}, "abstract": {}, "fields": {}}
    for name, classes in METHODS.items():
        found = _classes(vllm / name)
        for class_name, methods in classes.items():
            functions = _functions(found[class_name].body)
            contract["abstract"][class_name] = sorted(key for key, node in functions.items() if _is_abstract(node))
            for method in methods:
                contract["parameters"][f"{class_name}.{method}"] = _parameters(functions[method])
    for name, functions_wanted in FUNCTIONS.items():
        functions = _functions(ast.parse((vllm / name).read_text()).body)
        for function in functions_wanted:
            contract["parameters"][function] = _parameters(functions[function])
    for name, class_names in FIELDS.items():
        found = _classes(vllm / name)
        for class_name in class_names:
            contract["fields"][class_name] = _fields(found[class_name])
    return contract


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}


def _functions(body: list[ast.stmt]) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def _is_abstract(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "abstractmethod" for decorator in node.decorator_list)


def _parameters(node: ast.FunctionDef) -> list[str]:
    """Names without self and cls, in order; one with a default ends in "="."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    required = len(arguments) - len(node.args.defaults)
    names = [argument.arg + ("=" if index >= required else "") for index, argument in enumerate(arguments)]
    names += [
        argument.arg + ("=" if default else "") for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    ]
    return names[1:] if names and names[0] in ("self", "cls") else names


def _fields(node: ast.ClassDef) -> list[str]:
    """Annotated and assigned names of a class body, as of dataclasses and enums."""
    names = []
    for statement in node.body:
        targets = (
            statement.targets if isinstance(statement, ast.Assign) else [statement.target] if isinstance(statement, ast.AnnAssign) else []
        )
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


if __name__ == "__main__":
    print(json.dumps(read_contract(Path(sys.argv[1])), indent=1))
