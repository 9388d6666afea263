"""A vLLM engine in this process, and a watch on the operator calls it makes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fa4_backend.ops import paged_attention
from tests.support.collector import settled_heap

KV_CACHE_BYTES = 256 << 20
MAX_BATCHED_TOKENS = 256  # below the longest prompts: their prefill comes in chunks
_scanned: set[str] = set()  # modules of vLLM that `llvmlite_out_of_sight` has let it scan


@dataclass
class OperatorCalls:
    """What the watched engine asked of `paged_attention`."""

    count: int = 0
    query_lens: set[int] = field(default_factory=set)  # longest query of each call's step
    kernels: set[str] = field(default_factory=set)  # "sm100 kernels", "torch reference"
    page_sizes: set[int] = field(default_factory=set)
    q_dtypes: set[str] = field(default_factory=set)
    kv_dtypes: set[tuple[str, int]] = field(default_factory=set)  # of K and V in a call, with the number of scales, 0 for none


@contextmanager
def watch_operator(scale_error: float = 1.0, kv_scale_error: float = 1.0) -> Iterator[OperatorCalls]:
    """Record the calls of vLLM's adapter.

    Args:
        scale_error, kv_scale_error: what the softmax scale, and the scales of FP8 K and V, are multiplied by: planted faults.
    """
    calls = OperatorCalls()

    def watched(*args: Any, plan: Any, metadata: Any, softmax_scale: float, k_scale: Any, v_scale: Any, **kwargs: Any) -> Any:
        calls.count += 1
        calls.query_lens.add(metadata.bounds.max_seqlen_q)
        calls.kernels.add(plan.describe().removeprefix("FA4: ").partition(" on ")[0])
        calls.page_sizes.add(plan.problem.page_size)
        calls.q_dtypes.add(plan.problem.q_dtype)
        calls.kv_dtypes.add((plan.problem.kv_dtype, 0 if k_scale is None else k_scale.numel()))
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        if kv_scale_error != 1.0:
            scales = {name: scale if scale is None else scale * kv_scale_error for name, scale in scales.items()}
        return paged_attention(*args, plan=plan, metadata=metadata, softmax_scale=softmax_scale * scale_error, **scales, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fa4_integration.vllm_backend.impl.paged_attention", watched)
        yield calls


@dataclass(frozen=True)
class Answer:
    """Greedy tokens of one prompt."""

    token_ids: tuple[int, ...]
    num_cached_tokens: int  # prompt tokens taken from the prefix cache


def generate(model: Path, backend: str, prompts: list[Any], max_tokens: int = 32, **engine_args: Any) -> list[Answer]:
    """Start an engine, answer `prompts` greedily, stop it.

    Args:
        prompts: token id lists or texts.
        engine_args: of vLLM's `LLM`, above the defaults below.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    arguments = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "seed": 0,
        **engine_args,
    }
    inputs = [{"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt for prompt in prompts]
    with settled_heap():
        with llvmlite_out_of_sight():
            llm = LLM(str(model), attention_backend=backend, **arguments)
        try:
            outputs = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True), use_tqdm=False)
            return [Answer(tuple(output.outputs[0].token_ids), output.num_cached_tokens or 0) for output in outputs]
        finally:
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()


@contextmanager
def llvmlite_out_of_sight() -> Iterator[None]:
    """vLLM 0.32 scans all loaded modules for kernels, and stops at llvmlite's library object once numba has compiled anything here.

    A scan takes as long as a quarter of an engine of a small model; where vLLM has loaded no module since the last, there is nothing new.
    """
    from vllm.triton_utils import dispatcher

    scan = dispatcher._rebind_kernels

    def scan_without_llvmlite(overrides: Any) -> None:
        loaded = {name for name in sys.modules if name.startswith("vllm")}
        if loaded <= _scanned:
            return
        _scanned.update(loaded)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in sys.modules if name.startswith("llvmlite")]:
                patch.delitem(sys.modules, name)
            scan(overrides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "_rebind_kernels", scan_without_llvmlite)
        yield


def error_of(error: type[Exception], *arguments: Any, **engine_args: Any) -> str:
    """What `generate` fails with. The engine is gone afterwards: kept by a traceback, it would take the next one's groups along."""
    message = ""
    try:
        generate(*arguments, **engine_args)
    except error as failure:
        message = str(failure)
    gc.collect()
    assert message, f"expected {error.__name__}, got none"
    return message


def tokens(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]
