"""What every role of the CTA knows: its part of the work list, and where shared memory and TMEM begin."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Int32

from fa4_backend.kernels.common.block_info import BlockInfo, BlockRange
from fa4_backend.kernels.common.cta_group import CtaGroup
from fa4_backend.kernels.common.mask import MaskSpec, MaskValues
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds, SeqlenInfo
from fa4_backend.kernels.common.tile_scheduler import WorkTile, read_tile, tile_range
from fa4_backend.kernels.sm100.config import Sm100Config
from fa4_backend.kernels.sm100.storage import Storage
from fa4_backend.kernels.sm100.tmem_layout import TmemLayout


class WorkTensors(NamedTuple):
    """The work list and the lengths it refers to; read by every role, written by none."""

    mTiles: cute.Tensor  # (max_tiles, TILE_INTS) int32
    mBegin: cute.Tensor  # (num_ctas + 1,) int32
    mCuSeqlensQ: cute.Tensor  # (batch + 1,) int32
    values: MaskValues
    bounds: SeqlenBounds


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
        pack = PackGqa(kernel.q_per_kv, kernel.tokens_per_tile, 0, 0, kernel.tile.tile_m)
        blocks = BlockInfo(MaskSpec(kernel.mask), kernel.tile.tile_n, config.tokens_per_item)
        group, storage = CtaGroup(config.tuning.cta_group), Storage.of(config, o_stage)
        return Geometry(config, group, storage, TmemLayout.of(config), pack, blocks)

    @property
    def kv_edge(self) -> str:
        """The edge of the ring that products read."""
        return "kv_convert_to_mma" if self.config.converts else "kv_load_to_mma"

    def full(self, place: Place, edge: str, index=0) -> Int32:
        """Shared address of an edge's full barrier."""
        return place.smem_base + self.storage.barriers.full_offset(edge) + index * 8

    def empty(self, place: Place, edge: str, index=0) -> Int32:
        """Shared address of an edge's empty barrier."""
        return place.smem_base + self.storage.barriers.empty_offset(edge) + index * 8

    def full_at_leader(self, place: Place, edge: str, index=0) -> Int32:
        """Address of the full barrier that the mma warp waits for."""
        return place.leader_base + self.storage.barriers.full_offset(edge) + index * 8

    def empty_at_leader(self, place: Place, edge: str, index=0) -> Int32:
        """Address of the empty barrier that the mma warp waits for."""
        return place.leader_base + self.storage.barriers.empty_offset(edge) + index * 8

    def item_range(self, work: WorkTensors) -> tuple[Int32, Int32]:
        """Entries `begin .. end` of the work list that this CTA, or its pair, walks."""
        return tile_range(work.mBegin, self.group.ctas)

    def q_tile(self, place: Place, tile: WorkTile, q_idx) -> Int32:
        """Index, in tiles of the sequence, of this CTA's query tile `q_idx` of an item."""
        if self.group.ctas == 1:
            return tile.m_block * self.config.q_tiles + q_idx
        return (tile.m_block * self.group.ctas + place.cta_rank) * self.config.q_tiles + q_idx

    def read_item(self, work: WorkTensors, index: Int32) -> WorkItem:
        """Entry `index` of the work list."""
        tile = uniform(read_tile(work.mTiles, work.mCuSeqlensQ, index, work.bounds))
        blocks = self.block_info.blocks(tile.m_block, tile.seqlen, work.values, tile.n_block_begin, tile.n_block_end)
        return WorkItem(tile, blocks)

    def has_v_tail(self, item: WorkItem) -> Boolean:
        """Whether the last block ends within a box: the box's last rows hold none of its tokens, but anything."""
        kernel, seqlen_k = self.config.kernel, item.tile.seqlen.seqlen_k
        return (item.blocks.end * kernel.tile.tile_n > seqlen_k) & (seqlen_k % kernel.box_rows != 0)

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


def uniform(tile: WorkTile) -> WorkTile:
    """The same entry in uniform registers: every lane has read the same, but the compiler cannot know it."""
    same = [cute.arch.make_warp_uniform(field) for field in tile[:-1]]
    return WorkTile(*same, SeqlenInfo(*(cute.arch.make_warp_uniform(field) for field in tile.seqlen)))
