"""The convert warps: K and V tiles from e4m3 in staging to the 16 bits that wgmma reads from the ring.

V becomes float16, the type of P: every e4m3 value is exact in it, and one instruction makes two. K takes the type of Q; bfloat16 costs four
instructions for two values, so at some head dimensions a bfloat16 Q becomes float16 in its buffer first (`tuning.FLOAT16_QUERY_DIMS`;
`common/fp8.py`, Note [bfloat16 Q]), and what a row was divided by goes into the scale of its scores. A warp works on 32 chunks of 16 bytes
of staging at a time, of which each lane makes two of the ring:

    staging  row after row, whole heads              16 e4m3 a chunk
    ring     part after part, row after row          8 elements a chunk, chunks swizzled as TMA does

Note [Bank conflicts]. Shared memory serves 16-byte accesses eight lanes at a time, which meet no conflict if their chunks lie apart modulo
128 bytes. Where a row of the ring has 128 bytes, eight lanes take four chunks each of two neighbouring rows: of the same part where a row
of staging has an odd number of parts (of 64 bytes), of neighbouring parts where that is even. Either way they read both halves of 128
bytes, and write the even chunks of one row and the odd ones of the other, since the swizzle of neighbouring rows differs in its last bit.
Rows of 64 bytes (head dimension 96): two chunks each of four rows, likewise.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass._mlir import ir

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.fp8 import e4m3_to_float16, float16_to_bfloat16, scaled_to_float16
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm90.staging import STAGE_INTS, Note, Query, Staged, converts_query, staging_slots, tile_elems
from fa4_backend.kernels.sm90.storage import Barriers, Storage

CHUNK_BYTES = 16  # of a shared-memory access of a lane
LANES = 32
PARTS_AT_ONCE = 2  # chunks that a lane loads before it converts the first: registers of a thread that keeps 40 or 32


class SharedBuffers(NamedTuple):
    """Shared memory as a convert warp sees it."""

    q: cute.Pointer  # q_stage buffers
    staging: cute.Pointer  # slots of e4m3
    ring: cute.Pointer  # slots of 16 bits
    sNotes: cute.Tensor  # (STAGE_INTS, slots of staging) int32
    sRowScales: cute.Tensor | None  # (tile_m, WORK_STAGE) float32; None: Q has float16


@dataclass(frozen=True)
class ConvertWarps:
    """Role of the warps between the load warp and the consumers."""

    storage: Storage
    num_warps: int

    @cute.jit
    def run(self, shared: SharedBuffers, barriers: Barriers, warp: Int32):
        """Convert tile after tile until a note says that none follows: waits for a tile and for its slot of the ring, hands on both.

        A tile's Q comes before its first K. warp: 0 .. num_warps.
        """
        c = self.storage.config
        elems = const_expr(tile_elems(c))
        origin = RingPosition(Int32(0), Int32(0))
        staged, position, q = origin, origin, origin
        kind = Int32(int(Staged.NOTHING))
        notes = shared.sNotes.iterator.toint()
        while kind != int(Staged.END):
            cute.arch.mbarrier_wait(barriers.fp8_full + staged.slot, staged.phase)
            note = [Int32(word) for word in vectors.elements(ptx.load_shared_v4(notes + staged.slot * (4 * STAGE_INTS)))]
            kind, first, end, query = (note[int(field)] for field in (Note.KIND, Note.FIRST_ROW, Note.END_ROW, Note.QUERY))
            if const_expr(converts_query(c)):
                if query != int(Query.NOTHING):
                    cute.arch.mbarrier_wait(barriers.bf16q_full + q.slot, q.phase)
                    if query == int(Query.CONVERT):
                        self._convert_query(shared, q, warp)
                    else:
                        # What consumers compute with the numbers of no tile is thrown away, but it is not of memory that nobody wrote.
                        for row in cutlass.range(warp * LANES + cute.arch.lane_idx(), c.tile.tile_m, self.num_warps * LANES, unroll=1):
                            shared.sRowScales[row, self.storage.work_slot(q)] = Float32(1.0)
                    self._hand_on(barriers.q_full + q.slot)
                    q = advance(q, c.tile.q_stage)
            if kind != int(Staged.END):
                cute.arch.mbarrier_wait(barriers.kv_empty + position.slot, position.phase ^ 1)
                source = shared.staging.toint() + staged.slot * elems
                target = shared.ring.toint() + position.slot * (elems * c.element_bytes)
                if kind == int(Staged.KEYS):
                    self._convert(source, target, warp, c.head_dim, "float16" if converts_query(c) else c.dtype, None, None)
                if kind == int(Staged.VALUES):
                    if (first > 0) | (end < c.tile.tile_n):
                        self._convert(source, target, warp, c.head_dim_v, "float16", first, end)
                    else:
                        self._convert(source, target, warp, c.head_dim_v, "float16", None, None)
                self._hand_on(barriers.kv_full + position.slot)
                if cute.arch.lane_idx() == 0:
                    cute.arch.mbarrier_arrive(barriers.fp8_empty + staged.slot)
                position = advance(position, c.tile.kv_stage)
                staged = advance(staged, staging_slots(c))
                # Groups of rows are not a multiple of the warps: who begins changes from tile to tile.
                warp = cutlass.select_(warp == 0, Int32(self.num_warps - 1), warp - 1)

    @cute.jit
    def _hand_on(self, full: cute.Pointer):
        """This warp's part of a buffer is there for wgmma."""
        ptx.fence_proxy_async_shared()
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(full)

    @cute.jit
    def _convert_query(self, shared: SharedBuffers, q: RingPosition, warp: Int32):
        """This warp's rows of a buffer of Q, in place. A row of a part is a line of chunks, in whatever order."""
        c = self.storage.config
        part = const_expr(c.part_elems(c.head_dim))
        chunks = const_expr(2 * part // CHUNK_BYTES)
        rows = const_expr(LANES // chunks)
        lane = cute.arch.lane_idx()
        row, chunk = lane // chunks, lane % chunks
        buffer = shared.q.toint() + q.slot * (2 * self.storage.q_elems) + row * (2 * part) + chunk * CHUNK_BYTES
        for group in cutlass.range(warp, c.tile.tile_m // rows, self.num_warps, unroll=1):
            lines = [buffer + (group * rows + i * c.tile.tile_m) * (2 * part) for i in range(c.head_dim // part)]
            words = [Int32(word) for line in lines for word in vectors.elements(ptx.load_shared_v4(line))]
            scaled, divided_by = scaled_to_float16(words, chunks)
            for i, line in enumerate(lines):
                ptx.store_shared_v4(line, [word.ir_value() for word in scaled[4 * i : 4 * i + 4]])
            if chunk == 0:
                shared.sRowScales[group * rows + row, self.storage.work_slot(q)] = divided_by

    @cute.jit
    def _convert(
        self,
        source: Int32,  # shared address of the slot of staging
        target: Int32,  # shared address of the slot of the ring
        warp: Int32,
        head_dim: cutlass.Constexpr[int],
        dtype: cutlass.Constexpr[str],  # of the ring
        first: Int32 | None,  # rows `first .. end` are seen, others become zeros: a weight of 0 times NaN would be NaN
        end: Int32 | None,
    ):
        """This warp's rows of a tile. None: all rows as they are."""
        part = const_expr(self.storage.config.part_elems(head_dim))
        parts = const_expr(head_dim // part)
        chunks = const_expr(part // CHUNK_BYTES)  # of staging in a part
        rows = const_expr(LANES // chunks)  # a group: those of a lane's chunks of one part
        tile_n = const_expr(self.storage.config.tile.tile_n)
        assert tile_n % rows == 0 and part * 2 in (64, 128), f"{self.storage.config.tile=} {part=}"
        row, chunk = cute.arch.lane_idx() // chunks, cute.arch.lane_idx() % chunks
        swizzle = row % 8 if const_expr(part * 2 == 128) else row // 2 % 4
        # Note [Bank conflicts]
        part_of = [Int32(i) ^ (row & 1) if parts % 2 == 0 else Int32(i) for i in range(parts)]
        reads = [source + (row * head_dim + part_of[i] * part + chunk * CHUNK_BYTES) for i in range(parts)]
        writes = [target + ((part_of[i] * tile_n + row) * (2 * part) + ((2 * chunk) ^ swizzle) * CHUNK_BYTES) for i in range(parts)]
        for group in cutlass.range(warp, tile_n // rows, self.num_warps, unroll=1):
            row_in_tile = group * rows + row
            for i in cutlass.range_constexpr(parts):
                if const_expr(i % PARTS_AT_ONCE == 0):
                    loaded = [ptx.load_shared_v4(read + group * (rows * head_dim)) for read in reads[i : i + PARTS_AT_ONCE]]
                words = loaded[i % PARTS_AT_ONCE]
                if const_expr(first is not None):
                    words = vectors.select_words((row_in_tile >= first) & (row_in_tile < end), words)
                line = writes[i] + group * (rows * 2 * part)
                converted = [half for word in vectors.elements(words) for half in _two_pairs(word, dtype)]
                ptx.store_shared_v4(line, converted[:4])
                ptx.store_shared_v4(line ^ CHUNK_BYTES, converted[4:])  # the neighbour, swizzled alike


def _two_pairs(word: ir.Value, dtype: str) -> list[ir.Value]:
    """The four e4m3 of a word, two words of a 16-bit type."""
    halves = e4m3_to_float16(Int32(word))
    return [(half if dtype == "float16" else float16_to_bfloat16(half)).ir_value() for half in halves]
