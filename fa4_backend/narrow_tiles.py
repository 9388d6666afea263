"""Steps whose rows are short on prefill tiles that are no taller than those rows: one warpgroup, or two, in place of two or three.

A row group of 33 to 128 packed rows fills a part of a prompt's tile, and all warpgroups of a tile take their turns at the tensor cores,
rows or not. The decode kernel, whose warps take 16 keys of 16 rows at a time, has the more instructions the more rows there are. So where
the host knows that a step has decode rows alone, tiles of their height serve it.

With K and V in FP8 the lowest tile serves short messages too, beside decode rows or alone: all warps but five convert. Other steps are
served as plans without this file have it.

What stands here is a plan's choice and no part of a kernel: a change leaves compiled kernels as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fa4_backend.kernels.common.prefill_config import TileShape
from fa4_backend.kernels.families import PREFILL, KernelSet, PrefillKey
from fa4_backend.kernels.schedule.rates import MIN_PART_KEYS
from fa4_backend.kernels.schedule.work_list import WorkLists, WorkShape
from fa4_backend.problem import PAGED, AttentionProblem, BatchLimits
from fa4_backend.prompt_tiles import lists_of

MOST_DECODE_ROWS = 32  # packed rows up to which the decode kernel is as fast

# arch -> (head_dim, head_dim_v) -> tiles, narrowest first; those as high as a prompt's are not taken. H200, one KV head, L2 clean, us of
# 1 x 4K / 8 x 4K / 64 x 4K, FA3 in turns in the same process (2026-11-29, `python -m tests.device.measure_tiles --kinds packed-rows --tiles
# "prefill tiles" "prefill tiles,ping_pong=0,tile_m=64,kv_stage=12,min_part_blocks=1"`):
#   d64   64 rows, one warpgroup      14.0 / 14.8 / 28.5; decode kernel 19.3 / 20.0 / 40.4; prompts' tiles 16.7 / 17.1 / 35.1
#           (FA3 14.2 / 15.5 / 30.8); tile_n 192, 8 slots 15.7 / 15.9 / 28.4
#         48                          13.5 / 14.5 / 28.6; 15.3 / 16.1 / 32.1; 15.9 / 16.4 / 35.2 (FA3 13.9 / 15.7 / 30.6)
#         32                          13.7 / 14.7 / 28.1; 13.1 / 14.0 / 26.9; 16.5 / 17.0 / 35.1 (FA3 14.2 / 15.7 / 30.4)
#         96, two warpgroups          15.1 / 16.4 / 31.6; prompts' tiles 15.9 / 16.9 / 35.8 (FA3 17.6 / 19.1 / 44.5)
#   d96   48                          14.8 / 15.9 / 36.1; decode kernel 18.7 / 19.9 / 42.3 (FA3 20.5 / 23.0 / 49.5)
#   d128  48                          14.4 / 16.3 / 45.2; prompts' tiles 16.5 / 17.8 / 43.1 (FA3 16.3 / 19.1 / 47.5); tile_n 192, 4 slots
#           19.5 / 19.4 / 46.1
#         32                          14.6 / 16.7 / 45.5; decode kernel 16.1 / 17.7 / 43.3 (FA3 16.1 / 19.5 / 47.5)
#         64/8 heads, 8 queries, 1 x 4K / 16 x 4K / 4 x 16K / 64 x 2K 17.1 / 71.5 / 76.2 / 138; 18.8 / 71.4 / 76.2 / 140 (FA3 20.2 / 76.4 /
#           77.7 / 149)
TILES: dict[str, dict[tuple[int, int], tuple[TileShape, ...]]] = {
    "sm_90a": {
        (64, 64): (
            TileShape(tile_m=64, tile_n=128, kv_stage=12, asks_first=True),
            TileShape(tile_m=128, tile_n=128, kv_stage=12, ping_pong=True, asks_first=True),
        ),
        (96, 96): (TileShape(tile_m=64, tile_n=128, kv_stage=8, asks_first=True),),
        (128, 128): (TileShape(tile_m=64, tile_n=128, kv_stage=6), TileShape(tile_m=128, tile_n=128, kv_stage=5, ping_pong=True)),
    }
}

# The same for K and V in e4m3. A prompt's tile has seven warps that convert beside two consumers (three beside three, and at d256); beside
# one there is room for eleven, and seven at d256. H200, us on these tiles, on what served the steps before, and of FA3 in FP8, in turns
# (2026-11-29, `python -m tests.device.measure_tiles --kinds fp8-drafts,fp8-one-kv-head --tiles min_part_blocks=2`; more in docs/decode.md):
#   d128  64/8, 8 queries, 16 x 4K, 64 x 2K, 1 x 4K 52.3, 70.8 (62.4), 100.5, 139.1 (124.4), 24.4, 26.2 (22.9)
#         48/1 32 x 4K 26.6, 31.6 (29.1)
#   d64   64/1 64 x 4K, 1 x 4K 27.1, 45.7 (28.4), 16.8, 13.9 (13.3)
TILES_FP8: dict[str, dict[tuple[int, int], tuple[TileShape, ...]]] = {
    "sm_90a": {
        (64, 64): (TileShape(tile_m=64, tile_n=128, kv_stage=8, rescale_threshold=0.0),),
        (96, 96): (TileShape(tile_m=64, tile_n=128, kv_stage=5, rescale_threshold=0.0),),
        (128, 128): (TileShape(tile_m=64, tile_n=128, kv_stage=4, rescale_threshold=0.0),),
        (256, 256): (TileShape(tile_m=64, tile_n=64, kv_stage=4, q_stage=1, rescale_threshold=0.0),),
    }
}

# n_blocks of the shortest part. 2, as prompts have, take 14.3, 14.0, 15.1 and 14.8 us for 1 x 4K of 64/1 d64, 48/1 d64, d96 and d128, where
# 1 takes 14.0, 13.5, 14.8 and 14.4; with more rows both take the same.
MIN_PART_BLOCKS = 1


@dataclass(frozen=True)
class NarrowPrefill:
    """A prefill kernel that serves some steps, and what it asks of their lists."""

    prefill: PrefillKey
    work: WorkShape


def narrow_prefill(problem: AttentionProblem, limits: BatchLimits, kernels: KernelSet) -> NarrowPrefill | None:
    """What serves steps of decode rows alone; None where no tile of the table is as low as their row groups and below a prompt's.

    Not where a row's bits must not depend on the batch, whose other rows decide between both.

    Args:
        kernels: of the plan's other steps, whose buffers these share.
    """
    p, work, rows = problem, kernels.work, problem.q_per_kv * limits.decode_query_len
    if p.kv_source != PAGED or p.batch_invariant or p.exact or rows <= MOST_DECODE_ROWS:
        return None
    table = TILES_FP8 if p.has_kv_scales else TILES
    served = table.get(p.target_arch, {}).get((p.head_dim, p.head_dim_v), ())
    tile = next((tile for tile in served if rows <= tile.tile_m), None)
    if tile is None or kernels.prefill is None or tile.tile_m >= kernels.prefill.kernel.tile.tile_m:
        return None
    prefill = PREFILL[p.target_arch](problem, is_dependent=False, tile=tile)
    narrow = replace(lists_of(work, prefill, MIN_PART_BLOCKS), decode_query_len=0)
    assert narrow.part_floats <= work.part_floats and narrow.tokens_per_item >= limits.decode_query_len, f"{narrow=} {work=}"
    return NarrowPrefill(prefill, narrow)


def message_prefill(problem: AttentionProblem, kernels: KernelSet) -> NarrowPrefill | None:
    """What serves the prefill rows of steps in which none has more tokens than a tile holds; None where that would not be faster.

    Not where a row's bits must not depend on the batch: it decides which steps those are.

    Args:
        kernels: of the plan's other steps, whose decode kernel, buffers and rates these share.
    """
    p, table = problem, TILES_FP8.get(problem.target_arch, {})
    tile = next(iter(table.get((p.head_dim, p.head_dim_v), ())), None)
    if tile is None or not p.has_kv_scales or p.kv_source != PAGED or p.batch_invariant or p.q_per_kv > tile.tile_m:
        return None
    if kernels.prefill is None or tile.tile_m >= kernels.prefill.kernel.tile.tile_m:
        return None
    prefill = PREFILL[p.target_arch](problem, is_dependent=kernels.prefill.kernel.is_dependent, tile=tile)
    work = lists_of(kernels.work, prefill, -(-MIN_PART_KEYS // tile.tile_n))
    assert work.part_floats <= kernels.work.part_floats, f"{work=} {kernels.work=}"
    before = kernels.prefill.kernel.tile
    # An n_block's time, by its products: the rows of a tile and its keys.
    ticks = work.decode_tile_ticks * before.tile_m * before.tile_n // (tile.tile_m * tile.tile_n)
    return NarrowPrefill(prefill, replace(work, decode_tile_ticks=max(1, ticks)))


@dataclass(frozen=True)
class NarrowSteps:
    """A `NarrowPrefill` on a device."""

    launch: Callable[..., None]
    work: WorkLists  # the plan's buffers, in which slots for parts are shorter and lie one behind the other

    @classmethod
    def load(cls, narrow: NarrowPrefill | None, work: WorkLists, *, emulated: bool) -> NarrowSteps | None:
        """Load the kernel, if there is one, compiling what the cache on disk lacks, for the buffers `work` of the plan's other steps.

        Raises:
            CompileError, RuntimeError: as `fa4_backend.kernels.loading.load_kernels`.
        """
        from fa4_backend.kernels import loading

        if narrow is None:
            return None
        assert work.part_slots is not None and narrow.work.own_part_slots() == 0, f"{narrow.work=}"
        slots = work.part_slots.view(-1)[: narrow.work.max_part_slots() * narrow.work.part_floats]
        lists = replace(work, shape=narrow.work, part_slots=slots.view(-1, narrow.work.part_floats))
        return cls(loading.load(narrow.prefill, emulated=emulated), lists)
