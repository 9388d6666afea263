"""One row's weights of one KV block: P = exp2(s * scale_log2 - row_max), with the reference maximum moved only when it must.

Note [One pass]. FlashAttention-4 rescales O only when a row's maximum grew by more than 8 (log2 units), which is rare behind a row's first
block. Then even the maximum is rarely needed: the weights are computed with the reference in use, and their sum, which the softmax needs
anyway, shows whether they may stand: a sum of 96 weights above 96 * 2^8 holds a weight above 2^8. Only then does the warp go over the
block a second time, with the block's maximum. S is still in TMEM for it, since P is written after that decision. What the sum cannot show
is asked of the raw scores: columns of the polynomial, whose exponent field would wrap, and the last columns, whose weights are computed
while PV already works on the first ones. The second pass moves the reference of those rows only whose own weights asked for it, and
repeats the weights of all others, so a row's bits do not depend on the rows beside it.

Note [Weights in e4m3]. With Q, K and V in FP8, P is e4m3: at most 448, and nothing below 2^-10. References then lie `E4M3_LIFT` below a
row's largest score and move when that grew by `E4M3_THRESHOLD` (`tuning`), so that the largest weight is 2^7 to 2^8.75 and none is cut.
That leaves no room for a sum of 96 weights as the test, so every block takes its maximum, and then before the weights: there is no second
pass, whatever the scores are, where one would come in 4 to 40 % of a random item's first blocks. Where float32 numbers are so far apart
that a reference is not 7 below the largest score, it is at most 8 (`decode/operands_fp8.py`, Note [float16 P]), and scores that differ
differ by more than the threshold.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32
from cutlass._mlir import ir
from cutlass.cutlass_dsl import T

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.branches import repeat_once, when, when_scalars
from fa4_backend.kernels.common.exp2 import exp2_pair, uses_polynomial
from fa4_backend.kernels.common.fp8 import float32_to_e4m3
from fa4_backend.kernels.common.online_softmax import MAX_FUSED
from fa4_backend.kernels.sm100.config import Sm100Config
from fa4_backend.problem import FP8_MAX

CHUNK = 32  # columns a TMEM instruction moves
MAX_WEIGHT = {"float16": 65504.0, "bfloat16": 2.0**100}  # largest finite P; 2^100 leaves room for the products with V


class Scores(NamedTuple):
    """A row's scores of a block."""

    chunks: list[ir.Value]
    largest: Float32 | None  # of all of them, where it came with them


class Weights(NamedTuple):
    """What the decision left: the first columns' weights, and the scores of the rest with all that their weights need."""

    row_max: Float32  # reference maximum, log2 units (`online_softmax`); -inf: no key yet
    row_sum: Float32  # of all earlier blocks and the first columns
    factor: Float32  # multiplies O of earlier blocks; 1 while the reference stays
    first: list[ir.Value]  # packed weights, a chunk each
    rest: list[ir.Value]  # scores, a chunk each


