"""Work lists: which CTA does which tile. Made on the device once a step (`kernel.py`), read by every layer's kernels.

In the decode list CTA `c` has `decode_first[c, NUM_ENTRIES]` entries, one behind the other. The prefill list is a queue, in the
order in which its entries are taken, by whoever is free first. An entry of the prefill list is TILE_INTS int32, one of the decode list
DECODE_INTS (the names below index both; what stands behind the slots is one list's alone):

    seq_idx, kv_head_idx     whose queries and keys
    m_block                  query block, in units of the kernel's tokens per tile; always 0 for decode
    n_block_begin, n_block_end   KV range in units of the kernel's tile_n; the kernel intersects it with what its mask needs

    partial_slot             WHOLE: the entry holds its whole row group and writes `out`; NOTHING: it writes nothing; else the
                             first slot of the split-KV workspace that it fills
    first_slot, num_pieces   the slots `first_slot .. first_slot + num_pieces` of the whole row group, which are added up in slot order
                             when all have arrived at `arrivals[first_slot]` (`common/part_arrivals.py`); of no meaning where
                             partial_slot is below 0. The prefill list's entries have slots and counters of their own: `part_slots`,
                             `part_arrivals`

    tile_kv_len, tile_q_begin, tile_query_len   only in the prefill list, whose last int nobody reads: the sequence's KV tokens, its first
                             row in q and its query tokens: a kernel needs no second look-up

    q_begin, query_len, kv_len   the same in the decode list
    total_q                  query tokens of the whole step: rows of `out` from there on are zeroed; ALL_ROWS where the prefill kernel does
                             it, in a step of prefill rows alone
    num_entries, next_entry  only in `decode_first`, whose row c repeats the first entry of CTA c: how many entries it has and
                             where its second one stands. So a CTA reaches its first page with one look-up less. A CTA without
                             entries has a count of 0 and `total_q`, and nothing else.

Lengths in a list are within the plan's limits, whatever `cu_seqlens_q` and `seqused_k` hold (`rows.read_row`).

A *row group* is one (sequence, KV head, query block), of prefill rows also called a tile. With `split_blocks` > 0 (batch
invariance) a decode row group's KV is cut at fixed tiles whatever the batch is (`common/kv_pieces.py`), and each such
piece has a slot of its own; else an entry is one piece. With `part_piece_blocks` > 0 a prefill tile's likewise, from the last piece down;
there the first entry's pieces, which its CTA adds up, have one slot together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fa4_backend.kernels.common.kv_pieces import PieceRule, piece_of, short_piece
from fa4_backend.kernels.schedule.limits import MAX_DECODE_CTAS
from fa4_backend.kernels.schedule.params import ScheduleParams

if TYPE_CHECKING:
    import torch

    from fa4_backend.problem import BatchLimits

SEQ_IDX, KV_HEAD_IDX, M_BLOCK, N_BLOCK_BEGIN, N_BLOCK_END, PARTIAL_SLOT, FIRST_SLOT, NUM_PIECES = range(8)
TILE_INTS = 12
TILE_KV_LEN, TILE_Q_BEGIN, TILE_QUERY_LEN = range(8, 11)
DECODE_INTS = 16
Q_BEGIN, QUERY_LEN, KV_LEN, NUM_ENTRIES, NEXT_ENTRY, TOTAL_Q = range(8, 14)

QUEUE_INTS = 4
# Entries that were taken; entries; CTAs that found no entry left; entries that are nobody's to take: CTA c, or pair c, begins with entry c.
# That is an entry a CTA in a step of prefill rows alone, else 0: CTAs that start behind decode rows would hold up their entries.
QUEUE_NEXT, QUEUE_TOTAL, QUEUE_LEFT, QUEUE_OWN = range(4)

WHOLE, NOTHING = -1, -2  # in place of an entry's slot; NOTHING: its prefill tile has fewer pieces than its row's have parts
MAX_PARTS = 64  # of a prefill tile that may be cut anywhere; more slots than these are added up by one CTA (`sm90/part_shares.py`)
SLOTS_A_CTA = 2  # for parts of prefill tiles: tiles that are more than CTAs are hardly cut
PIECE_SLOTS_A_CTA = 6  # in batch-invariant mode, where pieces have slots: 256 tokens of 64K of 32/8 heads have 640
MOST_PARTS = (1 << 15) - 1  # of any row group: what its arrival counter can count (`common/part_arrivals.py`)
PART_COUNTERS = 4  # of a tile: one for each warpgroup that works on rows of its own, and one 16-byte store clears them

ALL_ROWS = 2**31 - 1  # more rows than `out` has
NO_WINDOW = 1 << 30  # a window wider than any sequence; a position plus it stays below 2^31
L2_SHARE_BYTES = 24 << 20  # about half of the L2 of an H100 (50 MB); KV of heads that prefill tiles stream together


@dataclass(frozen=True)
class WorkShape:
    """What the schedule must know of the kernels that read its lists, and of the batch's limits."""

    num_kv_heads: int
    prefill_groups: int  # CTAs of the prefill kernel, or CTA pairs
    decode_num_ctas: int  # CTAs of the decode kernel
    tokens_per_item: int  # query tokens of an entry of the prefill list
    prefill_tile_n: int  # keys of a prefill n_block
    decode_query_len: int  # longest query of a decode row; 0: every row goes to the prefill list
    decode_tile_n: int  # keys of a decode n_block
    slot_floats: int  # float32 of a split-KV slot
    split_blocks: int  # decode n_blocks of a long piece in batch-invariant mode; 0: cut where it balances best
    slot_vectors: int  # 16-byte vectors of a slot that each thread of a combining CTA adds
    l2_tokens: int  # KV tokens of one head that fit the share of L2 that prefill tiles running together may use
    num_sms: int  # of the device
    decode_tile_ticks: int  # time of a decode n_block on an SM of its own, in TICKS of a prefill n_block
    decode_full_sms: int  # SMs whose decode CTAs keep the memory busy: more are no faster
    max_seqlen_k: int  # KV tokens of one sequence in whole pages: longer lengths on the device are cut to it
    max_num_tokens: int  # query tokens of a step: `cu_seqlens_q` likewise
    part_floats: int = 0  # float32 of a slot for a part of a prefill tile; 0: prefill tiles are not cut along KV
    min_part_blocks: int = 1  # prefill n_blocks of the shortest part that a cut aims at
    part_piece_blocks: int = 0  # n_blocks of a short piece, at whose ends alone prefill tiles are cut (`kv_pieces.tile_rule`); 0: anywhere
    most_part_quarters: int = 1 << 16  # quarters of an n_block that adding up a prefill tile's parts takes at most (`schedule/rates.py`)
    decode_parts_ratio: int = 0  # with it: n n_blocks have at most the root of `decode_parts_ratio * n` parts; 0: no such bound
    decode_share_vectors: int = 0  # parts times `slot_vectors` from which on all CTAs of a row group add up its parts
    decode_part_blocks: int = 0  # decode n_blocks of the shortest part where all CTAs of a row group add up its parts; 0: one CTA does
    convert_keys: int = 0  # keys of a workspace where a step's K and V are converted before (`kernels/convert_kv`); 0: they are not
    private_slots: int = 0  # slots of the decode kernel's own, behind those that the schedule hands out
    decode_lines: int = 1  # `num_kv_heads` where all see the same keys, which CTAs side by side then take together (`decode_cuts`)
    decode_part_quarters: int = 0  # quarters of a decode n_block that a part of a row group costs; 0: parts are not weighed
    lone_block_eighths: int = 8  # eighths of its usual time that a decode n_block takes a CTA where others are done

    def __post_init__(self) -> None:
        assert self.decode_lines in (1, self.num_kv_heads), f"{self.decode_lines=}, expected 1 or {self.num_kv_heads=}"
        assert self.decode_lines <= self.decode_num_ctas, f"{self.decode_lines=}, expected at most {self.decode_num_ctas=}"
        assert not (self.split_blocks and self.decode_part_quarters), (
            f"{self.split_blocks=}: cuts are the row's, {self.decode_part_quarters=}"
        )
        assert self.lone_block_eighths > 0, f"{self.lone_block_eighths=}, expected at least 1"
        assert self.decode_num_ctas <= MAX_DECODE_CTAS, f"{self.decode_num_ctas=}, expected at most {MAX_DECODE_CTAS}"
        assert self.max_parts() <= MOST_PARTS, f"parts of a row group: {self.max_parts()}, expected at most {MOST_PARTS}"

    def params(self, window_left: int, window_right: int) -> ScheduleParams:
        """The numbers for a launch of the schedule, with the windows of a step."""
        others = {"window_left": window_left, "window_right": window_right, "part_slots": self.max_part_slots()}
        return ScheduleParams(*(others[name] if name in others else getattr(self, name) for name in ScheduleParams._fields))

    def max_prefill_tiles(self, max_num_seqs: int) -> int:
        """Entries of the longest prefill list within the limits."""
        m_blocks = self.max_num_tokens // self.tokens_per_item + min(max_num_seqs, self.max_num_tokens)
        return m_blocks * self.num_kv_heads + self.max_part_slots()

    def max_part_slots(self) -> int:
        """Parts of all prefill tiles that are cut: the schedule cuts no more (`prefill_parts.part_length`).

        264 slots of 68 KiB, 17.5 MiB, on 132 SMs at d128, in batch-invariant mode 792.
        """
        if not self.part_floats:
            return 0
        return (PIECE_SLOTS_A_CTA if self.part_piece_blocks else SLOTS_A_CTA) * self.prefill_groups

    def own_part_slots(self) -> int:
        """Slots behind those, one a CTA, in which it adds up the pieces of a tile that it has."""
        return self.prefill_groups if self.part_piece_blocks else 0

    def max_decode_tiles(self, max_num_seqs: int) -> int:
        """Entries of the longest decode list: a row group each, and one more for each cut between two CTAs."""
        return max_num_seqs * self.num_kv_heads + self.decode_num_ctas

    def max_slots(self) -> int:
        """Slots of the split-KV workspace; depends on the CTAs, not on the batch.

        Only row groups that a cut between two CTAs divides have slots: at most one a cut.
        """
        cuts = self.decode_num_ctas - 1 if self.decode_query_len else 0
        return max(1, cuts * (2 if self.split_blocks == 0 else self.max_parts()))

    def max_parts(self) -> int:
        """Parts of a decode row group at most: its pieces in batch-invariant mode, else one a CTA."""
        if self.split_blocks == 0:
            return self.decode_num_ctas
        blocks = -(-self.max_seqlen_k // self.decode_tile_n)
        return piece_of(max(blocks, 1) - 1, PieceRule(short_piece(self.slot_vectors), self.split_blocks)) + 1


@dataclass
class WorkLists:
    """Device buffers of one plan: lists and split-KV workspace. Fixed addresses; sizes follow from limits and CTA count."""

    shape: WorkShape
    prefill_tiles: torch.Tensor  # (max_prefill_tiles, TILE_INTS) int32
    prefill_queue: torch.Tensor  # (1, QUEUE_INTS) int32; a launch leaves QUEUE_NEXT and QUEUE_LEFT at 0
    decode_tiles: torch.Tensor  # (max_decode_tiles, DECODE_INTS) int32
    decode_first: torch.Tensor  # (decode_num_ctas, DECODE_INTS) int32
    slots: torch.Tensor  # (max_slots + private_slots, slot_floats) float32: O of a piece, relative to its row_max, then row_max and row_sum
    arrivals: torch.Tensor  # (max_slots,) int32: a row group's two counters in the places of its first two slots; 0 between launches
    # (max_part_slots + own_part_slots, part_floats) float32, as the prefill kernel lays them out; None: it takes no parts
    part_slots: torch.Tensor | None
    part_arrivals: torch.Tensor  # (max(1, max_part_slots), PART_COUNTERS) int32: the same of a prefill tile, for each of its warpgroups
    key_starts: torch.Tensor | None = None  # (max_num_seqs + 1,) int32: where a prefill row's keys begin in the workspace of converted ones

    @classmethod
    def allocate(cls, shape: WorkShape, limits: BatchLimits, device: torch.device | str) -> WorkLists:
        """Make the buffers for every batch within `limits`; the lists are empty until the first schedule."""
        import torch

        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        slots, part_slots = shape.max_slots(), shape.max_part_slots()
        return cls(
            shape,
            prefill_tiles=ints(shape.max_prefill_tiles(limits.max_num_seqs), TILE_INTS),
            prefill_queue=ints(1, QUEUE_INTS),
            decode_tiles=ints(shape.max_decode_tiles(limits.max_num_seqs), DECODE_INTS),
            decode_first=ints(shape.decode_num_ctas, DECODE_INTS),
            slots=torch.empty(slots + shape.private_slots, shape.slot_floats, dtype=torch.float32, device=device),
            arrivals=ints(slots),
            part_slots=torch.empty(part_slots + shape.own_part_slots(), shape.part_floats, dtype=torch.float32, device=device)
            if part_slots
            else None,
            part_arrivals=ints(max(1, part_slots), PART_COUNTERS),
            key_starts=ints(limits.max_num_seqs + 1),
        )
