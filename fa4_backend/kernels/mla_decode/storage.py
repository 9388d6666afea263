"""Shared memory of a CTA: Q, two KV tiles, each with three groups of parts that are loaded and released apart, and small tables.

A tile is nine parts of 64 keys x 64 elements, swizzled rows of 128 bytes: parts 0-3 are the left half of V, 4-7 its right half, 8 the
rotary part of K. When its scores are done, the rotary part's place takes the tile's weights P, 64 rows x 64 keys, for the other warpgroup.

Kernels of 16 rows (`is_narrow`) have the e4m3 numbers as they are, rows of 64 bytes, a barrier a tile, and a place of their own for P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils import LayoutEnum
from cutlass.utils.hopper_helpers import get_smem_layout_atom

from fa4_backend.kernels.common.edges import AT_BARRIER, MBARRIER_BYTES, EdgeBarriers, Party, PipelineEdge, Signal
from fa4_backend.kernels.common.pending_entries import MAX_PENDING
from fa4_backend.kernels.mla_decode.config import (
    CONVERT_WARPS,
    KV_STAGE,
    LATENT_PARTS,
    NARROW_WARPS,
    PART_DIM,
    PART_ELEMS,
    PARTS,
    TILE_ELEMS,
    TILE_M,
    TILE_N,
    WARP_ROWS,
    MlaDecodeConfig,
)
from fa4_backend.kernels.schedule.work_list import DECODE_INTS

ELEMENT_TYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}
SIDES = 2  # consumer warpgroups: columns 0-255 of O and columns 256-511
SIDE_PARTS = LATENT_PARTS // SIDES
ROPE_PART = LATENT_PARTS
GROUPS = ((0, SIDE_PARTS), (SIDE_PARTS, LATENT_PARTS), (ROPE_PART, PARTS))  # parts `begin .. end` of each group
LEFT, RIGHT, ROPE = range(3)
GROUP_NAMES = ("left", "right", "rope")
SIDE_WARPS = 4
SIDE_THREADS = 32 * SIDE_WARPS


class Barriers(NamedTuple):
    """mbarriers; those of the KV tile's groups by `LEFT`, `RIGHT`, `ROPE`, or one of the whole tile; one a stage."""

    kv_full: tuple[cute.Pointer, ...]
    kv_empty: tuple[cute.Pointer, ...]
    q_full: cute.Pointer  # an entry's ints and its Q
    q_empty: cute.Pointer
    p_full: cute.Pointer | None  # weights of a pair's first block and of its second, and the reference of their rows; None: narrow
    slots_full: cute.Pointer  # parts of slots to add up
    statistics_full: cute.Pointer | None  # references and row sums of their rows, which come first; None: with them
    raw_full: cute.Pointer | None  # a tile's e4m3 numbers have come, two stages; None where nothing is converted in shared memory


class SharedTensors(NamedTuple):
    """Views of one CTA's shared memory."""

    q: cute.Pointer  # 64 x 576
    kv: cute.Pointer  # `kv_stage` tiles
    p: (
        cute.Pointer | None
    )  # 2 x 16 x 64 float16, swizzled rows of 128 bytes, blocks take turns; None where P has a tile's rotary part's place
    barriers: Barriers
    sEntry: cute.Tensor  # (DECODE_INTS,) int32: the entry at hand
    sPending: cute.Tensor  # (MAX_PENDING, DECODE_INTS) int32: entries whose slots are written, whose arrival is due
    # (2, TILE_M) float32: reference maximum after a pair's first and its second block, log2 units; narrow: (2, 16, NARROW_WARPS), the
    # largest score of each warp's keys, blocks take turns
    sReference: cute.Tensor
    sRowSum: cute.Tensor  # (2, SIDES, TILE_M) float32, (2, NARROW_WARPS, 16): shares of row_sum at a piece's end; pieces take turns
    sFactor: cute.Tensor | None  # (TILE_M,) float32: what rows of Q were divided by to be float16; None: nothing
    sShare: cute.Tensor  # (MAX_PENDING,) int32: what of a pending entry this CTA adds up (`common/part_arrivals.py`)


