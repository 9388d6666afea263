"""What a launch hands to the roles, bundled by who reads it."""

from typing import NamedTuple

import cutlass.cute as cute

from fa4_backend.kernels.common.paged_kv import KvPages
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds
from fa4_backend.kernels.common.tile_scheduler import PartTensors


class Step(NamedTuple):
    """Tensors of the step that the load warp reads: page table, lengths and work list."""

    pages: KvPages | None  # None where K and V have none
    mCuSeqlensQ: cute.Tensor  # (batch + 1,) int32
    mTiles: cute.Tensor  # (max_tiles, TILE_INTS) int32
    mQueue: cute.Tensor  # (1, QUEUE_INTS) int32
    bounds: SeqlenBounds
    mKScale: cute.Tensor | None  # (num_kv_heads,) float32; None where K and V are not FP8
    mVScale: cute.Tensor | None  # (num_kv_heads,) float32
    mOutScale: cute.Tensor | None  # (1,) float32; None where out is not FP8


class Outputs(NamedTuple):
    """Where finished rows go, and what joins them at the end."""

    mO: cute.Tensor  # (total_q, num_q_heads, head_dim_v)
    mLse: cute.Tensor | None  # (num_q_heads, total_q) float32, natural log
    mSinks: cute.Tensor | None  # (num_q_heads,)
    mSlopes: cute.Tensor | None  # (num_q_heads,) float32
    parts: PartTensors
