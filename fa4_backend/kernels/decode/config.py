"""What is compiled into the decode kernel, and which problems it serves.

Page size, lengths, strides, window sizes, scales and the number of heads are arguments of each launch: one compiled
kernel serves every page size, with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common.hardware import LANES, SWIZZLE_ALIGN, VEC, widest_row
from fa4_backend.problem import DTYPE_BYTES, PAGED, AttentionProblem, BatchLimits, MaskFeatures, OperandDtypes, short_dtypes

BOX_KEYS = 16  # keys a TMA box fetches and a warp works on: the smallest page, and the K of one mma.sync
BOXES = 4  # boxes of a KV tile, one a key warp
TILE_N = BOX_KEYS * BOXES
MMA_ROWS = 16  # packed query rows of one mma.sync
MAX_ROWS = 64  # packed query rows: four row groups of four key warps
MERGE_PAD = 8  # float32 beside each row of the merge buffer: rows of a fragment then start 8 banks apart
RESERVED_BYTES = 768  # barriers, entries, flags, alignment
MIN_KV_STAGE, MAX_KV_STAGE = 2, 8  # KV tiles in flight, of 16-bit elements; of others as many bytes
ENTRY_STAGE = 2  # entries the load warp may be ahead of the consumers
MAX_SLOT_STAGE = 3  # copies of slots under way while one is added up, and that one
# Vectors of its slots that each thread of a CTA would have to add up alone, from which on all CTAs that made a row group's slots do so.
# One vector takes 0.05 us, waiting for the others and reading a share some 2.
SHARE_VECTORS = 64
# Looks at the counter of a row group's slots, some 0.5 us each, before a CTA leaves its share to the one that comes last: which then takes
# long, a unit after the other.
ARRIVAL_LOOKS = 512
# Where row groups are equally long: KV tiles that a part has at least, and the square of a row group's parts over its tiles at most.
MIN_PART_TILES, PARTS_RATIO = 2, 16
# What a part of a row group costs its CTA, in quarters of a tile, and eighths of its usual time that a tile takes a CTA where others are
# done: an eighth of the CTAs may be idle before whole row groups take longer. H200, us, cut by rows and into equal parts (2026-11-29,
# `python -m tests.device.measure_cuts`; rows of 2,112 and 4,160 keys, up to 32 more or less); of 50 x 4160 equal parts are taken:
#   32/8  128 x 2112 256.4, 256.9   64 x 4160 251.4, 252.6   32 x 2112 69.8, 74.1   8 x 4160 40.8, 42.1   50 x 4160 213.4, 200.7
#   16/2  128 x 2112  70.7,  75.1   64 x 4160  71.4,  74.0   32 x 2112 27.5, 28.0   8 x 4160 20.4, 22.7   50 x 4160  62.7,  60.6
PART_QUARTERS, LONE_BLOCK_EIGHTHS = 12, 7


@dataclass(frozen=True)
class DecodeConfig(OperandDtypes):
    """Compile key of a decode kernel."""

    arch: str
    dtype: str  # of the model
    q_dtype: str  # of q
    kv_dtype: str  # of K and V in memory
    out_dtype: str  # of out
    head_dim: int
    head_dim_v: int
    q_per_kv: int
    query_len: int  # longest query of a decode row
    ctas_per_sm: int
    mask: MaskFeatures
    has_lse: bool
    sinks_dtype: str  # of the tensor of sinks, read as it is
    has_pieces: bool  # an entry of the work list may hold several pieces (batch invariance)
    share_vectors: int = SHARE_VECTORS
    arrival_looks: int = ARRIVAL_LOOKS

    def __post_init__(self) -> None:
        assert self.rows <= MAX_ROWS, f"{self.query_len=} {self.q_per_kv=}"

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.decode.kernel:build"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}v{self.head_dim_v}"
        features = self.mask.short_name + "-lse" * self.has_lse + "-pieces" * self.has_pieces
        dtypes = short_dtypes(self.dtype, q=self.q_dtype, kv=self.kv_dtype, out=self.out_dtype)
        return f"decode-{self.arch}-{dtypes}-{dims}-g{self.q_per_kv}-q{self.query_len}-c{self.ctas_per_sm}{features}"

    @property
    def rows(self) -> int:
        """Packed query rows of a row group: `row = token * q_per_kv + head`."""
        return self.query_len * self.q_per_kv

    @property
    def row_groups(self) -> int:
        """Warps that share a KV tile's 16 keys, each with 16 packed rows."""
        return -(-self.rows // MMA_ROWS)

    @property
    def score_chains(self) -> int:
        """Chains of products that a box's scores are summed in.

        Two make a lone CTA 5 % faster (32 x 4K on 16 CTAs of an H100: 513 us for 542) but take 8 registers: beside running totals of
        several vectors 80 bytes spill (64 x 4K of 16/2 heads: 119 us for 113), and for sm_100a ptxas spills 8 to 16 bytes more in any case.
        """
        spills = self.arch != "sm_90a" or (self.has_pieces and slot_vectors(self) > 1)
        return 1 if spills else 2

    @property
    def merge_rows(self) -> int:
        """Rows of a row group that may be tokens."""
        return min(MMA_ROWS, self.rows)

    @property
    def num_consumer_warps(self) -> int:
        """Key warps times row groups."""
        return BOXES * self.row_groups

    @property
    def num_threads(self) -> int:
        """Consumer warps and the load warp."""
        return LANES * (self.num_consumer_warps + 1)

    @property
    def q_part_bytes(self) -> int:
        """Bytes of a head of q that lie in one swizzled row of shared memory."""
        return widest_row(self.head_dim * self.element_bytes)

    def kv_part_bytes(self, head_dim: int) -> int:
        """The same of a head of K or V."""
        return widest_row(head_dim * self.kv_element_bytes)

    @property
    def kv_stage_bytes(self) -> int:
        """One KV tile, K and V."""
        return TILE_N * (self.head_dim + self.head_dim_v) * self.kv_element_bytes

    @property
    def q_stage_bytes(self) -> int:
        """Q of an entry, to where the swizzle's pattern begins anew."""
        return -(-self.rows * self.head_dim * self.element_bytes // SWIZZLE_ALIGN) * SWIZZLE_ALIGN

    @property
    def merge_buffers(self) -> int:
        """Key warps of a row group that lay down their O at once: all four, or two and two where that leaves room for more KV tiles."""
        return BOXES if self._kv_stage(BOXES) >= self._kv_stage(BOXES // 2) else BOXES // 2

    @property
    def kv_stage(self) -> int:
        """KV tiles in flight: as many as fit. A tile of d128 is 32 KB; the H200 needs about 45 KB in flight an SM (4.8 TB/s, 1.2 us)."""
        return self._kv_stage(self.merge_buffers)

    @property
    def has_enough_stages(self) -> bool:
        """Whether shared memory holds the bytes of `MIN_KV_STAGE` tiles: one is loaded while another is attended to."""
        return self.kv_stage >= self._stages_of(MIN_KV_STAGE)

    @property
    def slot_bytes(self) -> int:
        """A split-KV slot."""
        return 4 * slot_floats(self)

    @property
    def slot_stage(self) -> int:
        """Parts of the KV ring's memory that take slots in turns when they are added up: a copy flies while another is read."""
        return min(MAX_SLOT_STAGE, self.kv_stage * self.kv_stage_bytes // self.slot_bytes)

    @property
    def slot_stage_bytes(self) -> int:
        """Such a part, of whole 128 bytes."""
        return self.kv_stage * self.kv_stage_bytes // self.slot_stage // 128 * 128

    @property
    def stage_slots(self) -> int:
        """Slots in such a part."""
        return self.slot_stage_bytes // self.slot_bytes

    def _merge_bytes(self, buffers: int) -> int:
        return buffers * self.row_groups * self.merge_rows * (self.head_dim_v + MERGE_PAD + 2) * 4

    def _stages_of(self, tiles: int) -> int:
        """KV tiles with as many bytes as `tiles` of the model's dtype."""
        return tiles * DTYPE_BYTES[self.dtype] // self.kv_element_bytes

    def _kv_stage(self, merge_buffers: int) -> int:
        other = RESERVED_BYTES + self._merge_bytes(merge_buffers) + ENTRY_STAGE * self.q_stage_bytes
        most = self._stages_of(MAX_KV_STAGE)
        # Each CTA costs 1 KiB of the SM's 228 beside its own.
        return min(most, (ARCHS[self.arch].smem_bytes // self.ctas_per_sm - 512 * (self.ctas_per_sm - 1) - other) // self.kv_stage_bytes)


# Packed rows up to which this kernel is faster than prefill tiles that are cut along KV, by arch and head_dim; 32 for the others: more rows
# of wide heads spill here. H100, us of 1 x 4K / 16 x 4K / 64 x 4K with one KV head (64 rows of d128: 8), L2 clean, here and there:
#   d64     64 rows 19.2 / 21.0 / 39.9 and 24.3 / 26.2 / 39.6
#   d96     48 rows 18.8 / 24.1 / 52.2 and 26.1 / 26.7 / 50.3; 64 rows 27.3 / 34.7 / 72.2 and 25.1 / 26.4 / 50.2
#   d128    32 rows 16.9 / 24.4 / 57.2 and 28.9 / 29.6 / 58.5; 48 rows 23.6 / 29.9 / 62.5 and 27.1 / 28.6 / 59.0;
#           64 rows 41.7 / 222 / 843 and 29.5 / 101 / 375
#   192/128 48 rows 28.7 / 38.5 / 97.9 and 29.7 / 31.6 / 71.4
# Blackwell, counted on the emulator for sm_100a (2026-11-28): issue slots of a scheduler for a tile of 64 keys, and bytes that spill,
# beside the cycles in which an SM's share of the memory (7 of 8 TB/s, 1.85 GHz) brings the tile's K and V. 32 rows end before their
# bytes have come, 48 do not; a prefill item of d128 takes 1,145 cycles for 64 keys (modelled) with any rows up to 256.
#   d64     641 cycles:  32 rows 605;    48 rows 855;          64 rows 1,259, 16 bytes
#   d96     961 cycles:  32 rows 627;    48 rows 1,089, 56;    64 rows 1,447, 192
#   d128    1,282 cycles: 32 rows 917;   48 rows 1,455, 96;    64 rows 1,935, 312
MOST_ROWS_BESIDE_PARTS: dict[str, dict[int, int]] = {"sm_90a": {64: 64, 96: 48}, "sm_100a": {}, "sm_103a": {}}


def resolve(problem: AttentionProblem, limits: BatchLimits, *, prefill_has_parts: bool) -> DecodeConfig | None:
    """The compile key of `problem`'s decode kernel; None where the prefill kernel must serve its short rows too.

    That is: K and V without pages, exact mode, float32, more packed rows than `MAX_ROWS`, heads wider than 256 or of no whole 32 bytes, or
    so many rows of so wide heads that two KV tiles of 16-bit elements do not fit.

    Args:
        prefill_has_parts: the prefill kernel cuts tiles along KV, and anywhere: at fixed places rows keep this kernel; then
            `MOST_ROWS_BESIDE_PARTS` in place of `MAX_ROWS`.
    """
    if problem.kv_source != PAGED or problem.exact:
        return None
    most_rows = MOST_ROWS_BESIDE_PARTS[problem.target_arch].get(problem.head_dim, 32) if prefill_has_parts else MAX_ROWS
    if DTYPE_BYTES[problem.dtype] != 2 or problem.q_per_kv * limits.decode_query_len > most_rows:
        return None
    elements = 32 // DTYPE_BYTES[problem.kv_dtype]
    if problem.head_dim % elements or problem.head_dim_v % elements or max(problem.head_dim, problem.head_dim_v) > 256:
        return None
    config = DecodeConfig(
        arch=problem.target_arch,
        dtype=problem.dtype,
        q_dtype=problem.q_dtype,
        kv_dtype=problem.kv_dtype,
        out_dtype=problem.out_dtype,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        q_per_kv=problem.q_per_kv,
        query_len=limits.decode_query_len,
        ctas_per_sm=1,
        mask=problem.mask,
        has_lse=problem.has_lse,
        sinks_dtype=problem.sinks_dtype,
        has_pieces=problem.batch_invariant,
    )
    # Two small CTAs hide each other's beginnings and ends: 32/8 d128 page 16 on an H200, against one CTA with the same bytes in
    # flight: 1 x 16K 32.4 us (35.8), 8 x 1K 23.4 (24.9), 256 ragged rows 389 (412), 64 x 16K 955 (966); 1 x 1K 12.0 (11.4).
    pair = replace(config, ctas_per_sm=2)
    fits_registers = config.row_groups == 1 and config.head_dim_v <= 128  # 5 warps of up to 204 registers, twice
    if fits_registers and pair.has_enough_stages:
        return pair
    return config if config.has_enough_stages else None


def slot_floats(config: DecodeConfig) -> int:
    """Float32 of a split-KV slot: rows of O, then row_max and row_sum of each row, to the next 16 bytes."""
    return config.rows * config.head_dim_v + -(-2 * config.rows // VEC) * VEC


def slot_vectors(config: DecodeConfig) -> int:
    """Vectors of `VEC` float32 of a split-KV slot that each consumer thread holds while slots are added up."""
    return -(-config.rows * (config.head_dim_v // VEC) // (LANES * config.num_consumer_warps))


def split_tiles(limits: BatchLimits) -> int:
    """KV tiles of a long piece in batch-invariant mode: a constant of the plan, so that a row's bits know nothing of its batch.

    512 keys; more where a row may be so long that its pieces would outgrow the workspace (128 long pieces a row).
    """
    return max(512 // TILE_N, -(-limits.max_seqlen_k // (128 * TILE_N)))
