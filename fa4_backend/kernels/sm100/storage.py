"""Shared memory of a CTA: what lies where, in bytes from a 1024-byte aligned base."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common.edges import EdgeBarriers
from fa4_backend.kernels.common.hardware import ACCESS_BYTES
from fa4_backend.kernels.schedule.work_list import TILE_INTS
from fa4_backend.kernels.sm100.config import Sm100Config
from fa4_backend.kernels.sm100.tile_bytes import O_PAD_BYTES, TileBytes, o_pitch
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE, pipeline_edges

STATS_BYTES = 8  # two float32 a row
TMEM_POINTER_BYTES = 8
FLAG_BYTES = 8  # one int32: whether the correction has all of an item's parts
FEED_BYTES = 4 * TILE_INTS


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
    def of(config: Sm100Config, o_stage: int) -> Storage:
        """Lay out the buffers.

        Raises:
            ValueError: they do not fit the arch's shared memory.
        """
        kernel = config.kernel
        sizes = TileBytes.of(config)
        kv_stage = config.kv_stage
        kv = config.q_tiles * sizes.q
        kv_stride = max(sizes.k, sizes.v)
        loaded, loaded_stride = kv, kv_stride
        if config.converts:
            loaded, loaded_stride = kv + kv_stage * kv_stride, max(sizes.k_tx_bytes, sizes.v_tx_bytes)
        o = kv + kv_stage * kv_stride + config.staged * loaded_stride
        assert config.q_tiles * STATS_BYTES <= O_PAD_BYTES, f"{config.q_tiles=}"
        stats = o + o_pitch(config) - O_PAD_BYTES
        tmem_pointer = o + o_stage * sizes.o
        part_flag = tmem_pointer + TMEM_POINTER_BYTES
        feed = part_flag + FLAG_BYTES
        assert feed % ACCESS_BYTES == 0 and FEED_BYTES % ACCESS_BYTES == 0, f"{feed=}"
        barriers = EdgeBarriers(pipeline_edges(sizes, config, o_stage), feed + FEED_STAGE * FEED_BYTES)
        limit = ARCHS[kernel.arch].smem_bytes
        if barriers.end_bytes > limit:
            raise ValueError(f"shared memory of {kernel.name}: expected at most {limit} bytes, got {barriers.end_bytes}")
        return Storage(
            sizes, barriers, 0, kv, kv_stride, loaded, loaded_stride, o, stats, tmem_pointer, part_flag, feed, barriers.end_bytes
        )  # fmt: skip
