"""Tuned numbers of the Hopper prefill kernel, each with its evidence."""

from __future__ import annotations

from fa4_backend.kernels.common.prefill_config import TileShape

# (head_dim, head_dim_v) -> tile on sm_90a. The ring takes the shared memory that two Q buffers leave of 227 KiB.
# Tried on an H200 (page 16, causal, interleaved medians of 7 rounds, TFLOP/s of 8 x 4K / 2 x 16K / 1 x 32K, FA3 beside it in the same run):
#   d128, 32/8 heads, FA3 529 / 599 / 609
#     tile_n 128 in turns 580 / 626 / 648, without turns 564 / 620 / 640; without turns 144: 543 / 597 / 624, 160: 550 / 596 / 621
#     192 rows with tile_n 64 or 80 (three consumers), Q in registers, skipping the rescale by a vote: 3 to 10 % slower each
#     threshold 8 against 0, without turns: 564 / 620 / 640 against 573 / 618 / 645; nothing is gained where the rescale is not skipped
#   (tile by tile; in one stream over all tiles a vote gains, see below)
#   d64, 16/16 heads, FA3 379 / 465 (8 x 4K / 2 x 16K)
#     192 rows in turns 404 / 467, without turns 381 / 448; 128 rows, tile_n 128: 363 / 399, tile_n 192: 354 / 406
# On an H100 (page 16, causal, tiles from the queue, medians of 6 rounds in turns, TFLOP/s), FA3 beside it in the same run:
#   d256 8/4 heads 8 x 4K / 1 x 16K, 16/2 heads 4 x 4K, FA3 606 / 662, 630
#     one buffer of Q: tile_n 80, 4 slots 648 / 643, 638; tile_n 64, 5 slots 611 / 600, 595
#   (192, 128) 16/16 heads 4 x 4K / 2 x 16K, 16/2 heads 4 x 4K, FA3 509 / 566, 488
#     one buffer of Q: tile_n 128, 3 slots 570 / 654, 606; tile_n 112, 4 slots 526 / 610, 587
#     4 slots, K's and V's of their own size, against 3, as shares of FA3: in pages 1.16 / 1.11 against 1.12 / 1.16; without
#     pages 8 x 4K, 2 x 16K, 128/128 heads 1 x 8K 0.98, 0.92, 0.94 against 0.98, 0.91, 0.92, full 4 x 2K of 8K 1.00 against 0.96
#   d96 32/8 heads 8 x 4K / 2 x 16K, FA3 507 / 561 (tiles dealt out, not from a queue)
#     tile_n 128 504 / 526; 160 457 / 492; 192 rows, tile_n 96 474 / 516; one buffer of Q and 8 slots 460 / 526
# Threshold 8 and a vote that skips the rescale against a rescale a block, on an H200, TFLOP/s (FA3 beside it), 2026-11-28:
#   d256 16/2 1 x 16K 748, 715 (718), 4 x 512 of 8K 725, 681 (642); the vote alone, threshold 0: 727, 699
#   d128 32/8 2 x 16K 606, 599 (561), 8 x 4K 573, 561 (510), full 2 x 16K 649, 641 (585)
#   d96 32/32 2 x 16K 544, 532 (562), 8 x 4K 509, 488 (449). Tiles with a rescale a block, 2 x 16K / 8 x 4K / 32 x 1K / 4 x 512 of 8K,
#     128 rows, tile_n 128 532 / 488 / 401 / 517; tile_n 144, 5 slots 544 / 495 / 364 / 520; 192 rows, tile_n 112, 6 slots
#     574 / 468 / 286 / 493, tile_n 96, 7 slots 561 / 481 / 319 / 481, tile_n 128, 5 slots 307 / 278 / 200 / 270 (FA3 562 / 449 / 266 / 477)
# Soft cap, d256: docs/sm90.md. The share of L2 (8, 16, 24, 36 MiB) changes d96, d128 and d256 at 16K by less than two runs differ.
# A vote before the exponentials (`asks_first`), on an H200, us in turns, 2026-11-28; threshold 8 with each:
#   d64 16/16 8 x 4K, 2 x 16K, 32 x 1K, 64/8 sinks 8 x 4K: a rescale a block 598, 2153, 226, 2291; behind a vote 596, 2136, 228, 2305; the
#     vote first 584, 2085, 225, 2222
#   d96 32/32 8 x 4K, 2 x 16K, 32 x 1K, 4 x 512 of 8K, 32/8 8 x 4K: 128 rows, tile_n 128 1714, 6509, 524, 394, 1669, the vote first 1678,
#     6394, 517, 393, 1618; tile_n 144, 5 slots 1722, 6288, 582, 389, 1621; 192 rows, tile_n 112, 6 slots 1577, 5436, 629, 378, 1474 (a
#     rescale a block 1662, 5700, 651, 397, 1523), tile_n 96, 7 slots 1578, 5531, 590, 387, 1436: the only ones that are ahead of FA3 in
#     every cell (1673, 5930, 777, 410, 1554 in another run), at the price of short prompts
#   (192, 128) 16/16 8 x 4K, 2 x 16K, 16 x 1K, 4 x 512 of 8K, 16/2 4 x 4K: 1099, 4083, 179, 254, 510; behind a vote 1100, 4008, 180, 252,
#     505; the vote first 1043, 3857, 178, 247, 500
#   d128 32/8 8 x 4K, 2 x 16K, 1 x 32K, full 2 x 16K: behind a vote 1752, 6631, 13301, 13404, the vote first 1737, 6965, 13909, 13798
#   d256 8/4 8 x 4K, 1 x 16K, 16/2 1 x 16K: 760, 1389, 2937, the vote first 759, 1385, 2935
TILES: dict[tuple[int, int], TileShape] = {
    (64, 64): TileShape(tile_m=192, tile_n=128, kv_stage=8, ping_pong=True, asks_first=True),
    (96, 96): TileShape(tile_m=192, tile_n=96, kv_stage=7, ping_pong=True, asks_first=True),
    (128, 128): TileShape(tile_m=128, tile_n=128, kv_stage=5, ping_pong=True),
    (192, 128): TileShape(tile_m=128, tile_n=128, kv_stage=4, ping_pong=True, q_stage=1, asks_first=True),
    (256, 256): TileShape(tile_m=128, tile_n=80, kv_stage=4, ping_pong=True, q_stage=1),
}

