"""The host's decision for one shape class, resolved: every kernel it launches, with all that is compiled in. No tensors, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fa4_backend import envs
from fa4_backend.arch import ARCHS, REFERENCE_ARCH
from fa4_backend.decode_parts import with_more_parts
from fa4_backend.decode_rates import with_fp8_rates
from fa4_backend.kernels.families import KernelSet, resolve_kernels
from fa4_backend.narrow_tiles import NarrowPrefill, message_prefill, narrow_prefill
from fa4_backend.problem import DTYPE_BYTES, LATENT, RAGGED, AttentionProblem, BatchLimits
from fa4_backend.prompt_tiles import with_fuller_tiles
from fa4_backend.support import check_limits, check_problem

if TYPE_CHECKING:
    from fa4_backend.compile import CompileKey

ALIGN_BYTES = 256  # of converted K and of V in their room; a tensor map wants 16


@dataclass(frozen=True)
class AttentionPlan:
    """A problem, the limits of its batches and the kernels that serve it. Make it with `plan_attention`."""

    problem: AttentionProblem
    limits: BatchLimits
    num_sms: int  # of the device; 1 on the reference
    kernels: KernelSet | None  # None: the torch reference
    narrow: NarrowPrefill | None = None  # serves steps of decode rows alone in their place; None: they do
    messages: NarrowPrefill | None = None  # serves the prefill rows of steps in which all are short; None: they do

    @property
    def keys(self) -> tuple[CompileKey, ...]:
        """Compile keys of all kernels, in the order of their launches; what some steps have in their place or in addition comes last."""
        others = tuple(dict.fromkeys(own.prefill for own in (self.narrow, self.messages) if own is not None))
        return () if self.kernels is None else (*self.kernels.keys, *others)

    @property
    def kernel_names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(key.name for key in self.keys)

    @property
    def converted_shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
        """(keys, kv_heads, head_dim) of K and of V that a step brings from FP8 to 16 bits once a call; None where no step does."""
        if self.kernels is None or self.kernels.converted is None:
            return None
        p, keys = self.problem, self.limits.convert_keys
        return (keys, p.num_kv_heads, p.head_dim), (keys, p.num_kv_heads, p.head_dim_v)

    @property
    def room_bytes(self) -> int:
        """What plans of a device share of memory for such K and V, if this is the one that asks for most (`convert_room.py`)."""
        return sum(aligned_bytes(shape, DTYPE_BYTES[self.problem.dtype]) for shape in self.converted_shapes or ())

    def always_converting(self) -> AttentionPlan:
        """The same plan, whose steps bring K and V in FP8 to 16 bits once a call however short rows are: to measure and to test.

        Raises:
            ValueError: its steps never do.
        """
        if self.kernels is None or self.kernels.converted is None:
            raise ValueError(f"plan: expected one with room for converted keys, got {self.describe()}")
        converted = replace(self.kernels.converted, least_visits=0)
        return replace(self, kernels=replace(self.kernels, converted=converted))

    def describe(self) -> str:
        """One line for a log: which kernels run, where, for what."""
        p = self.problem
        what = "torch reference" if self.kernels is None else f"{p.target_arch.removesuffix('a').replace('_', '')} kernels"
        where = f"cpu (emulating {p.target_arch})" if p.is_emulated else p.arch
        mode = ", exact" if p.exact else ", batch-invariant" if p.batch_invariant else ""
        source = RAGGED if p.kv_source == RAGGED else f"page {p.page_size}"
        heads = f"{p.num_q_heads} heads of latent attention" if p.kv_source == LATENT else f"{p.num_q_heads}/{p.num_kv_heads} heads"
        q = "" if p.q_dtype == p.dtype else f" (q {p.q_dtype})"
        kv = "" if p.kv_dtype == p.dtype else f" ({'latents' if p.kv_source == LATENT else 'K and V'} {p.kv_dtype})"
        out = "" if p.out_dtype == p.dtype else f" (out {p.out_dtype})"
        return (
            f"FA4: {what} on {where}, {heads}, "
            f"head_dim {p.head_dim}{'' if p.head_dim_v == p.head_dim else f'/{p.head_dim_v}'}, {p.dtype}{q}{kv}{out}, {source}{mode}"
        )


def aligned_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of a tensor in the room, so that another may lie behind it."""
    return -(-math.prod(shape) * itemsize // ALIGN_BYTES) * ALIGN_BYTES


def bounded(limits: BatchLimits, problem: AttentionProblem) -> BatchLimits:
    """`limits` with no more keys to convert than `FA4_BACKEND_CONVERT_MIB` has room for, of heads as `problem` has them.

    Raises:
        ValueError: the variable holds no number of MiB.
    """
    key_bytes = problem.num_kv_heads * (problem.head_dim + problem.head_dim_v) * DTYPE_BYTES[problem.dtype]
    return replace(limits, convert_keys=min(limits.convert_keys, envs.convert_bytes() // key_bytes))


def plan_attention(
    problem: AttentionProblem, limits: BatchLimits, *, num_sms: int | None = None, memory_gb: float | None = None
) -> AttentionPlan:
    """Choose the kernels for `problem`.

    Args:
        num_sms: SMs of the device that will run the plan; default: of the arch's largest part.
        memory_gb: its memory's peak in GB/s, by which decode and prefill rows of a step share the SMs; default: the published one of the
            arch. `fa4_backend.device.plan_on` asks the device for both.

    Raises:
        UnsupportedProblem: no kernel of `problem.arch` serves it, or none serves batches of these limits.
    """
    check_problem(problem)
    if problem.arch == REFERENCE_ARCH:
        return AttentionPlan(problem, limits, 1, None)
    check_limits(problem, limits)
    num_sms = num_sms or ARCHS[problem.target_arch].num_sms
    kernels = with_fuller_tiles(resolve_kernels(problem, limits, num_sms, memory_gb), problem)
    kernels = with_more_parts(with_fp8_rates(kernels, problem, num_sms, memory_gb))
    narrow, messages = narrow_prefill(problem, limits, kernels), message_prefill(problem, kernels)
    return AttentionPlan(problem, limits, num_sms, kernels, narrow, messages)
