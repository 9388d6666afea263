"""The instructions the decode kernel computes with, ldmatrix, mma.sync m16n8k16 and conversions, and where a lane's data lie.

Fragments of mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"), lane = 4 * group + pair:
A 16 x 16: words (row group, k 2 pair), (row group + 8, k 2 pair), (row group, k 2 pair + 8), (row group + 8, k 2 pair + 8);
B 16 x 8: words (k 2 pair, column group), (k 2 pair + 8, column group); C: (row group, columns 2 pair, + 1), (row group + 8, the same).
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cutlass_dsl import T

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.decode.config import BOX_KEYS

_MMA_TYPES = {"bfloat16": "bf16", "float16": "f16"}


def mma(dtype: str, c: list[Float32], a: list[Int32], b: tuple[Int32, Int32]) -> list[Float32]:
    """c + a @ b for one m16n8k16 tile; a: 4 words, b: 2 words, c: 4 float32."""
    name = _MMA_TYPES[dtype]
    return list(
        cute.arch.inline_ptx(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 "
            "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
            write_only_types=[Float32] * 4,
            read_only_args=[*a, *b, *c],
        )
    )


def load_matrices(address: Int32, *, transpose: bool) -> list[Int32]:
    """Four 8 x 8 matrices of 16-bit elements; lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i (shared window)."""
    mode = ".trans" if transpose else ""
    return list(
        cute.arch.inline_ptx(
            f"ldmatrix.sync.aligned.m8n8.x4{mode}.shared.b16 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}}];",
            write_only_types=[Int32] * 4,
            read_only_args=[address],
        )
    )


def permute_bytes(word: Int32, selector: Int32) -> Int32:
    """Bytes of a word in another order; 4 in a nibble of the selector gives 0 (PTX ISA, "prmt")."""
    return Int32(ptx.inline_asm("prmt.b32 $0, $1, 0, $2;", [word, selector], T.i32(), "=r", pure=True))


@dataclass(frozen=True)
class BoxLayout:
    """A box of 16 keys in shared memory as TMA writes it: parts of a head one behind the other, each 16 rows of `part_bytes`, swizzled.

    The swizzle XORs the 16-byte chunk within a row with the number of the row's 128-byte line (PTX ISA, "Swizzling modes"),
    so a lane's offset is computed once and later chunks differ by an XOR of a constant.
    """

    part_bytes: int  # 128, 64 or 32

    def lane_offset(self, key: Int32, chunk: Int32) -> Int32:
        """Offset of 16-byte chunk `chunk` (0 or 1) of row `key`, in bytes."""
        line = key // (128 // self.part_bytes)
        bits = (line % (self.part_bytes // 16)) * 16
        return key * self.part_bytes + ((chunk * 16) ^ bits)

    def step_address(self, lane_address: Int32, step: int) -> Int32:
        """Address of the lane's chunk for the `step`-th 32 bytes of a head."""
        part, within = divmod(32 * step, self.part_bytes)
        return (lane_address ^ within) + part * BOX_KEYS * self.part_bytes

    def key_matrices(self, lane_idx: Int32) -> Int32:
        """This lane's offset for `load_matrices` of K: words (keys 0-7, k 0-7), (keys 0-7, k 8-15), then keys 8-15."""
        return self.lane_offset(lane_idx % 8 + lane_idx // 16 * 8, lane_idx // 8 % 2)

    def value_matrices(self, lane_idx: Int32) -> Int32:
        """This lane's offset for the transposed `load_matrices` of V: words (keys 0-7, n 0-7), (keys 8-15, n 0-7), then n 8-15."""
        return self.lane_offset(lane_idx % 16, lane_idx // 16)
