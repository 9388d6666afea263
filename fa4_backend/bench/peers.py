"""The peers of every benchmark, as an engine calls them: FA3 and Triton from vLLM, FlashInfer; all read pages.

With K and V in FP8, FA3 takes q in FP8 too, which vLLM quantises before (not timed), Triton and FlashInfer take it in bf16.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache

import torch

from fa4_backend.bench.batch import DTYPE, LONGEST_DRAFT, BatchShape, BatchTensors
from fa4_backend.problem import FP8

Call = Callable[[], object]

FA3, TRITON, FLASHINFER = "fa3", "triton", "flashinfer"
INVARIANT = "fa3 invariant"  # with one split, what vLLM uses for batch invariance
WIDE = "fa3 bf16"  # beside FP8 K and V: FA3 with the same values in bf16
PAGED = (FA3, INVARIANT, WIDE, TRITON, FLASHINFER)
TRITON_SEGMENTS = 16
FLASHINFER_WORKSPACE_BYTES = 512 << 20


def has_module(module: str) -> bool:
    """Whether a module can be imported here, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def installed(kv_dtype: str) -> list[str]:
    """Peers of K and V in `kv_dtype` that can be imported here."""
    found = []
    if has_module("vllm"):
        found += [FA3, WIDE, TRITON] if kv_dtype == FP8 else [FA3, TRITON]
    if has_module("flashinfer"):
        found.append(FLASHINFER)
    return found


def ready(peer: str, batch: str, prepare: Callable[[], Call | None], *, must_run: bool = False) -> Call | None:
    """A kernel's call, run once; None where a peer has no answer to the batch or refuses it, which is printed with its reason.

    Raises:
        Exception: the kernel's own, where it `must_run`.
    """
    try:
        call = prepare()
        if call is not None:
            call()
    except Exception as error:  # a peer may refuse in any way it likes
        if must_run:
            raise
        reason = str(error).strip().splitlines() or [""]
        print(f"{batch}: {peer} did not run: {type(error).__name__}: {reason[0][:200]}", file=sys.stderr, flush=True)
        return None
    return call


def prepare(peer: str, batch: BatchShape, tensors: BatchTensors) -> Call | None:
    """One layer's call of a paged peer, its metadata made; None where the peer has nothing to say about the batch.

    Raises:
        ValueError: no peer has this name.
    """
    if peer == FA3:
        return _fa3(batch, tensors, num_splits=0)
    if peer == WIDE:
        return _fa3(batch, tensors.in_bf16(), num_splits=0)
    if peer == INVARIANT:
        # The same as fa3 where no row is split.
        return _fa3(batch, tensors, num_splits=1) if len({kv_len for _, kv_len in batch.row_lens}) > 1 else None
    if peer == TRITON:
        return _triton(batch, tensors)
    if peer == FLASHINFER:
        return _flashinfer(batch, tensors)
    raise ValueError(f"peer: expected one of {', '.join(PAGED)}, got {peer!r}")


def _window(b: BatchShape) -> tuple[int, int]:
    """Keys left and right of the diagonal's, as vLLM hands them over."""
    return (-1, -1) if b.mask.window_left is None else (b.mask.window_left, 0)


