"""The tensors and values of a call against its plan and its step. Every refusal says what was expected and what it got.

Only shapes, strides, dtypes, devices, addresses and host numbers are looked at: values on the device are the kernels' to clamp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa4_backend.arch import REFERENCE_ARCH
from fa4_backend.arguments import CallTensors, LatentTensors, RaggedTensors
from fa4_backend.expectations import (
    expect_dense,
    expect_device,
    expect_dtype,
    expect_number,
    expect_one_place_each,
    expect_rows,
    expect_shape,
    expect_tensors,
    expect_whole,
)
from fa4_backend.kernels.schedule.work_list import NO_WINDOW
from fa4_backend.memory_spans import num_bytes, share_memory
from fa4_backend.problem import DTYPE_BYTES, LATENT, PAGED, RAGGED
from fa4_backend.step_validation import device_type_of, remember

if TYPE_CHECKING:
    import torch

    from fa4_backend.metadata import AttentionMetadata
    from fa4_backend.plan import AttentionPlan
    from fa4_backend.problem import AttentionProblem

Tensors = CallTensors | RaggedTensors | LatentTensors


def _apart(fields: tuple[str, ...], read: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Places among a call's tensors of what it writes, beside what that must not share memory with. A call looks at each pair."""
    return tuple(
        (fields.index(written), fields.index(other)) for written, others in (("out", (*read, "lse")), ("lse", read)) for other in others
    )


APART = {
    CallTensors: _apart(CallTensors._fields, ("q", "k_cache", "v_cache")),
    RaggedTensors: _apart(RaggedTensors._fields, ("q", "k", "v")),
    LatentTensors: _apart(LatentTensors._fields, ("q", "q_rope", "latent_cache")),
}
OPERATORS = {CallTensors: (PAGED, "paged_attention"), RaggedTensors: (RAGGED, "ragged_attention"), LatentTensors: (LATENT, "mla_decode")}
FLOAT32_MIN = 1.1754943508222875e-38  # smallest normal number
# Kernels multiply softmax_scale, softcap and their ratio by up to 2 log2(e) = 2.89 and need a finite float32.
LARGEST_FACTOR = 2.0**126


def check_tensors(plan: AttentionPlan, metadata: AttentionMetadata, tensors: Tensors) -> None:
    """Check the tensors of one call against its plan; shapes as in `fa4_backend.ops`.

    Raises:
        ValueError: a tensor does not fit; the message says which, what was expected and what it got.
    """
    source, operator = OPERATORS[type(tensors)]
    if plan.problem.kv_source != source:
        raise ValueError(f"plan: expected kv_source {source} for {operator}, got {plan.problem.kv_source}")
    if metadata.plan is not plan and metadata.plan != plan:
        raise ValueError(f"metadata: expected one allocated for this plan ({plan.describe()}), got one for {metadata.plan.describe()}")
    try:
        addresses: list[int] = [0 if t is None else t.data_ptr() for t in tensors]
        # Layers and steps repeat their shapes; to look at everything each time would be three quarters of a call's host time.
        facts: list[object] = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    except AttributeError:
        expect_tensors(tensors._asdict())
        raise
    key = (*facts, *[address % 16 for address in addresses])
    sizes = metadata.passed.get(key)
    if sizes is None:
        _check_tensors(plan, metadata, tensors)
        sizes = tuple(0 if t is None else num_bytes(t) for t in tensors)
        remember(metadata.passed, key, sizes)
    _expect_apart(tensors, addresses, sizes)


def check_no_backward(tensors: Tensors) -> None:
    """Check a call where torch records operations for a backward pass, of which this operator would silently not be part.

    Raises:
        ValueError: a tensor wants a gradient.
    """
    for name, tensor in tensors._asdict().items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: expected a call under torch.no_grad(), since there is no backward pass, got requires_grad=True")


def _expect_apart(t: Tensors, addresses: list[int], sizes: tuple[int, ...]) -> None:
    """No element of what a call writes is one of the heads that it reads, or is written twice."""
    for written, other in APART[type(t)]:
        begin, at = addresses[written], addresses[other]
        if at < begin + sizes[written] and begin < at + sizes[other] and begin and at:  # no address: empty, or without memory
            a, b = t[written], t[other]
            if a is not None and b is not None and share_memory(a, b):
                raise ValueError(f"{t._fields[written]}: expected memory of its own, got elements shared with {t._fields[other]}")


