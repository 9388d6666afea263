"""Load warp: Q, K and V to shared memory by TMA. Lane i issues box i of a tile."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.cta_group import LEADER, CtaGroup
from fa4_backend.kernels.common.hardware import swizzle_bits
from fa4_backend.kernels.common.paged_kv import KvPages
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds
from fa4_backend.kernels.common.tile_scheduler import leave_queue, read_queue, wait_alone
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE
from fa4_backend.kernels.sm100.work import Geometry, Place, WorkItem, WorkTensors


class Operands(NamedTuple):
    """TMA atoms, and where pages lie."""

    q_atom: cute.CopyAtom
    k_atom: cute.CopyAtom
    v_atom: cute.CopyAtom
    pages: KvPages | None  # None where K and V have none


class Share(NamedTuple):
    """What of a KV tile this CTA holds: all of it, or in a CTA pair half of K's rows and half of V's columns."""

    first_row: Int32 | int
    rows: int
    box_rows: int
    first_part: Int32 | int
    parts: int
    part_bytes: int
    row_bytes: int
    tx_bytes: int


class KvBox(NamedTuple):
    """The box of a share that a lane fetches. One without tokens that a row sees lies out of bounds: zeros, no memory is read."""

    page: Int32 | None  # physical page; num_pages is out of bounds. None where K and V have no pages
    row: Int32  # first row within the page; without pages of k and v, where total_k is out of bounds
    row_box: Int32  # index of the box along the share's rows
    part: Int32  # index along the head dimension


def swizzled_box(shape: tuple[int, ...], element_bytes: int) -> cute.ComposedLayout:
    """Shared-memory layout of a box whose first mode is a row of 128 bytes, of 64 or of 32."""
    strides, stride = [], 1
    for extent in shape:
        strides.append(stride)
        stride *= extent
    bits = swizzle_bits(shape[0] * element_bytes)
    return cute.make_composed_layout(cute.make_swizzle(bits, 4, 3), 0, cute.make_layout(shape, stride=tuple(strides)))


def make_q_atom(mQ: cute.Tensor, elems: int, q_per_kv: int, tokens_per_tile: int) -> cute.CopyAtom:
    """Boxes (part of a head, heads of a KV head, tokens) of q (total_q, num_q_heads, head_dim): their rows are the packed rows."""
    q = cute.make_tensor(mQ.iterator, cute.select(mQ.layout, mode=[2, 1, 0]))
    shape = (elems, q_per_kv, tokens_per_tile)
    box = swizzled_box(shape, mQ.element_type.width // 8)
    return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), q, box, shape).atom


def make_kv_atom(cache: cute.Tensor, elems: int, box_rows: int) -> cute.CopyAtom:
    """Boxes (elements of a head, rows of a page) of a cache (num_pages, page_size, num_kv_heads, head_dim).

    Without pages: boxes (elements of a head, rows) of (total_k, num_kv_heads, head_dim).
    """
    modes = [3, 1, 2, 0] if cute.rank(cache) == 4 else [2, 0, 1]
    kv = cute.make_tensor(cache.iterator, cute.select(cache.layout, mode=modes))
    shape = (elems, box_rows, *[1] * (len(modes) - 2))
    box = swizzled_box(shape, cache.element_type.width // 8)
    return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), kv, box, shape).atom


def box_coords(atom: cute.CopyAtom, coords: tuple[Int32 | int, ...]) -> list[Int32 | int]:
    """Coordinates of a box in the order of the tensor map's dimensions, which need not be the order of the tensor's modes.

    The atom's type says `tma_gbasis = (...):(1@0,1@2,1@1)` where mode 1 is dimension 2.
    """
    basis = re.search(r"tma_gbasis = <\"[^:]*:\(([^)]*)\)", str(atom._trait.value.type))
    assert basis, f"expected a tiled tensor map, got {atom._trait.value.type}"
    dims = [int(stride.removeprefix("1@")) for stride in basis[1].split(",")]
    assert sorted(dims) == list(range(len(coords))), f"expected a dimension for each of {len(coords)} modes, got {dims}"
    return [coords[dims.index(dim)] for dim in range(len(coords))]


# Of an item's first block: (payload, index); further blocks have K and V alone. K needs no buffer that the item before has until its last
# products, and FP8 tiles have yet to be converted besides, so they come before Q.
ORDER = (("kv", 0), ("q", 0), ("q", 1), ("kv", 1))
ORDER_FP8 = (("kv", 0), ("kv", 1), ("q", 0), ("q", 1))


@dataclass(frozen=True)
class LoadWarp:
    """One warp; `ORDER` says what comes when."""

    geometry: Geometry

    @property
    def loaded_edge(self) -> str:
        """The edge that K and V tiles are loaded for."""
        return "kv_load_to_convert" if self.geometry.config.converts else "kv_load_to_mma"

    @property
    def kv_group(self) -> CtaGroup:
        """Who waits for a loaded tile: the mma warp of the group, or each CTA's own convert warps."""
        return CtaGroup(1) if self.geometry.config.converts else self.geometry.group

    @cute.jit
    def run(self, place: Place, work: WorkTensors, operands: Operands):
        """Take entries and tell all roles; owns the producer sides of the entries, of Q, of the KV tiles and of V tiles with an edge."""
        g = self.geometry
        k_share, v_share = self.shares(place)
        ring, q_phase, tail_phase = RingPosition(Int32(0), Int32(0)), Int32(0), Int32(0)
        feed = RingPosition(Int32(0), Int32(0))
        wait_alone(read_queue(work.mQueue), g.config.kernel.is_dependent)
        self.tell(place, work, feed)
        has_tile = g.has_tile(place, feed)
        while has_tile:
            item = g.read_item(place, work, feed)
            g.release_tile(place, feed)
            feed = advance(feed, FEED_STAGE)
            first_key = g.first_key(work, item) if const_expr(g.has_window_left) else None
            if const_expr(g.config.q_tiles == 1):
                # As a lone tile's products take them: K of a block, then V of the block before it.
                for i in range(item.num_blocks + 1, unroll=1):
                    if const_expr(not g.config.converts):
                        if i == 0:
                            self.load_q(place, operands, item, 0, q_phase)
                    if i < item.num_blocks:
                        box = self.find_box(place, operands, work.bounds, item, i, first_key, k_share)
                        ring, tail_phase = self.load_tile(place, work, operands, item, i, 0, k_share, box, ring, tail_phase)
                    if const_expr(g.config.converts):
                        if i == 0:
                            self.load_q(place, operands, item, 0, q_phase)
                    if i > 0:
                        box = self.find_box(place, operands, work.bounds, item, i - 1, first_key, v_share)
                        ring, tail_phase = self.load_tile(place, work, operands, item, i - 1, 1, v_share, box, ring, tail_phase)
            else:
                for i in range(item.num_blocks, unroll=1):
                    k_box = self.find_box(place, operands, work.bounds, item, i, first_key, k_share)
                    v_box = k_box
                    if const_expr(g.group.ctas > 1):
                        v_box = self.find_box(place, operands, work.bounds, item, i, first_key, v_share)
                    for payload, which in ORDER_FP8 if g.config.converts else ORDER:
                        if const_expr(payload == "q"):
                            if i == 0:
                                self.load_q(place, operands, item, which, q_phase)
                        else:
                            share, box = (v_share, v_box) if which else (k_share, k_box)
                            ring, tail_phase = self.load_tile(place, work, operands, item, i, which, share, box, ring, tail_phase)
            q_phase ^= 1
            self.tell(place, work, feed)
            has_tile = g.has_tile(place, feed)
        if const_expr(g.group.ctas == 1) or place.cta_rank == LEADER:
            leave_queue(work.mQueue, g.group.ctas)

    @cute.jit
    def tell(self, place: Place, work: WorkTensors, feed: RingPosition):
        """The next entry to every role; the leader's warp tells those of both CTAs."""
        if const_expr(self.geometry.group.ctas == 1) or place.cta_rank == LEADER:
            self.geometry.tell(place, work, feed)

    @cute.jit
    def load_tile(
        self,
        place: Place,
        work: WorkTensors,
        operands: Operands,
        item: WorkItem,
        i: Int32,
        is_v: cutlass.Constexpr[int],
        share: Share,
        box: KvBox,
        ring: RingPosition,
        tail_phase: Int32,
    ):
        """This CTA's share of K or V of the item's block `i`, once its buffer is free; returns the next buffer and phase of the tail."""
        g, storage, converts = self.geometry, self.geometry.storage, self.geometry.config.converts
        ptx.mbarrier_wait(g.empty(place, self.loaded_edge, ring.slot), ring.phase ^ 1)
        barrier = (g.full if converts else g.full_at_leader)(place, self.loaded_edge, ring.slot)
        if const_expr(is_v == 1 and not converts):
            has_edge = i == 0 and g.has_v_tail(item)
            if const_expr(g.has_window_left):
                has_edge = has_edge or (i == item.num_blocks - 1 and g.has_v_head(work, item))
            if has_edge:
                # The value tail warp fills the ring's buffer once the tile is clean.
                ptx.mbarrier_wait(g.empty(place, "v_tail_load_to_value_tail"), tail_phase ^ 1)
                barrier = g.full(place, "v_tail_load_to_value_tail")
                tail_phase ^= 1
        slot = place.smem_base + storage.loaded + ring.slot * storage.loaded_stride
        atom = operands.v_atom if is_v else operands.k_atom
        self.load_kv(place, atom, barrier, slot, share, item.tile.kv_head_idx, box)
        return advance(ring, g.config.staged if converts else g.config.kv_stage), tail_phase

    def shares(self, place: Place) -> tuple[Share, Share]:
        """This CTA's shares of a K and of a V tile."""
        config, sizes = self.geometry.config, self.geometry.storage.sizes
        kernel, first_row, first_part = config.kernel, 0, 0
        k_part, v_part, row = sizes.k_loaded_part, sizes.v_loaded_part, sizes.kv_row
        k_parts, v_parts = sizes.k_tx_bytes // k_part, sizes.v_tx_bytes // v_part
        if self.geometry.group.ctas > 1:
            first_row, first_part = place.cta_rank * config.k_rows, place.cta_rank * v_parts
        return (
            Share(first_row, config.k_rows, config.k_box_rows, 0, k_parts, k_part, row, sizes.k_tx_bytes),
            Share(0, kernel.tile.tile_n, kernel.box_rows, first_part, v_parts, v_part, row, sizes.v_tx_bytes),
        )

    @cute.jit
    def load_q(self, place: Place, operands: Operands, item: WorkItem, q_idx: int, q_phase: Int32):
        """Query tile `q_idx` of an item, once its buffer is free; boxes past the end of q bring zeros."""
        g, tile = self.geometry, item.tile
        config, storage, group = g.config.kernel, g.storage, g.group
        ptx.mbarrier_wait(g.empty(place, "q_load_to_mma", q_idx), q_phase ^ 1)
        barrier = g.full_at_leader(place, "q_load_to_mma", q_idx)
        token = tile.seqlen.q_begin + g.q_tile(place, tile, q_idx) * config.tokens_per_tile
        if place.lane_idx == 0:
            group.announce(barrier, storage.sizes.q_tx_bytes)
        cute.arch.sync_warp()
        if place.lane_idx < g.config.num_parts(config.head_dim):
            slot = place.smem_base + storage.q + q_idx * storage.sizes.q + place.lane_idx * storage.sizes.part
            coords = (place.lane_idx * g.config.part_elems, tile.kv_head_idx * config.q_per_kv, token)
            group.tma_load(ptx.tma_descriptor(operands.q_atom), slot, barrier, box_coords(operands.q_atom, coords))

    @cute.jit
    def load_kv(self, place: Place, atom: cute.CopyAtom, barrier: Int32, slot: Int32, share: Share, kv_head_idx: Int32, box: KvBox):
        """A share of one K or V tile into `slot`."""
        group = self.kv_group
        if place.lane_idx == 0:
            group.announce(barrier, share.tx_bytes)
        cute.arch.sync_warp()
        if box.part < share.parts:
            target = slot + box.part * share.part_bytes + box.row_box * (share.box_rows * share.row_bytes)
            coords = ((share.first_part + box.part) * self.geometry.config.loaded_elems, box.row, kv_head_idx)
            if const_expr(box.page is not None):
                coords = (*coords, box.page)
            group.tma_load(ptx.tma_descriptor(atom), target, barrier, box_coords(atom, coords))

    @cute.jit
    def find_box(
        self,
        place: Place,
        operands: Operands,
        bounds: SeqlenBounds,
        item: WorkItem,
        i: Int32,
        first_key: Int32 | None,
        share: Share,
    ):
        """This lane's box of a share of the item's block `i`; the page table is read only for pages with tokens that a row sees.

        first_key: that any row of the item sees; None: the sequence's first.
        """
        n_block, seqlen_k = item.blocks.end - 1 - i, item.tile.seqlen.seqlen_k
        pages, row_boxes = operands.pages, share.rows // share.box_rows
        row_box = place.lane_idx % row_boxes
        token = n_block * self.geometry.config.kernel.tile.tile_n + share.first_row + row_box * share.box_rows
        is_seen = token < seqlen_k
        if const_expr(first_key is not None):
            is_seen = is_seen & (token + share.box_rows > first_key)
        if const_expr(pages is None):
            page, row = None, bounds.kv_tokens
            if is_seen:
                row = bounds.k_begin(item.tile.seq_idx) + token
        else:
            page, row = pages.num_pages, Int32(0)
            if is_seen:
                page_idx = token // pages.page_size
                row = token - page_idx * pages.page_size
                page = pages.mPageTable[item.tile.seq_idx, page_idx]
        return KvBox(page, row, row_box, place.lane_idx // row_boxes)
