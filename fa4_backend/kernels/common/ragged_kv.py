"""K and V without pages to shared memory by TMA: a tile of KV tokens is one box, at any row of (total_k, num_kv_heads, head_dim).

A box that reaches past its sequence brings rows of the next one, past the last sequence zeros; a box without a token that a row sees is
addressed past the last row: zeros, and no memory is read. It has the methods of `paged_kv.PagedKv`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from fa4_backend.kernels.common.hardware import SWIZZLE_ALIGN
from fa4_backend.kernels.common.ring import RingSlots
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds


class RaggedBox(NamedTuple):
    """Where a tile's box lies."""

    row: Int32  # of k or v; one past the last for a box without tokens that a row sees


class RaggedOperand(NamedTuple):
    """A TMA copy and both sides of it."""

    atom: cute.CopyAtom
    mX: cute.Tensor  # its coordinate tensor: (total_k, part, head parts, kv heads)
    sX_ptr: cute.Pointer  # slot 0


@dataclass(frozen=True)
class RaggedKv:
    """Box geometry of K or V of one kernel."""

    tile_n: int
    part_elems: int  # elements of a head in one swizzled row of shared memory
    num_parts: int
    slots: RingSlots  # that tiles lie in

    @property
    def stages(self) -> int:
        """Slots of the ring."""
        return self.slots.stages

    @property
    def tile_elems(self) -> int:
        """Elements that the box of one tile brings."""
        return self.tile_n * self.part_elems * self.num_parts

    @property
    def nowhere(self) -> RaggedBox:
        """A box that nobody fetches."""
        return RaggedBox(Int32(0))

    @property
    def _box(self) -> cute.Layout:
        """(tile_n, part, head parts): one part after the other."""
        return cute.make_layout((self.tile_n, self.part_elems, self.num_parts), stride=(self.part_elems, 1, self.tile_n * self.part_elems))

    def make_tma(self, x: cute.Tensor, swizzle: cute.Swizzle) -> tuple[cute.CopyAtom, cute.Tensor]:
        """TMA copy of boxes of `x` (total_k, num_kv_heads, head_dim), any strides but the last."""
        tokens, heads = (cute.size(x, mode=[i]) for i in range(2))
        row_stride, head_stride, _ = x.stride
        by_parts = cute.make_layout(
            (tokens, self.part_elems, self.num_parts, heads), stride=(row_stride, 1, self.part_elems, head_stride)
        )  # fmt: skip
        box = cute.make_composed_layout(swizzle, 0, self._box)
        tile = (self.tile_n, self.part_elems, self.num_parts)
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), cute.make_tensor(x.iterator, by_parts), box, tile)

    def partition(
        self,
        atom: cute.CopyAtom,
        mX: cute.Tensor,  # its coordinate tensor: (total_k, part, head parts, kv heads)
        sX_ptr: cute.Pointer,  # slot 0
    ) -> RaggedOperand:
        """Both sides of the copy."""
        return RaggedOperand(atom, mX, sX_ptr)

    @cute.jit
    def find_boxes(
        self,
        pages: None,
        bounds: SeqlenBounds,
        seq_idx: Int32,
        n_block: Int32,
        first_key: Int32 | None,  # that any row of the tile sees; None: the sequence's first
        seqlen_k: Int32,
    ):
        """The box of KV block `n_block`."""
        token, row = n_block * self.tile_n, bounds.kv_tokens
        is_seen = token < seqlen_k
        if const_expr(first_key is not None):
            is_seen = is_seen & (token + self.tile_n > first_key)
        if is_seen:
            row = bounds.k_begin(seq_idx) + token
        return RaggedBox(row)

    @cute.jit
    def load(self, operand: RaggedOperand, boxes: RaggedBox, kv_head_idx: Int32, slot: Int32, full: cute.Pointer):
        """Issue a tile's box into `slot`; it completes on the barrier `full`."""
        at_tile = cute.domain_offset((boxes.row, 0, 0), operand.mX[None, None, None, kv_head_idx])
        gX = cute.group_modes(cute.local_tile(at_tile, (self.tile_n, self.part_elems, self.num_parts), (0, 0, 0)), 0, 3)
        sX = cute.group_modes(cute.make_tensor((operand.sX_ptr + self.slots.offset(slot)).align(SWIZZLE_ALIGN), self._box), 0, 3)
        tXsX, tXgX = cpasync.tma_partition(operand.atom, 0, cute.make_layout(1), sX, gX)
        cute.copy(operand.atom, tXgX, tXsX, tma_bar_ptr=full)
