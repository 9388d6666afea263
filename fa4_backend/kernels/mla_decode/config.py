"""What is compiled into the latent decode kernel, and how it follows from the problem. Imports no compiler.

Lengths, strides, scales and the page table are arguments of each launch. Pages matter only by the rows of a TMA box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fa4_backend.kernels.common.prefill_config import box_rows_of
from fa4_backend.problem import DTYPE_BYTES, FP8, AttentionProblem, BatchLimits, MaskFeatures, short_dtypes

LATENT_DIM, ROPE_DIM = 512, 64  # elements of a token: latents, which are V and the first part of K, and K's rotary part
PART_DIM = 64  # elements of 16 bits in a swizzled row of shared memory, 128 bytes
LATENT_PARTS = LATENT_DIM // PART_DIM
PARTS = (LATENT_DIM + ROPE_DIM) // PART_DIM
TILE_M = 64  # packed query rows of a CTA: `row = token * num_heads + head`
TILE_N = 64  # keys of a block
PART_ELEMS = TILE_N * PART_DIM  # of a part of a tile, of Q or of KV
TILE_ELEMS = PARTS * PART_ELEMS
KV_STAGE = 2  # Q and two tiles are 216 of 227 KiB
MERGE_BYTES = KV_STAGE * TILE_ELEMS * 2  # of shared memory for parts that are added up at once, where KV tiles were
VEC = 4  # float32 of a vector of a slot: 16 bytes
WARP_ROWS = 16  # rows of a tile that a warp has of a product
WARP_VECTORS = WARP_ROWS * LATENT_DIM // VEC  # vectors of a slot that hold those rows
CONSUMER_THREADS = 256
# Looks at the counter of a row group's parts before a CTA leaves its share of adding them up to the one that comes last. One look is a
# round trip to L2, 0.7 us; CTAs have equal work, so their parts come within microseconds where all of them run.
ARRIVAL_LOOKS = 64
# Where latents are FP8 and converted in shared memory: the warps beside the load warp. Not a warpgroup more: ptxas gives 512 threads 128
# registers each, and a product of 64 x 256 takes 158.
CONVERT_WARPS = 3
# Packed rows up to which FP8 latents are attended to by mma.sync, which takes them converted in registers (`narrow_warps.py`).
NARROW_ROWS = 16
NARROW_STAGE = 5  # with Q of 16 rows, 198 KiB
NARROW_WARPS = CONSUMER_THREADS // 32
# CTAs of a cluster at most, and KV blocks that the load warp asks L2 for ahead of the one that it loads: 0: none. H100, 128 heads, us of
# 1 x 1K / 8 x 4K / 64 x 1K / 64 x 4K / 64 x 16K / 64 x 4K with 4 queries (2026-11-28, `python -m tests.device.prove_mla`):
#   1 CTA, no block ahead   24.9 / 37.6 / 42.0 / 128.1 / 470.9 / 481      1 CTA, 2 blocks ahead   22.6 / 40.7 / 45.1 / 132.6 / 479.3 / 496
#   2 CTAs, no block ahead  23.8 / 42.6 / 53.1 / 165.6 / 651.2 / 646      2 CTAs, 2 blocks ahead  24.1 / 46.0 / 53.8 / 163.6 / 622.4 / 626
# Why clusters are slower was not looked into; in each block their CTAs wait for each other's buffers.
MAX_CLUSTER = 1
PREFETCH_BLOCKS = 0
# The same where latents are converted in shared memory: a tile's numbers come to the tile's own place, so nothing else runs beside them.
CONVERTED_PREFETCH_BLOCKS = 2
RESCALE_THRESHOLD = 8.0  # log2 units: weights reach 2^8 before O is rescaled
# KV blocks that a part of a row group has at least, and the square of its parts over its blocks at most: parts of 1 block up to 16 blocks,
# of 2 at 64, of 4 at 256. Whoever adds up parts does so with all CTAs that made them; still many parts cost more. H100, one row, us with
# parts of 1 / 2 / 4 blocks (2026-11-28, `python -m tests.device.measure_mla`):
#   128 heads, 512 keys 20.0 / 25.3 / 32.9    1K 20.9 / 23.2 / 27.7    4K 28.2 / 24.4 / 27.5    16K 36.0 / 36.1 / 34.8
#   16 heads,  512 keys 16.7 / 20.5 / 23.7    1K 14.3 / 20.5 / 22.6    4K 18.7 / 18.6 / 20.1    16K 29.4 / 29.3 / 25.4
MIN_PART_BLOCKS = 1
PARTS_RATIO = 16
# What a part of a row group costs its CTA, in quarters of a block: some, and as many for each warp of its tile, whose rows of a slot are
# written and as much is read. And eighths of its usual time that a block takes a CTA where others are done: with several tiles a row, whose
# CTAs share latents, the memory is less of a limit. H200, us, cut by rows and into equal parts, in brackets by the model in blocks
# (2026-11-29, `python -m tests.device.measure_cuts`; rows of 2,112 and 4,160 keys, up to 32 more or less):
#   128 heads  128 x 2112 129.5, 151.2 (64.8, 77.1)   50 x 4160 115.7, 120.7 (57.8, 60.4)   100 x 4160 220.4, 206.7 (115.5, 111.5)
#    16 heads  128 x 2112  83.5,  93.8 (32.4, 37.2)   50 x 4160  74.3,  74.8 (26.7, 28.2)   100 x 4160 127.2, 130.7 (49.6, 54.0)
PART_QUARTERS, WARP_PART_QUARTERS = 5, 5
LONE_BLOCK_EIGHTHS, SHARED_LONE_BLOCK_EIGHTHS = 6, 7


@dataclass(frozen=True)
class MlaDecodeConfig:
    """Compile key of a latent decode kernel."""

    arch: str
    dtype: str  # of q and out
    kv_dtype: str  # of the latents in memory
    num_heads: int
    query_len: int  # longest query of a row
    box_rows: int  # keys of a TMA box: the largest power of two that divides page and tile
    mask: MaskFeatures
    has_lse: bool
    has_pieces: bool  # an entry of the work list may hold several pieces (batch invariance)
    max_cluster: int = MAX_CLUSTER
    prefetch_blocks: int = PREFETCH_BLOCKS
    arrival_looks: int = ARRIVAL_LOOKS
    narrow_rows: int = NARROW_ROWS  # 0: wgmma for every number of rows

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.mla_decode.kernel:build"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        features = self.mask.short_name + "-lse" * self.has_lse + "-pieces" * self.has_pieces
        tuned = f"-c{self.cluster_size}" + f"-l2p{self.prefetch_blocks}" * (self.prefetch_blocks > 0)
        tuned += "-narrow" * self.is_narrow
        dtypes = short_dtypes(self.dtype, kv=self.kv_dtype)
        return f"mladecode-{self.arch}-{dtypes}-h{self.num_heads}-q{self.query_len}-box{self.box_rows}{tuned}{features}"

    @property
    def tile_n(self) -> int:
        """Keys of a block: what the work list counts in."""
        return TILE_N

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of q and out."""
        return DTYPE_BYTES[self.dtype]

    @property
    def has_scale(self) -> bool:
        """Whether latents are stored in FP8, with one scale."""
        return self.kv_dtype == FP8

    @property
    def is_narrow(self) -> bool:
        """Whether products are of 16 rows, by mma.sync."""
        return self.has_scale and self.rows <= self.narrow_rows

    @property
    def is_converted(self) -> bool:
        """Whether warps of their own convert latents in shared memory."""
        return self.has_scale and not self.is_narrow

    @property
    def is_scaled(self) -> bool:
        """Whether Q becomes float16 in shared memory."""
        return self.is_converted and self.dtype == "bfloat16"

    @property
    def latent_swizzle_bits(self) -> int:
        """Of the chunks of 16 bytes in a row of a box of latents."""
        # Rows of 64 bytes that ldmatrix reads are swizzled as such; those that are converted, not at all.
        return 2 if self.is_narrow else 0 if self.has_scale else 3

    @property
    def kv_stage(self) -> int:
        """KV tiles in shared memory."""
        return NARROW_STAGE if self.is_narrow else KV_STAGE

    @property
    def stage_bytes(self) -> int:
        """Bytes of a tile in shared memory."""
        return TILE_ELEMS * (DTYPE_BYTES[self.kv_dtype] if self.is_narrow else self.element_bytes)

    @property
    def q_part_bytes(self) -> int:
        """Bytes of a part of Q in shared memory."""
        return (WARP_ROWS if self.is_narrow else TILE_M) * PART_DIM * self.element_bytes

    @property
    def rows(self) -> int:
        """Packed rows of the longest query."""
        return self.num_heads * self.query_len

    @property
    def num_tiles(self) -> int:
        """Tiles of the longest query."""
        return -(-self.rows // TILE_M)

    @property
    def cluster_size(self) -> int:
        """CTAs of a cluster, each with a tile of the same sequence and the same keys: each loads half of a KV tile for both."""
        return math.gcd(self.num_tiles, self.max_cluster)

    @property
    def num_groups(self) -> int:
        """Row groups of a sequence: clusters that its tiles take."""
        return self.num_tiles // self.cluster_size

    @property
    def tile_rows(self) -> int:
        """Rows of a tile that may be a token's head."""
        return min(TILE_M, self.rows)

    @property
    def tile_warps(self) -> int:
        """Warps of a warpgroup that have such rows."""
        return -(-self.tile_rows // WARP_ROWS)

    @property
    def box_heads(self) -> int:
        """Heads of a TMA box of Q."""
        return math.gcd(self.num_heads, TILE_M)

    @property
    def box_tokens(self) -> int:
        """Tokens of a TMA box of Q: several where a tile has all heads of each."""
        return min(TILE_M // self.num_heads, self.query_len) if self.box_heads == self.num_heads else 1

    @property
    def q_boxes(self) -> int:
        """Boxes of a part of Q."""
        return -(-self.tile_rows // (self.box_heads * self.box_tokens))

    @property
    def loaded_rows(self) -> int:
        """Rows of Q that boxes bring; the others of the tile are zero."""
        return self.q_boxes * self.box_heads * self.box_tokens


def resolve(problem: AttentionProblem, limits: BatchLimits) -> MlaDecodeConfig:
    """The compile key of a latent problem."""
    assert (problem.head_dim, problem.head_dim_v) == (LATENT_DIM + ROPE_DIM, LATENT_DIM), problem
    config = MlaDecodeConfig(
        arch=problem.target_arch,
        dtype=problem.dtype,
        kv_dtype=problem.kv_dtype,
        num_heads=problem.num_q_heads,
        query_len=limits.decode_query_len,
        box_rows=box_rows_of(problem.page_size, TILE_N),
        mask=problem.mask,
        has_lse=problem.has_lse,
        has_pieces=problem.batch_invariant,
    )
    return replace(config, prefetch_blocks=CONVERTED_PREFETCH_BLOCKS) if config.is_converted else config


def tile_slot_floats(config: MlaDecodeConfig) -> int:
    """Float32 of a tile's part of a split-KV slot: O of its warps' rows, then reference and row_sum of each row."""
    return config.tile_warps * WARP_ROWS * (LATENT_DIM + 2)


def tile_stats_bytes(config: MlaDecodeConfig) -> int:
    """Bytes of reference and row_sum of all rows of a slot's tile."""
    return config.tile_warps * WARP_ROWS * 8


def slot_floats(config: MlaDecodeConfig) -> int:
    """Float32 of a split-KV slot: its tiles one behind the other."""
    return config.cluster_size * tile_slot_floats(config)


def slot_vectors(config: MlaDecodeConfig) -> int:
    """Vectors of a tile's slot for each consumer thread: tells how long the pieces of batch-invariant mode are (`common/kv_pieces.py`)."""
    return config.tile_warps * WARP_VECTORS // CONSUMER_THREADS


def part_quarters(config: MlaDecodeConfig) -> int:
    """Quarters of a block that a part of a row group costs: `WorkShape.decode_part_quarters`."""
    return (PART_QUARTERS + WARP_PART_QUARTERS * config.tile_warps) // (config.tile_n // TILE_N)


def lone_block_eighths(config: MlaDecodeConfig) -> int:
    """Eighths of its usual time that a block takes a CTA alone: `WorkShape.lone_block_eighths`."""
    return LONE_BLOCK_EIGHTHS if config.num_groups == 1 else SHARED_LONE_BLOCK_EIGHTHS


def most_parts(config: MlaDecodeConfig) -> int:
    """Parts of a row group that the merge has room for: statistics of a tile of all of them, and a vector of each."""
    return MERGE_BYTES // (tile_stats_bytes(config) + 4 * VEC)


def split_tiles(limits: BatchLimits) -> int:
    """KV tiles of a long piece in batch-invariant mode: a constant of the plan. At least 512 keys, and at most 16 long pieces a row,
    since a slot of 128 heads takes 258 KiB."""
    return max(512 // TILE_N, -(-limits.max_seqlen_k // (16 * TILE_N)))