def _fa3(b: BatchShape, t: BatchTensors, num_splits: int) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    dtype = t.k_cache.dtype
    q, scales = t.q, {}
    if dtype != DTYPE:
        q, ones = t.q.to(dtype), torch.ones(len(b.row_lens), b.num_kv_heads, device="cuda")
        scales = {"q_descale": ones, "k_descale": ones, "v_descale": ones}
    metadata = get_scheduler_metadata(
        len(b.row_lens), b.max_query_len, b.max_kv_len, b.num_q_heads, b.num_kv_heads, b.head_dim, t.seqused_k, headdim_v=b.value_dim,
        qkv_dtype=dtype, cu_seqlens_q=t.cu_seqlens_q, page_size=b.page_size, causal=b.is_causal, window_size=_window(b),
        has_softcap=b.mask.softcap > 0, num_splits=num_splits,
    )  # fmt: skip
    return lambda: flash_attn_varlen_func(
        q=q, k=t.k_cache, v=t.v_cache, out=t.out, cu_seqlens_q=t.cu_seqlens_q, max_seqlen_q=b.max_query_len, seqused_k=t.seqused_k,
        max_seqlen_k=b.max_kv_len, softmax_scale=b.head_dim**-0.5, causal=b.is_causal, window_size=list(_window(b)),
        softcap=b.mask.softcap, block_table=t.page_table, scheduler_metadata=metadata, fa_version=3, num_splits=num_splits,
        s_aux=t.sinks, **scales,
    )  # fmt: skip


def _triton(b: BatchShape, t: BatchTensors) -> Call | None:
    if not b.is_causal or b.value_dim != b.head_dim:
        return None
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    segments: dict[str, object] = {}
    scale = None if t.k_cache.dtype == DTYPE else torch.ones((), device="cuda")
    if b.max_query_len == 1:
        shape = (t.q.shape[0], b.num_q_heads, TRITON_SEGMENTS)
        segments = {
            "seq_threshold_3D": 128 // b.num_kv_heads,
            "num_par_softmax_segments": TRITON_SEGMENTS,
            "softmax_segm_output": torch.empty(*shape, _power_of_two(b.head_dim), device="cuda"),
            "softmax_segm_max": torch.empty(shape, device="cuda"),
            "softmax_segm_expsum": torch.empty(shape, device="cuda"),
        }
    return lambda: unified_attention(
        t.q, t.k_cache, t.v_cache, t.out, t.cu_seqlens_q, b.max_query_len, t.seqused_k, b.max_kv_len, b.head_dim**-0.5, True,
        _window(b), t.page_table, b.mask.softcap, None, scale, scale, sinks=t.sinks, **segments,
    )  # fmt: skip


def _power_of_two(elements: int) -> int:
    """Least power of two that holds them: the kernel's segments of O have as many."""
    return 1 << (elements - 1).bit_length()


@cache
def _workspace() -> torch.Tensor:
    return torch.empty(FLASHINFER_WORKSPACE_BYTES, device="cuda", dtype=torch.uint8)


def _flashinfer(b: BatchShape, t: BatchTensors) -> Call | None:
    if b.mask.has_sinks:
        return None  # its wrappers of paged K and V take none
    import flashinfer

    indptr = torch.tensor([0, *t.pages_of], device="cuda").cumsum(0).int()
    last = ((t.seqused_k - 1) % b.page_size + 1).int()
    assert t.page_table is not None
    pages = torch.cat([t.page_table[row, :n] for row, n in enumerate(t.pages_of)])
    # Its paged layouts want K and V in tensors of their own.
    kv_cache = (t.k_cache.contiguous(), t.v_cache.contiguous())
    heads = (b.num_q_heads, b.num_kv_heads, b.head_dim)
    options = {
        "q_data_type": DTYPE,
        "kv_data_type": t.k_cache.dtype,
        "window_left": _window(b)[0],
        "logits_soft_cap": b.mask.softcap or None,
    }
    if b.max_query_len == 1 and b.value_dim == b.head_dim:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", use_tensor_cores=True)
        wrapper.plan(indptr, pages, last, *heads, b.page_size, **options)
    else:
        has_decode_rows = min(query_len for query_len, _ in b.row_lens) <= LONGEST_DRAFT
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2" if has_decode_rows else "fa3")
        wrapper.plan(
            t.cu_seqlens_q, indptr, pages, last, *heads, b.page_size, head_dim_vo=b.value_dim, causal=b.is_causal, **options
        )  # fmt: skip
    return lambda: wrapper.run(t.q, kv_cache, out=t.out)