@dataclass(frozen=True)
class BlockWeights:
    """Compile-time side; the methods emit code and hold no state."""

    config: Sm100Config

    @property
    def first_chunks(self) -> int:
        """Chunks of P that PV may start with."""
        return self.config.tuning.p_first_columns // CHUNK

    @property
    def is_e4m3(self) -> bool:
        """See Note [Weights in e4m3]."""
        return self.config.kernel.has_q_scale

    def decide(
        self,
        load_scores: Callable[[], Scores],
        wait_again: Callable[[], None],
        is_first: Boolean,
        row_max: Float32,
        row_sum: Float32,
        scale_log2: Float32,
    ) -> Weights:
        """Weights of the first columns with a reference that the block's weights do not pass by too much.

        Args:
            load_scores: emits the load of the row's scores, masked; repeatable.
            wait_again: emits a wait that is over at once.
            is_first: the row group's first block, which always needs its maximum.
        """
        threshold = self.config.kernel.tile.rescale_threshold
        if self.is_e4m3:
            return self._after_maximum(load_scores(), wait_again, row_max, row_sum, scale_log2)
        # A sum above this holds a weight above 2^threshold, so a second pass always moves the reference.
        limit = self.config.tuning.p_first_columns * 2.0**threshold
        assert limit < MAX_WEIGHT[self.config.kernel.dtype], f"{limit=}"
        chunks = self.config.kernel.tile.tile_n // CHUNK
        word_type, score_type = vectors.int32s(CHUNK // 2), vectors.float32s(CHUNK)
        scalars = [T.f32(), T.f32(), T.bool(), T.f32()]
        results = scalars + [word_type] * self.first_chunks + [score_type] * (chunks - self.first_chunks)

        def one_pass(
            needs_max: ir.Value,  # the warp looks at maxima
            row_max: ir.Value,
            row_sum: ir.Value,
            may_move: ir.Value,  # this row asked for it
        ) -> tuple[Boolean, list[ir.Value]]:
            s = load_scores().chunks
            moved = when(
                Boolean(needs_max),
                [row_max, row_sum, Float32(1.0).ir_value()],
                lambda values: self._move(vectors.max_of(s, -Float32.inf), *values[:2], Boolean(may_move), scale_log2),
            )
            reference, total, factor = (Float32(value) for value in moved)
            offset = self.offset(reference)
            s = self._relate(s, reference, scale_log2, wait_again)
            first, part_sum = self.weigh(s[: self.first_chunks], 0, scale_log2, offset)
            unseen = cute.math.fma(Float32(self._unseen_max(s)), scale_log2, -offset)
            too_large = (part_sum > limit) | (unseen > math.log2(limit)) | (reference == -Float32.inf)
            again = cute.arch.vote_any_sync(too_large) & ~Boolean(needs_max)
            # A pass that is repeated has not moved the reference, so `total` is still the sum of the earlier blocks.
            total = cutlass.select_(again, total, total + part_sum)
            return again, [reference.ir_value(), total.ir_value(), too_large.ir_value(), factor.ir_value(), *first, *s[self.first_chunks :]]

        needs_max = Boolean(True) if threshold == 0 else Boolean(is_first)
        values = repeat_once(one_pass, needs_max, [row_max.ir_value(), row_sum.ir_value(), needs_max.ir_value()], results)
        reference, total, factor = (Float32(values[i]) for i in (0, 1, 3))
        cut = len(scalars) + self.first_chunks
        return Weights(reference, total, factor, values[len(scalars) : cut], values[cut:])

    def _after_maximum(
        self, scores: Scores, wait_again: Callable[[], None], row_max: Float32, row_sum: Float32, scale_log2: Float32
    ) -> Weights:
        """`decide` for weights in e4m3: Note [Weights in e4m3]."""
        most = self.config.tuning.lift + self.config.kernel.tile.rescale_threshold
        assert 2.0**most < FP8_MAX, f"{most=}"
        largest = vectors.max_of(scores.chunks, -Float32.inf) if scores.largest is None else scores.largest
        moved = self._move(largest, row_max.ir_value(), row_sum.ir_value(), Boolean(True), scale_log2)
        reference, total, factor = (Float32(value) for value in moved)
        s = self._relate(scores.chunks, reference, scale_log2, wait_again)
        first, part_sum = self.weigh(s[: self.first_chunks], 0, scale_log2, self.offset(reference))
        return Weights(reference, total + part_sum, factor, first, s[self.first_chunks :])

    def offset(self, row_max: Float32) -> Float32:
        """What is subtracted in the exponent; 0 for a row without a key, whose scores are all -inf, and after `_relate`."""
        return cutlass.select_(ptx.absolute(row_max) < MAX_FUSED, row_max, Float32(0.0))

    def _relate(self, s: list[ir.Value], row_max: Float32, scale_log2: Float32, wait_again: Callable[[], None]) -> list[ir.Value]:
        """Scores relative to a reference that is large (`online_softmax`, Note [Large scores]), their products rounded as it was."""
        is_large = (ptx.absolute(row_max) >= MAX_FUSED) & (row_max != -Float32.inf)

        def change(values: list[ir.Value]) -> list[ir.Value]:
            wait_again()  # keeps the branch a branch: see `load_scores`
            inverse = cute.arch.rcp_approx(scale_log2)
            scale, shift, back = (vectors.broadcast(x, 2) for x in (scale_log2, -row_max, inverse))
            related = []
            for v in values:
                pairs = [vectors.pair(v, j) for j in range(0, CHUNK, 2)]
                relative = [vectors.mul2(vectors.add2(vectors.mul2(pair, scale), shift), back) for pair in pairs]
                related.append(vectors.from_pairs([vectors.select(is_large, new, old) for new, old in zip(relative, pairs, strict=True)]))
            return related

        return when_scalars(cute.arch.vote_any_sync(is_large), s, change)

    def weigh(self, s: list[ir.Value], first_chunk: int, scale_log2: Float32, offset: Float32) -> tuple[list[ir.Value], Float32]:
        """Packed weights of some chunks, and their sum.

        The sum is of the float32 weights before they are rounded for PV: with rounded ones the lse of a row of few keys would be off by
        up to 2^-9.
        """
        tuning = self.config.tuning
        scale, shift = vectors.broadcast(scale_log2, 2), vectors.broadcast(-offset, 2)
        sums: list = [None, None]
        packed = []
        for chunk, v in enumerate(s, first_chunk):
            pairs = []
            for j in range(0, CHUNK, 2):
                x = vectors.fma2(vectors.pair(v, j), scale, shift)
                p = exp2_pair(x, chunk * CHUNK + j, tuning.polynomial_every, tuning.polynomial_degree)
                which = (j // 2) % 2
                sums[which] = p if sums[which] is None else vectors.add2(sums[which], p)
                pairs.append(p)
            packed.append(self.pack(vectors.from_pairs(pairs)))
        total = vectors.add2(sums[0], sums[1])
        return packed, Float32(vectors.element(total, 0)) + Float32(vectors.element(total, 1))

    def pack(self, weights: ir.Value) -> ir.Value:
        """A chunk's weights rounded as PV takes them, words of two or of four."""
        if not self.is_e4m3:
            return vectors.pack_16bit(weights, self.config.kernel.dtype)
        numbers = [Float32(x) for x in vectors.elements(weights)]
        return vectors.from_words([float32_to_e4m3(numbers[j : j + 4]) for j in range(0, CHUNK, 4)])

    def _move(self, largest: Float32, row_max: ir.Value, row_sum: ir.Value, may_move: Boolean, scale_log2: Float32) -> list[ir.Value]:
        """Reference, sum and factor after the block's largest score was looked at."""
        old = Float32(row_max)
        largest = ptx.mul_rn(largest, scale_log2)
        if self.config.tuning.lift:
            largest = largest - self.config.tuning.lift
        largest = cute.arch.fmax(old, largest)
        # -inf - -inf is NaN, compares false and keeps the old value: -inf as well.
        grew = may_move & (largest - old > self.config.kernel.tile.rescale_threshold)
        new = cutlass.select_(grew, largest, old)
        factor = cutlass.select_(grew, cute.math.exp2(old - new, fastmath=True), Float32(1.0))
        return [new.ir_value(), ptx.mul_rn(row_sum, factor).ir_value(), factor.ir_value()]

    def _unseen_max(self, s: list[ir.Value]) -> ir.Value:
        """Largest score among those whose weight the sum of the first columns does not show."""
        every = self.config.tuning.polynomial_every
        polynomial = [
            vectors.element(v, j)
            for chunk, v in enumerate(s[: self.first_chunks])
            for j in range(CHUNK)
            if uses_polynomial(chunk * CHUNK + j, every)
        ]
        chunks = ([vectors.from_elements(polynomial)] if polynomial else []) + s[self.first_chunks :]
        return vectors.max_of(chunks, -Float32.inf).ir_value()
