"""Finished rows from shared memory to `out`: 16 bytes a thread, coalesced along the head, no write outside the sequence's rows."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_backend.kernels.common.hardware import ACCESS_BYTES
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.seqlen_info import SeqlenInfo


@dataclass(frozen=True)
class OutputStore:
    """Copies `rows` rows of a swizzled shared-memory tile of `tile_rows` rows with `threads` threads."""

    pack: PackGqa
    rows: int
    tile_rows: int
    threads: int
    head_dim_v: int
    part_elems: int  # elements of a swizzled row of shared memory
    element_bytes: int

    @cute.jit
    def store(
        self,
        mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v)
        sO_ptr: cute.Pointer,  # row `first_row` of a tile [head part][row][part_elems], 16-byte chunks swizzled as TMA does
        thread: Int32,
        first_row: Int32,  # a multiple of 8
        kv_head_idx: Int32,
        m_block: Int32,
        seqlen: SeqlenInfo,
    ):
        """Write the rows that are valid; the caller has made the tile visible to all `threads`."""
        elems = ACCESS_BYTES // self.element_bytes
        row_chunks, part_chunks = self.head_dim_v // elems, self.part_elems // elems
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), mO.element_type, num_bits_per_copy=8 * ACCESS_BYTES)
        assert self.rows * row_chunks % self.threads == 0
        for i in cutlass.range_constexpr(self.rows * row_chunks // self.threads):
            chunk = thread + i * self.threads
            row, column = chunk // row_chunks, chunk % row_chunks
            line = (column // part_chunks) * self.tile_rows + row  # rows of part_elems elements
            # TMA's 128/64/32-byte swizzle: XOR of the chunk index with the number of the 128-byte line.
            swizzled = (column % part_chunks) ^ self._swizzle_bits(line, part_chunks)
            packed = self.pack.row(first_row + row, m_block, seqlen)
            fragment = cute.make_rmem_tensor(elems, mO.element_type)
            source = sO_ptr + (line * self.part_elems + swizzled * elems)
            cute.copy(copy, cute.make_tensor(source.align(ACCESS_BYTES), cute.make_layout(elems)), fragment)
            if packed.is_valid:
                head = kv_head_idx * self.pack.q_per_kv + packed.head
                gO = cute.local_tile(mO[seqlen.q_begin + packed.token, head, None], (elems,), (column,))
                cute.copy(copy, fragment, gO)

    def _swizzle_bits(self, line: Int32, part_chunks: int) -> Int32:
        """Bits to XOR into the chunk index of row `line`: address bits 7.. of the row's start."""
        lines_per_128 = 8 // part_chunks
        if const_expr(lines_per_128 == 1):
            return line % 8
        return (line // lines_per_128) % part_chunks
