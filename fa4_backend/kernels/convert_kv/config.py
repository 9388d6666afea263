"""Compile key of the conversion, and where its keys lie. Imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.problem import AttentionProblem

THREADS = 256  # of a CTA
# As many as are resident with 64 registers a thread. 1 to 6 and 8 took 68, 59, 58, 58, 62, 58 and 58 us for 32K keys of 8 heads d128
# (H200, 2026-11-29): from two on memory is what limits, and five leave a round of one CTA behind four.
CTAS_PER_SM = 4


@dataclass(frozen=True)
class ConvertConfig:
    """Compile key of a conversion of e4m3 to a 16-bit type."""

    arch: str
    dtype: str  # to which: bfloat16 or float16
    head_dim: int
    head_dim_v: int

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.convert_kv.kernel:build"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}v{self.head_dim_v}"
        return f"convert-{self.arch}-{self.dtype}-{dims}"


def resolve(problem: AttentionProblem) -> ConvertConfig:
    """The compile key of `problem`'s conversion."""
    return ConvertConfig(problem.target_arch, problem.dtype, problem.head_dim, problem.head_dim_v)
