"""The convert warps: K and V tiles from e4m3 in staging to float16 in the ring, which wgmma reads.

Every e4m3 value is exact in float16, the type of P, and one instruction makes two; a bfloat16 Q becomes float16 too (`query_rows`). A warp
works on 32 chunks of 16 bytes of staging at a time, of which each lane makes two of the ring:

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
from cutlass import Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.fp8 import e4m3_to_float16
from fa4_backend.kernels.common.hardware import ACCESS_BYTES, LANES
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm90.staging import STAGE_INTS, Note, Staged, staging_slots, tile_elems
from fa4_backend.kernels.sm90.storage import Barriers, Storage

PARTS_AT_ONCE = 2  # chunks that a lane loads before it converts the first: registers of a thread that keeps 40 or 32


class SharedBuffers(NamedTuple):
    """Shared memory as a convert warp sees it."""

    staging: cute.Pointer  # slots of e4m3
    ring: cute.Pointer  # slots of float16
    sNotes: cute.Tensor  # (STAGE_INTS, slots of staging) int32


@dataclass(frozen=True)
class ConvertWarps:
    """Role of the warps between the load warp and the consumers."""

    storage: Storage
    num_warps: int

    @cute.jit
    def run(self, shared: SharedBuffers, barriers: Barriers, warp: Int32):
        """Convert tile after tile until a note says that none follows: waits for a tile and for its slot of the ring, hands on both.

        warp: 0 .. num_warps.
        """
        c = self.storage.config
        elems = const_expr(tile_elems(c))
        origin = RingPosition(Int32(0), Int32(0))
        staged, position = origin, origin
        kind = Int32(int(Staged.NOTHING))
        notes = shared.sNotes.iterator.toint()
        while kind != int(Staged.END):
            cute.arch.mbarrier_wait(barriers.fp8_full + staged.slot, staged.phase)
            note = [Int32(word) for word in vectors.elements(ptx.load_shared_v4(notes + staged.slot * (4 * STAGE_INTS)))]
            kind, first, end = (note[int(field)] for field in (Note.KIND, Note.FIRST_ROW, Note.END_ROW))
            if kind != int(Staged.END):
                cute.arch.mbarrier_wait(barriers.kv_empty + position.slot, position.phase ^ 1)
                source = shared.staging.toint() + staged.slot * elems
                target = shared.ring.toint() + position.slot * (elems * c.element_bytes)
                has_edge = (kind == int(Staged.VALUES)) & ((first > 0) | (end < c.tile.tile_n))
                if has_edge:
                    self._convert(source, target, warp, c.head_dim_v, first, end)
                elif kind == int(Staged.KEYS):
                    self._convert(source, target, warp, c.head_dim, None, None)
                elif kind == int(Staged.VALUES):
                    self._convert(source, target, warp, c.head_dim_v, None, None)
                self._hand_on(barriers.kv_full + position.slot)
                self._arrive(barriers.fp8_empty + staged.slot)
                position = advance(position, c.tile.kv_stage)
                staged = advance(staged, staging_slots(c))
                # Groups of rows are not a multiple of the warps: who begins changes from tile to tile.
                warp = cutlass.select_(warp == 0, Int32(self.num_warps - 1), warp - 1)

    @cute.jit
    def _hand_on(self, full: cute.Pointer):
        """This warp's part of a buffer is there for wgmma."""
        ptx.fence_proxy_async_shared()
        cute.arch.sync_warp()
        self._arrive(full)

    @cute.jit
    def _arrive(self, barrier: cute.Pointer):
        """One arrival for the warp, whose lanes have met."""
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def _convert(
        self,
        source: Int32,  # shared address of the slot of staging
        target: Int32,  # shared address of the slot of the ring
        warp: Int32,
        head_dim: cutlass.Constexpr[int],
        first: Int32 | None,  # rows `first .. end` are seen, others become zeros: a weight of 0 times NaN would be NaN
        end: Int32 | None,
    ):
        """This warp's rows of a tile. None: all rows as they are."""
        part = const_expr(self.storage.config.part_elems(head_dim))
        parts = const_expr(head_dim // part)
        chunks = const_expr(part // ACCESS_BYTES)  # of staging in a part
        rows = const_expr(LANES // chunks)  # a group: those of a lane's chunks of one part
        tile_n = const_expr(self.storage.config.tile.tile_n)
        assert tile_n % rows == 0 and part * 2 in (64, 128), f"{self.storage.config.tile=} {part=}"
        row, chunk = cute.arch.lane_idx() // chunks, cute.arch.lane_idx() % chunks
        swizzle = row % 8 if const_expr(part * 2 == 128) else row // 2 % 4
        # Note [Bank conflicts]
        part_of = [Int32(i) ^ (row & 1) if parts % 2 == 0 else Int32(i) for i in range(parts)]
        reads = [source + (row * head_dim + part_of[i] * part + chunk * ACCESS_BYTES) for i in range(parts)]
        writes = [target + ((part_of[i] * tile_n + row) * (2 * part) + ((2 * chunk) ^ swizzle) * ACCESS_BYTES) for i in range(parts)]
        for group in cutlass.range(warp, tile_n // rows, self.num_warps, unroll=1):
            row_in_tile = group * rows + row
            for i in cutlass.range_constexpr(parts):
                if const_expr(i % PARTS_AT_ONCE == 0):
                    loaded = [ptx.load_shared_v4(read + group * (rows * head_dim)) for read in reads[i : i + PARTS_AT_ONCE]]
                words = loaded[i % PARTS_AT_ONCE]
                if const_expr(first is not None):
                    words = vectors.select_words((row_in_tile >= first) & (row_in_tile < end), words)
                line = writes[i] + group * (rows * 2 * part)
                converted = [half.ir_value() for word in vectors.elements(words) for half in e4m3_to_float16(Int32(word))]
                ptx.store_shared_v4(line, converted[:4])
                ptx.store_shared_v4(line ^ ACCESS_BYTES, converted[4:])  # the neighbour, swizzled alike
