"""What each arch serves, and tensors against a problem. Every refusal says what was expected and what it got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fa4_backend.arch import ARCHS, REFERENCE_ARCH
from fa4_backend.problem import DTYPE_BYTES, AttentionProblem, UnsupportedProblem

if TYPE_CHECKING:
    import torch

    from fa4_backend.metadata import AttentionMetadata
    from fa4_backend.plan import AttentionPlan

PAGE_MULTIPLE = 16  # tokens; a 16-row box is the smallest that TMA fetches efficiently, and engines use multiples of 16
FEATURES = (
    "is_causal", "has_window_left", "has_window_right", "has_softcap", "has_sinks", "has_alibi", "has_lse", "batch_invariant", "exact",
)  # fmt: skip


@dataclass(frozen=True)
class KernelSupport:
    """What the kernels of one arch serve; the only place that says so."""

    dtypes: tuple[str, ...]
    head_dims: tuple[tuple[int, int], ...] | None  # (head_dim, head_dim_v); None: any multiple of `head_dim_multiple`
    head_dim_multiple: int
    max_q_per_kv: int | None  # query heads packed in one tile; None: any
    features: frozenset[str]  # of FEATURES


_BLACKWELL = KernelSupport(
    ("bfloat16", "float16"), ((64, 64), (96, 96), (128, 128), (192, 128)), 32, max_q_per_kv=128, features=frozenset(FEATURES)
)
_HOPPER = KernelSupport(
    dtypes=("bfloat16", "float16"),
    head_dims=((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)),
    head_dim_multiple=32,
    max_q_per_kv=128,  # rows of the smaller query tile
    features=frozenset(FEATURES),
)

SUPPORT: dict[str, KernelSupport] = {
    # Not exact: torch picks its matrix products by shape, and a token alone has another shape than a chunk.
    REFERENCE_ARCH: KernelSupport(tuple(DTYPE_BYTES), None, 8, None, frozenset(FEATURES) - {"exact"}),
    "sm_90a": _HOPPER,
    **dict.fromkeys(("sm_100a", "sm_103a"), _BLACKWELL),
}


def check_problem(problem: AttentionProblem) -> None:
    """Check that a kernel of `problem.arch` serves `problem`.

    Raises:
        UnsupportedProblem: it does not; the message names the feature, what is served and what to use instead.
    """
    arch = problem.target_arch
    support = SUPPORT.get(arch)
    if support is None:
        served = ", ".join(SUPPORT)
        raise UnsupportedProblem(f"arch: expected one of {served}, got {arch!r}; kernels for {_chips(arch)} are not in this version")
    if problem.dtype not in support.dtypes:
        raise UnsupportedProblem(f"dtype on {arch}: expected one of {', '.join(support.dtypes)}, got {problem.dtype!r}")
    if problem.page_size % PAGE_MULTIPLE:
        raise UnsupportedProblem(f"page_size: expected a multiple of {PAGE_MULTIPLE}, got {problem.page_size}")
    dims = (problem.head_dim, problem.head_dim_v)
    if support.head_dims is not None and dims not in support.head_dims:
        served = ", ".join(str(d[0]) if d[0] == d[1] else f"{d[0]}/{d[1]}" for d in support.head_dims)
        raise UnsupportedProblem(f"head_dim/head_dim_v on {arch}: expected one of {served}, got {dims[0]}/{dims[1]}")
    if any(dim % support.head_dim_multiple for dim in dims):
        raise UnsupportedProblem(f"head_dim on {arch}: expected a multiple of {support.head_dim_multiple}, got {dims[0]}/{dims[1]}")
    if support.max_q_per_kv is not None and problem.q_per_kv > support.max_q_per_kv:
        raise UnsupportedProblem(f"query heads per KV head on {arch}: expected at most {support.max_q_per_kv}, got {problem.q_per_kv}")
    for feature in FEATURES:
        if feature != "is_causal" and getattr(problem, feature) and feature not in support.features:
            raise UnsupportedProblem(f"{feature} on {arch}: expected False, got True; {_FEATURE_ADVICE}")
    if not problem.is_causal and "is_causal" not in support.features:
        raise UnsupportedProblem(f"is_causal on {arch}: expected True, got False; {_FEATURE_ADVICE}")


_FEATURE_ADVICE = "use another attention backend of the engine for this model"


def _chips(arch: str) -> str:
    return ARCHS[arch].chips if arch in ARCHS else arch


def check_tensors(
    plan: AttentionPlan,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    """Check the tensors of one call against its plan; reads shapes, strides, dtypes and devices only, never values.

    Shapes as in `fa4_backend.ops.paged_attention`.

    Raises:
        ValueError: a tensor does not fit; the message says which, what was expected and what it got.
    """
    # Layers and steps repeat their shapes; looking at everything each time was three quarters of a call's host time.
    tensors = (q, k_cache, v_cache, page_table, cu_seqlens_q, seqused_k, out)
    facts = (plan, *[None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in tensors])
    if facts in _passed:
        return
    _check_tensors(plan, *tensors)
    if len(_passed) >= MAX_PASSED:
        _passed.clear()
    _passed.add(facts)


MAX_PASSED = 1024
_passed: set[tuple[object, ...]] = set()  # shapes, strides, dtypes, devices, alignments that fit their plan


def _check_tensors(
    plan: AttentionPlan,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    p, limits = plan.problem, plan.limits
    _expect_shape("q", q, (None, p.num_q_heads, p.head_dim))
    _expect_shape("k_cache", k_cache, (None, p.page_size, p.num_kv_heads, p.head_dim))
    _expect_shape("v_cache", v_cache, (k_cache.shape[0], p.page_size, p.num_kv_heads, p.head_dim_v))
    _expect_shape("page_table", page_table, (None, None))
    _expect_shape("seqused_k", seqused_k, (page_table.shape[0],))
    _expect_shape("cu_seqlens_q", cu_seqlens_q, (page_table.shape[0] + 1,))
    if out is not None:
        _expect_shape("out", out, (q.shape[0], p.num_q_heads, p.head_dim_v))
    if page_table.shape[0] > limits.max_num_seqs:
        raise ValueError(f"page_table: expected at most max_num_seqs={limits.max_num_seqs} rows, got {page_table.shape[0]}")
    if q.shape[0] > limits.max_num_tokens:
        raise ValueError(f"q: expected at most max_num_tokens={limits.max_num_tokens} rows, got {q.shape[0]}")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("out", out)):
        if tensor is not None:
            _expect_dtype(name, tensor, p.dtype)
            _expect_rows(name, tensor, DTYPE_BYTES[p.dtype], by_kernel=p.arch != REFERENCE_ARCH)
    for name, tensor in (("page_table", page_table), ("cu_seqlens_q", cu_seqlens_q), ("seqused_k", seqused_k)):
        _expect_dtype(name, tensor, "int32")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: expected last stride 1, got {tensor.stride(-1)}")
    for name, tensor in (
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("page_table", page_table),
        ("cu_seqlens_q", cu_seqlens_q),
        ("seqused_k", seqused_k),
        ("out", out),
    ):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name}: expected a tensor on {q.device} as q, got {tensor.device}")
    device_type = "cpu" if p.arch == REFERENCE_ARCH or p.is_emulated else "cuda"
    if q.device.type not in (device_type, "meta"):
        raise ValueError(f"q: expected a {device_type} tensor for a plan of arch {p.arch}, got {q.device}")


def check_call_values(
    plan: AttentionPlan,
    metadata: AttentionMetadata,
    seqused_k: torch.Tensor,
    total_q: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """Check that a call gives exactly the values whose presence its plan compiled in.

    Raises:
        ValueError: a value is missing, unexpected or out of its domain, or the metadata is another plan's or another step's.
    """
    p = plan.problem
    presence = (
        ("window_left", p.has_window_left, window_left is not None, window_left),
        ("window_right", p.has_window_right, window_right is not None, window_right),
        ("softcap", p.has_softcap, softcap != 0.0, softcap),
        ("sinks", p.has_sinks, sinks is not None, "a tensor"),
        ("alibi_slopes", p.has_alibi, alibi_slopes is not None, "a tensor"),
    )
    for name, planned, given, value in presence:
        if planned and not given:
            raise ValueError(f"{name}: expected a value, since the plan has it, got none")
        if given and not planned:
            raise ValueError(f"{name}: expected none, since the plan was made without it, got {value}")
    for name, window in (("window_left", window_left), ("window_right", window_right)):
        if window is not None and window < 0:
            raise ValueError(f"{name}: expected 0 or more visible tokens (None for all), got {window}")
    if softcap < 0:
        raise ValueError(f"softcap: expected 0 (off) or more, got {softcap}")
    for name, tensor in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if tensor is not None:
            _expect_shape(name, tensor, (p.num_q_heads,))
    if lse is not None:
        if not p.has_lse:
            raise ValueError("lse: expected none, since the plan was made without it, got a tensor")
        _expect_shape("lse", lse, (p.num_q_heads, total_q))
        _expect_dtype("lse", lse, "float32")
    if metadata.plan is not plan and metadata.plan != plan:
        raise ValueError(f"metadata: expected one allocated for this plan ({plan.describe()}), got one for {metadata.plan.describe()}")
    if metadata.bounds is None:
        raise ValueError("metadata: expected refresh(...) before the first forward of a step, got metadata never refreshed")
    if metadata.window_left is not None and (window_left is None or window_left > metadata.window_left):
        raise ValueError(
            f"window_left: expected at most {metadata.window_left}, the window that the metadata was made for, got {window_left}"
        )
    if metadata.bounds.num_seqs != seqused_k.shape[0]:
        raise ValueError(f"metadata: expected a refresh for {seqused_k.shape[0]} sequences, got one for {metadata.bounds.num_seqs}")


def _expect_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    fits = tensor.dim() == len(expected) and all(want is None or want == got for want, got in zip(expected, tensor.shape, strict=True))
    if not fits:
        want = ", ".join("any" if n is None else str(n) for n in expected)
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(tensor.shape)}")


def _expect_dtype(name: str, tensor: torch.Tensor, expected: str) -> None:
    got = str(tensor.dtype).removeprefix("torch.")
    if got != expected:
        raise ValueError(f"{name}: expected dtype {expected}, got {got}")


def _expect_rows(name: str, tensor: torch.Tensor, element_bytes: int, *, by_kernel: bool) -> None:
    """Rows are dense, and 16-byte aligned where a kernel moves them 16 bytes at a time."""
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected last stride 1, got {tensor.stride(-1)}")
    if not by_kernel:
        return
    if tensor.device.type != "meta" and tensor.data_ptr() % 16:
        raise ValueError(f"{name}: expected a 16-byte aligned address, got {tensor.data_ptr():#x}")
    for dim, stride in enumerate(tensor.stride()[:-1]):
        if tensor.shape[dim] > 1 and stride * element_bytes % 16:
            raise ValueError(
                f"{name}: expected strides of a multiple of 16 bytes, got stride {stride} ({stride * element_bytes} bytes) in dim {dim}"
            )
