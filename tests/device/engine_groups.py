"""The engines of `serve_matrix`: groups of them that serve one model, each beside the group's reference and yardstick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.device.engine_lane import Engine
from tests.engines.tiny_models import write_gemma2, write_llama, write_quantised_llama

EAGER: dict[str, Any] = {"enforce_eager": True}
SIZES = [1, 2, 4, 8, 16, 64, 256]
MODE_0: dict[str, Any] = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES}}
DEFAULT: dict[str, Any] = {"compilation_config": {"cudagraph_capture_sizes": SIZES}}  # inductor; both kinds of graphs
BOTH = "FULL_AND_PIECEWISE"
PEERS = ("FLASH_ATTN", "TRITON_ATTN")  # the reference; the yardstick
FEW_BLOCKS: dict[str, Any] = {"num_gpu_blocks_override": 68}  # of 16 tokens: max_model_len and little more
OFF = 1.05


@dataclass(frozen=True)
class Group:
    """A model and the engines that serve it, in one lane."""

    write: Callable[[Path], Path]
    engines: tuple[Engine, ...]
    per_lane: int = 5  # of them in one process


def peers(arguments: dict[str, Any], **more: Any) -> list[Engine]:
    """The reference and the yardstick. Eager for a model whose layers all have one window: FLASH_ATTN's full graphs of mixed steps gave
    other tokens there than TRITON_ATTN (vLLM 0.33, H100), and with 16/1 heads tokens that no vocabulary has."""
    return [Engine(name, name, arguments, **more) for name in PEERS]


def ours(name: str, arguments: dict[str, Any], **more: Any) -> Engine:
    """An engine on FA4, strict: a compile after warm-up would end it."""
    return Engine(name, "FA4", arguments, environment={"FA4_BACKEND_STRICT": "1", **more.pop("environment", {})}, **more)


def off(arguments: dict[str, Any], **more: Any) -> Engine:
    return ours("FA4, scale 5% off", arguments, scale_error=OFF, **more)


LLAMA = Group(
    write_llama,
    (
        *peers(EAGER),
        ours("FA4", EAGER),
        ours("FA4, no async scheduling", {**EAGER, "async_scheduling": False}),
        ours("FA4, no prefix caching", {**EAGER, "enable_prefix_caching": False}),
        ours("FA4, full graphs", {**MODE_0, "async_scheduling": True}, graphs="FULL"),
        ours("FA4, preempted", {**MODE_0, **FEW_BLOCKS}, graphs="FULL", preempts=True),
        ours("FA4, dummy batches", MODE_0, graphs="FULL", dummies=True),
        off(EAGER),
    ),
)
LLAMA_DEFAULT = Group(
    write_llama,
    (
        *peers(DEFAULT),
        ours("FA4", DEFAULT, graphs=BOTH),
        ours("FA4, preempted", {**DEFAULT, **FEW_BLOCKS, "async_scheduling": False}, graphs=BOTH, preempts=True),
        off(DEFAULT),
        ours("FA4, sleep and reload", {**DEFAULT, "enable_sleep_mode": True}, graphs=BOTH, is_alone=True),
        ours("FA4, engine apart", DEFAULT, graphs=BOTH, is_alone=True, environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
    ),
    per_lane=3,  # each compiles
)
GEMMA2 = Group(write_gemma2, (*peers(MODE_0), ours("FA4", MODE_0, graphs="FULL"), off(MODE_0)))
GEMMA2_DEFAULT = Group(write_gemma2, (*peers(DEFAULT), ours("FA4", DEFAULT, graphs=BOTH)))  # GEMMA2 has the control
SINKS = Group(
    write_llama,
    (*peers(EAGER, sinks=True), ours("FA4", MODE_0, graphs="FULL", sinks=True), off(MODE_0, sinks=True)),
)
WITH_LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
LORA = Group(
    write_llama,
    (
        *peers({**EAGER, **WITH_LORA}),
        ours("FA4", {**MODE_0, **WITH_LORA}, graphs="FULL"),
        off({**EAGER, **WITH_LORA}),
    ),
)


# vLLM's default for quantised models, without graphs, of which not every peer has full ones; TRITON_ATTN writes FP8 as ours does.
FUSED: dict[str, Any] = {"compilation_config": {"cudagraph_mode": "NONE", "pass_config": {"fuse_attn_quant": True}}}
FUSED_GRAPHS: dict[str, Any] = {"compilation_config": {"cudagraph_capture_sizes": SIZES, "pass_config": {"fuse_attn_quant": True}}}
FUSED_OUTPUT = Group(
    write_quantised_llama,
    (
        *peers(FUSED),
        ours("FA4", FUSED, writes_fp8=True),
        ours("FA4, full graphs", FUSED_GRAPHS, writes_fp8=True, graphs="FULL"),
        # 5% would hardly stand out from what rounding to FP8 moves.
        ours("FA4, scale 25% off", FUSED, writes_fp8=True, scale_error=1.25),
    ),
    per_lane=2,  # each compiles
)


def drafts(heads: tuple[int, int], num_tokens: int) -> Group:
    """Engines that draft: by n-grams, by the model itself, by an EAGLE head of random weights; the last two on FA4 as well."""

    def speculative(method: str, **more: Any) -> dict[str, Any]:
        return {**MODE_0, "speculative_config": {"method": method, "num_speculative_tokens": num_tokens, **more}}

    ngram = speculative("ngram", prompt_lookup_max=3, prompt_lookup_min=1)
    # A folder's name stands for its path, see `place_models`.
    draft_model = speculative("draft_model", model="MODEL", attention_backend="FA4")
    eagle = speculative("eagle", model="EAGLE", attention_backend="FA4")
    return Group(
        lambda folder: write_llama(folder, heads=heads),
        (
            *peers(EAGER),
            ours("FA4", MODE_0),
            ours("FA4, n-grams", ngram, drafts=True),
            ours("FA4, draft model", draft_model, drafts=True),
            ours("FA4, EAGLE", eagle, drafts=True, drafts_at_random=True),
            ours("FA4, EAGLE, default mode", {**eagle, **DEFAULT}, drafts=True, drafts_at_random=True, graphs=BOTH),
            off(MODE_0),
        ),
    )


TP_2: dict[str, Any] = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True}
NO_FUSED_ALL_REDUCE = {**DEFAULT["compilation_config"], "pass_config": {"fuse_allreduce_rms": False}}
TWO_DRAFTS = {"num_speculative_tokens": 3, "model": "MODEL", "method": "draft_model", "attention_backend": "FA4"}
TWO_GPUS = Group(
    write_llama,
    (
        *peers(EAGER),
        ours("FA4", MODE_0),
        ours("FA4, TP 2", {**MODE_0, **TP_2}, graphs="FULL", num_processes=2, is_alone=True),
        ours("FA4, TP 2, default mode", {**TP_2, "compilation_config": NO_FUSED_ALL_REDUCE}, graphs=BOTH, num_processes=2, is_alone=True),
        ours("FA4, TP 2, drafts", {**MODE_0, **TP_2, "speculative_config": TWO_DRAFTS}, drafts=True, num_processes=2, is_alone=True),
        ours("FA4, PP 2", {**MODE_0, "pipeline_parallel_size": 2}, num_processes=2, is_alone=True),
        # Each step of one rank has to meet a step of the other, which steps that only fetch tokens do not.
        ours("FA4, DP 2", {**MODE_0, "async_scheduling": False}, graphs="FULL", num_processes=2, ranks=2, is_alone=True),
        off(MODE_0),
    ),
)


GROUPS: dict[str, Group] = {
    "llama": LLAMA,
    "llama_default": LLAMA_DEFAULT,
    "gemma2": GEMMA2,
    "gemma2_default": GEMMA2_DEFAULT,
    "sinks": SINKS,
    "lora": LORA,
    "fused_output": FUSED_OUTPUT,
    "two_gpus": TWO_GPUS,
    **{f"drafts_{q}_{kv}_{num}": drafts((q, kv), num) for q, kv in ((64, 8), (16, 1)) for num in (3, 7)},
}
DEFAULT_GROUPS = ("llama", "llama_default", "gemma2", "gemma2_default", "sinks", "lora")


def rehearsed(group: Group) -> Group:
    """The group's engines as a machine without a GPU has them: on vLLM's CPU_ATTN in place of its GPU backends, eager, with little memory.

    Nothing is asked of graphs then, nor of distances and conversion once a call; all else is.
    """
    engines = []
    for engine in group.engines:
        arguments = {name: value for name, value in engine.arguments.items() if name not in ("compilation_config", "async_scheduling")}
        arguments |= {**EAGER, "kv_cache_memory_bytes": 64 << 20, "block_size": 32 if engine.backend in PEERS else 16}
        backend = "CPU_ATTN" if engine.backend in PEERS else engine.backend
        engines.append(replace(engine, backend=backend, arguments=arguments, graphs=None, converts=False))
    return replace(group, engines=tuple(engines))
