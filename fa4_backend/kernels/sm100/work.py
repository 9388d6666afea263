"""What every role of the CTA knows: the entry of the work list in hand, and where shared memory and TMEM begin.

The load warp takes an entry from the queue when it has asked for all of the one before, and lays its numbers into a ring of shared memory
(`tell`), of both CTAs where they work in pairs. Every role reads them there (`has_tile`, `read_item`) and says when it is done with them
(`release_tile`). An entry without a tile ends the roles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.block_info import BlockInfo, BlockRange
from fa4_backend.kernels.common.cta_group import CtaGroup
from fa4_backend.kernels.common.edges import MBARRIER_BYTES
from fa4_backend.kernels.common.hardware import ACCESS_BYTES
from fa4_backend.kernels.common.mask import MaskSpec, MaskValues
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.ring import RingPosition
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds, SeqlenInfo
from fa4_backend.kernels.common.tile_scheduler import PartTensors, TilePart, WorkTile, take_tile, tile_of_entry
from fa4_backend.kernels.schedule.work_list import (
    FIRST_SLOT,
    KV_HEAD_IDX,
    M_BLOCK,
    N_BLOCK_BEGIN,
    N_BLOCK_END,
    NUM_PIECES,
    PARTIAL_SLOT,
    QUEUE_TOTAL,
    SEQ_IDX,
    TILE_INTS,
    TILE_KV_LEN,
)
from fa4_backend.kernels.sm100.config import Sm100Config
from fa4_backend.kernels.sm100.storage import FEED_BYTES, Storage
from fa4_backend.kernels.sm100.tmem_layout import TmemLayout

# In the ring, behind the numbers of the list (`work_list`): tokens of the sequence within the call's bounds, and whether there is an entry.
SEQLEN_K, Q_BEGIN, SEQLEN_Q, IS_TILE = range(TILE_KV_LEN, TILE_INTS)


class WorkTensors(NamedTuple):
    """The work list, the lengths it refers to, and the workspace for parts of its items."""

    mTiles: cute.Tensor  # (max_tiles, TILE_INTS) int32
    mQueue: cute.Tensor  # (1, QUEUE_INTS) int32
    mCuSeqlensQ: cute.Tensor  # (batch + 1,) int32
    values: MaskValues
    bounds: SeqlenBounds
    parts: PartTensors


class HeadTensors(NamedTuple):
    """What a row's head brings to its softmax, and where its lse goes; presence is compile-time."""

    mLse: cute.Tensor | None  # (num_q_heads, total_q) float32, natural log
    mSinks: cute.Tensor | None  # (num_q_heads,)
    mSlopes: cute.Tensor | None  # (num_q_heads,) float32
    mQScale: cute.Tensor | None  # (num_kv_heads,) float32
    mKScale: cute.Tensor | None  # (num_kv_heads,) float32
    mVScale: cute.Tensor | None  # (num_kv_heads,) float32
    mOutScale: cute.Tensor | None  # (1,) float32


class Place(NamedTuple):
    """Who and where a thread is."""

    smem_base: Int32  # shared address of Storage's offset 0
    leader_base: Int32  # the same of the CTA that issues the products; for arrivals and copies
    cta_rank: Int32 | int  # within the CTAs that share products
    tmem_base: Int32  # TMEM address of column 0
    warp_idx: Int32  # warp-uniform
    lane_idx: Int32


class WorkItem(NamedTuple):
    """One entry of the work list: `q_tiles` query tiles a CTA of one KV head against `blocks`, from the last block to the first."""

    tile: WorkTile
    blocks: BlockRange

    @property
    def num_blocks(self) -> Int32:
        """KV blocks; at least one."""
        return self.blocks.end - self.blocks.begin


