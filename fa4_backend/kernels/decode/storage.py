"""Shared memory of a decode CTA: a ring of KV tiles, a ring of entries with their Q, the place where key warps meet, barriers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common.edges import AT_BARRIER, MBARRIER_BYTES, EdgeBarriers, Party, PipelineEdge, Signal
from fa4_backend.kernels.common.hardware import SWIZZLE_ALIGN
from fa4_backend.kernels.common.pending_entries import MAX_PENDING
from fa4_backend.kernels.decode.config import BOX_KEYS, ENTRY_STAGE, MERGE_PAD, TILE_N, DecodeConfig
from fa4_backend.kernels.schedule.work_list import DECODE_INTS


class SharedTensors(NamedTuple):
    """Views of one CTA's shared memory; addresses are Int32 in the shared window."""

    kv_address: Int32  # kv_stage tiles, each 4 boxes of K, then 4 boxes of V
    kv_full: cute.Pointer  # kv_stage mbarriers: a tile has arrived
    kv_empty: cute.Pointer  # kv_stage mbarriers: every consumer warp is done with it
    slot_full: cute.Pointer  # slot_stage mbarriers: split-KV slots have arrived where KV tiles were
    q_address: Int32  # ENTRY_STAGE tiles of Q: parts of a head, each all packed rows one behind the other, swizzled
    entry_full: cute.Pointer  # ENTRY_STAGE mbarriers: an entry's ints and its Q have arrived
    entry_empty: cute.Pointer  # ENTRY_STAGE mbarriers: every consumer warp has them in registers
    sEntry: cute.Tensor  # (ENTRY_STAGE, DECODE_INTS) int32
    sPending: cute.Tensor  # (MAX_PENDING, DECODE_INTS) int32: entries whose slots are written, whose arrival is due
    sO: cute.Tensor  # (row groups * merge_buffers, merge_rows, head_dim_v) float32: O of a key warp, relative to its maximum
    sMax: cute.Tensor  # (row groups * merge_buffers, merge_rows) float32, row_max in log2 units
    sSum: cute.Tensor  # (row groups * merge_buffers, merge_rows) float32, row_sum
    sShare: cute.Tensor  # (MAX_PENDING,) int32: what of a pending entry this CTA adds up (`common/part_arrivals.py`)


@dataclass(frozen=True)
class DecodeStorage:
    """Layout of the shared memory of one kernel."""

    config: DecodeConfig

    @property
    def box_bytes(self) -> tuple[int, int]:
        """Bytes of a box of K and of V."""
        c = self.config
        return BOX_KEYS * c.head_dim * c.kv_element_bytes, BOX_KEYS * c.head_dim_v * c.kv_element_bytes

    @property
    def edges(self) -> EdgeBarriers:
        """Every pipeline of the kernel: where its mbarriers lie behind the first, `kv_full`, and their counts."""
        c = self.config
        load, consumers = Party("load", Signal.TMA), Party("consumers", Signal.WARPS, c.num_consumer_warps)
        q_bytes = c.rows * c.head_dim * c.element_bytes
        edges = (
            # The last tile of a sequence announces fewer bytes: boxes without keys are left out.
            PipelineEdge("kv_load_to_consumers", c.kv_stage, (load,), (consumers,), c.kv_stage_bytes),
            # An entry's ints, each released by the lane that wrote it, and its Q, announced by the first of them.
            PipelineEdge(
                "entry_load_to_consumers", ENTRY_STAGE, (load, Party("load", Signal.LANES, lanes=DECODE_INTS - 1)), (consumers,), q_bytes
            ),
            PipelineEdge("slots_merge_to_consumers", c.slot_stage, (Party("merge", Signal.TMA),), (), c.slot_stage_bytes, AT_BARRIER),
        )
        return EdgeBarriers(edges, 0)

    @cute.jit
    def allocate(self) -> SharedTensors:
        """Lay the tensors out; every thread calls."""
        c = self.config
        smem = cutlass.utils.SmemAllocator()
        tiles = smem.allocate_array(cutlass.Uint8, c.kv_stage * c.kv_stage_bytes, byte_alignment=SWIZZLE_ALIGN)
        queries = smem.allocate_array(cutlass.Uint8, ENTRY_STAGE * c.q_stage_bytes, byte_alignment=SWIZZLE_ALIGN)
        edges = self.edges
        barriers = smem.allocate_array(cutlass.Int64, edges.end_bytes // MBARRIER_BYTES, byte_alignment=8)
        buffers, pitch = c.row_groups * c.merge_buffers, c.head_dim_v + MERGE_PAD
        merged = cute.make_layout((buffers, c.merge_rows, c.head_dim_v), stride=(c.merge_rows * pitch, pitch, 1))
        rows = cute.make_layout((buffers, c.merge_rows), stride=(c.merge_rows, 1))

        def ints(count: int) -> cute.Tensor:
            layout = cute.make_layout((count, DECODE_INTS), stride=(DECODE_INTS, 1))
            return smem.allocate_tensor(Int32, layout, byte_alignment=16)

        return SharedTensors(
            tiles.toint(),
            barriers + edges.full_offset("kv_load_to_consumers") // MBARRIER_BYTES,
            barriers + edges.empty_offset("kv_load_to_consumers") // MBARRIER_BYTES,
            barriers + edges.full_offset("slots_merge_to_consumers") // MBARRIER_BYTES,
            queries.toint(),
            barriers + edges.full_offset("entry_load_to_consumers") // MBARRIER_BYTES,
            barriers + edges.empty_offset("entry_load_to_consumers") // MBARRIER_BYTES,
            ints(ENTRY_STAGE),
            ints(MAX_PENDING),
            smem.allocate_tensor(cutlass.Float32, merged, byte_alignment=16),
            smem.allocate_tensor(cutlass.Float32, rows, byte_alignment=16),
            smem.allocate_tensor(cutlass.Float32, rows, byte_alignment=16),
            smem.allocate_tensor(Int32, cute.make_layout(MAX_PENDING), byte_alignment=4),
        )

    @cute.jit
    def init_barriers(self, shared: SharedTensors):
        """By one thread, before the CTA's first barrier."""
        for offset, count in self.edges.initial_counts():
            cute.arch.mbarrier_init(shared.kv_full + offset // MBARRIER_BYTES, count)
        cute.arch.mbarrier_init_fence()

    def q_tile(self, shared: SharedTensors, stage: Int32) -> Int32:
        """Address of an entry's Q."""
        return shared.q_address + stage * self.config.q_stage_bytes

    def k_box(self, shared: SharedTensors, slot: Int32, box: Int32) -> Int32:
        """Address of a box of K."""
        return shared.kv_address + slot * self.config.kv_stage_bytes + box * self.box_bytes[0]

    def v_box(self, shared: SharedTensors, slot: Int32, box: Int32) -> Int32:
        """Address of a box of V."""
        k_bytes = TILE_N * self.config.head_dim * self.config.kv_element_bytes
        return shared.kv_address + slot * self.config.kv_stage_bytes + k_bytes + box * self.box_bytes[1]