def _check_tensors(plan: AttentionPlan, metadata: AttentionMetadata, t: Tensors) -> None:
    """What holds wherever K and V lie, and what is each place's own."""
    p, limits = plan.problem, plan.limits
    if isinstance(t, LatentTensors):
        _check_latent(plan, t)
    elif isinstance(t, RaggedTensors):
        _check_ragged(plan, t)
    else:
        _check_paged(plan, t)
    _expect_heads(p, "q", t.q, p.q_dtype)
    if t.q.shape[0] > limits.max_num_tokens:
        raise ValueError(f"q: expected at most max_num_tokens={limits.max_num_tokens} rows, got {t.q.shape[0]}")
    device_type = device_type_of(p)
    if t.q.device.type not in (device_type, "meta"):
        raise ValueError(f"q: expected a {device_type} tensor for a plan of arch {p.arch}, got {t.q.device}")
    if t.out is not None:
        expect_shape("out", t.out, (t.q.shape[0], p.num_q_heads, p.head_dim_v))
        _expect_heads(p, "out", t.out, p.out_dtype)
        expect_one_place_each("out", t.out)
    if t.lse is not None:
        expect_one_place_each("lse", t.lse)
    expect_device("q", t.q, metadata.device, "the metadata")
    for name, tensor in t._asdict().items():
        if tensor is not None:
            expect_device(name, tensor, t.q.device, "q")


def _check_paged(plan: AttentionPlan, t: CallTensors) -> None:
    """K and V in pages, and where they lie."""
    p = plan.problem
    expect_shape("q", t.q, (None, p.num_q_heads, p.head_dim))
    expect_shape("k_cache", t.k_cache, (None, p.page_size, p.num_kv_heads, p.head_dim))
    if t.k_cache.shape[0] == 0:
        raise ValueError("k_cache: expected at least one page, got none")
    expect_shape("v_cache", t.v_cache, (t.k_cache.shape[0], p.page_size, p.num_kv_heads, p.head_dim_v))
    _check_pages(plan, t)
    for name, cache in (("k_cache", t.k_cache), ("v_cache", t.v_cache)):
        _expect_heads(p, name, cache, p.kv_dtype)
    _check_optional(plan, t)


def _check_latent(plan: AttentionPlan, t: LatentTensors) -> None:
    """Latents in pages, and queries in two parts."""
    p = plan.problem
    expect_shape("q", t.q, (None, p.num_q_heads, p.head_dim_v))
    expect_shape("q_rope", t.q_rope, (t.q.shape[0], p.num_q_heads, p.head_dim - p.head_dim_v))
    expect_shape("latent_cache", t.latent_cache, (None, p.page_size, p.head_dim))
    if t.latent_cache.shape[0] == 0:
        raise ValueError("latent_cache: expected at least one page, got none")
    _check_pages(plan, t)
    _expect_heads(p, "q_rope", t.q_rope, p.dtype)
    _expect_heads(p, "latent_cache", t.latent_cache, p.kv_dtype)
    _check_planned((("lse", t.lse, p.has_lse, (p.num_q_heads, t.q.shape[0]), "float32"),))
    _check_scales(plan, (("latent_scale", t.latent_scale),))


def _check_pages(plan: AttentionPlan, t: CallTensors | LatentTensors) -> None:
    """Where the pages of each sequence lie, and the lengths of the batch."""
    limits = plan.limits
    expect_shape("page_table", t.page_table, (None, None))
    expect_shape("seqused_k", t.seqused_k, (t.page_table.shape[0],))
    expect_shape("cu_seqlens_q", t.cu_seqlens_q, (t.page_table.shape[0] + 1,))
    if t.page_table.shape[0] > limits.max_num_seqs:
        raise ValueError(f"page_table: expected at most max_num_seqs={limits.max_num_seqs} rows, got {t.page_table.shape[0]}")
    for name, tensor in (("page_table", t.page_table), ("cu_seqlens_q", t.cu_seqlens_q), ("seqused_k", t.seqused_k)):
        expect_dtype(name, tensor, "int32")
        expect_dense(name, tensor)


