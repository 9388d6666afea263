"""Shared memory of one CTA: one or two buffers of Q, a ring of slots that K and V tiles share, the tiles being worked on, barriers.
K and V in FP8 wait for their conversion in slots of their own (`staging.py`).

The KV blocks of all tiles of a CTA are one stream, and ring order is its order of use: K0 K1 V0 K2 V1 ... K runs one block ahead of V,
from one tile into the next. Where a K tile and a V tile differ in size and the number of stages is even, each has stages of its own size:
K0 - K1 V0 K2 V1 ..., whose second stage stays empty once, so that K has the even ones and V the odd ones. Finished rows of O leave through
their tile's Q buffer where there are two, else from registers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils import LayoutEnum
from cutlass.utils.hopper_helpers import get_smem_layout_atom

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common.edges import MBARRIER_BYTES, EdgeBarriers
from fa4_backend.kernels.common.element_types import ELEMENT_TYPES
from fa4_backend.kernels.common.hardware import ACCESS_BYTES, SWIZZLE_ALIGN
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.ring import RingPosition, RingSlots
from fa4_backend.kernels.sm90.staging import STAGE_INTS, converts_query, header_bytes, q_buffer_bytes, staging_slots, tile_elems
from fa4_backend.kernels.sm90.tile_numbers import WORK_INTS
from fa4_backend.kernels.sm90.warp_roles import WORK_STAGE, has_own_slots, pipeline_edges


class Barriers(NamedTuple):
    """mbarriers, a pair a buffer; None where the kernel has no such pipeline."""

    q_full: cute.Pointer  # Q and the tile's numbers
    q_empty: cute.Pointer
    kv_full: cute.Pointer  # slots of the ring
    kv_empty: cute.Pointer
    fp8_full: cute.Pointer | None = None  # slots of staging
    fp8_empty: cute.Pointer | None = None
    tile_full: cute.Pointer | None = None  # taken tiles
    tile_empty: cute.Pointer | None = None


@dataclass(frozen=True)
class Storage:
    """Sizes and layouts of one kernel's shared memory."""

    config: PrefillConfig

    def __post_init__(self) -> None:
        c = self.config
        if self.o_through_q:
            # A warpgroup's rows of O must lie where its own rows of Q lay.
            assert c.head_dim_v <= c.head_dim and c.part_elems(c.head_dim_v) == c.part_elems(c.head_dim), f"O must fit Q's buffer: {c=}"
        limit = ARCHS[self.config.arch].smem_bytes
        assert self.num_bytes <= limit, f"{self.num_bytes=} {limit=} {self.config=}"

    @property
    def dtype(self) -> type[cutlass.Numeric]:
        """Element type of q and out."""
        return ELEMENT_TYPES[self.config.dtype]

    @property
    def key_dtype(self) -> type[cutlass.Numeric]:
        """Element type of Q and K as the first product takes them."""
        return cutlass.Float16 if converts_query(self.config) else self.dtype

    @property
    def value_dtype(self) -> type[cutlass.Numeric]:
        """Element type of P and V: float16 holds every e4m3 value, and one instruction makes two of them."""
        return cutlass.Float16 if self.config.converts_kv else self.dtype

    @property
    def has_factors(self) -> bool:
        """Whether a tile has scales: `K_SCALE`, `O_FACTOR`."""
        return self.config.has_kv_scales or self.config.has_out_scale

    @property
    def o_through_q(self) -> bool:
        """Whether O leaves through its tile's Q buffer; else from registers."""
        return self.releases_q_late and not self.config.has_out_scale

    @property
    def releases_q_late(self) -> bool:
        """Whether Q is released with its tile; else as soon as its last product has read it."""
        return self.config.tile.q_stage > 1

    def work_slot(self, q: RingPosition) -> Int32:
        """Where the numbers of the tile whose Q is at `q` lie: of two places in turns, so that they outlive Q by a tile."""
        return q.slot if self.config.tile.q_stage == WORK_STAGE else q.phase

    @property
    def slot_elems(self) -> int:
        """Elements of a slot, of the ring or of staging: a K or a V tile."""
        return tile_elems(self.config)

    @property
    def tile_slots(self) -> RingSlots:
        """Stages of the ring: K tiles in even ones, V tiles in odd ones where they differ in size, else either anywhere."""
        c = self.config
        if not has_own_slots(c):
            return RingSlots(c.tile.kv_stage, self.slot_elems, self.slot_elems)
        return RingSlots(c.tile.kv_stage, c.tile.tile_n * c.head_dim, c.tile.tile_n * c.head_dim_v)

    @property
    def q_elems(self) -> int:
        """Elements of a Q buffer."""
        return self.config.tile.tile_m * self.config.head_dim

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole, with room for alignment."""
        c = self.config
        tiles = self.tile_slots.total_elems * c.element_bytes + staging_slots(c) * self.slot_elems * c.kv_element_bytes
        return header_bytes(c) + c.tile.q_stage * q_buffer_bytes(c) + tiles

    def struct(self) -> type:
        """The DSL's struct of this layout."""
        c = self.config
        if not c.converts_kv:

            @cute.struct
            class SharedStorage:
                barriers: cute.struct.MemRange[cutlass.Int64, self.edges.end_bytes // MBARRIER_BYTES]
                work: cute.struct.MemRange[cutlass.Int32, WORK_STAGE * WORK_INTS]
                q: cute.struct.Align[cute.struct.MemRange[self.dtype, c.tile.q_stage * self.q_elems], SWIZZLE_ALIGN]
                kv: cute.struct.Align[cute.struct.MemRange[self.dtype, self.tile_slots.total_elems], SWIZZLE_ALIGN]

            return SharedStorage

        @cute.struct
        class StagedStorage:
            barriers: cute.struct.MemRange[cutlass.Int64, self.edges.end_bytes // MBARRIER_BYTES]
            work: cute.struct.MemRange[cutlass.Int32, WORK_STAGE * WORK_INTS]
            notes: cute.struct.Align[cute.struct.MemRange[cutlass.Int32, staging_slots(c) * STAGE_INTS], ACCESS_BYTES]  # read as vectors
            row_scales: cute.struct.MemRange[cutlass.Float32, WORK_STAGE * c.tile.tile_m if converts_query(c) else 1]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, c.tile.q_stage * self.q_elems], SWIZZLE_ALIGN]
            kv: cute.struct.Align[cute.struct.MemRange[self.dtype, self.tile_slots.total_elems], SWIZZLE_ALIGN]
            fp8: cute.struct.Align[cute.struct.MemRange[cutlass.Float8E4M3FN, staging_slots(c) * self.slot_elems], SWIZZLE_ALIGN]

        return StagedStorage

    @property
    def edges(self) -> EdgeBarriers:
        """Where each pipeline's mbarriers lie, and their counts."""
        return EdgeBarriers(pipeline_edges(self.config), 0)

    def barriers(self, base: cute.Pointer) -> Barriers:
        """The barriers by name."""
        edges = self.edges
        at = {f"{name.split('_')[0]}_full": edges.full_offset(name) for name in edges.edges}
        at |= {f"{name.split('_')[0]}_empty": edges.empty_offset(name) for name, edge in edges.edges.items() if edge.empty_by}
        return Barriers(**{name: base + offset // MBARRIER_BYTES for name, offset in at.items()})

    def row_atom(self, head_dim: int) -> cute.ComposedLayout:
        """Swizzled atom for rows of `head_dim` elements, head contiguous."""
        return warpgroup.make_smem_layout_atom(get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, head_dim), self.dtype)

    def rows_layout(self, rows: int, head_dim: int) -> cute.ComposedLayout:
        """(rows, head_dim) tile: parts of a head one after the other, rows within a part."""
        return cute.tile_to_shape(self.row_atom(head_dim), (rows, head_dim), (0, 1))

    def group_rows_layout(self, rows: int, head_dim: int) -> cute.ComposedLayout:
        """(rows, head_dim): some rows of a (tile_m, head_dim) tile, whose parts of a head stay `tile_m` rows apart."""
        atom = self.row_atom(head_dim)
        part = self.config.part_elems(head_dim)
        outer = cute.make_layout((rows, (part, head_dim // part)), stride=(part, (1, self.config.tile.tile_m * part)))
        return cute.make_composed_layout(atom.inner, 0, outer)

    def q_layout(self) -> cute.ComposedLayout:
        """(tile_m, head_dim, q_stage)."""
        tile = self.rows_layout(self.config.tile.tile_m, self.config.head_dim)
        return cute.make_composed_layout(
            tile.inner, 0, cute.append(tile.outer, cute.make_layout(self.config.tile.q_stage, stride=self.q_elems))
        )

    def k_layout(self) -> cute.ComposedLayout:
        """(tile_n, head_dim, kv_stage): the ring seen as K tiles."""
        c = self.config
        tile = self.rows_layout(c.tile.tile_n, c.head_dim)
        return cute.make_composed_layout(tile.inner, 0, cute.append(tile.outer, self.tile_slots.layout))

    def v_layout(self) -> cute.ComposedLayout:
        """(head_dim_v, tile_n, kv_stage): the ring seen as V tiles, transposed; box after box, each with all parts of the head.

        A tile that was converted is one box.
        """
        c = self.config
        rows = c.tile.tile_n if c.converts_kv else c.box_rows
        part = c.part_elems(c.head_dim_v)
        parts, slots = c.head_dim_v // part, self.tile_slots.layout
        outer = cute.make_layout(
            ((part, parts), (rows, c.tile.tile_n // rows), slots.shape),
            stride=((1, rows * part), (part, rows * c.head_dim_v), slots.stride),
        )
        return cute.make_composed_layout(self.row_atom(c.head_dim_v).inner, 0, outer)

    @cute.jit
    def init_barriers(self, base: cute.Pointer):
        """By one thread, before the CTA's first barrier."""
        for offset, count in self.edges.initial_counts():
            cute.arch.mbarrier_init(base + offset // MBARRIER_BYTES, count)
        cute.arch.mbarrier_init_fence()


def tensor_at(pointer: cute.Pointer, layout: cute.ComposedLayout) -> cute.Tensor:
    """Shared-memory tensor whose swizzle is carried by the pointer, as the MMA and copy atoms want it."""
    if const_expr(isinstance(layout, cute.ComposedLayout)):
        return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=pointer.dtype), layout.outer)
    return cute.make_tensor(pointer, layout)