@dataclass(frozen=True)
class Geometry:
    """The compile-time side of a kernel, resolved once."""

    config: Sm100Config
    group: CtaGroup
    storage: Storage
    tmem: TmemLayout
    pack: PackGqa
    block_info: BlockInfo

    @staticmethod
    def of(config: Sm100Config, o_stage: int) -> "Geometry":
        """Resolve a config."""
        kernel = config.kernel
        blocks = BlockInfo(MaskSpec(kernel.mask), kernel.tile.tile_n, config.tokens_per_item)
        group, storage = CtaGroup(config.tuning.cta_group), Storage.of(config, o_stage)
        return Geometry(config, group, storage, TmemLayout.of(config), PackGqa.of(kernel), blocks)

    @property
    def kv_edge(self) -> str:
        """The edge of the ring that products read."""
        return "kv_convert_to_mma" if self.config.converts else "kv_load_to_mma"

    def full(self, place: Place, edge: str, index: Int32 | int = 0) -> Int32:
        """Shared address of an edge's full barrier."""
        return place.smem_base + self.storage.barriers.full_offset(edge) + index * MBARRIER_BYTES

    def empty(self, place: Place, edge: str, index: Int32 | int = 0) -> Int32:
        """Shared address of an edge's empty barrier."""
        return place.smem_base + self.storage.barriers.empty_offset(edge) + index * MBARRIER_BYTES

    def full_at_leader(self, place: Place, edge: str, index: Int32 | int = 0) -> Int32:
        """Address of the full barrier that the mma warp waits for."""
        return place.leader_base + self.storage.barriers.full_offset(edge) + index * MBARRIER_BYTES

    def empty_at_leader(self, place: Place, edge: str, index: Int32 | int = 0) -> Int32:
        """Address of the empty barrier that the mma warp waits for."""
        return place.leader_base + self.storage.barriers.empty_offset(edge) + index * MBARRIER_BYTES

    @cute.jit
    def tell(self, place: Place, work: WorkTensors, feed: RingPosition):
        """Take the next entry and tell all roles; the leader's load warp calls. Lane i has number i."""
        index = take_tile(work.mQueue)
        value = Int32(0)
        if index < work.mQueue[0, QUEUE_TOTAL]:
            if place.lane_idx < TILE_INTS:
                value = work.mTiles[index, place.lane_idx]
            seqlen = tile_of_entry(value, work.bounds).seqlen
            for number, own in ((SEQLEN_K, seqlen.seqlen_k), (Q_BEGIN, seqlen.q_begin), (SEQLEN_Q, seqlen.seqlen_q), (IS_TILE, Int32(1))):
                value = cutlass.select_(place.lane_idx == number, own, value)
        self.group.wait(self.empty(place, "tile_load_to_roles", feed.slot), feed.phase ^ 1)
        for rank in cutlass.range_constexpr(self.group.ctas):
            base = self.group.base_of(place.smem_base, rank)
            if place.lane_idx < TILE_INTS:
                ptx.store_shared_i32(base + self.feed_offset(feed) + place.lane_idx * 4, value, cluster=self.group.ctas > 1)
            self.group.warp_arrive(
                base + self.storage.barriers.full_offset("tile_load_to_roles") + feed.slot * MBARRIER_BYTES, place.lane_idx
            )

    def feed_offset(self, feed: RingPosition) -> Int32:
        """Where an entry of the ring lies, from the base of shared memory."""
        return self.storage.feed + feed.slot * FEED_BYTES

    def has_tile(self, place: Place, feed: RingPosition) -> Boolean:
        """Wait for the ring's entry; whether it is one of the list."""
        self.group.wait(self.full(place, "tile_load_to_roles", feed.slot), feed.phase)
        return cute.arch.make_warp_uniform(ptx.load_shared_i32(place.smem_base + self.feed_offset(feed) + IS_TILE * 4)) != 0

    def release_tile(self, place: Place, feed: RingPosition) -> None:
        """The warp has read all that it needs of the ring's entry."""
        self.group.warp_arrive(self.empty_at_leader(place, "tile_load_to_roles", feed.slot), place.lane_idx)

    def q_tile(self, place: Place, tile: WorkTile, q_idx: Int32 | int) -> Int32:
        """Index, in tiles of the sequence, of this CTA's query tile `q_idx` of an item."""
        if self.group.ctas == 1:
            return tile.m_block * self.config.q_tiles + q_idx
        return (tile.m_block * self.group.ctas + place.cta_rank) * self.config.q_tiles + q_idx

    def read_item(self, place: Place, work: WorkTensors, feed: RingPosition) -> WorkItem:
        """The ring's entry."""
        n = self._numbers(place, feed)
        kv_head_idx, m_block, begin, end = (_uniform(n[i]) for i in (KV_HEAD_IDX, M_BLOCK, N_BLOCK_BEGIN, N_BLOCK_END))
        seqlen = SeqlenInfo(*(_uniform(n[i]) for i in (Q_BEGIN, SEQLEN_Q, SEQLEN_K)))
        tile = WorkTile(n[SEQ_IDX], kv_head_idx, m_block, begin, end, seqlen)
        blocks = self.block_info.blocks(m_block, seqlen, work.values, begin, end)
        if const_expr(self.config.kernel.has_parts):
            # A part that the layer's window leaves no block of its own works on one of another part, of which it must see nothing.
            blocks = blocks._replace(full_end=cutlass.min(blocks.full_end, end))
        return WorkItem(tile, blocks)

    def read_part(self, place: Place, feed: RingPosition) -> TilePart:
        """Which part of its item the ring's entry is."""
        n = self._numbers(place, feed)
        return TilePart(*(_uniform(n[i]) for i in (PARTIAL_SLOT, FIRST_SLOT, NUM_PIECES)))

    def _numbers(self, place: Place, feed: RingPosition) -> list[Int32]:
        address = place.smem_base + self.feed_offset(feed)
        return [Int32(word) for at in range(0, FEED_BYTES, ACCESS_BYTES) for word in vectors.elements(ptx.load_shared_v4(address + at))]

    def tile_of_item(self, place: Place, q_idx: Int32 | int) -> Int32 | int:
        """Index of this CTA's query tile `q_idx` among all of an item."""
        return q_idx if self.group.ctas == 1 else place.cta_rank * self.config.q_tiles + q_idx

    def has_v_tail(self, item: WorkItem) -> Boolean:
        """Whether the last block ends within a box: the box's last rows hold none of its tokens, but anything."""
        kernel, seqlen_k = self.config.kernel, item.tile.seqlen.seqlen_k
        ends_here = item.blocks.end * kernel.tile.tile_n > seqlen_k
        if const_expr(kernel.has_parts):
            # A part without a block of its own may stand behind the sequence's end.
            ends_here = ends_here & ((item.blocks.end - 1) * kernel.tile.tile_n < seqlen_k)
        return ends_here & (seqlen_k % kernel.box_rows != 0)

    def has_v_head(self, work: WorkTensors, item: WorkItem) -> Boolean:
        """Whether what the item sees begins in its first block and within a box, whose first rows may hold anything."""
        kernel, first_key = self.config.kernel, self.first_key(work, item)
        return (item.blocks.begin * kernel.tile.tile_n < first_key) & (first_key % kernel.box_rows != 0)

    def first_key(self, work: WorkTensors, item: WorkItem) -> Int32:
        """First key that any row of an item sees."""
        return self.block_info.first_key(item.tile.m_block, item.tile.seqlen, work.values)

    @property
    def has_window_left(self) -> bool:
        """Whether items may begin behind a sequence's first key."""
        return self.block_info.mask.has_left


def _uniform(number: Int32) -> Int32:
    """The same number in a uniform register: every lane has read the same, but the compiler cannot know it."""
    return cute.arch.make_warp_uniform(number)
