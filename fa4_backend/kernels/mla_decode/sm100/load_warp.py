"""The load warp: Q, and of each block K of this CTA's half of the keys and V of its half of the columns; a TMA box a lane.

A latent is fetched as K by one CTA and as V by both, each its half of the columns: from L2 three times for twice the work (docs/mla.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass._mlir import ir

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common.decode_entry import Entry, StepTensors
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.mla_decode.config import LATENT_PARTS, PARTS
from fa4_backend.kernels.mla_decode.sm100.config import BLOCK_KEYS, CTA_KEYS, K_PARTS, K_STAGE, PAIR, V_PARTS, V_STAGE
from fa4_backend.kernels.mla_decode.sm100.storage import (
    Q_PART_BYTES,
    Q_ROW_BYTES,
    PairStorage,
    Place,
)
from fa4_backend.kernels.mla_decode.sm100.work import PairWork
from fa4_backend.kernels.mla_decode.tensor_maps import TensorMaps, query_modes


class Source(NamedTuple):
    """Where latents of an entry lie."""

    step: StepTensors
    num_pages: Int32
    entry: Entry


@dataclass(frozen=True)
class LoadWarp:
    """One warp of each CTA; the boxes of both complete at the leader's barriers."""

    storage: PairStorage
    work: PairWork

    @cute.jit
    def run(self, place: Place, step: StepTensors, num_pages: Int32, values: MaskValues, maps: TensorMaps):
        """Walk the entries; owns the producer sides of Q, K, V and of V with a tail.

        Order: K 0, V 0, K 1, K 2, V 1, K 3, V 2 ... A stage of K is free once the scores behind it are made, which comes before the
        product that frees V.
        """
        work = self.work
        q_map, rope_map, latent_map = (ptx.tma_descriptor(atom) for atom in maps)
        word, num_entries, second = work.first_entry(step)
        k, v, q_phase = RingPosition(Int32(0), Int32(0)), RingPosition(Int32(0), Int32(0)), Int32(0)
        for index in cutlass.range(num_entries, unroll=1):
            entry = work.entry(step, word)
            blocks, source = work.blocks(entry, values), Source(step, num_pages, entry)
            if index + 1 < num_entries:
                word = work.entry_word(step, second + index)
            has_tail = work.has_v_tail(entry, blocks)
            if blocks.end > blocks.begin:
                self.load_q(place, entry, q_map, rope_map, q_phase)
                q_phase ^= 1
            for n_block in cutlass.range(blocks.begin, blocks.end, unroll=1):
                is_tail = has_tail & (n_block == blocks.end - 1)
                if n_block == blocks.begin:
                    k = self.load_k(place, source, n_block, latent_map, k)
                    self.load_v(place, source, n_block, latent_map, v, is_tail)
                if n_block + 1 < blocks.end:
                    k = self.load_k(place, source, n_block + 1, latent_map, k)
                if n_block > blocks.begin:
                    self.load_v(place, source, n_block, latent_map, v, is_tail)
                v = advance(v, self.storage.config.num_blocks)

    @cute.jit
    def load_q(self, place: Place, entry: Entry, q_map: ir.Value, rope_map: ir.Value, q_phase: Int32):
        """This CTA's rows of Q, once the products with the entry before are done: lanes take turns, boxes of one part side by side.

        For the mma warp, or for the softmax warps, which split them.
        """
        s, c = self.storage, self.storage.config
        ptx.mbarrier_wait(s.empty(place, s.q_edge), q_phase ^ 1)
        full = s.full_at_leader(place, "q_load_to_mma") if c.terms == 1 else s.full(place, "q_load_to_softmax")
        if place.lane == 0:
            s.group.announce(full, s.q_bytes)
        cute.arch.sync_warp()
        first_row = self.work.first_row(entry)
        box_rows = const_expr(c.box_heads * c.box_tokens)
        for part in cutlass.range_constexpr(PARTS):
            for box in cutlass.range(place.lane, c.q_boxes, 32, unroll=1):
                packed = first_row + box * box_rows
                token = packed // c.num_heads
                where = place.q + part * Q_PART_BYTES + box * (box_rows * Q_ROW_BYTES)
                at = {"head": packed - token * c.num_heads, "token": entry.seqlen.q_begin + token, "part": part}
                if const_expr(part < LATENT_PARTS):
                    s.group.tma_load(q_map, where, full, self._query_coords(at, True))
                else:
                    s.group.tma_load(rope_map, where, full, self._query_coords(at, False))

    def _query_coords(self, at: dict[str, Int32 | int], has_parts: bool) -> tuple[Int32 | int, ...]:
        return (0, *(at[name] for name in query_modes(self.storage.config, has_parts)))

    @cute.jit
    def load_k(self, place: Place, source: Source, n_block: Int32, latent_map: ir.Value, k: RingPosition):
        """All elements of this CTA's half of a block's keys, a stage as soon as it is free. Returns the next stage."""
        s, rows = self.storage, self.storage.config.box_rows
        boxes = const_expr(CTA_KEYS // rows)
        row_box = place.lane % boxes
        page, row = self._find(source, n_block * BLOCK_KEYS + place.rank * CTA_KEYS + row_box * rows)
        for stage in cutlass.range_constexpr(K_STAGE):
            ptx.mbarrier_wait(s.empty(place, "k_load_to_mma", k.slot), k.phase ^ 1)
            full = s.full_at_leader(place, "k_load_to_mma", k.slot)
            if place.lane == 0:
                s.group.announce(full, s.k_stage_bytes)
            cute.arch.sync_warp()
            if place.lane < K_PARTS * boxes:
                part = place.lane // boxes
                where = place.k + k.slot * s.k_stage_bytes + part * s.k_part_bytes + row_box * (rows * s.row_bytes)
                s.group.tma_load(latent_map, where, full, (0, row, stage * K_PARTS + part, page))
            k = advance(k, s.k_stages)
        return k

    @cute.jit
    def load_v(self, place: Place, source: Source, n_block: Int32, latent_map: ir.Value, v: RingPosition, is_tail: Boolean):
        """This CTA's half of V's columns of all keys of a block; with a tail for the value tail warp, which hands it on."""
        s, rows = self.storage, self.storage.config.box_rows
        boxes = const_expr(BLOCK_KEYS // rows)
        row_box = place.lane % boxes
        page, row = self._find(source, n_block * BLOCK_KEYS + row_box * rows)
        for stage in cutlass.range_constexpr(V_STAGE):
            buffer = v.slot * V_STAGE + stage
            ptx.mbarrier_wait(s.empty(place, "v_load_to_mma", buffer), v.phase ^ 1)
            full = s.full_at_leader(place, "v_load_to_mma", buffer)
            if is_tail:
                full = s.full(place, "v_tail_load_to_value_tail", buffer)
            if place.lane == 0:
                s.group.announce(full, s.v_stage_bytes)
            cute.arch.sync_warp()
            for box in cutlass.range(place.lane, V_PARTS * boxes, 32, unroll=1):
                part = box // boxes
                where = place.v + buffer * s.v_stage_bytes + part * s.v_part_bytes + row_box * (rows * s.row_bytes)
                first_part = place.rank * (LATENT_PARTS // PAIR) + stage * V_PARTS
                s.group.tma_load(latent_map, where, full, (0, row, first_part + part, page))

    @cute.jit
    def _find(self, source: Source, token: Int32):
        """Page and row of the box that begins with a token; the page table's entries past the sequence's end are not ours to read.

        A box without keys lies one page past the last: TMA then reads nothing and writes zeros.
        """
        step = source.step
        page, row = source.num_pages, Int32(0)
        if token < source.entry.seqlen.seqlen_k:
            logical = token // step.page_size
            page, row = step.mPageTable[source.entry.seq_idx, logical], token - logical * step.page_size
        return page, row
