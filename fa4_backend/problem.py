"""What attention is asked for, without any tensor: the frozen facts that choose and shape a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.arch import ARCHS, REFERENCE_ARCH

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EMULATED_PREFIX = "emulated-"  # arch "emulated-sm_100a": the sm_100a kernel, executed on the emulator over CPU tensors


class UnsupportedProblem(ValueError):
    """A combination no kernel here serves; the message names the feature, what was expected and what to use instead."""


@dataclass(frozen=True)
class AttentionProblem:
    """Facts known when a model is loaded; everything that a compiled kernel may depend on.

    Presence of a feature is stated here, its value (window size, cap, slopes) is an argument of each call.

    Raises:
        UnsupportedProblem: the facts contradict each other (see `__post_init__`), on any arch. Whether a given arch serves
            the problem is asked by `fa4_backend.validation.check_problem`.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int  # elements of a query or key row
    head_dim_v: int  # elements of a value or output row
    dtype: str  # of q, k, v and out: a key of DTYPE_BYTES
    page_size: int  # tokens a page
    arch: str  # "cpu" (torch reference), a key of ARCHS, or "emulated-" + such a key
    is_causal: bool = True
    has_window_left: bool = False
    has_window_right: bool = False
    has_softcap: bool = False
    has_sinks: bool = False
    has_alibi: bool = False
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
        if self.dtype not in DTYPE_BYTES:
            raise UnsupportedProblem(f"dtype: expected one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.arch != REFERENCE_ARCH and self.target_arch not in ARCHS:
            raise UnsupportedProblem(f"arch: expected cpu, {', '.join(ARCHS)} or emulated-<one of them>, got {self.arch!r}")
        if self.exact and not self.batch_invariant:
            raise UnsupportedProblem("exact: expected batch_invariant=True with it (in vLLM: VLLM_BATCH_INVARIANT=1), got False")
        if self.is_causal and self.has_window_right:
            raise UnsupportedProblem("has_window_right: expected False for causal attention (the diagonal already bounds it), got True")

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def is_emulated(self) -> bool:
        """Whether the kernel runs on the emulator, over CPU tensors."""
        return self.arch.startswith(EMULATED_PREFIX)

    @property
    def target_arch(self) -> str:
        """The arch the kernel is compiled for: `arch` without the emulator's prefix."""
        return self.arch.removeprefix(EMULATED_PREFIX)
