"""Every tuned number, beside its evidence. One function a decision; nothing here is derived from a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fa4_backend.kernels.common.prefill_config import PrefillConfig, TileShape, prefill_config
from fa4_backend.problem import DTYPE_BYTES

if TYPE_CHECKING:
    from fa4_backend.plan import AttentionPlan
    from fa4_backend.problem import AttentionProblem

# (head_dim, head_dim_v) -> tile on sm_90a. The ring takes the shared memory that two Q buffers leave of 227 KiB.
# Tried on an H200 (page 16, causal, interleaved medians of 7 rounds, TFLOP/s of 8 x 4K / 2 x 16K / 1 x 32K, FA3 beside it in the same run):
#   d128, 32/8 heads, FA3 529 / 599 / 609
#     tile_n 128 in turns 580 / 626 / 648, without turns 564 / 620 / 640; without turns 144: 543 / 597 / 624, 160: 550 / 596 / 621
#     192 rows with tile_n 64 or 80 (three consumers), Q in registers, skipping the rescale by a vote: 3 to 10 % slower each
#     threshold 8 against 0, without turns: 564 / 620 / 640 against 573 / 618 / 645; nothing is gained where the rescale is not skipped
#   d64, 16/16 heads, FA3 379 / 465 (8 x 4K / 2 x 16K)
#     192 rows in turns 404 / 467, without turns 381 / 448; 128 rows, tile_n 128: 363 / 399, tile_n 192: 354 / 406
# The other head dimensions take what fits: 128 rows, and the widest tile_n that leaves three or more slots.
SM90_TILES: dict[tuple[int, int], TileShape] = {
    (64, 64): TileShape(tile_m=192, tile_n=128, kv_stage=8, ping_pong=True, rescale_threshold=0.0),
    (96, 96): TileShape(tile_m=128, tile_n=128, kv_stage=6, ping_pong=True, rescale_threshold=0.0),
    (128, 128): TileShape(tile_m=128, tile_n=128, kv_stage=5, ping_pong=True, rescale_threshold=0.0),
    (192, 128): TileShape(tile_m=128, tile_n=96, kv_stage=3, ping_pong=True, rescale_threshold=0.0),
    (256, 256): TileShape(tile_m=128, tile_n=64, kv_stage=3, ping_pong=True, rescale_threshold=0.0),
}


# (head_dim, head_dim_v) -> tile on sm_100a and sm_103a, the same way. TMEM holds two tiles of S and O, so 128 x 128 is the largest tile.
SM100_TILES: dict[tuple[int, int], TileShape] = {
    (64, 64): TileShape(tile_m=128, tile_n=128, kv_stage=8),
    (96, 96): TileShape(tile_m=128, tile_n=128, kv_stage=4),
    (128, 128): TileShape(tile_m=128, tile_n=128, kv_stage=4),
    (192, 128): TileShape(tile_m=128, tile_n=128, kv_stage=2),
}
SM100_Q_TILES = 2  # query tiles of a CTA in a work item on Blackwell, in ping-pong

# (head_dim, head_dim_v) -> CTAs that share a product; 1 where nothing is said. Modelled cycles of a KV block (docs/sm100.md), 1 and 2 CTAs:
#   192 and 128: 4027 and 2560. Shared memory holds two K/V tiles of one CTA but four halves of a pair, and one CTA's port needs 2688 cycles
#   for the 2560 of the tensor core. The other side: a pair walks to the end of the longer of its CTAs' rows, 2 more blocks a causal item.
#   128: 2218 and 2048, but items of 512 packed rows leave a CTA of the pair idle for queries of fewer than 256, so 1.
SM100_CTA_GROUP: dict[tuple[int, int], int] = {(192, 128): 2}


def prefill_tile(problem: AttentionProblem) -> TileShape:
    """Tile of the prefill kernel of `problem`."""
    tiles = SM90_TILES if problem.target_arch == "sm_90a" else SM100_TILES
    return tiles[problem.head_dim, problem.head_dim_v]


def cta_group(arch: str, head_dim: int, head_dim_v: int) -> int:
    """CTAs that work on an entry of the prefill list together."""
    return 1 if arch == "sm_90a" else SM100_CTA_GROUP.get((head_dim, head_dim_v), 1)


def prefill_groups(plan: AttentionPlan) -> int:
    """CTAs, or groups of CTAs, that share the prefill list."""
    problem = plan.problem
    return max(1, plan.num_ctas // cta_group(problem.target_arch, problem.head_dim, problem.head_dim_v))


def tokens_per_work_item(problem: AttentionProblem) -> int:
    """Query tokens of an entry of the prefill list: what its `m_block` counts in."""
    q_tiles = 1 if problem.target_arch == "sm_90a" else SM100_Q_TILES
    return (
        cta_group(problem.target_arch, problem.head_dim, problem.head_dim_v) * q_tiles * (prefill_tile(problem).tile_m // problem.q_per_kv)
    )


@dataclass(frozen=True)
class ChipRates:
    """What an SM and the chip do where decode and prefill run side by side (`schedule.share_chip`)."""

    prefill_tflops: float  # of an SM: products of visible and masked keys alike
    decode_gb: float  # GB/s of one SM whose CTA decodes while others do not
    decode_pieces_gb: float  # the same in batch-invariant mode, where pieces end every few tiles
    memory_gb: float  # GB/s that lone rates may add up to; `schedule.share_chip` reaches it with 1.5 times the SMs

    def lone_decode_gb(self, problem: AttentionProblem) -> float:
        """GB/s of an SM that decodes alone."""
        return self.decode_pieces_gb if problem.batch_invariant else self.decode_gb


# sm_90a, on an H100 (32/8 d128 page 16): a chunk of 2K of 6K in 278 us on 132 SMs; 32 x 4K on 16, 28, 44 and 66 CTAs of an SM each 66.3,
# 61.7, 52.1 and 40.2 GB/s a CTA, in batch-invariant mode 43.9, 43.0, 41.6 and 37.8, on all SMs 2,780 GB/s together. A step of both, the
# chunk beside the 32 rows, takes 350 us with these rates and 447 one kernel after the other; with either rate 20 to 40 % off 353 to 407.
# In batch-invariant mode 392, with the other mode's rate 454. Where decode is nearly all, more SMs than saturate the memory are a little
# faster still: 64 x 8K beside a 512 chunk on 58, 69, 80 and 99 SMs 800, 807, 764 and 812 us. Blackwell is modelled: prefill from the cycles
# of a block (docs/sm100.md) at 1.85 GHz, a lone decode CTA as on the H100, memory 7 of the 8 TB/s in the data sheet.
CHIP_RATES = {
    "sm_90a": ChipRates(prefill_tflops=4.75, decode_gb=60, decode_pieces_gb=39, memory_gb=3180),
    "sm_100a": ChipRates(prefill_tflops=14.0, decode_gb=60, decode_pieces_gb=39, memory_gb=7000),
    "sm_103a": ChipRates(prefill_tflops=14.0, decode_gb=60, decode_pieces_gb=39, memory_gb=7000),
}


def decode_tile_ticks(problem: AttentionProblem) -> int:
    """Time of a decode n_block on an SM of its own, in TICKS of a prefill n_block."""
    from fa4_backend.kernels.decode.config import TILE_N
    from fa4_backend.kernels.schedule.work_list import TICKS

    rates, tile = CHIP_RATES[problem.target_arch], prefill_tile(problem)
    ctas = cta_group(problem.target_arch, problem.head_dim, problem.head_dim_v)
    elements = problem.head_dim + problem.head_dim_v
    rows = tokens_per_work_item(problem) * problem.q_per_kv
    prefill_us = 2 * rows * tile.tile_n * elements / (ctas * rates.prefill_tflops * 1e6)
    decode_us = TILE_N * elements * DTYPE_BYTES[problem.dtype] / (rates.lone_decode_gb(problem) * 1e3)
    return max(1, round(TICKS * decode_us / prefill_us))


def decode_full_sms(plan: AttentionPlan) -> int:
    """SMs whose decode CTAs keep the memory busy: more are no faster."""
    rates = CHIP_RATES[plan.problem.target_arch]
    return max(1, min(plan.num_ctas, round(rates.memory_gb / rates.decode_gb)))


def prefill_key(plan: AttentionPlan) -> PrefillConfig:
    """Compile key of the plan's prefill kernel."""
    from fa4_backend.kernels.decode.config import decode_config

    is_dependent = decode_config(plan.problem, plan.limits) is not None
    return prefill_config(plan.problem, prefill_tile(plan.problem), is_dependent=is_dependent)
