"""Issue of tcgen05.mma: descriptors and one block of instructions a product, float32 accumulators.

Kind f16 where operands have 16 bits; kind f8f6f4 where they have 8, of which an instruction takes twice as many along the reduction:
32 bytes in either; there A may be e5m2 beside a B in e4m3. V is contiguous along N (MN-major) as it is stored, which 8-bit operands of
this kind may be too.

PTX ISA: "tcgen05.mma", "Shared memory descriptor", "Instruction descriptor", "Canonical layouts".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cutlass import Int32

from fa4_backend.kernels.common.ptx_ops import inline_asm
from fa4_backend.problem import DTYPE_BYTES, FP8

E5M2 = "float8_e5m2"  # 1 sign, 5 exponent, 2 mantissa bits: numbers down to 2^-16
K_STEP_BYTES = 32  # of an operand's row, along the reduction
K_STEP_COLUMNS = K_STEP_BYTES // 4  # of an operand in TMEM
SWIZZLES = {128: 2 << 29, 64: 4 << 29, 32: 6 << 29}  # bytes of a row -> layout type, bits 61-63 of the descriptor
DESCRIPTOR_VERSION = 1 << 14  # bits 46-47: tcgen05
FORMATS = {"float16": ("f16", 0), "bfloat16": ("f16", 1), FP8: ("f8f6f4", 0), E5M2: ("f8f6f4", 1)}  # element type -> kind, code
OUTPUT_FLOAT32 = 1 << 4
B_IS_MN_MAJOR = 1 << 16


@dataclass(frozen=True)
class Products:
    """What a kernel's products have in common."""

    dtype: str  # of both operands, or of B
    ctas: int  # that share a product
    rows: int = 128  # of a CTA
    row_bytes: int = 128  # of a part of an operand in shared memory, swizzled in 16-byte units
    a_dtype: str | None = None  # of A where it is another of the same kind

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the operands."""
        return DTYPE_BYTES[self.dtype]

    @property
    def k_elems(self) -> int:
        """Elements of the reduction that one instruction takes."""
        return K_STEP_BYTES // self.element_bytes

    @property
    def descriptor_high(self) -> int:
        """High word of every operand descriptor: stride between groups of eight rows, version, swizzle."""
        return (8 * self.row_bytes >> 4) | DESCRIPTOR_VERSION | SWIZZLES[self.row_bytes]

    def instruction_descriptor(self, n: int, *, b_mn_major: bool) -> int:
        """Instruction descriptor of D (rows ctas x n, float32) = A (rows ctas x k) B (n x k)^T."""
        (a_kind, a_code), (kind, code) = FORMATS[self.a_dtype or self.dtype], FORMATS[self.dtype]
        assert a_kind == kind, f"{self}"
        m = self.rows * self.ctas
        return OUTPUT_FLOAT32 | (a_code << 7) | (code << 10) | (B_IS_MN_MAJOR * b_mn_major) | ((n >> 3) << 17) | ((m >> 4) << 24)

    def k_major_steps(self, elems: int, part_bytes: int) -> list[int]:
        """Offsets, in 16-byte units, of the steps along a K-major operand of `elems` elements."""
        steps = range(0, elems * self.element_bytes, K_STEP_BYTES)
        return [(at // self.row_bytes * part_bytes + at % self.row_bytes) >> 4 for at in steps]

    def mn_major_steps(self, k_steps: range) -> list[int]:
        """The same of an operand that is contiguous along M or N, whose rows lie along the reduction."""
        return [(step * self.k_elems * self.row_bytes) >> 4 for step in k_steps]

    def mma_ss(
        self,
        d_tmem: Int32,
        a_low: Int32,
        b_low: Int32,
        a_steps: Sequence[int],
        b_steps: Sequence[int],
        n: int,
        *,
        b_mn_major: bool = False,
        accumulate: Int32 | int = 0,
    ) -> None:
        """D (+)= A B^T with both operands in shared memory, A K-major; steps: offsets of the reduction steps; n: columns of D.

        Args:
            accumulate: 0: the first step overwrites D. A constant takes no register.
        """
        setup = [f"add.u32 low, $1, {step}; mov.b64 a, {{low, high}};" for step in a_steps]
        idesc, operands = self.instruction_descriptor(n, b_mn_major=b_mn_major), [d_tmem, a_low, b_low]
        if isinstance(accumulate, int):
            self._issue("a", setup, b_steps, idesc, operands, str(accumulate))
        else:
            self._issue("a", setup, b_steps, idesc, [*operands, accumulate], "$3")

    def mma_ts(self, d_tmem: Int32, a_tmem: Int32, b_low: Int32, k_steps: range, n: int, accumulate: Int32) -> None:
        """D (+)= A B with A (rows x k) in TMEM and B (k x n) contiguous along n in shared memory.

        Args:
            k_steps: which steps of the reduction to do.
            accumulate: 0: the first step overwrites D.
        """
        setup = [f"add.u32 low, $1, {step * K_STEP_COLUMNS};  mov.b32 a_col, low;" for step in k_steps]
        setup[0] = ".reg .b32 a_col; " + setup[0]
        idesc = self.instruction_descriptor(n, b_mn_major=True)
        self._issue("[a_col]", setup, self.mn_major_steps(k_steps), idesc, [d_tmem, a_tmem, b_low, accumulate], "$3")

    def _issue(
        self, a_operand: str, a_setup: Sequence[str], b_steps: Sequence[int], idesc: int, operands: Sequence[Int32], first: str
    ) -> None:
        kind, _ = FORMATS[self.dtype]
        instruction = f"tcgen05.mma.cta_group::{self.ctas}.kind::{kind}"
        lines = [
            ".reg .pred issue, first, always;",
            ".reg .b32 low, high, idesc;",
            ".reg .b64 a, b;",
            "elect.sync _|issue, 0xffffffff;",
            f"setp.ne.b32 first, {first}, 0;",
            "setp.eq.b32 always, 0, 0;",
            f"mov.b32 high, {self.descriptor_high};",
            f"mov.b32 idesc, {idesc};",
        ]
        for i, b_step in enumerate(b_steps):
            lines += [
                a_setup[i],
                f"add.u32 low, $2, {b_step};",
                "mov.b64 b, {low, high};",
                f"@issue {instruction} [$0], {a_operand}, b, idesc, {'first' if i == 0 else 'always'};",
            ]
        inline_asm("{ " + " ".join(lines) + " }", operands)


def descriptor_low(smem_address: Int32, leading_bytes: int = 16) -> Int32:
    """Low word: address and leading byte offset (between parts, for an operand that is contiguous along M or N) in 16-byte units."""
    return ((smem_address >> 4) & 0x3FFF) | ((leading_bytes >> 4) << 16)
