"""How large a step one launch of the schedule serves: the sizes that its kernel is built on. Imports no compiler."""

from __future__ import annotations

from fa4_backend.arch import ARCHS

NUM_THREADS = 512  # of a CTA
NUM_WARPS = NUM_THREADS // 32
MAX_DECODE_CTAS = NUM_THREADS - 1  # a thread each for the cuts before consumer CTAs, and one for the list's end

SEQ_BYTES = 8  # shared memory of a sequence: its index and a sum, int32 each (`rows.RowTables`)
FIXED_BYTES = 5 * 4 * NUM_THREADS + 1024  # the tables of cuts and of parts; sums of warps, ends of tables, alignment
SHORTEST_TILE = 64  # keys: no kernel has a narrower KV tile
MAX_SUM = 2**31 - 1  # sums of KV tiles are int32


def largest_num_seqs(arch: str, max_seqlen_k: int) -> int:
    """The largest `max_num_seqs` of a plan: what fits the shared memory of a CTA, and whose KV tiles a sum can count.

    Args:
        arch: a key of ARCHS.
        max_seqlen_k: KV tokens of one sequence at most.
    """
    fits = (ARCHS[arch].smem_bytes - FIXED_BYTES) // SEQ_BYTES // 1024 * 1024
    tiles = -(-max_seqlen_k // SHORTEST_TILE)
    return min(fits, MAX_SUM // tiles)


def table_size(arch: str, max_num_seqs: int) -> int:
    """Sequences that the kernel for `max_num_seqs` of them has tables for; few sizes, so that plans share it."""
    return min(max(256, 1 << (max_num_seqs - 1).bit_length()), largest_num_seqs(arch, 1))
