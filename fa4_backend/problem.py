"""What attention is asked for, without any tensor: the frozen facts that choose and shape a kernel, and how large a batch may be."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fa4_backend.arch import ARCHS, REFERENCE_ARCH

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}  # by torch's names
FP8 = "float8_e4m3fn"  # 1 sign, 4 exponent, 3 mantissa bits
MAX_CONVERT_KEYS = 1 << 21  # sums of lengths that are cut to it are int32 (`kernels/schedule/key_starts.py`)
FP8_MAX = 448.0  # the largest finite number
SHORT_NAMES = {FP8: "e4m3"}  # in the names of kernels
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")  # of a model
EMULATED_PREFIX = "emulated-"  # arch "emulated-sm_100a": the sm_100a kernel, executed on the emulator over CPU tensors


def short_dtypes(dtype: str, **operands: str) -> str:
    """Dtypes in the name of a kernel: the model's, and of what has another one: "bfloat16-kve4m3", say."""
    return dtype + "".join(f"-{name}{SHORT_NAMES.get(other, other)}" for name, other in operands.items() if other != dtype)


class UnsupportedProblem(ValueError):
    """A combination no kernel here serves; the message names the feature, what was expected and what to use instead."""


SAME_AS_Q = "auto"  # kv_dtype, q_dtype, out_dtype: the model's dtype, as engines call it

PAGED = "paged"  # K and V in pages of a pool, found by a page table
RAGGED = "ragged"  # K and V of the batch one sequence behind the other, without pages
LATENT = "latent"  # pages of multi-head latent attention: one head a token, of which the first head_dim_v elements are V
KV_SOURCES = (PAGED, RAGGED, LATENT)


@dataclass(frozen=True)
class MaskFeatures:
    """What a layer's mask is made of: which bounds and score changes are there. Their values are arguments of each call.

    Raises:
        UnsupportedProblem: the features contradict each other.
    """

    is_causal: bool = True
    has_window_left: bool = False
    has_window_right: bool = False
    has_softcap: bool = False
    has_sinks: bool = False
    has_alibi: bool = False

    def __post_init__(self) -> None:
        if self.is_causal and self.has_window_right:
            raise UnsupportedProblem("has_window_right: expected False for causal attention (the diagonal already bounds it), got True")

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the features that are there, in order."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name))

    @property
    def short_name(self) -> str:
        """The features in the name of a kernel: "-causal-windowleft", say."""
        return "".join("-" + name.split("_", 1)[1].replace("_", "") for name in self.present)