# Where a layer has a left window, in place of the row above. Windows of 128 leave a tile of 24 tokens 152 keys, two or three blocks of 128
# that are all masked: 64/8 heads with sinks, window 128, 8 x 4K and 4 x 512 of 8K on an H200, us, 2026-11-28: tile_n 128 465, 44.3; 96
# 393, 38.2; 64, 16 slots 370, 35.5; 128 rows 497, 43.5 (FA3 546, 48.6 in another run). Wide windows are like none, 8 x 4K 2291, 2364, 2567:
# hence 96.
WINDOW_TILES: dict[tuple[int, int], TileShape] = {
    (64, 64): TileShape(tile_m=192, tile_n=96, kv_stage=10, ping_pong=True, rescale_threshold=0.0),
}

# The same for K and V in e4m3: tiles wait for their conversion in slots of half the size, which take their place out of the ring
# (`staging.py`). Tried on an H100 (page 16, causal, medians in turns, TFLOP/s of 8 x 4K / 2 x 16K / 4 x 512 of 8K / 32 x 1K):
#   d128 32/8 heads, two buffers of Q and 4 slots 498 / 543 / 479 / 363; one buffer and 4 slots 522 / 538 / 464 / 372,
#     5 slots 508 / 537 / 469 / 388
#   d96 32/8 heads, 6 slots 485 / 508 / 477 / 321; 5 slots 476 / 498 / 473 / 324; one buffer of Q and 6 slots 470 / 505 / 483 / 324
# d64 and d256 were timed as they are (docs/sm90.md), (192, 128) was not.
TILES_FP8: dict[tuple[int, int], TileShape] = {
    (64, 64): TileShape(tile_m=192, tile_n=128, kv_stage=8, ping_pong=True, rescale_threshold=0.0),
    (96, 96): TileShape(tile_m=128, tile_n=128, kv_stage=6, ping_pong=True, rescale_threshold=0.0),
    (128, 128): TileShape(tile_m=128, tile_n=128, kv_stage=4, ping_pong=True, rescale_threshold=0.0),
    (192, 128): TileShape(tile_m=128, tile_n=80, kv_stage=4, ping_pong=True, q_stage=1, rescale_threshold=0.0),
    (256, 256): TileShape(tile_m=128, tile_n=64, kv_stage=4, ping_pong=True, q_stage=1, rescale_threshold=0.0),
}