@dataclass(frozen=True)
class MlaStorage:
    """Layout of the shared memory of one kernel."""

    config: MlaDecodeConfig

    @property
    def dtype(self) -> type[cutlass.Numeric]:
        """Element type of both products: that of q and out, or float16 beside FP8 latents."""
        return cutlass.Float16 if self.config.has_scale else ELEMENT_TYPES[self.config.dtype]

    @property
    def q_bytes(self) -> int:
        """Bytes that the boxes of an entry's Q bring."""
        return self.config.loaded_rows * PARTS * PART_DIM * self.config.element_bytes

    @property
    def group_edges(self) -> tuple[str, ...]:
        """Names of the groups' pipelines."""
        if self.config.is_narrow:
            return ("tile_load_to_consumers",)
        producer = "convert" if self.config.has_scale else "load"
        return tuple(f"{name}_{producer}_to_consumers" for name in GROUP_NAMES)

    @property
    def edges(self) -> EdgeBarriers:
        """Every pipeline of the kernel."""
        c = self.config
        load, consumers = Party("load", Signal.TMA), Party("consumers", Signal.WARPS, SIDES * SIDE_WARPS)
        # A group is read last by one warpgroup: half of V by whose columns of O it is, the weights by who did not make them.
        reader = Party("reader", Signal.WARPS, SIDE_WARPS, ctas=c.cluster_size)
        others = [
            PipelineEdge("weights_scorer_to_other", SIDES, (Party("scorer", Signal.WARPS, SIDE_WARPS),), drained_by=self.group_edges[-1])
        ]
        if c.is_narrow:
            groups, others = [PipelineEdge(self.group_edges[0], c.kv_stage, (load,), (consumers,), TILE_ELEMS)], []
        elif c.is_converted:
            # A CTA converts for itself, but e4m3 numbers come to the place of all but the left half from both CTAs.
            convert, own_reader = Party("convert", Signal.WARPS, CONVERT_WARPS), Party("reader", Signal.WARPS, SIDE_WARPS)
            groups = [
                PipelineEdge(name, KV_STAGE, (convert,), (own_reader if group == LEFT else reader,))
                for group, name in enumerate(self.group_edges)
            ]
            others += [PipelineEdge("raw_load_to_convert", KV_STAGE, (load,), tx_bytes=TILE_ELEMS, drained_by=self.group_edges[ROPE])]
        else:
            groups = [
                PipelineEdge(name, KV_STAGE, (load,), (reader,), (end - begin) * PART_ELEMS * c.element_bytes)
                for name, (begin, end) in zip(self.group_edges, GROUPS, strict=True)
            ]
        edges = (
            *groups,
            PipelineEdge("entry_load_to_consumers", 1, (load,), (consumers,), self.q_bytes),
            *(
                PipelineEdge(f"{name}_merge_to_consumers", 1, (Party("merge", Signal.TMA),), (), KV_STAGE * TILE_ELEMS * 2, AT_BARRIER)
                for name in ("slots", "statistics")
            ),
            *others,
        )
        return EdgeBarriers(edges, 0)

    @cute.jit
    def allocate(self) -> SharedTensors:
        """Lay the tensors out; every thread calls."""
        c = self.config
        smem = cutlass.utils.SmemAllocator()
        q = smem.allocate_array(self.dtype, PARTS * c.q_part_bytes // c.element_bytes, byte_alignment=1024)
        kv = smem.allocate_array(self.dtype, c.kv_stage * c.stage_bytes // c.element_bytes, byte_alignment=1024)
        p = smem.allocate_array(cutlass.Float16, 2 * WARP_ROWS * TILE_N, byte_alignment=1024) if c.is_narrow else None
        edges = self.edges
        base = smem.allocate_array(cutlass.Int64, edges.end_bytes // MBARRIER_BYTES, byte_alignment=8)

        def full(name: str) -> cute.Pointer:
            return base + edges.full_offset(name) // MBARRIER_BYTES

        def empty(name: str) -> cute.Pointer:
            return base + edges.empty_offset(name) // MBARRIER_BYTES

        def tensor(kind: type, *shape: int) -> cute.Tensor:
            return smem.allocate_tensor(kind, cute.make_ordered_layout(shape, order=tuple(reversed(range(len(shape))))), byte_alignment=16)

        barriers = Barriers(
            tuple(full(name) for name in self.group_edges), tuple(empty(name) for name in self.group_edges),
            full("entry_load_to_consumers"), empty("entry_load_to_consumers"),
            None if c.is_narrow else full("weights_scorer_to_other"), full("slots_merge_to_consumers"),
            full("statistics_merge_to_consumers"), full("raw_load_to_convert") if c.is_converted else None,
        )  # fmt: skip
        reference = (2, WARP_ROWS, NARROW_WARPS) if c.is_narrow else (2, TILE_M)
        sums = (2, NARROW_WARPS, WARP_ROWS) if c.is_narrow else (2, SIDES, TILE_M)
        return SharedTensors(
            q, kv, p, barriers,
            tensor(Int32, DECODE_INTS), tensor(Int32, MAX_PENDING, DECODE_INTS),
            tensor(Float32, *reference), tensor(Float32, *sums), tensor(Float32, TILE_M) if c.is_scaled else None,
            tensor(Int32, MAX_PENDING),
        )  # fmt: skip

    @cute.jit
    def init_barriers(self, barriers: Barriers):
        """By one thread, before the CTA's, or the cluster's, first barrier."""
        first = barriers.kv_full[LEFT]  # the first edge's
        for offset, count in self.edges.initial_counts():
            cute.arch.mbarrier_init(first + offset // MBARRIER_BYTES, count)
        cute.arch.mbarrier_init_fence()

    # -- operands -----------------------------------------------------------------------------------------------------------------

    def _swizzle(self) -> cute.Swizzle:
        atom = warpgroup.make_smem_layout_atom(get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, PART_DIM), self.dtype)
        return atom.inner

    def _tensor(self, pointer: cute.Pointer, shape: tuple, stride: tuple) -> cute.Tensor:
        swizzled = cute.recast_ptr(pointer, self._swizzle(), dtype=self.dtype)
        return cute.make_tensor(swizzled, cute.make_layout(shape, stride=stride))

    def q_tile(self, shared: SharedTensors) -> cute.Tensor:
        """(rows, elements)."""
        return self._tensor(shared.q, (TILE_M, (PART_DIM, PARTS)), (PART_DIM, (1, PART_ELEMS)))

    def k_tiles(self, shared: SharedTensors) -> cute.Tensor:
        """(keys, elements, stage)."""
        return self._tensor(shared.kv, (TILE_N, (PART_DIM, PARTS), KV_STAGE), (PART_DIM, (1, PART_ELEMS), TILE_ELEMS))

    def v_tiles(self, shared: SharedTensors, side: int) -> cute.Tensor:
        """(columns, keys, stage): a warpgroup's half of V, transposed."""
        half = (shared.kv + side * SIDE_PARTS * PART_ELEMS).align(1024)
        return self._tensor(half, ((PART_DIM, SIDE_PARTS), TILE_N, KV_STAGE), ((1, PART_ELEMS), PART_DIM, TILE_ELEMS))

    def p_tiles(self, shared: SharedTensors) -> cute.Tensor:
        """(rows, keys, stage): weights where the rotary part was."""
        rope = (shared.kv + ROPE_PART * PART_ELEMS).align(1024)
        return self._tensor(rope, (TILE_M, TILE_N, KV_STAGE), (PART_DIM, 1, TILE_ELEMS))
