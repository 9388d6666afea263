"""What depends on a Blackwell chip's ratios: one row an arch. No Blackwell GPU was at hand: reasons are counts and models, not timings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.tuning import cta_group

NUM_WARPS = 16
PART_ELEMS = 64  # 16-bit elements of a 128-byte row of shared memory
REGISTER_STEP = 8  # setmaxnreg takes multiples of 8 (PTX ISA, "setmaxnreg")
REGISTER_FILE = 65536


@dataclass(frozen=True)
class Sm100Tuning:
    """Tuned numbers of the prefill kernel.

    Raises:
        ValueError: the register budgets do not fit the register file, or a number is out of its domain.
    """

    # Every how many pairs of columns one pair's exp2 runs on the FMA units (0: none, 1: all). 8, upstream's share for causal attention: per
    # 256 x 128 tile MUFU then needs 1808 cycles, less than the tensor core's 2048 (16 a clock and SM, modelled), and a larger share costs
    # issue slots (docs/sm100.md). 0 on sm_103a, which has twice the MUFU rate.
    polynomial_every: int
    # 3 (error 8.6e-5) is far below bfloat16's 3.9e-3 and would do for O, but not for an lse of 2e-5 in rows of few keys; 4 has 3.0e-6 and
    # costs one more packed FMA for each polynomial pair (docs/numerics.md).
    polynomial_degree: int = 4
    cta_group: int = 1  # CTAs that share a product; `kernels/tuning.py` says where 2
    p_first_columns: int = 96  # columns of P after which PV may start; the rest follows under it
    # setmaxnreg budgets: a softmax thread holds a row of 128 scores, a correction thread 16 columns of O, an epilogue thread two 16-byte
    # pieces with their addresses. Nothing spills in any key (docs/sm100.md); with 64 and 48 an epilogue of four pieces did.
    softmax_registers: int = 200
    correction_registers: int = 56
    other_registers: int = 56

    def __post_init__(self) -> None:
        total = 32 * (8 * self.softmax_registers + 4 * self.correction_registers + 4 * self.other_registers)
        if total > REGISTER_FILE:
            raise ValueError(f"registers of all roles: expected at most {REGISTER_FILE}, got {total}")
        if any(r % REGISTER_STEP for r in (self.softmax_registers, self.correction_registers, self.other_registers)):
            raise ValueError(f"registers: expected multiples of {REGISTER_STEP}, got {self}")
        if self.p_first_columns % 32 or not 0 < self.p_first_columns < 128:
            raise ValueError(f"p_first_columns: expected 32, 64 or 96, got {self.p_first_columns}")
        if self.cta_group not in (1, 2):
            raise ValueError(f"cta_group: expected 1 or 2, got {self.cta_group}")


def num_parts(head_dim: int) -> int:
    """Parts of 64 elements that a head takes."""
    return -(-head_dim // PART_ELEMS)


ROWS: dict[str, Sm100Tuning] = {
    "sm_100a": Sm100Tuning(polynomial_every=8),
    "sm_103a": Sm100Tuning(polynomial_every=0),
}


@dataclass(frozen=True)
class Sm100Config:
    """Compile key of a Blackwell prefill kernel with tuned numbers of its own, for ablations."""

    kernel: PrefillConfig
    tuning: Sm100Tuning

    def __post_init__(self) -> None:
        if self.tuning.cta_group == 2 and self.kernel.head_dim_v % (2 * PART_ELEMS):
            raise ValueError(f"cta_group 2: expected a head_dim_v of whole parts for each CTA, got {self.kernel.head_dim_v}")

    @property
    def kv_stage(self) -> int:
        """Buffers of K and V tiles in a CTA: half a tile takes half the shared memory."""
        return self.kernel.tile.kv_stage * self.tuning.cta_group

    @property
    def k_rows(self) -> int:
        """Rows of a K tile that this CTA holds."""
        return self.kernel.tile.tile_n // self.tuning.cta_group

    @property
    def k_box_rows(self) -> int:
        """Tokens that one TMA box of K fetches."""
        return min(self.kernel.box_rows, self.k_rows)

    @property
    def v_parts(self) -> int:
        """Parts of a V tile that this CTA holds."""
        return num_parts(self.kernel.head_dim_v) // self.tuning.cta_group

    @staticmethod
    def of(kernel: PrefillConfig) -> Sm100Config:
        """The config of a kernel with the tuning of its arch and head dimensions."""
        return Sm100Config(kernel, replace(ROWS[kernel.arch], cta_group=cta_group(kernel.arch, kernel.head_dim, kernel.head_dim_v)))

    def with_tuning(self, **changes: float) -> Sm100Config:
        """The same kernel with some tuned numbers replaced."""
        return replace(self, tuning=replace(self.tuning, **changes))

    @property
    def arch(self) -> str:
        """Target arch."""
        return self.kernel.arch

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.sm100.kernel:build"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        tuning = self.tuning
        pair = "-pair" if tuning.cta_group == 2 else ""
        return f"{self.kernel.name}-poly{tuning.polynomial_every}d{tuning.polynomial_degree}{pair}"
