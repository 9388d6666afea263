"""Which problems have a decode kernel, and that its shared memory holds what the config says; nothing is compiled."""

from __future__ import annotations

import itertools

import pytest

from fa4_backend import AttentionProblem, BatchLimits
from fa4_backend.arch import ARCHS
from fa4_backend.kernels.decode.config import MAX_ROWS, DecodeConfig, resolve
from fa4_backend.kernels.families import resolve_kernels
from fa4_backend.problem import FP8

LIMITS = {"max_num_seqs": 8, "max_num_tokens": 64, "max_seqlen_k": 4096}
# Ratios around 16 packed rows a warp and at the limit of 64; every head_dim a kernel here knows.
RATIOS, QUERY_LENS, HEAD_DIMS = (1, 3, 7, 8, 16, 64), (1, 2, 4), ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))


def config_of(
    q_per_kv: int, dims: tuple[int, int], query_len: int, dtype: str = "bfloat16", kv_dtype: str = "auto", *, parts: bool = False
) -> DecodeConfig | None:
    problem = AttentionProblem(2 * q_per_kv, 2, *dims, dtype, 16, "emulated-sm_90a", kv_dtype=kv_dtype)
    return resolve(problem, BatchLimits(**LIMITS, decode_query_len=query_len), prefill_has_parts=parts)


def test_every_config_fits_its_sm() -> None:
    served = 0
    for kv_dtype, q_per_kv, query_len, dims in itertools.product(("auto", FP8), RATIOS, QUERY_LENS, HEAD_DIMS):
        config = config_of(q_per_kv, dims, query_len, kv_dtype=kv_dtype)
        if kv_dtype == FP8 and dims[0] % 32:
            assert config is None, "a row of K of no whole 32 bytes"
            continue
        if config is None:
            assert q_per_kv * query_len > MAX_ROWS or (dims == (256, 256) and q_per_kv * query_len >= 32), (q_per_kv, query_len, dims)
            continue
        served += 1
        merge = config.merge_buffers * config.row_groups * config.merge_rows * (config.head_dim_v + 8 + 2) * 4
        used = config.kv_stage * config.kv_stage_bytes + 2 * config.q_stage_bytes + merge
        assert config.kv_stage >= 2 and used * config.ctas_per_sm <= ARCHS[config.arch].smem_bytes - 512 * config.ctas_per_sm
        assert config.num_threads <= 1024
        assert config.slot_stage >= 1 and config.stage_slots >= 1, "a slot fits where KV tiles were"
    assert served > 150


def test_fp8_has_the_bytes_in_flight_of_16_bits() -> None:
    for q_per_kv, query_len, dims in itertools.product(RATIOS, QUERY_LENS, ((64, 64), (128, 128), (192, 128), (256, 256))):
        wide, narrow = (config_of(q_per_kv, dims, query_len, kv_dtype=kv_dtype) for kv_dtype in ("auto", FP8))
        assert (wide is None) == (narrow is None)
        if wide is not None and narrow is not None:
            assert narrow.ctas_per_sm == wide.ctas_per_sm
            assert narrow.kv_stage * narrow.kv_stage_bytes >= wide.kv_stage * wide.kv_stage_bytes


@pytest.mark.parametrize(
    ("q_per_kv", "dims", "dtype"), [(65, (64, 64), "bfloat16"), (64, (256, 256), "bfloat16"), (4, (128, 128), "float32")]
)
def test_rows_that_the_prefill_kernel_must_serve(q_per_kv: int, dims: tuple[int, int], dtype: str) -> None:
    assert config_of(q_per_kv, dims, 1, dtype) is None


@pytest.mark.parametrize(("head_dim", "most"), [(64, 64), (96, 48), (128, 32), (192, 32)])
def test_many_rows_go_to_prefill_tiles_where_those_are_cut(head_dim: int, most: int) -> None:
    dims = (head_dim, 128) if head_dim == 192 else (head_dim, head_dim)
    assert config_of(most, dims, 1, parts=True) is not None
    assert config_of(most + 1, dims, 1, parts=True) is None
    assert config_of(64, dims, 1) is not None
    # Of a plan: prefill tiles are cut, but not in batch-invariant mode; Blackwell's row of the table is another.
    for arch, rows, invariant, served in (
        ("sm_90a", 64, False, most == 64),
        ("sm_90a", 64, True, True),
        ("sm_100a", 64, True, True),
        ("sm_100a", 33, False, False),
        ("sm_103a", 32, False, True),
    ):
        problem = AttentionProblem(rows, 1, *dims, "bfloat16", 16, arch, batch_invariant=invariant)
        assert (resolve_kernels(problem, BatchLimits(**LIMITS), 132).decode is not None) == served, (arch, invariant)
