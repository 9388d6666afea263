"""What is compiled into the latent decode kernel of Blackwell, and how it follows from the problem. Imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.kernels.common.prefill_config import box_rows_of
from fa4_backend.kernels.mla_decode.config import LATENT_PARTS, PART_DIM, PARTS, RESCALE_THRESHOLD, MlaDecodeConfig
from fa4_backend.problem import FP8_MAX, AttentionProblem, BatchLimits

PAIR = 2  # CTAs that share products, 64 packed rows each
BLOCK_KEYS = 128  # keys of a block: N of a product for S, half of them from each CTA
CTA_KEYS = BLOCK_KEYS // PAIR
K_PARTS = 3  # parts of a stage of K: 64 keys x 64 elements each
K_STAGE = PARTS // K_PARTS  # one block of K
O_COLUMNS = 256  # of O that a product makes: N, half of them from each CTA
V_PARTS = O_COLUMNS // PAIR // PART_DIM  # parts of a stage of V: 128 keys x 64 columns each
V_STAGE = LATENT_PARTS // PAIR // V_PARTS  # one block of V
FP8_TERMS = 2  # of Q and of weights beside FP8 latents: `common/fp8.py`, Note [Two terms]
FP8_BLOCKS = 2  # of K and of V in shared memory, where an element takes half
# Weights beside FP8 latents: log2 units that a row's reference lies below its largest score, and that a score may grow before it moves.
# 2^8.75 is below 448, where hi ends; a weight below 2^-22 of the row's largest is lost.
FP8_LIFT, FP8_THRESHOLD = 5.0, 3.75
assert 2 ** (FP8_LIFT + FP8_THRESHOLD) < FP8_MAX
S_STAGE = 2  # buffers of S in tensor memory


@dataclass(frozen=True)
class MlaSm100Config(MlaDecodeConfig):
    """Compile key; `max_cluster` and `prefetch_blocks` are Hopper's."""

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.mla_decode.sm100.kernel:build"

    @property
    def is_narrow(self) -> bool:
        """Never: rows fill a tile or not."""
        return False

    @property
    def is_converted(self) -> bool:
        """Never: products take latents as they are stored."""
        return False

    @property
    def terms(self) -> int:
        """Operands of 8 bits that one of Q or of weights is split into; 1: it is taken as it is."""
        return FP8_TERMS if self.has_scale else 1

    @property
    def num_blocks(self) -> int:
        """Blocks of K and of V in shared memory."""
        return FP8_BLOCKS if self.has_scale else 1

    @property
    def lift(self) -> float:
        """See `FP8_LIFT`."""
        return FP8_LIFT if self.has_scale else 0.0

    @property
    def rescale_threshold(self) -> float:
        """See `FP8_THRESHOLD`."""
        return FP8_THRESHOLD if self.has_scale else RESCALE_THRESHOLD

    @property
    def latent_swizzle_bits(self) -> int:
        """See `MlaDecodeConfig`; rows of 64 or 128 bytes."""
        return 2 if self.has_scale else 3

    @property
    def tile_n(self) -> int:
        """Keys of a block."""
        return BLOCK_KEYS

    @property
    def cluster_size(self) -> int:
        """A pair of CTAs, with a tile each: the second one may have no rows."""
        return PAIR

    @property
    def num_groups(self) -> int:
        """Row groups of a sequence: pairs that its tiles take."""
        return -(-self.num_tiles // PAIR)


def resolve(problem: AttentionProblem, limits: BatchLimits) -> MlaSm100Config:
    """The compile key of a latent problem."""
    return MlaSm100Config(
        arch=problem.target_arch,
        dtype=problem.dtype,
        kv_dtype=problem.kv_dtype,
        num_heads=problem.num_q_heads,
        query_len=limits.decode_query_len,
        box_rows=box_rows_of(problem.page_size, CTA_KEYS),
        mask=problem.mask,
        has_lse=problem.has_lse,
        has_pieces=problem.batch_invariant,
    )
