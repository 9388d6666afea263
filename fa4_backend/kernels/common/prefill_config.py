"""What is compiled into a prefill kernel of any chip. Frozen and complete before tracing; everything else is an argument of each launch.

Runtime values, never part of a key: lengths, window sizes, scales, the soft cap, strides, page size, number of pages and of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common.hardware import widest_row
from fa4_backend.problem import FP8, PAGED, RAGGED, AttentionProblem, MaskFeatures, OperandDtypes, short_dtypes

ARRIVAL_LOOKS = 512  # at the counter of a tile's parts, some 0.5 us each, before a CTA leaves its share to the one that comes last


@dataclass(frozen=True)
class TileShape:
    """The tuned part of a config; an arch's `tuning` chooses it."""

    tile_m: int  # packed query rows a CTA works on
    tile_n: int  # KV tokens a step
    kv_stage: int  # shared-memory buffers for K and V tiles, together
    ping_pong: bool = False  # sm90: warpgroups take turns in issuing products
    q_stage: int = 2  # sm90: buffers of Q. With one, O leaves from registers and the next tile's Q comes while the last softmax runs
    value_columns: int = 256  # sm90: of V, that one wgmma of the second product takes at most
    asks_first: bool = False  # sm90: a vote before the exponentials of whole blocks; lanes meet only where a reference moves
    rescale_threshold: float = 8.0  # log2 units a row's maximum may grow before O is rescaled; 0: always rescale


@dataclass(frozen=True)
class PrefillConfig(OperandDtypes):
    """What every prefill kernel is compiled for; a chip's own config holds it beside its own numbers, and is the compile key."""

    arch: str
    dtype: str  # of the model
    q_dtype: str  # of q
    kv_dtype: str  # of K and V as the kernel reads them
    out_dtype: str  # of out
    head_dim: int
    head_dim_v: int
    q_per_kv: int
    tile: TileShape
    box_rows: int  # tokens one TMA box of K or V fetches; divides tile_n, and page_size where there are pages
    mask: MaskFeatures
    has_lse: bool
    sinks_dtype: str  # of the tensor of sinks, read as it is
    is_dependent: bool = False  # launched behind a decode kernel of the same call, and runs beside it
    has_parts: bool = False  # entries of the work list may be parts of a tile, cut along KV
    piece_blocks: int = 0  # with it: n_blocks of a short piece (`kv_pieces.tile_rule`), at whose ends alone KV is cut; 0: anywhere
    kv_source: str = PAGED  # where K and V lie: PAGED or RAGGED
    is_converted: bool = False  # K and V were brought from FP8 to 16 bits before (`kernels/convert_kv`), and have scales as in FP8
    share_parts: int = 0  # parts of a tile from which on all CTAs that made them add them up; 0: always the one that comes last
    arrival_looks: int = ARRIVAL_LOOKS

    def __post_init__(self) -> None:
        assert self.tile.tile_n % self.box_rows == 0 and self.box_rows % 8 == 0, f"{self.box_rows=} {self.tile=}"
        assert 1 <= self.q_per_kv <= self.tile.tile_m, f"{self.q_per_kv=} {self.tile=}"
        assert self.kv_source in (PAGED, RAGGED), f"{self.kv_source=}"
        assert self.has_parts or not self.has_pieces, f"{self.piece_blocks=}"
        assert not (self.is_converted and self.converts_kv), f"{self.kv_dtype=}"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}v{self.head_dim_v}"
        features = self.mask.short_name + "-lse" * self.has_lse + "-dependent" * self.is_dependent + "-parts" * self.has_parts
        features += f"-pieces{self.piece_blocks}" if self.has_pieces else ""
        tile = f"m{self.tile.tile_m}n{self.tile.tile_n}s{self.tile.kv_stage}r{self.tile.rescale_threshold:g}"
        tile += "-turns" if self.tile.ping_pong else ""
        tile += "-asks" if self.tile.asks_first else ""
        tile += "-q1" if self.tile.q_stage == 1 else ""
        tile += f"-v{self.tile.value_columns}" if self.tile.value_columns < self.head_dim_v else ""
        dtypes = short_dtypes(self.dtype, q=self.q_dtype, kv=self.kv_dtype, out=self.out_dtype)
        source = "" if self.kv_source == PAGED else f"-{self.kv_source}"
        source += "-converted" * self.is_converted
        return f"prefill-{self.arch}-{dtypes}-{dims}-g{self.q_per_kv}-b{self.box_rows}-{tile}{features}{source}"

    @property
    def converts_kv(self) -> bool:
        """Whether the kernel itself brings K and V from FP8 to what its products take."""
        return self.kv_dtype == FP8

    @property
    def has_kv_scales(self) -> bool:
        """Whether K and V stand for what is read times a scale, one of K and one of V a KV head."""
        return self.converts_kv or self.is_converted

    @property
    def has_pieces(self) -> bool:
        """Whether a tile's KV is added up piece after piece, whoever has which: a row's bits do not depend on its batch."""
        return self.piece_blocks > 0

    @property
    def may_fix_reference(self) -> bool:
        """Whether rows whose cap is small enough keep their first block's reference: scores are bounded, and weights have float32's
        exponents (Hopper)."""
        return self.mask.has_softcap and not self.mask.has_alibi and self.dtype == "bfloat16" and not self.converts_kv

    @property
    def may_skip_rescale(self) -> bool:
        """Whether O is rescaled behind a vote, since few blocks move a row's reference (Hopper)."""
        return self.tile.rescale_threshold > 0 or self.may_fix_reference

    @property
    def tokens_per_tile(self) -> int:
        """Query tokens of a tile; rows past `tokens_per_tile * q_per_kv` are idle."""
        return self.tile.tile_m // self.q_per_kv

    def part_elems(self, head_dim: int) -> int:
        """Elements of a head that lie in one swizzled row of shared memory: a TMA box is that wide."""
        return widest_row(head_dim * self.element_bytes) // self.element_bytes


def box_rows_of(page_size: int, tile_n: int) -> int:
    """Largest power of two that divides page size and tile: the tokens one TMA box may fetch from one page."""
    common = gcd(page_size, tile_n)
    return common & -common


def prefill_config(problem: AttentionProblem, tile: TileShape, *, is_dependent: bool, has_parts: bool = False) -> PrefillConfig:
    """The common part of `problem`'s prefill kernel with the given tile, alone or behind a decode kernel.

    Args:
        has_parts: the kernel can add up parts of a tile.
    """
    assert problem.target_arch in ARCHS, problem.target_arch
    # Without pages a box is a whole tile.
    box_rows = tile.tile_n if problem.kv_source == RAGGED else box_rows_of(problem.page_size, tile.tile_n)
    return PrefillConfig(
        arch=problem.target_arch,
        dtype=problem.dtype,
        q_dtype=problem.q_dtype,
        kv_dtype=problem.kv_dtype,
        out_dtype=problem.out_dtype,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        q_per_kv=problem.q_per_kv,
        tile=tile,
        box_rows=box_rows,
        mask=problem.mask,
        has_lse=problem.has_lse,
        sinks_dtype=problem.sinks_dtype,
        is_dependent=is_dependent,
        has_parts=has_parts,
        kv_source=problem.kv_source,
    )
