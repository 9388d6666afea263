"""Our operator on a batch of any benchmark, its metadata made once, as for all layers of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits, paged_attention, plan_attention, ragged_attention
from fa4_backend.arch import arch_of_capability
from fa4_backend.bench.batch import BatchShape, BatchTensors
from fa4_backend.bench.peers import Call
from fa4_backend.compile import CompileKey
from fa4_backend.compile_cache import ensure_objects
from fa4_backend.device import plan_on
from fa4_backend.plan import AttentionPlan, bounded
from fa4_backend.problem import MAX_CONVERT_KEYS, PAGED


def asked(
    batch: BatchShape, arch: str, *, batch_invariant: bool = False, exact: bool = False, convert_keys: int | None = None
) -> tuple[AttentionProblem, BatchLimits]:
    """What a server would plan for whose largest step is at least this batch.

    Args:
        convert_keys: of `BatchLimits`; default: as the environment says.
    """
    rows = batch.row_lens
    problem = AttentionProblem(
        num_q_heads=batch.num_q_heads, num_kv_heads=batch.num_kv_heads, head_dim=batch.head_dim, head_dim_v=batch.value_dim,
        dtype="bfloat16", page_size=batch.page_size if batch.kv_source == PAGED else 1, arch=arch, mask=batch.mask.features,
        kv_dtype=batch.kv_dtype, q_dtype=batch.q_dtype, kv_source=batch.kv_source,
        sinks_dtype="bfloat16", batch_invariant=batch_invariant, exact=exact,
    )  # fmt: skip
    tokens = sum(query_len for query_len, _ in rows)
    asked_keys = MAX_CONVERT_KEYS if convert_keys is None else convert_keys
    limits = BatchLimits(max(256, len(rows)), max(8192, tokens), 131072, batch.decode_query_len, asked_keys)
    return problem, bounded(limits, problem) if convert_keys is None else limits


def gpu_arch() -> str:
    """The arch of the GPU present; "none" where there are no kernels for it, which plans refuse."""
    return arch_of_capability(*torch.cuda.get_device_capability()) or "none"


def compile_all(requests: Iterable[tuple[AttentionProblem, BatchLimits]]) -> int:
    """Compile what the plans of `asked` need and the cache lacks.

    Returns:
        how many kernels they need.
    """
    keys: dict[CompileKey, None] = {}
    for request in requests:
        plan = plan_attention(*request)
        keys |= dict.fromkeys(plan.keys)
    ensure_objects(keys)
    return len(keys)


@dataclass(frozen=True)
class Ours:
    """Our operator on one batch."""

    refresh: Call
    call: Call

    @classmethod
    def make(
        cls, batch: BatchShape, t: BatchTensors, *, batch_invariant: bool = False, exact: bool = False, convert_keys: int | None = None
    ) -> Ours:
        """Plan for the GPU present, allocate and refresh."""
        problem, limits = asked(batch, gpu_arch(), batch_invariant=batch_invariant, exact=exact, convert_keys=convert_keys)
        return cls.of_plan(plan_on(problem, limits, t.q.device), batch, t)

    @classmethod
    def of_plan(cls, plan: AttentionPlan, batch: BatchShape, t: BatchTensors) -> Ours:
        """Allocate and refresh."""
        metadata = AttentionMetadata.allocate(plan, t.q.device)
        metadata.window_left = batch.mask.window_left

        bounds: dict[str, Any] = {"max_seqlen_q": batch.max_query_len, "max_seqlen_k": batch.max_kv_len}
        bounds["prefill_keys"] = sum(kv_len for query_len, kv_len in batch.row_lens if query_len > batch.decode_query_len)
        bounds["min_seqlen_q"] = min(query_len for query_len, _ in batch.row_lens)
        bounds["decode_alone"] = batch.max_query_len <= batch.decode_query_len
        values: dict[str, Any] = {"window_left": batch.mask.window_left, "softcap": batch.mask.softcap, "sinks": t.sinks, "out": t.out}
        page_table, cu_seqlens_k = t.page_table, t.cu_seqlens_k
        q = t.q.to(getattr(torch, plan.problem.q_dtype))

        def refresh() -> None:
            seqused_k = t.seqused_k if cu_seqlens_k is None else None
            metadata.refresh(cu_seqlens_q=t.cu_seqlens_q, seqused_k=seqused_k, cu_seqlens_k=cu_seqlens_k, **bounds)

        def call() -> object:
            if page_table is None:
                assert cu_seqlens_k is not None
                return ragged_attention(q, t.k_cache, t.v_cache, t.cu_seqlens_q, cu_seqlens_k, plan=plan, metadata=metadata, **values)
            tensors = (q, t.k_cache, t.v_cache, page_table, t.cu_seqlens_q, t.seqused_k)
            return paged_attention(*tensors, plan=plan, metadata=metadata, **values)

        refresh()
        return cls(refresh, call)
