"""Shared memory of a CTA: what lies where, in bytes from a 1024-byte aligned base.

An operand tile consists of parts of 64 elements of the head dimension; a part is 128 rows of 128 bytes, swizzled in 16-byte units by the
row's low three bits (TMA's and tcgen05's 128-byte swizzle, PTX ISA "Shared memory matrix layout"). A head_dim of 96 fills its second part
to one half; TMA fills the rest with zeros, and no MMA reads it. K and V in FP8 are staged in parts of 64 elements, or of 32 where 64 do not
divide the head, in TMA's swizzle of that many bytes. Where Q is FP8 too, products read e4m3: parts have rows of 128, 64 or 32 bytes, the
most that divides both head dimensions, in the swizzle of that many bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common.edges import EdgeBarriers
from fa4_backend.kernels.schedule.work_list import TILE_INTS
from fa4_backend.kernels.sm100.config import Sm100Config

STATS_BYTES = 8  # two float32 a row
# Padding of a row of O: rows then start four banks apart, so that eight threads with a row each store 16 bytes without conflict.
# It is not part of the tile, and holds the row's statistics, two float32 for each query tile.
O_PAD_BYTES = 16
TMEM_POINTER_BYTES = 8
FLAG_BYTES = 8  # one int32: whether the correction has all of an item's parts
FEED_STAGE = 4  # entries of the work list that roles may be apart
FEED_BYTES = 4 * TILE_INTS


def o_pitch(config: Sm100Config) -> int:
    """Bytes from a row of O, or of a part of it, to the next in shared memory."""
    return config.o_columns * config.kernel.out_element_bytes + O_PAD_BYTES


@dataclass(frozen=True)
class TileBytes:
    """Bytes of one buffer of each payload in this CTA, and what TMA delivers to it."""

    part: int  # one part of a Q or V tile
    k_part: int  # one part of the rows of K that this CTA holds
    q: int
    k: int
    v: int
    o: int
    q_tx_bytes: int
    k_tx_bytes: int
    v_tx_bytes: int
    kv_row: int  # a row of a part of K or V as TMA delivers it
    k_loaded_part: int  # one part of K as TMA delivers it
    v_loaded_part: int

    @staticmethod
    def of(resolved: Sm100Config) -> TileBytes:
        """Sizes for a config; K and V tiles are fetched whole, Q tiles without their idle rows."""
        config = resolved.kernel
        part, k_part = config.tile.tile_n * resolved.row_bytes, resolved.k_rows * resolved.row_bytes
        assert config.tile.tile_m == config.tile.tile_n, f"one part size serves q, k and v: {config.tile=}"
        qk_parts, v_parts = resolved.num_parts(config.head_dim), resolved.v_parts
        rows = config.tokens_per_tile * config.q_per_kv
        kv_row = resolved.loaded_elems * config.kv_element_bytes
        k_loaded_part, v_loaded_part = resolved.k_rows * kv_row, config.tile.tile_n * kv_row
        return TileBytes(
            part=part,
            k_part=k_part,
            q=qk_parts * part,
            k=qk_parts * k_part,
            v=v_parts * part,
            o=config.tile.tile_m * o_pitch(resolved),
            q_tx_bytes=qk_parts * rows * resolved.row_bytes,
            k_tx_bytes=resolved.loaded_parts(config.head_dim) * k_loaded_part,
            v_tx_bytes=resolved.loaded_parts(config.head_dim_v) // resolved.tuning.cta_group * v_loaded_part,
            kv_row=kv_row,
            k_loaded_part=k_loaded_part,
            v_loaded_part=v_loaded_part,
        )


@dataclass(frozen=True)
class Storage:
    """Byte offsets of every buffer."""

    sizes: TileBytes
    barriers: EdgeBarriers
    q: int
    kv: int  # the ring that products read
    kv_stride: int
    loaded: int  # where TMA delivers K and V: that ring, or in FP8 the staged tiles behind it
    loaded_stride: int
    o: int
    stats: int  # of row 0, query tile 0; rows are o_pitch apart, query tiles STATS_BYTES
    tmem_pointer: int
    part_flag: int
    feed: int  # the ring of entries of the work list, as the load warp has taken them
    num_bytes: int

    @staticmethod
    def of(resolved: Sm100Config, o_stage: int) -> Storage:
        """Lay out the buffers.

        Raises:
            ValueError: they do not fit the arch's shared memory.
        """
        from fa4_backend.kernels.sm100.warp_roles import pipeline_edges

        config = resolved.kernel
        sizes = TileBytes.of(resolved)
        kv_stage = resolved.kv_stage
        kv = resolved.q_tiles * sizes.q
        kv_stride = max(sizes.k, sizes.v)
        loaded, loaded_stride = kv, kv_stride
        if resolved.converts:
            loaded, loaded_stride = kv + kv_stage * kv_stride, max(sizes.k_tx_bytes, sizes.v_tx_bytes)
        o = kv + kv_stage * kv_stride + resolved.staged * loaded_stride
        assert resolved.q_tiles * STATS_BYTES <= O_PAD_BYTES, f"{resolved.q_tiles=}"
        stats = o + o_pitch(resolved) - O_PAD_BYTES
        tmem_pointer = o + o_stage * sizes.o
        part_flag = tmem_pointer + TMEM_POINTER_BYTES
        feed = part_flag + FLAG_BYTES
        assert feed % 16 == 0 and FEED_BYTES % 16 == 0, f"{feed=}"
        barriers = EdgeBarriers(pipeline_edges(sizes, resolved, o_stage), feed + FEED_STAGE * FEED_BYTES)
        limit = ARCHS[config.arch].smem_bytes
        if barriers.end_bytes > limit:
            raise ValueError(f"shared memory of {config.name}: expected at most {limit} bytes, got {barriers.end_bytes}")
        return Storage(
            sizes, barriers, 0, kv, kv_stride, loaded, loaded_stride, o, stats, tmem_pointer, part_flag, feed, barriers.end_bytes
        )  # fmt: skip
