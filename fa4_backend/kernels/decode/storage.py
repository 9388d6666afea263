"""Shared memory of a decode CTA: a ring of KV tiles, the place where the key warps of a row group meet, barriers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.decode.config import BOX_KEYS, MERGE_PAD, TILE_N, DecodeConfig

ELEMENT_TYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}


class SharedTensors(NamedTuple):
    """Views of one CTA's shared memory; addresses are Int32 in the shared window."""

    kv_address: Int32  # kv_stage tiles, each 4 boxes of K, then 4 boxes of V
    kv_full: cute.Pointer  # kv_stage mbarriers: a tile has arrived
    kv_empty: cute.Pointer  # kv_stage mbarriers: every consumer warp is done with it
    sO: cute.Tensor  # (consumer warps, merge_rows, head_dim_v) float32: O of each warp, relative to its maximum
    sMax: cute.Tensor  # (consumer warps, merge_rows) float32, row_max
    sSum: cute.Tensor  # (consumer warps, merge_rows) float32, row_sum
    sFlag: cute.Tensor  # (1,) int32: this CTA arrived last


@dataclass(frozen=True)
class DecodeStorage:
    """Layout of the shared memory of one kernel."""

    config: DecodeConfig

    @property
    def box_bytes(self) -> tuple[int, int]:
        """Bytes of a box of K and of V."""
        c = self.config
        return BOX_KEYS * c.head_dim * c.element_bytes, BOX_KEYS * c.head_dim_v * c.element_bytes

    @cute.jit
    def allocate(self) -> SharedTensors:
        """Lay the tensors out; every thread calls."""
        c = self.config
        smem = cutlass.utils.SmemAllocator()
        tiles = smem.allocate_array(cutlass.Uint8, c.kv_stage * c.kv_stage_bytes, byte_alignment=1024)
        full = smem.allocate_array(cutlass.Int64, c.kv_stage, byte_alignment=8)
        empty = smem.allocate_array(cutlass.Int64, c.kv_stage, byte_alignment=8)
        warps, pitch = c.num_consumer_warps, c.head_dim_v + MERGE_PAD
        merged = cute.make_layout((warps, c.merge_rows, c.head_dim_v), stride=(c.merge_rows * pitch, pitch, 1))
        rows = cute.make_layout((warps, c.merge_rows), stride=(c.merge_rows, 1))
        return SharedTensors(
            tiles.toint(),
            full,
            empty,
            smem.allocate_tensor(cutlass.Float32, merged, byte_alignment=16),
            smem.allocate_tensor(cutlass.Float32, rows, byte_alignment=16),
            smem.allocate_tensor(cutlass.Float32, rows, byte_alignment=16),
            smem.allocate_tensor(Int32, cute.make_layout(1), byte_alignment=4),
        )

    @cute.jit
    def init_barriers(self, shared: SharedTensors):
        """By one thread, before the CTA's first barrier."""
        for stage in cutlass.range_constexpr(self.config.kv_stage):
            cute.arch.mbarrier_init(shared.kv_full + stage, 1)
            cute.arch.mbarrier_init(shared.kv_empty + stage, self.config.num_consumer_warps)
        cute.arch.mbarrier_init_fence()

    def k_box(self, shared: SharedTensors, slot: Int32, box: Int32) -> Int32:
        """Address of a box of K."""
        return shared.kv_address + slot * self.config.kv_stage_bytes + box * self.box_bytes[0]

    def v_box(self, shared: SharedTensors, slot: Int32, box: Int32) -> Int32:
        """Address of a box of V."""
        k_bytes = TILE_N * self.config.head_dim * self.config.element_bytes
        return shared.kv_address + slot * self.config.kv_stage_bytes + k_bytes + box * self.box_bytes[1]
