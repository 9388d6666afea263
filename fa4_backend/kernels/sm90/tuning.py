"""Tuned numbers of the Hopper prefill kernel, each with its evidence."""

from __future__ import annotations

from fa4_backend.kernels.common.prefill_config import TileShape

# (head_dim, head_dim_v) -> tile on sm_90a. The ring takes the shared memory that two Q buffers leave of 227 KiB.
# Tried on an H200 (page 16, causal, interleaved medians of 7 rounds, TFLOP/s of 8 x 4K / 2 x 16K / 1 x 32K, FA3 beside it in the same run):
#   d128, 32/8 heads, FA3 529 / 599 / 609
#     tile_n 128 in turns 580 / 626 / 648, without turns 564 / 620 / 640; without turns 144: 543 / 597 / 624, 160: 550 / 596 / 621
#     192 rows with tile_n 64 or 80 (three consumers), Q in registers, skipping the rescale by a vote: 3 to 10 % slower each
#     threshold 8 against 0, without turns: 564 / 620 / 640 against 573 / 618 / 645; nothing is gained where the rescale is not skipped
#   d64, 16/16 heads, FA3 379 / 465 (8 x 4K / 2 x 16K)
#     192 rows in turns 404 / 467, without turns 381 / 448; 128 rows, tile_n 128: 363 / 399, tile_n 192: 354 / 406
# The other head dimensions take what fits: 128 rows, and the widest tile_n that leaves three or more slots.
TILES: dict[tuple[int, int], TileShape] = {
    (64, 64): TileShape(tile_m=192, tile_n=128, kv_stage=8, ping_pong=True, rescale_threshold=0.0),
    (96, 96): TileShape(tile_m=128, tile_n=128, kv_stage=6, ping_pong=True, rescale_threshold=0.0),
    (128, 128): TileShape(tile_m=128, tile_n=128, kv_stage=5, ping_pong=True, rescale_threshold=0.0),
    (192, 128): TileShape(tile_m=128, tile_n=112, kv_stage=4, ping_pong=True, q_stage=1, rescale_threshold=0.0),
    (256, 256): TileShape(tile_m=128, tile_n=64, kv_stage=5, ping_pong=True, q_stage=1, rescale_threshold=0.0),
}
