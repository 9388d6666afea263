"""K and V pages to shared memory by TMA: a tile of KV tokens is fetched in boxes, each from one page.

A box holds `box_rows` tokens of one part of the head (the width that shared memory is swizzled for). Boxes that begin past the
sequence's last token, or end before the first that a row sees, are addressed past the last page: TMA fills them with zeros and reads
nothing, the page table included.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from fa4_backend.kernels.common.ring import RingSlots
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds


class KvPages(NamedTuple):
    """Where a call's pages lie."""

    mPageTable: cute.Tensor  # (batch, max_pages_per_seq) int32
    page_size: Int32  # tokens a page
    num_pages: Int32  # pages of the pool


class PageBoxes(NamedTuple):
    """Where a lane's box lies: lane `i` of the load warp knows box `i` of the tile."""

    page: Int32  # physical page; one past the last for a box without tokens that a row sees
    row_box: Int32  # index of the box in its page


class TmaOperand(NamedTuple):
    """A TMA copy and both sides of it, partitioned for whole boxes."""

    atom: cute.CopyAtom
    tXgX: cute.Tensor  # (box, row boxes of a page, head parts, kv heads, pages)
    tXsX: cute.Tensor  # (box, boxes of a tile, head parts, stages)


@dataclass(frozen=True)
class PagedKv:
    """Box geometry of K or V of one kernel."""

    tile_n: int
    box_rows: int
    part_elems: int  # elements of a head in one box
    num_parts: int
    slots: RingSlots  # that tiles lie in
    whole_rows: bool  # a box holds whole heads (one part after the other), else one part

    @property
    def num_boxes(self) -> int:
        """Boxes of a tile along KV tokens."""
        return self.tile_n // self.box_rows

    @property
    def stages(self) -> int:
        """Slots of the ring."""
        return self.slots.stages

    @property
    def tile_elems(self) -> int:
        """Elements that the boxes of one tile bring."""
        return self.tile_n * self.part_elems * self.num_parts

    @property
    def nowhere(self) -> PageBoxes:
        """Boxes that nobody fetches."""
        return PageBoxes(Int32(0), Int32(0))

    @property
    def box_parts(self) -> int:
        """Head parts of one box."""
        return self.num_parts if self.whole_rows else 1

    def make_tma(self, cache: cute.Tensor, swizzle: cute.Swizzle) -> tuple[cute.CopyAtom, cute.Tensor]:
        """TMA copy of boxes of `cache` (num_pages, page_size, num_kv_heads, head_dim), any strides but the last."""
        rows, part = self.box_rows, self.part_elems
        pages, page_size, heads = (cute.size(cache, mode=[i]) for i in range(3))
        page_stride, row_stride, head_stride, _ = cache.stride
        by_parts = cute.make_layout((page_size, part, self.num_parts, heads, pages), stride=(row_stride, 1, part, head_stride, page_stride))
        tile = (rows, part, self.box_parts)
        box = cute.make_composed_layout(swizzle, 0, cute.make_layout(tile, stride=(part, 1, rows * part)))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), cute.make_tensor(cache.iterator, by_parts), box, tile)

    @cute.jit
    def partition(
        self,
        atom: cute.CopyAtom,
        mX: cute.Tensor,  # its coordinate tensor: (page_size, part, head parts, kv heads, pages)
        sX_ptr: cute.Pointer,  # slot 0
    ) -> TmaOperand:
        """Both sides of the copy, box by box."""
        rows, part, parts = self.box_rows, self.part_elems, self.box_parts
        box_elems = rows * part * parts
        part_elems = box_elems if self.whole_rows else self.tile_n * part
        boxes = cute.make_layout(
            ((rows, part, parts), self.num_boxes, self.num_parts // parts, self.slots.layout.shape),
            stride=((part, 1, rows * part), box_elems, part_elems, self.slots.layout.stride),
        )
        # (box_rows, part, box parts, row boxes, 1, head parts / box parts, kv heads, pages)
        gX = cute.flat_divide(mX, (rows, part, parts))
        tXsX, tXgX = cpasync.tma_partition(atom, 0, cute.make_layout(1), cute.make_tensor(sX_ptr, boxes), cute.group_modes(gX, 0, 3))
        return TmaOperand(atom, tXgX, tXsX)

    @cute.jit
    def find_boxes(
        self,
        pages: KvPages,
        bounds: SeqlenBounds,
        seq_idx: Int32,
        n_block: Int32,
        first_key: Int32 | None,  # that any row of the tile sees; None: the sequence's first
        seqlen_k: Int32,
    ):
        """This lane's box of KV block `n_block`."""
        token = n_block * self.tile_n + cute.arch.lane_idx() * self.box_rows
        page_idx = token // pages.page_size
        page, row_box = pages.num_pages, Int32(0)
        is_seen = token < seqlen_k
        if const_expr(first_key is not None):
            is_seen = is_seen & (token + self.box_rows > first_key)
        if is_seen and cute.arch.lane_idx() < self.num_boxes:
            page = pages.mPageTable[seq_idx, page_idx]
            row_box = (token - page_idx * pages.page_size) // self.box_rows
        return PageBoxes(page, row_box)

    @cute.jit
    def load(self, operand: TmaOperand, boxes: PageBoxes, kv_head_idx: Int32, slot: Int32, full: cute.Pointer):
        """Issue every box of a tile into `slot`; each completes on the barrier `full`."""
        for i in cutlass.range_constexpr(self.num_boxes):
            page = cute.arch.shuffle_sync(boxes.page, i)
            row_box = cute.arch.shuffle_sync(boxes.row_box, i)
            for part in cutlass.range_constexpr(self.num_parts // self.box_parts):
                cute.copy(
                    operand.atom,
                    operand.tXgX[None, row_box, 0, part, kv_head_idx, page],
                    operand.tXsX[None, i, part, slot],
                    tma_bar_ptr=full,
                )
