"""What is compiled into a Hopper prefill kernel, and how it follows from the problem. Imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa4_backend.kernels.common.hardware import QUAD, VEC
from fa4_backend.kernels.common.prefill_config import PrefillConfig, TileShape, prefill_config
from fa4_backend.kernels.sm90.tuning import (
    CONVERT_VISITS,
    CONVERTED_TILES,
    DECODE_PIECE_KEYS,
    PIECE_KEYS,
    SHARE_PARTS,
    TILES,
    TILES_FP8,
    WINDOW_TILES,
)
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WarpRoles
from fa4_backend.problem import PAGED, RAGGED, AttentionProblem

CTAS_PER_ITEM = 1


def part_vectors(config: PrefillConfig) -> int:
    """Vectors that a thread has of a part's slot: O of its two rows, a quarter of each, and their maxima and sums."""
    return 2 * config.head_dim_v // QUAD // VEC + 1


def part_floats(config: PrefillConfig) -> int:
    """float32 of a part's slot."""
    return WarpRoles.of(config).num_consumers * WARPGROUP_THREADS * part_vectors(config) * VEC


@dataclass(frozen=True)
class Sm90Config:
    """Compile key of a Hopper prefill kernel."""

    kernel: PrefillConfig

    @property
    def arch(self) -> str:
        """Target arch."""
        return self.kernel.arch

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.sm90.kernel:build"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        return self.kernel.name

    @property
    def ctas_per_item(self) -> int:
        """CTAs that work on an entry of the work list together."""
        return CTAS_PER_ITEM

    @property
    def tokens_per_item(self) -> int:
        """Query tokens of a work item: what its `m_block` counts in."""
        return self.kernel.tokens_per_tile

    @property
    def part_floats(self) -> int:
        """float32 of a slot for a part of a tile; 0: the kernel takes whole tiles only."""
        return part_floats(self.kernel) if self.kernel.has_parts else 0


def least_converted_visits(problem: AttentionProblem) -> int:
    """Query tiles that see a key from which on K and V are converted before."""
    return CONVERT_VISITS[problem.head_dim, problem.head_dim_v]


def resolve_converted(problem: AttentionProblem, *, is_dependent: bool) -> Sm90Config:
    """The compile key of the kernel that serves `problem`, K and V in FP8 pages, from what `kernels/convert_kv` made of them."""
    wide = replace(problem, kv_dtype=problem.dtype, kv_source=RAGGED, page_size=1)
    key = resolve(wide, is_dependent=is_dependent, tile=CONVERTED_TILES.get((problem.head_dim, problem.head_dim_v)))
    return Sm90Config(replace(key.kernel, is_converted=True))


def resolve(problem: AttentionProblem, *, is_dependent: bool, tile: TileShape | None = None) -> Sm90Config:
    """The compile key of `problem`'s kernel, alone or behind a decode kernel; with a `tile` other than the tables'.

    Tiles are cut along KV where balance asks for it; in batch-invariant mode at the ends of pieces.
    """
    tile = tile or _tile(problem)
    config = prefill_config(problem, tile, is_dependent=is_dependent, has_parts=True)
    piece_keys = DECODE_PIECE_KEYS if problem.kv_source == PAGED and not is_dependent else PIECE_KEYS
    piece_blocks = -(-piece_keys // tile.tile_n) if problem.batch_invariant else 0
    return Sm90Config(replace(config, share_parts=SHARE_PARTS, piece_blocks=piece_blocks))


def _tile(problem: AttentionProblem) -> TileShape:
    """The row of the tables."""
    dims = problem.head_dim, problem.head_dim_v
    if problem.has_kv_scales:
        return TILES_FP8[dims]
    return WINDOW_TILES.get(dims, TILES[dims]) if problem.mask.has_window_left else TILES[dims]
