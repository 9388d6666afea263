"""Prompts' tiles of another height, where those of the table leave many of their rows idle.

A tile holds whole tokens: two of 48 heads are 96 of 128 rows, and the tensor cores take as long for the others. Where a tile of other
height has fewer such rows, by more than it is slower with all of them, it takes the table's place.

What stands here is a plan's choice and no part of a kernel: a change leaves compiled kernels as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa4_backend.kernels.common.prefill_config import TileShape
from fa4_backend.kernels.decode import config as decode_family
from fa4_backend.kernels.families import PREFILL, KernelSet, PrefillKey
from fa4_backend.kernels.schedule.rates import MIN_PART_KEYS, decode_tile_ticks
from fa4_backend.kernels.schedule.work_list import WorkShape
from fa4_backend.problem import AttentionProblem


@dataclass(frozen=True)
class OtherTile:
    """A tile, and its speed beside the table's with all rows of both in use."""

    tile: TileShape
    speed: float


# arch -> (head_dim, head_dim_v) -> the other tile. H200, us in turns (2026-11-29, `python -m tests.device.measure_tiles --kinds
# one-kv-head-prompts --only 48/1 --tiles "tile_m=192,tile_n=80,kv_stage=6" ...`), tiles of 128 rows of which 96 are in use, tiles of 192
# rows with blocks of 80, of 64 and of 96 keys (which spill), and FA3:
#   48/1 d128 1 x 64 of 32K                 112.2,  86.3,  89.6, 138.4 (103.2)
#   48/1 d128 32 x 4K + 64 tokens of 32K    149.8, 120.8, 125.5, 181.3 (153.4)
# With all rows in use it was 3 to 10 % slower (`kernels/sm90/tuning.py`). Other numbers of heads follow from these by their rows in use.
OTHER_TILES: dict[str, dict[tuple[int, int], OtherTile]] = {
    "sm_90a": {(128, 128): OtherTile(TileShape(tile_m=192, tile_n=80, kv_stage=6, ping_pong=True), speed=0.9)},
}


def with_fuller_tiles(kernels: KernelSet, problem: AttentionProblem) -> KernelSet:
    """The same kernels but for the prefill kernel and the lists' shape, where another tile serves `problem` faster.

    Not where K and V are FP8, which three warps would convert beside three consumers, nor in batch-invariant and exact mode, where decode
    rows of many heads, a token a tile, have no other tile.
    """
    other = OTHER_TILES.get(problem.target_arch, {}).get((problem.head_dim, problem.head_dim_v))
    if other is None or kernels.prefill is None or problem.has_kv_scales or problem.batch_invariant:
        return kernels
    usual = kernels.prefill.kernel.tile.tile_m
    if rows_in_use(problem, other.tile.tile_m) * other.speed <= rows_in_use(problem, usual):
        return kernels
    prefill = PREFILL[problem.target_arch](problem, is_dependent=kernels.prefill.kernel.is_dependent, tile=other.tile)
    ticks = decode_tile_ticks(
        problem,
        decode_tile_n=decode_family.TILE_N,
        item_rows=prefill.tokens_per_item * problem.q_per_kv,
        item_ctas=prefill.ctas_per_item,
        prefill_tile_n=other.tile.tile_n,
    )
    work = lists_of(kernels.work, prefill, -(-MIN_PART_KEYS // other.tile.tile_n))
    return replace(kernels, prefill=prefill, work=replace(work, decode_tile_ticks=ticks))


def lists_of(work: WorkShape, prefill: PrefillKey, min_part_blocks: int) -> WorkShape:
    """The lists of a plan as another prefill kernel, of another tile, asks for them."""
    return replace(
        work,
        tokens_per_item=prefill.tokens_per_item,
        prefill_tile_n=prefill.kernel.tile.tile_n,
        part_floats=prefill.part_floats,
        min_part_blocks=min_part_blocks,
        part_piece_blocks=prefill.kernel.piece_blocks,
    )


def rows_in_use(problem: AttentionProblem, tile_m: int) -> float:
    """The share of a tile's rows that whole tokens fill."""
    return tile_m // problem.q_per_kv * problem.q_per_kv / tile_m
