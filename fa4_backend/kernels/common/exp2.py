"""2^x split between two units: MUFU (ex2.approx) and, for a share of the columns, a polynomial on the FMA units.

Note [Polynomial exp2]. With n = floor(x) and f = x - n in [0, 1), 2^x = 2^n p(f): Cody-Waite reduction, then a minimax polynomial by
Horner on packed pairs, then n added to the exponent field. x + 1.5 * 2^23 rounded towards minus infinity holds n in its low mantissa
bits, so floor and exponent come from one addition. p(0) = 1 exactly: the largest score of a row has weight 1 on either unit.
(FlashAttention-4, arXiv 2603.05451, "software exponential"; Tang, "Table-driven implementation of the exponential function".)

Note [Columns]. Which columns use the polynomial depends on the KV column alone, so a row's bits do not depend on its tile or on the page
size. Only the Blackwell prefill kernel has it: decode and the Hopper kernels compute every column on MUFU. So a token's bits from decode
and from prefill differ; where they must not, exact mode sends all rows to the prefill kernel.

`scripts/exp2_minimax.py` derives COEFFICIENTS and the error table of docs/numerics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cutlass._mlir import ir

# Degree -> coefficients, ascending, rounded to float32; minimax in relative error on [0, 1) with p(0) = 1.
COEFFICIENTS: dict[int, tuple[float, ...]] = {
    2: (1.0, 0.665960967540741, 0.32993239164352417),
    3: (1.0, 0.6951167583465576, 0.22764499485492706, 0.07706703990697861),
    4: (1.0, 0.6930448412895203, 0.241280198097229, 0.052242472767829895, 0.013426683843135834),
    5: (1.0, 0.6931512951850891, 0.24016444385051727, 0.05579991266131401, 0.009017030708491802, 0.0018671300495043397),
}
FLOOR_MAGIC = 1.5 * 2.0**23  # x + this, rounded down, has floor(x) in its low mantissa bits for |x| < 2^22
MIN_EXPONENT = -127.0  # 2^-127 comes out as 0; below, the exponent field would wrap


def uses_polynomial(kv_col: int, every: int) -> bool:
    """Whether column `kv_col` is computed by the polynomial when every `every`-th pair of columns is (0: none, 1: all).

    `every` divides 16, so that the answer is the same for a column counted within any tile of a multiple of 32 columns.
    """
    assert every == 0 or 16 % every == 0, f"{every=}"
    return every > 0 and (kv_col // 2) % every == every - 1


def exp2_polynomial(x: ir.Value, degree: int) -> ir.Value:
    """2^x of a vector<2 x f32> on the FMA units; x at most 120, any smaller value (or -inf) gives 0."""
    from cutlass import Float32, Int32
    from cutlass._mlir.dialects import arith, nvvm, vector
    from cutlass.cutlass_dsl import T

    from fa4_backend.kernels.common import vector_ops as vectors

    lowest = Float32(MIN_EXPONENT).ir_value()
    x = vector.from_elements(vectors.float32s(2), [nvvm.fmax(vectors.element(x, i), lowest) for i in (0, 1)])
    shifted = vectors.add2_down(x, vectors.broadcast(Float32(FLOOR_MAGIC), 2))
    floor = vectors.add2(shifted, vectors.broadcast(Float32(-FLOOR_MAGIC), 2))
    fraction = nvvm.sub_packed_f32x2(x, floor, rnd=nvvm.FPRoundingMode.RN)
    coefficients = [vectors.broadcast(Float32(c), 2) for c in COEFFICIENTS[degree]]
    result = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        result = vectors.fma2(result, fraction, coefficient)
    words = vectors.int32s(2)
    exponent, mantissa = vector.bitcast(words, shifted), vector.bitcast(words, result)
    scaled = []
    for i in (0, 1):
        n = arith.shli(vector.extract(exponent, [], [i]), Int32(23).ir_value())
        scaled.append(arith.bitcast(T.f32(), arith.addi(n, vector.extract(mantissa, [], [i]))))
    return vector.from_elements(vectors.float32s(2), scaled)


def exp2_pair(x: ir.Value, kv_col: int, every: int, degree: int) -> ir.Value:
    """2^x of a vector<2 x f32> for columns kv_col, kv_col + 1 (even kv_col), on the unit that the column is assigned to."""
    from fa4_backend.kernels.common import vector_ops as vectors

    return exp2_polynomial(x, degree) if uses_polynomial(kv_col, every) else vectors.exp2_approx(x)
