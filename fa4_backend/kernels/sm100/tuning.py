"""What depends on a Blackwell chip's ratios: one row an arch. No Blackwell GPU was at hand: reasons are counts and models, not timings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common.prefill_config import TileShape
from fa4_backend.problem import AttentionProblem

REGISTER_STEP = 8  # setmaxnreg takes multiples of 8 (PTX ISA, "setmaxnreg")
# Weights in e4m3, whose numbers end at 448 and below 2^-9: a row's reference is put E4M3_LIFT below its largest score, in log2 units, and
# moves when that grew by more than E4M3_THRESHOLD. So the largest weight is 2^7 to 2^8.75 = 430.5, exactly 2^7 where the reference has
# just moved; weights of 2^-13 of it have all 4 bits, and those below 2^-17 are lost. A larger lift keeps more of a long tail, and rescales
# more often: of 32 rows with random logits of standard deviation 1 one moves in 53, 29 and 4 % of the blocks 8 to 24 with thresholds of
# 0.75, 1.75 and 2.75. Modelled, a lower threshold costs nothing: 1,620 cycles a block with 1.75, 1,637 with 2.75, where items do not
# follow one another without a pause; where they do, 1,638 with 1.75 (docs/sm100.md).
E4M3_LIFT, E4M3_THRESHOLD = 7.0, 1.75

# (head_dim, head_dim_v) -> tile. TMEM holds two tiles of S and O, or two of S and one of O at 256: 128 x 128 is the largest tile.
TILES: dict[tuple[int, int], TileShape] = {
    (64, 64): TileShape(tile_m=128, tile_n=128, kv_stage=8),
    (96, 96): TileShape(tile_m=128, tile_n=128, kv_stage=4),
    (128, 128): TileShape(tile_m=128, tile_n=128, kv_stage=4),
    (192, 128): TileShape(tile_m=128, tile_n=128, kv_stage=2),
    (256, 256): TileShape(tile_m=128, tile_n=128, kv_stage=2),
}

# (head_dim, head_dim_v) -> CTAs that share a product; 1 where nothing is said. Modelled cycles of a KV block (docs/sm100.md), 1 and 2 CTAs:
#   192 and 128: 4027 and 2560. Shared memory holds two K/V tiles of one CTA but four halves of a pair, and one CTA's port needs 2688 cycles
#   for the 2560 of the tensor core. The other side: a pair walks to the end of the longer of its CTAs' rows, 2 more blocks a causal item.
#   256: a K or V tile of one CTA takes 64 KB, beside 64 of Q and 34 of O: one buffer; a pair's CTA has four halves.
#   128: 2218 and 2048, but items of 512 packed rows leave a CTA of the pair idle for queries of fewer than 256, so 1.
CTA_GROUP: dict[tuple[int, int], int] = {(192, 128): 2, (256, 256): 2}
# The same with K and V in FP8, whose conversion takes the shared-memory port as well: for 128 one CTA needs 2560 cycles of it, a pair's CTA
# 1536, beside 2048 of the tensor core (docs/sm100.md). 192 and 128 does not fit one CTA's shared memory.
FP8_CTA_GROUP: dict[tuple[int, int], int] = {(128, 128): 2, (192, 128): 2, (256, 256): 2}
# The same with Q in FP8 too: shared memory holds two of every tile but those of 256, and exponents take longer than the tensor core.
FP8_PRODUCTS_CTA_GROUP: dict[tuple[int, int], int] = {(256, 256): 2}


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
    cta_group: int = 1  # CTAs that share a product; `CTA_GROUP` says where 2
    lift: float = 0.0  # log2 units that a row's reference is put below its largest score
    loads_maximum: bool = False  # tcgen05.ld.red, which sm_103a has: a block's maximum comes with its scores where nothing changes them
    p_first_columns: int = 96  # columns of P after which PV may start; the rest follows under it
    # setmaxnreg budgets: a softmax thread holds a row of 128 scores, a correction thread 16 columns of O, an epilogue thread two 16-byte
    # pieces with their addresses. Nothing spills in any key (docs/sm100.md); with 64 and 48 an epilogue of four pieces did.
    softmax_registers: int = 200
    correction_registers: int = 56
    other_registers: int = 56

    def __post_init__(self) -> None:
        total = 32 * (8 * self.softmax_registers + 4 * self.correction_registers + 4 * self.other_registers)
        registers = min(limits.registers for limits in ARCHS.values())
        if total > registers:
            raise ValueError(f"registers of all roles: expected at most {registers}, got {total}")
        if any(r % REGISTER_STEP for r in (self.softmax_registers, self.correction_registers, self.other_registers)):
            raise ValueError(f"registers: expected multiples of {REGISTER_STEP}, got {self}")
        if self.p_first_columns % 32 or not 0 < self.p_first_columns < 128:
            raise ValueError(f"p_first_columns: expected 32, 64 or 96, got {self.p_first_columns}")
        if self.cta_group not in (1, 2):
            raise ValueError(f"cta_group: expected 1 or 2, got {self.cta_group}")


ROWS: dict[str, Sm100Tuning] = {
    "sm_100a": Sm100Tuning(polynomial_every=8),
    "sm_103a": Sm100Tuning(polynomial_every=0),
}
# Products take half the cycles, and MUFU is the bound of sm_100a: modelled cycles of a causal block at d128, a pause between items, with
# one pair in 8, 4 and 2: 1818, 1620, 1826. sm_103a, with none, one in 16 and in 8: 1147, 1204, 1288; with `loads_maximum` 1084 for 1147.
FP8_PRODUCTS_ROWS: dict[str, Sm100Tuning] = {
    "sm_100a": Sm100Tuning(polynomial_every=4, lift=E4M3_LIFT),
    "sm_103a": Sm100Tuning(polynomial_every=0, lift=E4M3_LIFT, loads_maximum=True),
}


def tile_of(problem: AttentionProblem) -> TileShape:
    """The tile of a problem's kernel."""
    tile = TILES[problem.head_dim, problem.head_dim_v]
    return replace(tile, rescale_threshold=E4M3_THRESHOLD) if problem.has_q_scale else tile


def tuning_of(problem: AttentionProblem) -> Sm100Tuning:
    """The tuned numbers of a problem's kernel."""
    rows, groups = ROWS, CTA_GROUP
    if problem.has_q_scale:
        rows, groups = FP8_PRODUCTS_ROWS, FP8_PRODUCTS_CTA_GROUP
    elif problem.has_kv_scales:
        groups = FP8_CTA_GROUP
    return replace(rows[problem.target_arch], cta_group=groups.get((problem.head_dim, problem.head_dim_v), 1))
