"""The host's decision for one shape class: which kernel, for how large a batch. No tensors, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.arch import ARCHS, REFERENCE_ARCH
from fa4_backend.problem import AttentionProblem
from fa4_backend.validation import check_problem


@dataclass(frozen=True)
class BatchLimits:
    """The largest batch that a plan's buffers are sized for.

    Raises:
        ValueError: a limit is not positive, or `decode_query_len` is above `max_num_tokens`.
    """

    max_num_seqs: int
    max_num_tokens: int  # query tokens of a step, all sequences together
    max_seqlen_k: int  # KV tokens of one sequence
    decode_query_len: int = 1  # longest query that counts as a decode row: 1 + speculative tokens

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_tokens", "max_seqlen_k", "decode_query_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.decode_query_len > self.max_num_tokens:
            raise ValueError(f"decode_query_len: expected at most max_num_tokens={self.max_num_tokens}, got {self.decode_query_len}")


@dataclass(frozen=True)
class AttentionPlan:
    """A problem, the limits of its batches and the kernel that serves it. Make it with `plan_attention`."""

    problem: AttentionProblem
    limits: BatchLimits
    kernel_name: str  # as people read it: "torch reference", "sm90 kernels", ...
    num_ctas: int  # CTAs of a persistent launch: one per SM; 1 on the reference

    def __hash__(self) -> int:
        # Looked up in every call: a few of the numbers tell plans apart, and all 19 fields take a microsecond.
        return hash((self.num_ctas, self.problem.num_q_heads, self.problem.head_dim, self.limits.max_num_tokens))

    def describe(self) -> str:
        """One line for a log: which kernel runs, where, for what."""
        p = self.problem
        where = f"cpu (emulating {p.target_arch})" if p.is_emulated else p.arch
        mode = ", exact" if p.exact else ", batch-invariant" if p.batch_invariant else ""
        return (
            f"FA4: {self.kernel_name} on {where}, {p.num_q_heads}/{p.num_kv_heads} heads, "
            f"head_dim {p.head_dim}{'' if p.head_dim_v == p.head_dim else f'/{p.head_dim_v}'}, {p.dtype}, page {p.page_size}{mode}"
        )


def plan_attention(problem: AttentionProblem, limits: BatchLimits, *, num_sms: int | None = None) -> AttentionPlan:
    """Choose the kernel for `problem`.

    Args:
        num_sms: SMs of the device that will run the plan; default: of the arch's largest part.

    Raises:
        UnsupportedProblem: no kernel of `problem.arch` serves it.
    """
    check_problem(problem)
    if problem.arch == REFERENCE_ARCH:
        return AttentionPlan(problem, limits, "torch reference", num_ctas=1)
    name = f"{problem.target_arch.removesuffix('a').replace('_', '')} kernels"
    return AttentionPlan(problem, limits, name, num_ctas=num_sms or ARCHS[problem.target_arch].num_sms)
