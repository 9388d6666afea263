"""What is compiled into a Blackwell prefill kernel, and how it follows from the problem. Imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common.hardware import SWIZZLED_ROWS, VEC, widest_row
from fa4_backend.kernels.common.prefill_config import PrefillConfig, prefill_config
from fa4_backend.kernels.sm100.tuning import Sm100Tuning, tile_of, tuning_of
from fa4_backend.problem import DTYPE_BYTES, AttentionProblem

S_STAGE = 2  # buffers of S: one for each of two query tiles, or two for a tile that is alone
MOST_O_COLUMNS = 128  # of O that a CTA keeps in shared memory on its way out


@dataclass(frozen=True)
class Sm100Config:
    """Compile key of a Blackwell prefill kernel: what all prefill kernels have, and the tuned numbers of its arch."""

    kernel: PrefillConfig
    tuning: Sm100Tuning

    def __post_init__(self) -> None:
        if self.tuning.cta_group == 2 and self.kernel.head_dim_v % (2 * self.part_elems):
            raise ValueError(f"cta_group 2: expected a head_dim_v of whole parts for each CTA, got {self.kernel.head_dim_v}")
        if not self.q_tiles or self.kernel.head_dim_v % self.o_columns:
            raise ValueError(f"head_dim_v: expected at most 256, and a multiple of {MOST_O_COLUMNS} above it, got {self.kernel.head_dim_v}")

    @property
    def converts(self) -> bool:
        """Whether K and V are staged as they are in memory, in FP8, and converted for the products: not where Q is FP8 as well."""
        return self.kernel.has_kv_scales and not self.kernel.has_q_scale

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a part of an operand tile: 128 in 16 bits (the last may be half empty), what divides the heads in FP8."""
        if self.kernel.element_bytes > 1:
            return SWIZZLED_ROWS[0]
        return widest_row(self.kernel.head_dim, self.kernel.head_dim_v)

    @property
    def part_elems(self) -> int:
        """Elements of the head dimension in such a row."""
        return self.row_bytes // self.kernel.element_bytes

    def num_parts(self, head_dim: int) -> int:
        """Parts of an operand tile that a head takes."""
        return -(-head_dim // self.part_elems)

    @property
    def kv_stage(self) -> int:
        """Buffers of K and V tiles, as products read them, in a CTA: half a tile takes half the shared memory, and so does one in FP8.

        FP8 that is converted is staged in every fourth one's.
        """
        buffers = self.kernel.tile.kv_stage * self.tuning.cta_group * (DTYPE_BYTES[self.kernel.dtype] // self.kernel.element_bytes)
        return buffers - buffers // 4 if self.converts else buffers

    @property
    def staged(self) -> int:
        """Buffers of FP8 tiles in a CTA: what fills the place of every fourth buffer of 16 bits. 0 where K and V have 16 bits."""
        if not self.converts:
            return 0
        buffers, head_dim = max(1, self.kernel.tile.kv_stage * self.tuning.cta_group // 4), self.kernel.head_dim
        # Head dimension 96 takes two parts of 64 in the ring, and is staged without what they have too much.
        return -(-buffers * 2 * self.num_parts(head_dim) * self.part_elems // (self.loaded_parts(head_dim) * self.loaded_elems))

    @property
    def loaded_elems(self) -> int:
        """Elements of a head in a row of K or V as TMA delivers it: those of a part, in FP8 those that divide the head as well."""
        return gcd(self.part_elems, self.kernel.head_dim, self.kernel.head_dim_v) if self.converts else self.part_elems

    def loaded_parts(self, head_dim: int) -> int:
        """Such rows that a head takes."""
        return -(-head_dim // self.loaded_elems)

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
        return self.num_parts(self.kernel.head_dim_v) // self.tuning.cta_group

    def with_tuning(self, **changes: float) -> Sm100Config:
        """The same kernel with some tuned numbers replaced."""
        return replace(self, tuning=replace(self.tuning, **changes))

    @property
    def q_tiles(self) -> int:
        """Query tiles of a CTA in a work item: two in ping-pong, or one where TMEM does not hold O of two beside both buffers of S."""
        columns = ARCHS[self.arch].tmem_columns - S_STAGE * self.kernel.tile.tile_n
        return min(S_STAGE, columns // self.kernel.head_dim_v)

    @property
    def o_columns(self) -> int:
        """Columns of O that its buffer in shared memory holds: a part of a wide head."""
        return min(MOST_O_COLUMNS, self.kernel.head_dim_v)

    @property
    def o_parts(self) -> int:
        """Such parts of a head."""
        return -(-self.kernel.head_dim_v // self.o_columns)

    @property
    def slot_tiles(self) -> int:
        """Query tiles of a work item, of all its CTAs."""
        return self.q_tiles * self.ctas_per_item

    @property
    def part_floats(self) -> int:
        """float32 of a slot for a part of an item: rows of O, and a vector for each row's maximum and sum. 0: it takes no parts."""
        rows = self.slot_tiles * self.kernel.tile.tile_m
        return rows * (self.kernel.head_dim_v + VEC) if self.kernel.has_parts else 0

    @property
    def arch(self) -> str:
        """Target arch."""
        return self.kernel.arch

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.sm100.kernel:build"

    @property
    def ctas_per_item(self) -> int:
        """CTAs that work on an entry of the work list together."""
        return self.tuning.cta_group

    @property
    def tokens_per_item(self) -> int:
        """Query tokens of a work item: what its `m_block` counts in."""
        return self.q_tiles * self.ctas_per_item * self.kernel.tokens_per_tile

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        tuning = self.tuning
        pair = "-pair" if tuning.cta_group == 2 else ""
        return f"{self.kernel.name}-poly{tuning.polynomial_every}d{tuning.polynomial_degree}{pair}"


def resolve(problem: AttentionProblem, *, is_dependent: bool) -> Sm100Config:
    """The compile key of `problem`'s kernel, alone or behind a decode kernel.

    Items are cut along KV where balance asks for it, so not in batch-invariant mode.
    """
    has_parts = not problem.batch_invariant
    return Sm100Config(prefill_config(problem, tile_of(problem), is_dependent=is_dependent, has_parts=has_parts), tuning_of(problem))
