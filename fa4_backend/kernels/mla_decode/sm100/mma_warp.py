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
from fa4_backend.kernels.mla_decode.config import PART_DIM, TILE_M
from fa4_backend.kernels.mla_decode.sm100.config import BLOCK_KEYS, K_PARTS, K_STAGE, O_COLUMNS, PAIR, S_STAGE, V_STAGE
from fa4_backend.kernels.mla_decode.sm100.storage import (
    K_PART_BYTES,
    K_STAGE_BYTES,
    O_COL,
    P_PART_BYTES,
    Q_PART_BYTES,
    S_COL,
    S_COLUMNS,
    V_PART_BYTES,
    V_STAGE_BYTES,
    PairStorage,
    Place,
)
from fa4_backend.kernels.mla_decode.sm100.work import PairWork


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
        k, next_s = RingPosition(Int32(0), Int32(0)), Int32(0)
        q_phase, block_phase = Int32(0), Int32(0)
        for index in cutlass.range(num_entries, unroll=1):
            entry = work.entry(step, word)
            blocks = work.blocks(entry, values)
            if index + 1 < num_entries:
                word = work.entry_word(step, second + index)
            if blocks.end > blocks.begin:
                group.wait(s.full(place, "q_load_to_mma"), q_phase)
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
                            k = advance(k, K_STAGE)
                        group.commit(s.full(place, "s_mma_to_softmax", next_s))
                        next_s = (next_s + 1) % S_STAGE
                        if begin + t == blocks.end - 1:
                            group.commit(s.empty(place, "q_load_to_mma"))
                    if t > 0:
                        group.wait(s.full(place, "p_softmax_to_mma"), block_phase)
                        tcgen05_ops.fence_after_sync()
                        for stage in cutlass.range_constexpr(V_STAGE):
                            group.wait(s.full(place, "v_load_to_mma", stage), block_phase)
                            self.issue_pv(place, stage, t - 1)
                            group.commit(s.empty(place, "v_load_to_mma", stage))
                        group.commit(s.full(place, "pv_mma_to_softmax"))
                        block_phase ^= 1

    def issue_qk(self, place: Place, stage: int, slot: Int32, buffer: Int32) -> None:
        """S (+)= Q K^T over the elements of stage `stage` of a block, which lies in `slot` of the ring."""
        s = self.storage
        # Kept in the loop: hoisted, the descriptors of all 52 products of a block would take two registers each.
        q_low = umma.descriptor_low(ptx.keep_in_loop(place.q) + stage * (K_PARTS * Q_PART_BYTES))
        k_low = umma.descriptor_low(place.k + slot * K_STAGE_BYTES)
        products = umma.Products(s.config.dtype, PAIR, TILE_M)
        q_steps, k_steps = (products.k_major_steps(K_PARTS * PART_DIM, part) for part in (Q_PART_BYTES, K_PART_BYTES))
        products.mma_ss(Int32(S_COL) + buffer * S_COLUMNS, q_low, k_low, q_steps, k_steps, BLOCK_KEYS, accumulate=int(stage > 0))

    def issue_pv(self, place: Place, stage: int, accumulate: Int32) -> None:
        """O (+)= P V of the columns of a stage of V."""
        s = self.storage
        p_low = umma.descriptor_low(ptx.keep_in_loop(place.p))
        v_low = umma.descriptor_low(ptx.keep_in_loop(place.v) + stage * V_STAGE_BYTES, V_PART_BYTES)
        products = umma.Products(s.config.dtype, PAIR, TILE_M)
        p_steps = products.k_major_steps(BLOCK_KEYS, P_PART_BYTES)
        v_steps = products.mn_major_steps(range(BLOCK_KEYS // products.k_elems))
        o_tmem = Int32(O_COL + stage * (O_COLUMNS // PAIR))
        products.mma_ss(o_tmem, p_low, v_low, p_steps, v_steps, O_COLUMNS, b_mn_major=True, accumulate=accumulate)
