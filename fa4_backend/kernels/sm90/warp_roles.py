"""Who does what in a CTA: warpgroup 0 loads, the others compute 64 query rows each; registers move from the first to the others.

load --q, kv--> consumers
"""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.kernels.common.edges import Party, PipelineEdge, Signal
from fa4_backend.kernels.common.prefill_config import PrefillConfig

WARPGROUP_THREADS = 128
WORK_STAGE = 2  # tiles whose numbers are in shared memory: the one being finished and the next
WGMMA_ROWS = 64  # rows of a wgmma tile (PTX ISA, wgmma.mma_async: M is always 64)

# Registers a thread after setmaxnreg (multiples of 8), by number of consumer warpgroups: 128 * (load + n * consumer) <= 65536.
LOAD_REGISTERS = {1: 56, 2: 40, 3: 32}
CONSUMER_REGISTERS = {1: 240, 2: 232, 3: 160}


@dataclass(frozen=True)
class WarpRoles:
    """Warpgroups, thread counts and barrier ids of one kernel."""

    num_consumers: int

    @staticmethod
    def of(config: PrefillConfig) -> WarpRoles:
        """The roles of a kernel: a consumer warpgroup for each 64 rows of the tile."""
        assert config.tile.tile_m % WGMMA_ROWS == 0, config.tile
        return WarpRoles(config.tile.tile_m // WGMMA_ROWS)

    @property
    def consumer_threads(self) -> int:
        """Threads of all consumer warpgroups."""
        return WARPGROUP_THREADS * self.num_consumers

    @property
    def threads(self) -> int:
        """Threads of the CTA."""
        return WARPGROUP_THREADS + self.consumer_threads

    @property
    def consumer_warps(self) -> int:
        """Warps that release a shared-memory slot, one arrival each."""
        return 4 * self.num_consumers

    @property
    def load_registers(self) -> int:
        """Registers a thread of the load warpgroup keeps."""
        return LOAD_REGISTERS[self.num_consumers]

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread takes."""
        return CONSUMER_REGISTERS[self.num_consumers]

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


def pipeline_edges(config: PrefillConfig) -> tuple[PipelineEdge, ...]:
    """Every pipeline of the kernel."""
    load, consumers = Party("load", Signal.TMA), Party("consumers", Signal.WARPS, WarpRoles.of(config).consumer_warps)
    q_bytes = config.q_per_kv * config.tokens_per_tile * config.head_dim * config.element_bytes
    kv_bytes = config.tile.tile_n * max(config.head_dim, config.head_dim_v) * config.element_bytes
    return (
        # Q and the tile's numbers; where there are two buffers, O leaves through Q's before it is released.
        PipelineEdge("q_load_to_consumers", config.tile.q_stage, (load,), (consumers,), q_bytes),
        # K and V tiles share the ring; a narrower one announces its own bytes.
        PipelineEdge("kv_load_to_consumers", config.tile.kv_stage, (load,), (consumers,), kv_bytes),
    )
