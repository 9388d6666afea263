"""MMA warp of the leader: S of consecutive blocks in two buffers, O += P V in block order: QK 0, QK 1, PV 0, QK 2, PV 1, ...

While softmax turns S of a block into P, the tensor cores do S of the block behind. Products of one CTA pair execute in issue order, so the
QK that overwrites a buffer of S needs no wait for those that read it: the PV before it has waited for the weights made of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import tcgen05_ops, umma
from fa4_backend.kernels.common.decode_entry import StepTensors
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.mla_decode.config import PART_DIM, PARTS, TILE_M
from fa4_backend.kernels.mla_decode.sm100.config import BLOCK_KEYS, K_PARTS, K_STAGE, O_COLUMNS, PAIR, S_STAGE, V_STAGE
from fa4_backend.kernels.mla_decode.sm100.storage import (
    O_COL,
    P_PARTS,
    S_COL,
    S_COLUMNS,
    PairStorage,
    Place,
)
from fa4_backend.kernels.mla_decode.sm100.work import PairWork
from fa4_backend.problem import FP8


@dataclass(frozen=True)
class MmaWarp:
    """One elected thread issues; the whole warp walks the loop."""

    storage: PairStorage
    work: PairWork

    @cute.jit
    def run(self, place: Place, step: StepTensors, values: MaskValues):
        """Walk the entries; owns the consumer sides of Q, K, V and P, and the producer sides of S and of products."""
        s, group, work = self.storage, self.storage.group, self.work
        word, num_entries, second = work.first_entry(step)
        k, v, next_s = RingPosition(Int32(0), Int32(0)), RingPosition(Int32(0), Int32(0)), Int32(0)
        q_phase, block_phase = Int32(0), Int32(0)
        for index in cutlass.range(num_entries, unroll=1):
            entry = work.entry(step, word)
            blocks = work.blocks(entry, values)
            if index + 1 < num_entries:
                word = work.entry_word(step, second + index)
            if blocks.end > blocks.begin:
                group.wait(s.full(place, s.q_edge), q_phase)
                tcgen05_ops.fence_after_sync()
                q_phase ^= 1
            first_piece, last_piece = work.pieces(entry, step.split_blocks)
            for piece in cutlass.range(first_piece, last_piece, unroll=1):
                begin, end = work.piece_blocks(piece, blocks, step.split_blocks)
                num_blocks = cute.arch.make_warp_uniform(end - begin)
                # Round t: S of block t, then the product with V of the block before it.
                for t in cutlass.range(cutlass.select_(num_blocks > 0, num_blocks + 1, 0), unroll=1):
                    if t < num_blocks:
                        for stage in cutlass.range_constexpr(K_STAGE):
                            group.wait(s.full(place, "k_load_to_mma", k.slot), k.phase)
                            self.issue_qk(place, stage, k.slot, next_s)
                            group.commit(s.empty(place, "k_load_to_mma", k.slot))
                            k = advance(k, s.k_stages)
                        group.commit(s.full(place, "s_mma_to_softmax", next_s))
                        next_s = (next_s + 1) % S_STAGE
                        if begin + t == blocks.end - 1:
                            group.commit(s.empty(place, s.q_edge))
                    if t > 0:
                        group.wait(s.full(place, "p_softmax_to_mma"), block_phase)
                        tcgen05_ops.fence_after_sync()
                        for stage in cutlass.range_constexpr(V_STAGE):
                            group.wait(s.full(place, "v_load_to_mma", v.slot * V_STAGE + stage), v.phase)
                            self.issue_pv(place, stage, v.slot, t - 1)
                            group.commit(s.empty(place, "v_load_to_mma", v.slot * V_STAGE + stage))
                        group.commit(s.full(place, "pv_mma_to_softmax"))
                        block_phase ^= 1
                        v = advance(v, s.config.num_blocks)

    def issue_qk(self, place: Place, stage: int, slot: Int32, buffer: Int32) -> None:
        """S (+)= Q K^T over the elements of stage `stage` of a block, which lies in `slot` of the ring; term by term of Q."""
        s = self.storage
        k_low = umma.descriptor_low(place.k + slot * s.k_stage_bytes)
        for term, products in enumerate(self._products()):
            # Kept in the loop: hoisted, the descriptors of all 52 products of a block would take two registers each.
            first_part = term * PARTS + stage * K_PARTS
            q_low = umma.descriptor_low(ptx.keep_in_loop(place.q) + first_part * s.q_part_bytes)
            q_steps, k_steps = (products.k_major_steps(K_PARTS * PART_DIM, part) for part in (s.q_part_bytes, s.k_part_bytes))
            s_tmem = Int32(S_COL) + buffer * S_COLUMNS
            products.mma_ss(s_tmem, q_low, k_low, q_steps, k_steps, BLOCK_KEYS, accumulate=int(stage > 0 or term > 0))

    def issue_pv(self, place: Place, stage: int, slot: Int32, accumulate: Int32) -> None:
        """O (+)= P V of the columns of a stage of V of the block in `slot`; term by term of P."""
        s = self.storage
        where = ptx.keep_in_loop(place.v) + (slot * V_STAGE + stage) * s.v_stage_bytes
        v_low = umma.descriptor_low(where, s.v_part_bytes)
        for term, products in enumerate(self._products()):
            p_low = umma.descriptor_low(ptx.keep_in_loop(place.p) + term * (P_PARTS * s.q_part_bytes))
            p_steps = products.k_major_steps(BLOCK_KEYS, s.q_part_bytes)
            v_steps = products.mn_major_steps(range(BLOCK_KEYS // products.k_elems))
            o_tmem = Int32(O_COL + stage * (O_COLUMNS // PAIR))
            products.mma_ss(
                o_tmem, p_low, v_low, p_steps, v_steps, O_COLUMNS, b_mn_major=True, accumulate=accumulate if term == 0 else 1
            )  # fmt: skip

    def _products(self) -> list[umma.Products]:
        """With each term of Q or of P: `common/fp8.py`, Note [Two terms]."""
        config = self.storage.config
        terms = [config.kv_dtype] if config.terms == 1 else [FP8, umma.E5M2]
        return [umma.Products(config.kv_dtype, PAIR, TILE_M, self.storage.row_bytes, a_dtype=term) for term in terms]
