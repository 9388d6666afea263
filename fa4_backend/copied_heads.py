"""One KV head with many query heads, given to the kernels as several KV heads that are the same memory: a stride of 0 between them.

A decode CTA then has at most 16 packed rows: one group of warps in place of several, two CTAs an SM in place of one, and row groups
enough that fewer parts of each are added up. K and V are read once from memory and as often as there are heads from L2.
"""

from __future__ import annotations

from fa4_backend.arguments import AttentionArguments
from fa4_backend.problem import PAGED, AttentionProblem, BatchLimits

ROWS = 16  # packed query rows of one mma.sync: what a group of warps works on

# arch -> (head_dim, head_dim_v) -> most packed rows of a KV head that is given as several. H200, L2 clean, us, FA3 in the same run
# (`python -m tests.device.measure_tiles --kinds one-kv-head --tiles "1 KV heads" "2 KV heads" "3 KV heads"`, 2026-11-29):
#   d64 48/1 8 x 4K: 1 head 16.1, 2 heads 14.5, 3 heads 13.8 (FA3 15.3)
#   d128 32/1 16 x 4K: 1 head 21.3, 2 heads 21.5 (FA3 24.8)
COPIED_ROWS: dict[str, dict[tuple[int, int], int]] = {"sm_90a": {(64, 64): 64}}


def kv_head_copies(problem: AttentionProblem, limits: BatchLimits) -> int:
    """As how many KV heads the kernels get each of the problem's: 1 but for the only one of a problem that `COPIED_ROWS` names.

    K and V in FP8 stay one head, since steps may convert them to 16 bits once a call, and so do rows whose bits are promised.
    """
    p = problem
    if p.num_kv_heads != 1 or p.kv_source != PAGED or p.has_kv_scales or p.batch_invariant or p.exact:
        return 1
    most = COPIED_ROWS.get(p.target_arch, {}).get((p.head_dim, p.head_dim_v), 0)
    return fewest_copies(p, limits) if p.q_per_kv * limits.decode_query_len <= most else 1


def fewest_copies(problem: AttentionProblem, limits: BatchLimits) -> int:
    """Fewest KV heads that share the query heads of one in equal parts, so that a decode row group has at most ROWS rows; 1 where it would
    have half of them or fewer, since each head reads all of K and V."""
    heads = problem.q_per_kv
    for copies in (n for n in range(1, heads + 1) if heads % n == 0):
        rows = heads // copies * limits.decode_query_len
        if rows <= ROWS:
            return copies if 2 * rows > ROWS else 1
    return 1


def with_copies(arguments: AttentionArguments, copies: int) -> AttentionArguments:
    """A call's arguments as kernels for `copies` KV heads take them; no memory is copied."""
    if copies == 1:
        return arguments
    k_cache, v_cache = (cache.expand(-1, -1, copies, -1) for cache in (arguments.k_cache, arguments.v_cache))
    return arguments._replace(k_cache=k_cache, v_cache=v_cache)