def _check_ragged(plan: AttentionPlan, t: RaggedTensors) -> None:
    """K and V without pages, and where their sequences begin."""
    p, limits = plan.problem, plan.limits
    expect_shape("q", t.q, (None, p.num_q_heads, p.head_dim))
    expect_shape("k", t.k, (None, p.num_kv_heads, p.head_dim))
    expect_shape("v", t.v, (t.k.shape[0], p.num_kv_heads, p.head_dim_v))
    expect_shape("cu_seqlens_k", t.cu_seqlens_k, (None,))
    if not 1 <= t.cu_seqlens_k.shape[0] <= limits.max_num_seqs + 1:
        raise ValueError(
            f"cu_seqlens_k: expected 1 to {limits.max_num_seqs + 1} numbers, one more than max_num_seqs, got {t.cu_seqlens_k.shape[0]}"
        )
    expect_shape("cu_seqlens_q", t.cu_seqlens_q, (t.cu_seqlens_k.shape[0],))
    for name, tensor in (("k", t.k), ("v", t.v)):
        _expect_heads(p, name, tensor, p.kv_dtype)
    for name, tensor in (("cu_seqlens_q", t.cu_seqlens_q), ("cu_seqlens_k", t.cu_seqlens_k)):
        expect_dtype(name, tensor, "int32")
        expect_dense(name, tensor)
    _check_optional(plan, t)


def _expect_heads(problem: AttentionProblem, name: str, tensor: torch.Tensor, dtype: str) -> None:
    """Rows of heads as the problem's arch reads or writes them."""
    expect_dtype(name, tensor, dtype)
    expect_rows(name, tensor, DTYPE_BYTES[dtype], by_kernel=problem.arch != REFERENCE_ARCH)


def _check_optional(plan: AttentionPlan, t: CallTensors | RaggedTensors) -> None:
    p = plan.problem
    of_plan = (
        ("sinks", t.sinks, p.mask.has_sinks, (p.num_q_heads,), p.sinks_dtype),
        ("alibi_slopes", t.alibi_slopes, p.mask.has_alibi, (p.num_q_heads,), "float32"),
        ("lse", t.lse, p.has_lse, (p.num_q_heads, t.q.shape[0]), "float32"),
    )
    _check_planned(of_plan)
    _check_scales(plan, (("k_scale", t.k_scale), ("v_scale", t.v_scale)))
    if t.q_scale is not None:
        if not p.has_q_scale:
            raise ValueError(f"q_scale: expected none, since the plan's q is {p.q_dtype}, got a tensor")
        _check_scales(plan, (("q_scale", t.q_scale),))
    _check_out_scale(plan, t.out_scale)


def _check_planned(tensors: tuple[tuple[str, torch.Tensor | None, bool, tuple[int, ...], str], ...]) -> None:
    """The tensors that only some plans have, (name, tensor, whether the plan has it, shape, dtype): all of these, and no other."""
    for name, tensor, planned, shape, dtype in tensors:
        if tensor is None:
            if planned and name != "lse":  # an lse that is not given is made
                raise ValueError(f"{name}: expected a value, since the plan has it, got none")
            continue
        if not planned:
            raise ValueError(f"{name}: expected none, since the plan was made without it, got a tensor")
        expect_shape(name, tensor, shape)
        expect_dtype(name, tensor, dtype)
        expect_dense(name, tensor)


def _check_scales(plan: AttentionPlan, scales: tuple[tuple[str, torch.Tensor | None], ...]) -> None:
    """Scales of what is stored in FP8: none, one for all KV heads or one each."""
    p, heads = plan.problem, plan.problem.num_kv_heads
    stored = "latents" if p.kv_source == LATENT else "K and V"
    for name, scale in scales:
        if scale is None:
            continue
        if not p.has_kv_scales:
            raise ValueError(f"{name}: expected none, since the plan's {stored} are {p.kv_dtype}, got a tensor")
        if tuple(scale.shape) not in ((), (1,), (heads,)):
            each = f"() or (1) for {stored}" if heads == 1 else f"(), (1) or ({heads}), one a KV head"
            raise ValueError(f"{name}: expected shape {each}, got {tuple(scale.shape)}")
        expect_dtype(name, scale, "float32")


