"""The instructions of products by single warps, ldmatrix and mma.sync m16n8k16, and where a lane's data lie.

Fragments of mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"), lane = 4 * group + pair:
A 16 x 16: words (row group, k 2 pair), (row group + 8, k 2 pair), (row group, k 2 pair + 8), (row group + 8, k 2 pair + 8);
B 16 x 8: words (k 2 pair, column group), (k 2 pair + 8, column group); C: (row group, columns 2 pair, + 1), (row group + 8, the same).
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import vector
from cutlass.cutlass_dsl import T

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors

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


def quad_max(value: Float32) -> Float32:
    """Largest value of the four lanes that hold a row."""
    for offset in (1, 2):
        value = cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset))
    return value


def pack_pair(dtype: str, low: Float32, high: Float32) -> Int32:
    """Two weights rounded to the element type, in one word."""
    values = vector.from_elements(vectors.float32s(2), [Float32(low).ir_value(), Float32(high).ir_value()])
    return Int32(vector.extract(vectors.pack_16bit(values, dtype), [], [0]))
