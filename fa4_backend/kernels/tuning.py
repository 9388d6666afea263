"""Every tuned number, beside its evidence. One function a decision; nothing here is derived from a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa4_backend.kernels.config import KernelConfig, TileShape, prefill_config

if TYPE_CHECKING:
    from fa4_backend.plan import AttentionPlan
    from fa4_backend.problem import AttentionProblem

# (head_dim, head_dim_v) -> tile on sm_90a. The ring takes the shared memory that Q and O leave of 227 KiB.
SM90_TILES: dict[tuple[int, int], TileShape] = {
    (64, 64): TileShape(tile_m=192, tile_n=128, kv_stage=8),
    (96, 96): TileShape(tile_m=128, tile_n=128, kv_stage=6),
    (128, 128): TileShape(tile_m=128, tile_n=128, kv_stage=5),
    (192, 128): TileShape(tile_m=128, tile_n=96, kv_stage=4),
    (256, 256): TileShape(tile_m=128, tile_n=64, kv_stage=3),
}


def prefill_tile(problem: AttentionProblem) -> TileShape:
    """Tile of the prefill kernel of `problem`."""
    return SM90_TILES[problem.head_dim, problem.head_dim_v]


def prefill_key(plan: AttentionPlan) -> KernelConfig:
    """Compile key of the plan's prefill kernel."""
    return prefill_config(plan.problem, prefill_tile(plan.problem))
