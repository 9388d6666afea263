"""Who does what in a CTA: warpgroup 0 loads, the others compute 64 query rows each; registers move from the first to the others.

16-bit K and V:  load --q, kv--> consumers
FP8 K and V:     load --fp8--> convert --kv--> consumers,  load --q--> consumers
"""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.kernels.common.edges import Party, PipelineEdge, Signal
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.sm90.staging import staging_slots, tile_elems

WARPGROUP_THREADS = 128
WORK_STAGE = 2  # tiles whose numbers are in shared memory: the one being finished and the next
WGMMA_ROWS = 64  # rows of a wgmma tile (PTX ISA, wgmma.mma_async: M is always 64)

# Registers a thread after setmaxnreg (multiples of 8), by number of convert and of consumer warpgroups:
# 128 * ((1 + m) * load + n * consumer) <= 65536.
LOAD_REGISTERS = {(0, 1): 56, (0, 2): 40, (0, 3): 32, (1, 1): 56, (1, 2): 40, (2, 1): 56}
CONSUMER_REGISTERS = {(0, 1): 240, (0, 2): 232, (0, 3): 160, (1, 1): 240, (1, 2): 216, (2, 1): 240}


@dataclass(frozen=True)
class WarpRoles:
    """Warpgroups, thread counts and barrier ids of one kernel."""

    num_consumers: int
    num_converters: int = 0  # warpgroups that do nothing but convert, beside the warps of warpgroup 0 that do not load

    @staticmethod
    def of(config: PrefillConfig) -> WarpRoles:
        """The roles of a kernel: a consumer warpgroup for each 64 rows of the tile.

        Where K and V are FP8, warpgroups that convert fill up 512 threads, which begin with 128 registers: too few for three consumers. A
        wgmma of 256 columns wants more, which 384 threads begin with.
        """
        assert config.tile.tile_m % WGMMA_ROWS == 0, config.tile
        num_consumers = config.tile.tile_m // WGMMA_ROWS
        if not config.converts_kv or num_consumers > 2:
            return WarpRoles(num_consumers)
        is_wide = min(config.head_dim_v, config.tile.value_columns) >= 256
        return WarpRoles(num_consumers, (2 if is_wide else 3) - num_consumers)

    @property
    def convert_warps(self) -> int:
        """Warps that convert where K and V are FP8: all before the consumers but warp 0."""
        return self.first_consumer_warp - 1

    @property
    def first_consumer_warp(self) -> int:
        """Consumers are the warps from here on."""
        return WARPGROUP_THREADS // 32 * (1 + self.num_converters)

    @property
    def consumer_threads(self) -> int:
        """Threads of all consumer warpgroups."""
        return WARPGROUP_THREADS * self.num_consumers

    @property
    def threads(self) -> int:
        """Threads of the CTA."""
        return 32 * self.first_consumer_warp + self.consumer_threads

    @property
    def consumer_warps(self) -> int:
        """Warps that release a shared-memory slot, one arrival each."""
        return 4 * self.num_consumers

    @property
    def load_registers(self) -> int:
        """Registers a thread that loads or converts keeps."""
        return LOAD_REGISTERS[self.num_converters, self.num_consumers]

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread takes."""
        return CONSUMER_REGISTERS[self.num_converters, self.num_consumers]

    # Named barriers; 0 is the CTA's own.
    @property
    def turn_barrier(self) -> int:
        """First of `num_consumers` barriers: it is consumer i's turn to issue its products."""
        return 1

    @property
    def consumers_barrier(self) -> int:
        """All consumers."""
        return 1 + self.num_consumers

    @property
    def output_barrier(self) -> int:
        """First of `num_consumers` barriers: threads of consumer i wrote what others of it will read."""
        return 2 + self.num_consumers


def has_own_slots(config: PrefillConfig) -> bool:
    """Whether K and V tiles take turns in stages of different size. Where K and V are FP8 what is converted takes any."""
    return config.head_dim != config.head_dim_v and config.tile.kv_stage % 2 == 0 and not config.converts_kv


def pipeline_edges(config: PrefillConfig) -> tuple[PipelineEdge, ...]:
    """Every pipeline of the kernel."""
    load, consumers = Party("load", Signal.TMA), Party("consumers", Signal.WARPS, WarpRoles.of(config).consumer_warps)
    q_bytes = config.q_per_kv * config.tokens_per_tile * config.head_dim * config.element_bytes
    kv_bytes = tile_elems(config) * config.kv_element_bytes
    # Q and the tile's numbers; where there are two buffers, O leaves through Q's before it is released.
    q = PipelineEdge("q_load_to_consumers", config.tile.q_stage, (load,), (consumers,), q_bytes)
    # K and V tiles share the ring; a narrower one announces its own bytes.
    if not config.converts_kv:
        return (
            q,
            PipelineEdge("kv_load_to_consumers", config.tile.kv_stage, (load,), (consumers,), kv_bytes),
            # Which tile the warp that loads K has taken.
            PipelineEdge("tile_k_to_v", WORK_STAGE, (Party("k", Signal.WARPS),), (Party("v", Signal.WARPS),)),
        )
    convert = Party("convert", Signal.WARPS, WarpRoles.of(config).convert_warps)
    return (
        q,
        PipelineEdge("kv_convert_to_consumers", config.tile.kv_stage, (convert,), (consumers,)),
        # A tile in FP8 and its note.
        PipelineEdge("fp8_load_to_convert", staging_slots(config), (load,), (convert,), kv_bytes),
    )