# Parts of a tile from which on all CTAs that made them add them up.
SHARE_PARTS = 4

# Keys of a short piece in batch-invariant mode (`kv_pieces.tile_rule`): behind a decode kernel, and where this one has decode rows too.
# A CTA that adds up pieces of a tile loses some 2 us at the end of each; shorter pieces let shorter rows fill the chip. H200, page 16, us,
# 32/8 d128, pieces of 2,048 and 4,096 keys, and the plan that may cut anywhere, in turns in one process (2026-11-29, `python -m
# tests.device.measure_tiles --kinds prefix,whole,chunked --tiles invariant "invariant,piece_keys=2048"`):
#   1 x 16 of 64K 79.9, 73.2, 72.2   1 x 64 of 32K 76.9, 67.0, 64.1   1 x 256 of 64K 791, 462, 405   8 x 4K 1908, 1832, 1780
#   2 x 16K 7560, 7303, 6850   1 x 32K 15358, 14781, 13696   4 x 512 of 8K 455, 437, 418   32 x 1K 540, 539, 543
# Decode rows in exact mode, 2,048 and 4,096, in two runs: 1 x 4K 38.5, 55.1   1 x 16K 41.1, 65.4   8 x 4K 42.6, 56.4   64 x 4K 266, 245.
PIECE_KEYS, DECODE_PIECE_KEYS = 4096, 2048

# Where K and V in FP8 are converted once a call, in place of a row of TILES: such steps share lists and slots of parts with those whose
# tiles are converted one at a time, so tiles have as many rows.
CONVERTED_TILES: dict[tuple[int, int], TileShape] = {
    (96, 96): TileShape(tile_m=128, tile_n=128, kv_stage=6, ping_pong=True, asks_first=True),
}

# Query tiles of a KV head that see a key from which on K and V in FP8 are converted once a call, not once a tile. On an H200 (page 16,
# causal, medians of 5 rounds in turns, 2026-11-28), us converted once, a tile at a time, and in bf16; in brackets the tiles that see a key:
#   d128 32/8 heads 4 x 128 of 8K (4) 157, 123, 103; 4 x 256 of 8K (8) 259, 232, 198; 4 x 512 of 8K (15.5) 430, 461, 391; 32 x 1K (16) 597,
#     675, 554; 8 x 4K (64) 1738, 2092, 1755; 2 x 16K (256) 6296, 7720, 6448; 8 x 4K window 1024 (32) 964, 1085, 927
#   d96 32/8 heads 4 x 512 of 8K (15.5) 379, 385, 362; 32 x 1K (16) 513, 586, 474; 8 x 4K (64) 1494, 1750, 1605
#   d256 16/2 heads 4 x 128 of 8K (8) 124, 146, 96; 4 x 256 of 8K (16) 196, 271, 168; 4 x 512 of 8K (31) 360, 565, 336; 32 x 1K (32) 474,
#     645, 447; 8 x 4K (128) 1502, 2467, 1482; 2 x 16K (512) 5316, 9559, 5376
#   d64 16/16 heads 4 x 512 of 8K (2.6) 210, 169, 153; 32 x 1K (2.7) 296, 266, 242; 8 x 4K (10.7) 649, 653, 602
#   (192, 128) 16/16 heads 4 x 512 of 8K (3.9) 383, 335, 245; 32 x 1K (4) 470, 444, 336; 8 x 4K (16) 1160, 1468, 1042
# What lies between is interpolated: the conversion costs a key as much whatever sees it.
CONVERT_VISITS: dict[tuple[int, int], int] = {(64, 64): 12, (96, 96): 15, (128, 128): 12, (192, 128): 6, (256, 256): 5}
