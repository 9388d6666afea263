"""Shared and tensor memory of a CTA of a pair, and the pipelines between its roles.

    load --q, k, v--> mma --s--> softmax --p--> mma --pv--> softmax
    load --v_tail--> value_tail --v--> mma
    load --q--> softmax --q--> mma    beside FP8 latents

Shared memory: 64 rows of Q; K of half the block's keys, three stages of 64 keys x 192 elements; half of V's columns of all keys, two stages
of 128 keys x 128 columns; the weights P of 64 rows x 128 keys. All in parts of 64 elements, swizzled rows of 128 bytes, beside FP8 latents
of 64: then Q and P are two terms each, K and V two blocks, and everything takes what it takes in 16 bits. Q comes in 16 bits to the place
of its terms.

Tensor memory of a product of 128 rows over two CTAs: lanes 0-63 hold the CTA's rows with the first half of the product's columns, lanes
64-127 the same rows with the second half (PTX ISA, tcgen05.mma, layout B). So a lane half has the left 256 columns of O or the right ones:

| O left or right, 256 columns | S 0, 64 columns | S 1 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.cta_group import CtaGroup
from fa4_backend.kernels.common.edges import AT_BARRIER, MBARRIER_BYTES, EdgeBarriers, Party, PipelineEdge, Signal
from fa4_backend.kernels.common.pending_entries import MAX_PENDING
from fa4_backend.kernels.mla_decode.config import KV_STAGE, LATENT_DIM, PART_DIM, PARTS, TILE_ELEMS, TILE_M
from fa4_backend.kernels.mla_decode.sm100.config import (
    BLOCK_KEYS,
    CTA_KEYS,
    K_PARTS,
    K_STAGE,
    O_COLUMNS,
    PAIR,
    S_STAGE,
    V_PARTS,
    V_STAGE,
    MlaSm100Config,
)
from fa4_backend.kernels.schedule.work_list import DECODE_INTS
from fa4_backend.problem import DTYPE_BYTES

ELEMENT_BYTES = 2  # of q
Q_ROW_BYTES = PART_DIM * ELEMENT_BYTES
Q_PART_BYTES = TILE_M * Q_ROW_BYTES
P_PARTS = BLOCK_KEYS // PART_DIM
# Of one block of 16 bits, or of all blocks and terms of 8.
K_BYTES, V_BYTES, P_BYTES = (
    rows * elements * ELEMENT_BYTES
    for rows, elements in ((CTA_KEYS, PARTS * PART_DIM), (BLOCK_KEYS, LATENT_DIM // PAIR), (TILE_M, BLOCK_KEYS))
)
SLOTS_BYTES = KV_STAGE * TILE_ELEMS * ELEMENT_BYTES  # what `Merge` fills at once, from `kv` on
assert SLOTS_BYTES <= K_BYTES + V_BYTES + P_BYTES
SOFTMAX_WARPS = 8
SIDES = 2  # lane halves of tensor memory: keys and columns of O of one half, of both

O_COL = 0
S_COL = O_COL + V_STAGE * O_COLUMNS // PAIR
S_COLUMNS = BLOCK_KEYS // PAIR
ALL_COLUMNS = 512  # allocated whole: the kernel runs alone on its SM, so that the allocation begins at column 0
assert S_COL + S_STAGE * S_COLUMNS <= ARCHS["sm_100a"].tmem_columns


class MergeBarriers(NamedTuple):
    """What `Merge` waits for."""

    slots_full: cute.Pointer
    statistics_full: None = None  # with the slots


class SharedTensors(NamedTuple):
    """Views of one CTA's shared memory; `kv`, `sPending`, `sRowSum`, `sShare` and `barriers` are what `Merge` uses."""

    q: cute.Pointer
    kv: cute.Pointer  # K, behind it V, behind it P; at the end parts of slots that are added up
    sMax: cute.Tensor  # (S_STAGE, SIDES, TILE_M) float32: largest score of a row among the keys of a lane half
    sPending: cute.Tensor  # (MAX_PENDING, DECODE_INTS) int32
    sRowSum: cute.Tensor  # (2, SIDES, TILE_M) float32
    sShare: cute.Tensor  # (MAX_PENDING,) int32
    sFactor: cute.Tensor | None  # (TILE_M,) float32: what a row of Q was divided by; None: Q is taken as it is
    sTmem: cute.Tensor  # (2,) int32: where tensor memory begins
    barriers: MergeBarriers


