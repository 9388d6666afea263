"""A step's rows as the schedule sees them: lengths within the plan's limits, compacted by kind, prefill rows ordered by length."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from fa4_backend.kernels.schedule.block_ops import block_scan
from fa4_backend.kernels.schedule.limits import NUM_THREADS
from fa4_backend.kernels.schedule.params import ScheduleParams

# Prefill rows up to which a row's place is found by counting the longer ones; above, rows are sorted. Instructions of a CTA's busiest warp
# for the whole schedule in exact mode (emulator), counted and sorted: 32 rows 1,000 and 1,360, 256 rows 3,250 and 2,320, where the sort
# waits at 36 barriers besides; 1,024 rows, each thread counting for two, 20,650 and 3,680. Not timed on a GPU.
COUNTED_ROWS = 256


class StepLengths(NamedTuple):
    """The device's lengths of a step, of which nothing is trusted."""

    cu_seqlens_q: cute.Tensor  # (batch + 1,) int32
    seqused_k: cute.Tensor  # (batch,) int32


class Row(NamedTuple):
    """One sequence's lengths, within the plan's limits."""

    q_begin: Int32  # row of its first query token in q
    query_len: Int32  # query tokens; 0 or less: none
    kv_len: Int32  # KV tokens


class RowTables(NamedTuple):
    """Shared memory: the batch's rows, compacted by kind. Both kinds share two tables, decode from the front and prefill from the back."""

    decode_seq: cute.Tensor  # (num_decode,) sequence of the i-th decode row
    decode_cost: cute.Tensor  # (num_decode + 1,) n_blocks of one head of all earlier decode rows, at least one each
    prefill_seq: cute.Tensor  # (num_prefill,) sequence of the i-th prefill row
    prefill_sum: cute.Tensor  # (num_prefill + 1,) its KV tokens; once ordered: query blocks of all earlier rows
    num_decode: Int32
    num_prefill: Int32

    @property
    def has_prefill_alone(self) -> Boolean:
        """Whether the step has rows, and no decode row."""
        return (self.num_decode == 0) & (self.num_prefill > 0)


def read_row(lengths: StepLengths, seq_idx: Int32, params: ScheduleParams) -> Row:
    """Lengths of a sequence. The lists and the split-KV workspace are sized for the plan's limits, so lengths past them are cut."""
    begin, end = (cutlass.min(cutlass.max(lengths.cu_seqlens_q[seq_idx + i], 0), params.max_num_tokens) for i in (0, 1))
    kv_len = cutlass.min(cutlass.max(lengths.seqused_k[seq_idx], 0), params.max_seqlen_k)
    return Row(begin, end - begin, kv_len)


def decode_range(row: Row, params: ScheduleParams) -> tuple[Int32, Int32]:
    """First n_block that a decode row sees, and the n_blocks from there to its end."""
    begin = cutlass.max(row.kv_len - row.query_len - params.window_left, 0) // params.decode_tile_n
    return begin, (row.kv_len + params.decode_tile_n - 1) // params.decode_tile_n - begin


@cute.jit
def scan_rows(
    lengths: StepLengths,
    seqs: cute.Tensor,  # (max_num_seqs,) int32 of shared memory
    table: cute.Tensor,  # (max_num_seqs + 2,) likewise
    sums: cute.Tensor,  # (NUM_WARPS,) likewise
    params: ScheduleParams,
) -> RowTables:
    """Compact the rows into `seqs` and `table`; ends with a barrier."""
    tidx, _, _ = cute.arch.thread_idx()
    num_seqs, size = cute.size(lengths.seqused_k), cute.size(seqs)
    decode_done, prefill_done, cost_done = Int32(0), Int32(0), Int32(0)
    for base in range(0, num_seqs, NUM_THREADS):
        seq_idx = base + tidx
        row = Row(Int32(0), Int32(0), Int32(0))
        if seq_idx < num_seqs:
            row = read_row(lengths, seq_idx, params)
        kind, cost = Int32(0), Int32(0)
        if row.query_len > params.decode_query_len:
            kind = Int32(1 << 16)
        elif row.query_len > 0:
            kind = Int32(1)
            cost = cutlass.max(decode_range(row, params)[1], 1)
        kinds_at, kinds = block_scan(kind, sums)  # decode rows in the lower half, prefill rows in the upper one
        cost_at, cost_all = block_scan(cost, sums)
        if kind == 1:
            at = decode_done + kinds_at % (1 << 16)
            seqs[at] = seq_idx
            table[at] = cost_done + cost_at
        elif kind > 1:
            at = size - 1 - (prefill_done + (kinds_at >> 16))
            seqs[at] = seq_idx
            table[at + 1] = row.kv_len
        decode_done += kinds % (1 << 16)
        prefill_done += kinds >> 16
        cost_done += cost_all
    if tidx == 0:
        table[decode_done] = cost_done
    cute.arch.sync_threads()
    prefill_seq = cute.make_tensor(seqs.iterator + (size - prefill_done), seqs.layout)
    prefill_sum = cute.make_tensor(table.iterator + (size + 1 - prefill_done), table.layout)
    return RowTables(seqs, table, prefill_seq, prefill_sum, decode_done, prefill_done)


@cute.jit
def order_by_length(rows: RowTables) -> None:
    """Put the prefill rows in order: longest KV first, ties by sequence. Ends with a barrier."""
    if rows.num_prefill <= COUNTED_ROWS:
        _count_places(rows)
    else:
        _sort(rows)


@cute.jit
def _count_places(rows: RowTables) -> None:
    """A thread a row: its place is the number of rows before it."""
    mine, _, _ = cute.arch.thread_idx()
    seq_idx, place = Int32(0), Int32(0)
    if mine < rows.num_prefill:
        seq_idx, kv_len = rows.prefill_seq[mine], rows.prefill_sum[mine]
        for other in cutlass.range(rows.num_prefill, unroll=4):
            other_len = rows.prefill_sum[other]
            # Rows stand from the back, so a later place is an earlier sequence.
            if other_len > kv_len or (other_len == kv_len and other > mine):
                place += 1
    cute.arch.sync_threads()
    if mine < rows.num_prefill:
        rows.prefill_seq[place] = seq_idx
    cute.arch.sync_threads()


@cute.jit
def _sort(rows: RowTables) -> None:
    """Bitonic network of any length: runs of `size` come from two of half as many, the second one read backwards. Every comparison
    puts the longer row in front, so rows that are missing at the end would not move."""
    tidx, _, _ = cute.arch.thread_idx()
    count = rows.num_prefill
    size = Int32(2)
    while size < 2 * count:
        stride = size // 2
        partner = size - 1
        while stride > 0:
            for pair in range(tidx, size * ((count + size - 1) // size) // 2, NUM_THREADS):
                front = 2 * pair - (pair & (stride - 1))
                back = front ^ partner
                if back < count:
                    front_len, back_len = rows.prefill_sum[front], rows.prefill_sum[back]
                    front_seq, back_seq = rows.prefill_seq[front], rows.prefill_seq[back]
                    if back_len > front_len or (back_len == front_len and back_seq < front_seq):
                        rows.prefill_sum[front], rows.prefill_sum[back] = back_len, front_len
                        rows.prefill_seq[front], rows.prefill_seq[back] = back_seq, front_seq
            cute.arch.sync_threads()
            stride = stride // 2
            partner = stride
        size = 2 * size