class OperandDtypes:
    """What follows from the dtypes of q, K and V and out, of a problem as of a kernel; holds nothing of its own."""

    q_dtype: str
    kv_dtype: str  # as stored
    out_dtype: str

    @property
    def has_kv_scales(self) -> bool:
        """Whether K and V are stored in FP8: what they stand for is the stored value times a scale, one of K and one of V a KV head."""
        return self.kv_dtype == FP8

    @property
    def has_q_scale(self) -> bool:
        """Whether q comes in FP8: a query is what is given times a scale, one a KV head."""
        return self.q_dtype == FP8

    @property
    def has_out_scale(self) -> bool:
        """Whether `out` is FP8: what is written times one scale is the result."""
        return self.out_dtype == FP8

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of q, and of K and V as products take them."""
        return DTYPE_BYTES[self.q_dtype]

    @property
    def kv_element_bytes(self) -> int:
        """Bytes of an element of K and V in memory."""
        return DTYPE_BYTES[self.kv_dtype]

    @property
    def out_element_bytes(self) -> int:
        """Bytes of an element of out."""
        return DTYPE_BYTES[self.out_dtype]


@dataclass(frozen=True)
class AttentionProblem(OperandDtypes):
    """Facts known when a model is loaded; everything that a compiled kernel may depend on.

    Raises:
        UnsupportedProblem: the facts contradict each other (see `__post_init__`), on any arch. Whether a given arch serves
            the problem is asked by `fa4_backend.support.check_problem`.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int  # elements of a query or key row
    head_dim_v: int  # elements of a value or output row
    dtype: str  # of the model, and so of q and out unless they are FP8: one of COMPUTE_DTYPES
    page_size: int  # tokens a page; 1 where K and V have no pages
    arch: str  # "cpu" (torch reference), a key of ARCHS, or "emulated-" + such a key
    mask: MaskFeatures = MaskFeatures()
    kv_dtype: str = SAME_AS_Q  # of K and V as stored: a key of DTYPE_BYTES; after construction never "auto"
    kv_source: str = PAGED  # where K and V lie: one of KV_SOURCES
    out_dtype: str = SAME_AS_Q  # of out: the model's, or FP8; after construction never "auto"
    q_dtype: str = SAME_AS_Q  # of q: the model's, or beside K and V in FP8 that; after construction never "auto"
    sinks_dtype: str = "float32"  # of the tensor of sinks, where the mask has them: kernels read the engine's own parameter
    has_lse: bool = False
    batch_invariant: bool = False  # a row's bits do not depend on its neighbours in the batch
    exact: bool = False  # nor on whether its token came alone or in a chunk of a prompt: one kernel serves decode and prefill rows

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_q_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise UnsupportedProblem(
                "num_q_heads: expected a positive multiple of num_kv_heads, got "
                f"num_q_heads={self.num_q_heads}, num_kv_heads={self.num_kv_heads}"
            )
        for name in ("head_dim", "head_dim_v", "page_size"):
            if getattr(self, name) < 1:
                raise UnsupportedProblem(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.kv_dtype == SAME_AS_Q:
            object.__setattr__(self, "kv_dtype", self.dtype)
        if self.out_dtype == SAME_AS_Q:
            object.__setattr__(self, "out_dtype", self.dtype)
        if self.q_dtype == SAME_AS_Q:
            object.__setattr__(self, "q_dtype", self.dtype)
        if not self.mask.has_sinks:
            object.__setattr__(self, "sinks_dtype", "float32")  # one key for all that have none
        for name, served in (
            ("dtype", COMPUTE_DTYPES),
            ("kv_dtype", tuple(DTYPE_BYTES)),
            ("out_dtype", (self.dtype, FP8)),
            ("q_dtype", (self.dtype, FP8)),
            ("sinks_dtype", COMPUTE_DTYPES),
        ):
            if getattr(self, name) not in served:
                raise UnsupportedProblem(f"{name}: expected one of {', '.join(served)}, got {getattr(self, name)!r}")
        if self.has_q_scale and not self.has_kv_scales:
            raise UnsupportedProblem(f"q_dtype: expected {self.dtype} with K and V in {self.kv_dtype}, got {FP8}")
        if self.arch != REFERENCE_ARCH and self.target_arch not in ARCHS:
            raise UnsupportedProblem(f"arch: expected cpu, {', '.join(ARCHS)} or emulated-<one of them>, got {self.arch!r}")
        if self.kv_source not in KV_SOURCES:
            raise UnsupportedProblem(f"kv_source: expected one of {', '.join(KV_SOURCES)}, got {self.kv_source!r}")
        if self.kv_source == RAGGED and self.page_size != 1:
            raise UnsupportedProblem(f"page_size: expected 1 for K and V without pages, got {self.page_size}")
        if self.kv_source == LATENT and (self.num_kv_heads != 1 or self.head_dim_v > self.head_dim):
            raise UnsupportedProblem(
                "num_kv_heads, head_dim_v: expected 1 and at most head_dim for a latent cache, got "
                f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, head_dim_v={self.head_dim_v}"
            )
        if self.exact and not self.batch_invariant:
            raise UnsupportedProblem("exact: expected batch_invariant=True with it (in vLLM: VLLM_BATCH_INVARIANT=1), got False")

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's K and V of one KV head; of a latent cache V is a part of K."""
        elements = self.head_dim if self.kv_source == LATENT else self.head_dim + self.head_dim_v
        return elements * DTYPE_BYTES[self.kv_dtype]

    @property
    def is_emulated(self) -> bool:
        """Whether the kernel runs on the emulator, over CPU tensors."""
        return self.arch.startswith(EMULATED_PREFIX)

    @property
    def target_arch(self) -> str:
        """The arch the kernel is compiled for: `arch` without the emulator's prefix."""
        return self.arch.removeprefix(EMULATED_PREFIX)


@dataclass(frozen=True)
class BatchLimits:
    """The largest batch that a plan's buffers are sized for.

    Raises:
        ValueError: a limit is not positive, `decode_query_len` is above `max_num_tokens`, or `convert_keys` is out of range.
    """

    max_num_seqs: int
    max_num_tokens: int  # query tokens of a step, all sequences together
    max_seqlen_k: int  # KV tokens of one sequence
    decode_query_len: int = 1  # longest query that counts as a decode row: 1 + speculative tokens
    convert_keys: int = 0  # keys of a step's prefill rows that may be brought from FP8 to 16 bits once a call; 0: there is no room for it

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_tokens", "max_seqlen_k", "decode_query_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.convert_keys <= MAX_CONVERT_KEYS:
            raise ValueError(f"convert_keys: expected 0 to {MAX_CONVERT_KEYS}, got {self.convert_keys}")
        if self.decode_query_len > self.max_num_tokens:
            raise ValueError(f"decode_query_len: expected at most max_num_tokens={self.max_num_tokens}, got {self.decode_query_len}")
