"""The end of a piece and of a CTA: `mla_decode/merge.py` with the warps of tensor memory's lane halves in place of two warpgroups."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from fa4_backend.kernels.common.decode_entry import Entry, StepTensors
from fa4_backend.kernels.common.wgmma_fragment import RowFragment, RowStats, quad_sum, row_of_thread
from fa4_backend.kernels.mla_decode.merge import NOTHING, Merge, ResultTensors, Scales
from fa4_backend.kernels.mla_decode.sm100.storage import SIDES, SharedTensors

ROW_BARRIER = 4  # first of four named barriers: the two warps that have the same rows; 3 is `Merge`'s
ROW_THREADS = 64


@dataclass(frozen=True)
class PairMerge(Merge):
    """What follows the main loop. A thread's rows and columns are those of a thread `thread` of warpgroup `side` on Hopper."""

    def meet_rows(self, row_block: Int32) -> None:
        """The two warps of 16 rows."""
        cute.arch.barrier(barrier_id=ROW_BARRIER + row_block, number_of_threads=ROW_THREADS)

    @cute.jit
    def finish_piece_of(
        self,
        side: Int32,
        row_block: Int32,
        thread: Int32,
        entry: Entry,
        piece_in_entry: Int32,
        is_last: Boolean,
        turn: Int32,  # 0 or 1, another one each piece
        rO: cute.Tensor,
        stats: RowStats,
        totals: RowStats,  # of an entry's pieces so far, where it has several
        scales: Scales,
        shared: SharedTensors,
        results: ResultTensors,
    ):
        """A piece's rows to `out` or to its slot."""
        for i in cutlass.range_constexpr(2):
            total = quad_sum(stats.row_sum[i])
            if thread % 4 == 0:
                shared.sRowSum[turn, side, row_of_thread(thread, i)] = total
        self.meet_rows(row_block)
        for i in cutlass.range_constexpr(2):
            row = row_of_thread(thread, i)
            stats.row_sum[i] = shared.sRowSum[turn, 0, row] + shared.sRowSum[turn, 1, row]
        for each in cutlass.range_constexpr(SIDES):
            if side == each:
                if entry.partial_slot >= 0:
                    self._store_slot(each, entry, entry.partial_slot + piece_in_entry, rO, stats, thread, results)
                elif const_expr(self.config.has_pieces):
                    self._fold_whole(each, entry, piece_in_entry, is_last, rO, stats, totals, scales, thread, results)
                else:
                    self._write_fragment(each, entry, rO, stats, scales, thread, results)

    def _rounded(self, rO: cute.Tensor, dtype: type[cutlass.Numeric]) -> cute.Tensor:
        """Pair by pair: of a whole vector LLVM makes halves of 64-bit registers for sm_100a, whose other halves nobody has written."""
        rOut = cute.make_rmem_tensor_like(rO, dtype)
        RowFragment(cute.size(rO) // 2, 0.0).to_operand(rO, rOut)
        return rOut

    @cute.jit
    def join(self, num_pending: Int32, step: StepTensors, scales: Scales, thread: Int32, shared: SharedTensors, results: ResultTensors):
        """Arrive at the slots of every pending entry, and add up this CTA's shares: `Merge`, Note [Shares].

        thread: of all softmax warps.
        """
        self._barrier()
        if thread < num_pending:
            shared.sShare[thread] = self._arrive(thread, shared, results)
        self._barrier()
        phase = Int32(0)
        for place in cutlass.range(num_pending, unroll=1):
            share = shared.sShare[place]
            if share != NOTHING:
                phase = self._add_up(place, share, phase, step, scales, thread, shared, results)
