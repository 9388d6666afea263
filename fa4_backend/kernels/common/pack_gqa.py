"""Query heads of a KV head packed as rows of a tile: row `r` is token `r // q_per_kv`, head `r % q_per_kv` of the group.

One code path for every ratio. Rows past `tokens_per_tile * q_per_kv` are idle where the ratio does not divide the tile.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass.cute.nvgpu import cpasync

from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.seqlen_info import SeqlenInfo


class PackedRow(NamedTuple):
    """A row of a tile in terms of the sequence."""

    token: Int32  # query token of the sequence
    head: Int32  # query head within the KV head's group
    is_valid: Boolean  # neither idle nor past the sequence's last token


@dataclass(frozen=True)
class PackGqa:
    """Row arithmetic and the TMA of packed queries for one kernel."""

    q_per_kv: int
    tokens_per_tile: int
    part_elems: int  # elements of a head in one swizzled row of shared memory
    num_parts: int  # such rows of a head
    tile_m: int

    @staticmethod
    def of(config: PrefillConfig) -> "PackGqa":
        """Row arithmetic of a kernel."""
        part = config.part_elems(config.head_dim)
        return PackGqa(config.q_per_kv, config.tokens_per_tile, part, config.head_dim // part, config.tile.tile_m)

    @property
    def box_elems(self) -> int:
        """Elements of Q that the boxes of one tile bring."""
        return self.q_per_kv * self.tokens_per_tile * self.part_elems * self.num_parts

    def row(self, row: Int32, m_block: Int32, seqlen: SeqlenInfo) -> PackedRow:
        """Row `row` (0 .. tile_m) of query block `m_block`."""
        token_in_tile = row // self.q_per_kv
        token = m_block * self.tokens_per_tile + token_in_tile
        is_valid = (token_in_tile < self.tokens_per_tile) & (token < seqlen.seqlen_q)
        return PackedRow(token, row - token_in_tile * self.q_per_kv, is_valid)

    def make_tma(self, q: cute.Tensor, swizzle: cute.Swizzle) -> tuple[cute.CopyAtom, cute.Tensor]:
        """TMA copy of boxes (heads, tokens, part of a head) of q (total_q, num_q_heads, head_dim)."""
        heads_first = cute.make_tensor(q.iterator, cute.select(q.layout, mode=[1, 0, 2]))
        shape = (self.q_per_kv, self.tokens_per_tile, self.part_elems)
        stride = (self.part_elems, self.part_elems * self.q_per_kv, 1)
        box = cute.make_composed_layout(swizzle, 0, cute.make_layout(shape, stride=stride))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), heads_first, box, shape)

    @cute.jit
    def load(
        self,
        atom: cute.CopyAtom,
        mQ: cute.Tensor,  # the TMA's coordinate tensor: (num_q_heads, total_q, head_dim)
        sQ_ptr: cute.Pointer,  # of a buffer: head parts of (tile_m, part_elems)
        kv_head_idx: Int32,
        first_token: Int32,  # row of q of the tile's first token
        full: cute.Pointer,
    ):
        """Issue one box for each part of a head."""
        shape = (self.q_per_kv, self.tokens_per_tile, self.part_elems)
        stride = (self.part_elems, self.part_elems * self.q_per_kv, 1)
        sQ = cute.make_tensor(sQ_ptr, cute.make_layout((shape, self.num_parts), stride=(stride, self.tile_m * self.part_elems)))
        at_tile = cute.domain_offset((kv_head_idx * self.q_per_kv, first_token, 0), mQ)
        gQ = cute.group_modes(cute.local_tile(at_tile, shape, (0, 0, None)), 0, 3)
        tQsQ, tQgQ = cpasync.tma_partition(atom, 0, cute.make_layout(1), sQ, gQ)
        cute.copy(atom, tQgQ, tQsQ, tma_bar_ptr=full)