def _check_out_scale(plan: AttentionPlan, scale: torch.Tensor | None) -> None:
    p = plan.problem
    if scale is None:
        if p.has_out_scale:
            raise ValueError(f"out_scale: expected a tensor, since the plan's out is {p.out_dtype}, got none")
        return
    if not p.has_out_scale:
        raise ValueError(f"out_scale: expected none, since the plan's out is {p.out_dtype}, got a tensor")
    if tuple(scale.shape) not in ((), (1,)):
        raise ValueError(f"out_scale: expected shape () or (1), one for all of out, got {tuple(scale.shape)}")
    expect_dtype("out_scale", scale, "float32")


def check_values(
    plan: AttentionPlan,
    metadata: AttentionMetadata,
    num_seqs: int,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
) -> None:
    """Check that a call gives exactly the values whose presence its plan compiled in.

    Raises:
        ValueError: a value is missing, unexpected or out of its domain, or the metadata is another step's.
    """
    mask = plan.problem.mask
    # Types first: to compare a tensor would be to wait for the device.
    if type(softmax_scale) is not float:
        expect_number("softmax_scale", softmax_scale)
    if type(softcap) is not float:
        expect_number("softcap", softcap)
    for name, planned, given, value in (
        ("window_left", mask.has_window_left, window_left is not None, window_left),
        ("window_right", mask.has_window_right, window_right is not None, window_right),
        ("softcap", mask.has_softcap, softcap != 0.0, softcap),
    ):
        if planned and not given:
            raise ValueError(f"{name}: expected a value, since the plan has it, got none")
        if given and not planned:
            raise ValueError(f"{name}: expected none, since the plan was made without it, got {value}")
    for name, window in (("window_left", window_left), ("window_right", window_right)):
        if window is None:
            continue
        expect_whole(name, window)
        if window < 0:
            raise ValueError(f"{name}: expected 0 or more visible tokens (None for all), got {window}")
    # Kernels take maxima of raw logits and mask with -inf before they scale: by a positive, finite float32.
    if not FLOAT32_MIN <= softmax_scale <= LARGEST_FACTOR:
        raise ValueError(f"softmax_scale: expected a normal float32 above 0 and at most 2^126, got {softmax_scale}")
    if softcap != 0.0 and not (FLOAT32_MIN <= softcap <= LARGEST_FACTOR and softmax_scale <= LARGEST_FACTOR * softcap):
        raise ValueError(
            "softcap: expected 0 (off) or a normal float32 above 0 of which neither it nor softmax_scale / softcap is above 2^126, "
            f"got {softcap} with a softmax_scale of {softmax_scale}"
        )
    if metadata.bounds is None:
        raise ValueError("metadata: expected refresh(...) before the first forward of a step, got metadata never refreshed")
    if metadata.window_left is not None and (window_left is None or window_left > metadata.window_left):
        raise ValueError(
            f"window_left: expected at most {metadata.window_left}, the window that the metadata was made for, got {window_left}"
        )
    if metadata.bounds.num_seqs != num_seqs:
        raise ValueError(f"metadata: expected a refresh for {num_seqs} sequences, got one for {metadata.bounds.num_seqs}")


def check_whole_tables(metadata: AttentionMetadata, page_table: torch.Tensor) -> None:
    """Check that no length of a step that converts K and V is cut to the page table, which its prefill kernel does not see.

    Raises:
        ValueError: a row of the page table holds fewer tokens than the step's longest sequence may have.
    """
    bounds, page_size = metadata.bounds, metadata.plan.problem.page_size
    if bounds is not None and bounds.converts and page_table.shape[1] * page_size < bounds.max_seqlen_k:
        raise ValueError(
            f"page_table: expected room for max_seqlen_k={bounds.max_seqlen_k} tokens a row in a step refreshed with prefill_keys, got "
            f"{page_table.shape[1]} pages of {page_size}"
        )


def clamp_window(window: int | None) -> int | None:
    """The same window for every sequence there can be, in a range in which no position overflows."""
    return None if window is None else int(min(window, NO_WINDOW))
