"""Issue of tcgen05.mma: descriptors and one block of instructions a product. Kind f16, float32 accumulators.

PTX ISA: "tcgen05.mma", "Shared memory descriptor", "Instruction descriptor", "Canonical layouts".
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Int32

from fa4_backend.kernels.common.ptx_ops import inline_asm

ROW_BYTES = 128  # a row of a part: 64 elements, swizzled in 16-byte units by the row's low three bits
MMA_M, MMA_K = 128, 16  # rows of a CTA, and 16-bit elements of the reduction, of one instruction
EIGHT_ROWS = 8 * ROW_BYTES
SWIZZLE_128B = 2 << 29  # layout type, bits 61-63 of the descriptor
DESCRIPTOR_VERSION = 1 << 14  # bits 46-47: tcgen05
K_STEP_BYTES = MMA_K * 2
FORMAT_CODE = {"float16": 0, "bfloat16": 1}
OUTPUT_FLOAT32 = 1 << 4
B_IS_MN_MAJOR = 1 << 16


def descriptor_high() -> int:
    """High word of every operand descriptor: stride between groups of eight rows, version, swizzle."""
    return (EIGHT_ROWS >> 4) | DESCRIPTOR_VERSION | SWIZZLE_128B


def descriptor_low(smem_address: Int32, leading_bytes: int = 16) -> Int32:
    """Low word: address and leading byte offset (between parts, for an operand that is contiguous along M or N) in 16-byte units."""
    return ((smem_address >> 4) & 0x3FFF) | ((leading_bytes >> 4) << 16)


def instruction_descriptor(dtype: str, n: int, *, b_mn_major: bool, ctas: int, rows: int = MMA_M) -> int:
    """Instruction descriptor of D (rows ctas x n, float32) = A (rows ctas x 16) B (n x 16)^T."""
    code = FORMAT_CODE[dtype]
    return OUTPUT_FLOAT32 | (code << 7) | (code << 10) | (B_IS_MN_MAJOR * b_mn_major) | ((n >> 3) << 17) | ((rows * ctas >> 4) << 24)


def k_major_steps(head_dim: int, part_bytes: int) -> list[int]:
    """Offsets, in 16-byte units, of the MMA steps along a K-major operand of `head_dim` elements."""
    steps_per_part = ROW_BYTES // K_STEP_BYTES
    return [(i // steps_per_part * part_bytes + i % steps_per_part * K_STEP_BYTES) >> 4 for i in range(head_dim // MMA_K)]


def _issue(
    ctas: int, a_operand: str, a_setup: Sequence[str], b_steps: Sequence[int], idesc: int, operands: Sequence[Int32], first: str
) -> None:
    lines = [
        ".reg .pred issue, first, always;",
        ".reg .b32 low, high, idesc;",
        ".reg .b64 a, b;",
        "elect.sync _|issue, 0xffffffff;",
        f"setp.ne.b32 first, {first}, 0;",
        "setp.eq.b32 always, 0, 0;",
        f"mov.b32 high, {descriptor_high()};",
        f"mov.b32 idesc, {idesc};",
    ]
    for i, b_step in enumerate(b_steps):
        lines += [
            a_setup[i],
            f"add.u32 low, $2, {b_step};",
            "mov.b64 b, {low, high};",
            f"@issue tcgen05.mma.cta_group::{ctas}.kind::f16 [$0], {a_operand}, b, idesc, {'first' if i == 0 else 'always'};",
        ]
    inline_asm("{ " + " ".join(lines) + " }", operands)


def mma_ss(
    ctas: int,
    d_tmem: Int32,
    a_low: Int32,
    b_low: Int32,
    a_steps: Sequence[int],
    b_steps: Sequence[int],
    idesc: int,
    accumulate: Int32 | int = 0,
) -> None:
    """D (+)= A B^T with both operands in shared memory; steps: offsets of the reduction steps.

    Args:
        accumulate: 0: the first step overwrites D. A constant takes no register.
    """
    setup = [f"add.u32 low, $1, {step}; mov.b64 a, {{low, high}};" for step in a_steps]
    if isinstance(accumulate, int):
        _issue(ctas, "a", setup, b_steps, idesc, [d_tmem, a_low, b_low], str(accumulate))
    else:
        _issue(ctas, "a", setup, b_steps, idesc, [d_tmem, a_low, b_low, accumulate], "$3")


def mma_ts(ctas: int, d_tmem: Int32, a_tmem: Int32, b_low: Int32, k_steps: range, idesc: int, accumulate: Int32) -> None:
    """D (+)= A B with A (128 x k, 16-bit pairs) in TMEM and B (k x n) contiguous along n in shared memory.

    Args:
        k_steps: which 16-row steps of the reduction to do.
        accumulate: 0: the first step overwrites D.
    """
    setup = [f"add.u32 low, $1, {step * MMA_K // 2};  mov.b32 a_col, low;" for step in k_steps]
    setup[0] = ".reg .b32 a_col; " + setup[0]
    _issue(ctas, "[a_col]", setup, [(step * MMA_K * ROW_BYTES) >> 4 for step in k_steps], idesc, [d_tmem, a_tmem, b_low, accumulate], "$3")
