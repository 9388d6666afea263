"""From which rows on decode is cut into as many parts as all of a row group's CTAs add up, and not into the fewer that one does.

The schedule weighs what the one that comes last takes for all parts (`paying_parts` in `kernels/schedule/decode_cuts.py`); from
`SHARE_VECTORS` on parts are added up by all, a share each. Cut further, a row reaches that number where it would not have otherwise, so the
choice belongs below it. What stands here is a plan's number and no part of a kernel: a change leaves compiled kernels as they are.
"""

from __future__ import annotations

from dataclasses import replace

from fa4_backend.kernels.decode.config import DecodeConfig
from fa4_backend.kernels.families import KernelSet
from fa4_backend.kernels.schedule.work_list import WorkShape

# arch -> vectors of slots that a thread of the one CTA would have to add up, from which on a row is cut for all. H200, page 16, L2 clean,
# us with 64, 32, 24 and 16, and of FA3 in the same run (2026-11-29, `python -m tests.device.measure_shares --lone`):
#   16/1 d128  1 x 4K 15.9, 12.2, 12.0, 11.9 (16.6)   1 x 2K 13.8, 13.8, 13.0, 13.3 (16.4)   1 x 8K 19.0, 12.7, 12.6, 12.7 (18.7)
#              4 x 4K 16.5, 13.9, 13.8, 14.0 (19.0)   1 x 1K 11.9, 12.0, 11.9, 11.4 (15.8)
#   8/1 d128   1 x 4K 13.0, 13.0, 11.2, 11.3 (16.4)   1 x 2K 11.9, 12.0, 11.8, 11.5 (16.7)   1 x 8K 14.4, 11.6, 11.7, 11.7 (18.4)
#   16/2 d128  1 x 4K 13.3, 13.2, 12.0, 11.8 (16.7)   4 x 4K 15.4, 15.5, 14.5, 14.5 (20.0)   1 x 8K 14.8, 12.3, 12.3, 12.3 (19.2)
#   64/8 d128  1 x 4K 14.8, 14.9, 14.4, 14.4 (19.3)   1 x 2K 12.8, 12.8, 12.9, 13.4 (18.0)   1 x 8K 19.8, 18.3, 18.3, 18.2 (24.3)
# With K and V in FP8, whose slots are the same, 64 was not timed beside it; nor on Blackwell, which keeps the kernel's bound.
CUT_FOR_ALL_VECTORS = {"sm_90a": 24}


def with_more_parts(kernels: KernelSet) -> KernelSet:
    """The same kernels, their lists cut so; as they are where a slot is one vector of a thread, which one CTA adds up as fast.

    64/8 d64 1 x 8K, whose slots are, takes 14.3 us as it is and 14.9 with 24 in place of 64.
    """
    if not isinstance(kernels.decode, DecodeConfig) or kernels.decode.has_pieces or kernels.work.slot_vectors == 1:
        return kernels
    vectors = CUT_FOR_ALL_VECTORS.get(kernels.decode.arch, kernels.work.decode_share_vectors)

    def changed(work: WorkShape) -> WorkShape:
        return replace(work, decode_share_vectors=vectors)

    converted = kernels.converted and replace(kernels.converted, work=changed(kernels.converted.work))
    return replace(kernels, work=changed(kernels.work), converted=converted)
