"""What each arch serves: the one table, and the check that refuses the rest, with what was expected and what came."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fa4_backend.arch import ARCHS, REFERENCE_ARCH
from fa4_backend.kernels.schedule.limits import largest_num_seqs
from fa4_backend.problem import (
    COMPUTE_DTYPES,
    FP8,
    LATENT,
    PAGED,
    RAGGED,
    AttentionProblem,
    BatchLimits,
    MaskFeatures,
    UnsupportedProblem,
)

PAGE_MULTIPLE = 16  # tokens; a 16-row box is the smallest that TMA fetches efficiently, and engines use multiples of 16
# Tokens of a page of latents where an engine's user says nothing: a tile's keys, so that it is 9 TMA boxes and not 36. H200, 64 x 4K, us in
# pages of 16 and 64 (`fa4 bench mla`): 128 heads 132.8 and 119.7, 16 heads 86.8 and 83.5.
LATENT_PAGE = 64
MAX_TOKENS = 1 << 29  # of a sequence or a step: a position, the widest window (`work_list.NO_WINDOW`) and a tile stay below 2^31
MODES = ("has_lse", "batch_invariant", "exact")  # of a problem, beside its mask's features
MASKS = frozenset(f.name for f in fields(MaskFeatures))
# Latent attention: queries of a row, one more than the drafts that engines verify at once. 8 of 128 heads are 1024 packed rows.
MAX_LATENT_QUERY_LEN = 8


@dataclass(frozen=True)
class KernelSupport:
    """What the kernels of one arch serve; the only place that says so."""

    dtypes: tuple[str, ...]  # of models
    head_dims: tuple[tuple[int, int], ...] | None  # (head_dim, head_dim_v); None: any multiple of `head_dim_multiple`
    head_dim_multiple: int
    max_q_per_kv: int | None  # query heads packed in one tile; None: any
    min_q_per_kv: int = 1
    masks: frozenset[str] = MASKS  # features of a mask; a mask without "is_causal" sees all keys
    modes: frozenset[str] = frozenset(MODES)
    quantised_kv: tuple[str, ...] = ()  # dtypes of K and V beside the model's
    quantised_kv_beside: tuple[str, ...] | None = None  # dtypes of q that those go with; None: all
    quantised_out: tuple[str, ...] = ()  # dtypes of out beside the model's, except beside a latent cache
    quantised_q: tuple[str, ...] = ()  # dtypes of q beside the model's
    kv_sources: tuple[str, ...] = (PAGED,)  # where K and V may lie


_BLACKWELL = KernelSupport(
    dtypes=("bfloat16", "float16"),
    head_dims=((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)),
    head_dim_multiple=32,
    max_q_per_kv=128,  # rows of a query tile
    quantised_kv=(FP8,),
    kv_sources=(PAGED, RAGGED),
    quantised_out=(FP8,),
    quantised_q=(FP8,),
)
_HOPPER = KernelSupport(
    dtypes=("bfloat16", "float16"),
    head_dims=((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)),
    head_dim_multiple=32,
    max_q_per_kv=128,  # rows of the smaller query tile
    quantised_kv=(FP8,),
    kv_sources=(PAGED, RAGGED),
    quantised_out=(FP8,),
)

SUPPORT: dict[str, KernelSupport] = {
    # Not exact: torch picks its matrix products by shape, and a token alone has another shape than a chunk.
    REFERENCE_ARCH: KernelSupport(
        COMPUTE_DTYPES,
        None,
        8,
        None,
        modes=frozenset(MODES) - {"exact"},
        quantised_kv=(FP8,),
        quantised_out=(FP8,),
        quantised_q=(FP8,),
        kv_sources=(PAGED, RAGGED),
    ),
    "sm_90a": _HOPPER,
    **dict.fromkeys(("sm_100a", "sm_103a"), _BLACKWELL),
}

# Latent attention has kernels of its own: what they serve, by arch. Not exact: rows of prompts go another way than decode rows.
LATENT_SUPPORT: dict[str, KernelSupport] = {
    REFERENCE_ARCH: KernelSupport(
        COMPUTE_DTYPES, None, 8, None, masks=frozenset({"is_causal"}), modes=frozenset(MODES) - {"exact"}, quantised_kv=(FP8,),
        kv_sources=(LATENT,),
    ),
    "sm_90a": KernelSupport(
        ("bfloat16", "float16"), ((576, 512),), 64, 128, min_q_per_kv=8, masks=frozenset({"is_causal"}),
        modes=frozenset(MODES) - {"exact"}, quantised_kv=(FP8,), kv_sources=(LATENT,),
    ),
    **dict.fromkeys(
        ("sm_100a", "sm_103a"),
        KernelSupport(
            ("bfloat16", "float16"), ((576, 512),), 64, 128, min_q_per_kv=8, masks=frozenset({"is_causal"}),
            modes=frozenset(MODES) - {"exact"}, quantised_kv=(FP8,), kv_sources=(LATENT,),
            quantised_kv_beside=("bfloat16",),  # a float16 has more bits than two terms of 8: `kernels/common/fp8.py`, Note [Two terms]
        ),
    ),
}  # fmt: skip


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
    if problem.kv_source == LATENT:
        if arch not in LATENT_SUPPORT:
            served = " or ".join(support.kv_sources)
            raise UnsupportedProblem(f"kv_source on {arch}: expected {served}, got {LATENT}; {_FEATURE_ADVICE}")
        support = LATENT_SUPPORT[arch]
        if not problem.mask.is_causal:
            raise UnsupportedProblem(f"is_causal: expected True for latent attention, got False; {_FEATURE_ADVICE}")
    if problem.dtype not in support.dtypes:
        advice = "choose one for the model (--dtype)"
        raise UnsupportedProblem(f"dtype on {arch}: expected one of {', '.join(support.dtypes)}, got {problem.dtype!r}; {advice}")
    if problem.kv_source not in support.kv_sources:
        served = " or ".join(support.kv_sources)
        raise UnsupportedProblem(f"kv_source on {arch}: expected {served}, got {problem.kv_source}; {_FEATURE_ADVICE}")
    if problem.kv_source != RAGGED and problem.page_size % PAGE_MULTIPLE:
        advice = "choose the engine's pages so (vLLM: --block-size, SGLang: --page-size)"
        raise UnsupportedProblem(f"page_size: expected a multiple of {PAGE_MULTIPLE}, got {problem.page_size}; {advice}")
    dims = (problem.head_dim, problem.head_dim_v)
    if support.head_dims is not None and dims not in support.head_dims:
        served = ", ".join(str(d[0]) if d[0] == d[1] else f"{d[0]}/{d[1]}" for d in support.head_dims)
        raise UnsupportedProblem(f"head_dim/head_dim_v on {arch}: expected one of {served}, got {dims[0]}/{dims[1]}; {_FEATURE_ADVICE}")
    if any(dim % support.head_dim_multiple for dim in dims):
        expected = f"a multiple of {support.head_dim_multiple}"
        raise UnsupportedProblem(f"head_dim on {arch}: expected {expected}, got {dims[0]}/{dims[1]}; {_FEATURE_ADVICE}")
    ratio = f"query heads per KV head on {arch}: expected"
    if support.max_q_per_kv is not None and problem.q_per_kv > support.max_q_per_kv:
        raise UnsupportedProblem(f"{ratio} at most {support.max_q_per_kv}, got {problem.q_per_kv}; {_FEATURE_ADVICE}")
    if problem.q_per_kv < support.min_q_per_kv:
        advice = f"share the heads out among fewer GPUs, or {_FEATURE_ADVICE}"
        raise UnsupportedProblem(f"{ratio} at least {support.min_q_per_kv}, got {problem.q_per_kv}; {advice}")
    unserved = [name for name in problem.mask.present if name not in support.masks]
    unserved += [name for name in MODES if getattr(problem, name) and name not in support.modes]
    if unserved:
        raise UnsupportedProblem(f"{unserved[0]} on {arch}: expected False, got True; {_FEATURE_ADVICE}")
    has_quantised = support.quantised_kv_beside is None or problem.dtype in support.quantised_kv_beside
    served_kv = (problem.dtype, *(support.quantised_kv if has_quantised else ()))
    if problem.kv_dtype not in served_kv:
        expected = f"{' or '.join(served_kv)} with q in {problem.dtype}"
        raise UnsupportedProblem(f"kv_dtype on {arch}: expected {expected}, got {problem.kv_dtype}; see the engine's --kv-cache-dtype")
    served_q = (problem.dtype, *support.quantised_q)
    if problem.q_dtype not in served_q:
        advice = "let the engine leave queries as they are"
        raise UnsupportedProblem(f"q_dtype on {arch}: expected {' or '.join(served_q)}, got {problem.q_dtype}; {advice}")
    served_out = (problem.dtype, *(() if problem.kv_source == LATENT else support.quantised_out))
    if problem.out_dtype not in served_out:
        what = f"{problem.dtype} q and {problem.kv_source} K and V"
        expected = f"{' or '.join(served_out)} with {what}"
        raise UnsupportedProblem(
            f"out_dtype on {arch}: expected {expected}, got {problem.out_dtype}; let the engine quantise what comes out"
        )


_FEATURE_ADVICE = "use another attention backend of the engine for this model"


def _chips(arch: str) -> str:
    return ARCHS[arch].chips if arch in ARCHS else arch


def check_limits(problem: AttentionProblem, limits: BatchLimits) -> None:
    """Check that the kernels can count in, and the schedule serve, batches of these limits.

    Raises:
        UnsupportedProblem: it cannot; the message says what can be served.
    """
    arch = problem.target_arch
    for name, options in (
        ("max_num_tokens", "vLLM: --max-num-batched-tokens, SGLang: --chunked-prefill-size"),
        ("max_seqlen_k", "vLLM: --max-model-len, SGLang: --context-length"),
    ):
        if getattr(limits, name) > MAX_TOKENS:
            raise UnsupportedProblem(f"{name} on {arch}: expected at most {MAX_TOKENS}, got {getattr(limits, name)}; lower it ({options})")
    if problem.kv_source == LATENT and limits.decode_query_len > MAX_LATENT_QUERY_LEN:
        raise UnsupportedProblem(
            f"decode_query_len on {arch}: expected at most {MAX_LATENT_QUERY_LEN} queries a row of latent attention, "
            f"got {limits.decode_query_len}; let the engine verify fewer drafts at once"
        )
    most = largest_num_seqs(arch, limits.max_seqlen_k)
    if limits.max_num_seqs > most:
        raise UnsupportedProblem(
            f"max_num_seqs on {arch}: expected at most {most} for sequences of up to {limits.max_seqlen_k} tokens, "
            f"got {limits.max_num_seqs}; lower it (vLLM: --max-num-seqs, SGLang: --max-running-requests)"
        )