class Place(NamedTuple):
    """Who a thread is, and addresses in the shared windows."""

    rank: Int32  # in the pair
    warp: Int32
    lane: Int32
    edges: Int32  # of the first barrier
    leader_edges: Int32  # the same of the CTA that issues products, for arrivals and copies
    q: Int32
    k: Int32
    v: Int32
    p: Int32


@dataclass(frozen=True)
class PairStorage:
    """Layout of one kernel."""

    config: MlaSm100Config

    @property
    def group(self) -> CtaGroup:
        """The CTAs that share products."""
        return CtaGroup(PAIR)

    @property
    def dtype(self) -> type[cutlass.Numeric]:
        """Element type of q, out and the tiles."""
        return {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[self.config.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a part of an operand: of K and V, and of a term of Q and of P."""
        return PART_DIM * DTYPE_BYTES[self.config.kv_dtype]

    @property
    def q_part_bytes(self) -> int:
        """Bytes of a part of a term of Q, or of the weights of 64 keys."""
        return TILE_M * self.row_bytes

    @property
    def k_part_bytes(self) -> int:
        """Bytes of a part of K."""
        return CTA_KEYS * self.row_bytes

    @property
    def k_stage_bytes(self) -> int:
        """Bytes of a stage of K."""
        return K_PARTS * self.k_part_bytes

    @property
    def k_stages(self) -> int:
        """Stages of K of all blocks in shared memory."""
        return K_STAGE * self.config.num_blocks

    @property
    def v_part_bytes(self) -> int:
        """Bytes of a part of V."""
        return BLOCK_KEYS * self.row_bytes

    @property
    def v_stage_bytes(self) -> int:
        """Bytes of a stage of V."""
        return V_PARTS * self.v_part_bytes

    @property
    def q_edge(self) -> str:
        """What the mma warp waits for before products with Q, and hands Q's place back by."""
        return "q_load_to_mma" if self.config.terms == 1 else "q_softmax_to_mma"

    @property
    def q_bytes(self) -> int:
        """Bytes that the boxes of an entry's Q bring to a CTA."""
        return self.config.loaded_rows * PARTS * Q_ROW_BYTES

    @property
    def edges(self) -> EdgeBarriers:
        """Every pipeline; what the mma warp waits for is signalled by both CTAs at the leader's barriers."""
        load, load_all = Party("load", Signal.TMA), Party("load", Signal.TMA, ctas=PAIR)
        softmax_all = Party("softmax", Signal.WARPS, SOFTMAX_WARPS, PAIR)
        mma, v_stages = Party("mma", Signal.COMMIT), V_STAGE * self.config.num_blocks
        q_edges: tuple[PipelineEdge, ...] = (PipelineEdge("q_load_to_mma", 1, (load_all,), (mma,), self.q_bytes),)
        if self.config.terms > 1:
            q_edges = (
                PipelineEdge("q_load_to_softmax", 1, (load,), (), self.q_bytes, drained_by="q_softmax_to_mma"),
                PipelineEdge("q_softmax_to_mma", 1, (softmax_all,), (mma,)),
            )
        return EdgeBarriers(
            (
                *q_edges,
                PipelineEdge("k_load_to_mma", self.k_stages, (load_all,), (mma,), self.k_stage_bytes),
                # The arrival for a block with a tail is the value tail warp's instead: a stage that is free again was behind it.
                PipelineEdge("v_load_to_mma", v_stages, (load_all,), (mma,), self.v_stage_bytes),
                PipelineEdge("v_tail_load_to_value_tail", v_stages, (load,), (), self.v_stage_bytes, drained_by="v_load_to_mma"),
                # S is overwritten two blocks later, behind the product with the weights that were made of it.
                PipelineEdge("s_mma_to_softmax", S_STAGE, (mma,), drained_by="p_softmax_to_mma"),
                # P is overwritten, and O rescaled or read, once the product that reads P is done. The next product with O waits for weights
                # that every warp writes behind that.
                PipelineEdge("p_softmax_to_mma", 1, (softmax_all,), drained_by="pv_mma_to_softmax"),
                PipelineEdge("pv_mma_to_softmax", 1, (mma,), drained_by="p_softmax_to_mma"),
                PipelineEdge(
                    "slots_merge_to_softmax", 1, (Party("merge", Signal.TMA),), (), KV_STAGE * TILE_ELEMS * ELEMENT_BYTES, AT_BARRIER
                ),
            ),
            0,
        )

    @cute.jit
    def allocate(self) -> tuple[SharedTensors, cute.Pointer]:
        """Lay the tensors out, the same in both CTAs; every thread calls. Returns the first barrier besides."""
        smem = cutlass.utils.SmemAllocator()
        q = smem.allocate_array(self.dtype, TILE_ELEMS, byte_alignment=1024)
        kv = smem.allocate_array(self.dtype, (K_BYTES + V_BYTES + P_BYTES) // ELEMENT_BYTES, byte_alignment=1024)
        edges = self.edges
        base = smem.allocate_array(cutlass.Int64, edges.end_bytes // MBARRIER_BYTES, byte_alignment=8)

        def tensor(kind: type, *shape: int) -> cute.Tensor:
            return smem.allocate_tensor(kind, cute.make_ordered_layout(shape, order=tuple(reversed(range(len(shape))))), byte_alignment=16)

        shared = SharedTensors(
            q, kv, tensor(Float32, S_STAGE, SIDES, TILE_M), tensor(Int32, MAX_PENDING, DECODE_INTS), tensor(Float32, 2, SIDES, TILE_M),
            tensor(Int32, MAX_PENDING), tensor(Float32, TILE_M) if self.config.terms > 1 else None, tensor(Int32, 2),
            MergeBarriers(base + edges.full_offset("slots_merge_to_softmax") // MBARRIER_BYTES),
        )  # fmt: skip
        return shared, base

    def place(self, shared: SharedTensors, base: cute.Pointer) -> Place:
        """This thread's place."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        edges, kv = Int32(base.toint()), Int32(shared.kv.toint())
        return Place(
            self.group.rank(), warp, cute.arch.lane_idx(), edges, self.group.leader_base(edges), Int32(shared.q.toint()), kv,
            kv + K_BYTES, kv + (K_BYTES + V_BYTES),
        )  # fmt: skip

    def init_barriers(self, place: Place) -> None:
        """By one thread, before the pair's first barrier."""
        for offset, count in self.edges.initial_counts():
            ptx.mbarrier_init(place.edges + offset, count)
        cute.arch.mbarrier_init_fence()

    def full(self, place: Place, edge: str, stage: Int32 | int = 0) -> Int32:
        """This CTA's full barrier of an edge."""
        return place.edges + self.edges.full_offset(edge) + stage * MBARRIER_BYTES

    def empty(self, place: Place, edge: str, stage: Int32 | int = 0) -> Int32:
        """This CTA's empty barrier of an edge."""
        return place.edges + self.edges.empty_offset(edge) + stage * MBARRIER_BYTES

    def full_at_leader(self, place: Place, edge: str, stage: Int32 | int = 0) -> Int32:
        """The full barrier that the mma warp waits for."""
        return place.leader_edges + self.edges.full_offset(edge) + stage * MBARRIER_BYTES
