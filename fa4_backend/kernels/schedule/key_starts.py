"""Where the keys of each prefill row begin in a workspace that holds them one sequence behind the other (`kernels/convert_kv`)."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.schedule.block_ops import block_scan
from fa4_backend.kernels.schedule.limits import NUM_THREADS
from fa4_backend.kernels.schedule.params import ScheduleParams
from fa4_backend.kernels.schedule.rows import StepLengths, read_row


@cute.jit
def write_key_starts(lengths: StepLengths, key_starts: cute.Tensor, sums: cute.Tensor, params: ScheduleParams) -> None:
    """Exclusive prefix sum of the prefill rows' KV tokens, other rows having none; cut to the workspace. By all threads of one CTA.

    Args:
        key_starts: (max_num_seqs + 1,) int32, of which one more than the batch has rows is written.
        sums: (NUM_WARPS,) int32 of shared memory.
    """
    tidx, _, _ = cute.arch.thread_idx()
    num_seqs = cute.size(lengths.seqused_k)
    done = Int32(0)
    for base in range(0, num_seqs, NUM_THREADS):
        seq_idx, keys = base + tidx, Int32(0)
        if seq_idx < num_seqs:
            row = read_row(lengths, seq_idx, params)
            if row.query_len > params.decode_query_len:
                keys = cutlass.min(row.kv_len, params.convert_keys)
        before, keys_of_all = block_scan(keys, sums)
        if seq_idx < num_seqs:
            key_starts[seq_idx] = cutlass.min(done + before, params.convert_keys)
        done = cutlass.min(done + keys_of_all, params.convert_keys)
    if tidx == 0:
        key_starts[num_seqs] = done
