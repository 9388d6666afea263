"""A bfloat16 Q as float16 beside K in FP8: each consumer warpgroup converts its own rows in place before its first product reads them.

A product takes both operands in one type, and K becomes float16 with one instruction for two values, bfloat16 with four
(`common/fp8.py`, Note [bfloat16 Q]). What a row was divided by goes into the scale of its scores. A warp converts the 16 rows whose scores
its lanes hold, so the numbers that it writes are read by itself only; the rows themselves are read by the whole warpgroup's products.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.fp8 import scaled_to_float16
from fa4_backend.kernels.common.hardware import ACCESS_BYTES, LANES
from fa4_backend.kernels.common.ring import RingPosition
from fa4_backend.kernels.sm90.storage import Storage
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS

WARP_ROWS = 16  # of a warp's accumulators
WORDS_AT_ONCE = 32  # registers of loads that are under way together


@dataclass(frozen=True)
class QueryRows:
    """Conversion of the rows of one warpgroup."""

    storage: Storage

    @cute.jit
    def to_float16(
        self,
        buffers: cute.Pointer,  # of Q, q_stage
        sRowScales: cute.Tensor,  # (tile_m, WORK_STAGE) float32: what a row was divided by
        q: RingPosition,  # the buffer, which TMA has filled
        is_tile: Int32,  # 0: the empty tile behind the last, whose buffer nobody wrote
        first_row: Int32,  # of this warpgroup
        thread: Int32,  # in the warpgroup
        barrier: Int32,  # of the warpgroup
    ):
        """Convert in place. A row of a part is a line of chunks, in whatever order."""
        c = self.storage.config
        part = const_expr(c.part_elems(c.head_dim))
        chunks = const_expr(2 * part // ACCESS_BYTES)
        rows = const_expr(LANES // chunks)  # at a time
        parts = const_expr(c.head_dim // part)
        work_slot = self.storage.work_slot(q)
        lane = thread % LANES
        row = first_row + thread // LANES * WARP_ROWS + lane // chunks
        if is_tile == 1:
            line = buffers.toint() + q.slot * (2 * self.storage.q_elems) + row * (2 * part) + lane % chunks * ACCESS_BYTES
            at_once = const_expr(max(1, WORDS_AT_ONCE // (4 * parts)))
            for begin in cutlass.range_constexpr(0, WARP_ROWS // rows, at_once):
                groups = const_expr(range(begin, min(begin + at_once, WARP_ROWS // rows)))
                lines = [[line + (group * rows + i * c.tile.tile_m) * (2 * part) for i in range(parts)] for group in groups]
                loaded = [[Int32(word) for x in of_row for word in vectors.elements(ptx.load_shared_v4(x))] for of_row in lines]
                for k in cutlass.range_constexpr(len(lines)):
                    scaled, divided_by = scaled_to_float16(loaded[k], chunks)
                    for i in cutlass.range_constexpr(parts):
                        ptx.store_shared_v4(lines[k][i], [word.ir_value() for word in scaled[4 * i : 4 * i + 4]])
                    if lane % chunks == 0:
                        sRowScales[row + (begin + k) * rows, work_slot] = divided_by
            ptx.fence_proxy_async_shared()
        elif lane < WARP_ROWS:
            # What is computed with the numbers of no tile is thrown away, but it is not of memory that nobody wrote.
            sRowScales[first_row + thread // LANES * WARP_ROWS + lane, work_slot] = Float32(1.0)
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP_THREADS)
