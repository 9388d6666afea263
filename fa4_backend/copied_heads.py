"""One KV head with many query heads, given to the kernels as several KV heads that are the same memory: a stride of 0 between them.

A decode CTA then has at most 16 packed rows: one group of warps in place of several, two CTAs an SM in place of one, and row groups
enough that fewer parts of each are added up. K and V are read once from memory and as often as there are heads from L2.
"""

from __future__ import annotations

from fa4_backend.arguments import AttentionArguments
from fa4_backend.problem import PAGED, AttentionProblem, BatchLimits

ROWS = 16  # packed query rows of one mma.sync: what a group of warps works on

# arch -> (head_dim, head_dim_v) -> as how many heads one goes to the kernels where each has ROWS rows. H200, L2 clean, us as one head and
# as several, 1 x 4K / 8 x 4K / 64 x 4K, FA3 in the same run (`python -m tests.device.measure_tiles --kinds packed-rows --tiles "1 KV heads"
# "KV heads of 16 rows"`, 2026-11-29):
#   d64   32/1 2 heads 13.4, 12.1 / 13.7, 13.6 / 27.2, 27.0 (FA3 13.8 / 15.3 / 29.7)
#         64/1 4 heads 20.0, 12.0 / 20.5, 14.6 / 43.9, 41.5 (FA3 14.3 / 15.3 / 30.5)
#         48/1 3 heads 15.2, 11.9 / 15.9, 13.9 / 31.9, 53.7 (FA3 14.1 / 15.4 / 30.0): 192 row groups do not divide among 264 CTAs, so heads
#         of a row are apart in time and K and V come from memory more than once
#         96/1, prefill tiles as one, 6 heads 16.0, 12.2 / 17.0, 16.5 / 35.5, 67.3 (FA3 17.5 / 19.0 / 44.1)
#   d96   48/1 3 heads 19.9, 13.5 / 20.9, 16.9 / 44.8, 79.8 (FA3 20.8 / 22.9 / 49.7)
#   d128  32/1 2 heads 16.3, 15.4 / 17.6, 17.5 / 43.1, 42.9 (FA3 16.6 / 19.5 / 47.2)
#         48/1, prefill tiles as one, 3 heads 16.6, 15.5 / 18.0, 18.6 / 44.6, 103 (FA3 16.8 / 20.0 / 48.0)
#         32/1 16 x 4K 21.3, 21.5 in another run
# So 3 and more heads that are no power of 2 would pay for few rows only, and a plan does not know how many a step has.
COPIES: dict[str, dict[tuple[int, int], tuple[int, ...]]] = {"sm_90a": {(64, 64): (2, 4)}}


def kv_head_copies(problem: AttentionProblem, limits: BatchLimits) -> int:
    """As how many KV heads the kernels get each of the problem's: 1 but for the only one of a problem that `COPIES` names.

    K and V in FP8 stay one head, since steps may convert them to 16 bits once a call, and so do rows whose bits are promised.
    """
    p = problem
    if p.num_kv_heads != 1 or p.kv_source != PAGED or p.has_kv_scales or p.batch_invariant or p.exact:
        return 1
    copies, rest = divmod(p.q_per_kv * limits.decode_query_len, ROWS)
    served = COPIES.get(p.target_arch, {}).get((p.head_dim, p.head_dim_v), ())
    return copies if not rest and copies in served and p.q_per_kv % copies == 0 else 1


def with_copies(arguments: AttentionArguments, copies: int) -> AttentionArguments:
    """A call's arguments as kernels for `copies` KV heads take them; no memory is copied."""
    if copies == 1:
        return arguments
    k_cache, v_cache = (cache.expand(-1, -1, copies, -1) for cache in (arguments.k_cache, arguments.v_cache))
    return arguments._replace(k_cache=k_cache, v_cache=v_cache)
