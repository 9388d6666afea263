"""What the Blackwell kernels do not serve is refused before any launch, with what was expected and what was got."""

from dataclasses import replace

import pytest
import torch

from fa4_backend import UnsupportedProblem
from fa4_backend.support import check_problem
from tests.support.paged_case import PagedCase
from tests.support.problems import make_problem

SERVED = make_problem(
    num_q_heads=8, num_kv_heads=2, head_dim=128, head_dim_v=128, dtype="bfloat16", page_size=16, arch="sm_100a", has_lse=True
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 72, "head_dim_v": 72}, r"head_dim/head_dim_v on sm_100a: expected one of 64, 96, 128, 192/128, 256, got 72/72"),
        ({"head_dim": 256, "head_dim_v": 128}, r"got 256/128"),
        ({"page_size": 24}, r"page_size: expected a multiple of 16, got 24"),
        (
            {"dtype": "float32", "out_dtype": "auto", "q_dtype": "auto"},
            r"dtype on sm_100a: expected one of bfloat16, float16, got 'float32'",
        ),
        ({"num_q_heads": 129, "num_kv_heads": 1}, r"query heads per KV head on sm_100a: expected at most 128, got 129"),
    ],
)
@pytest.mark.parametrize("arch", ["sm_100a", "emulated-sm_100a"])
def test_unsupported_problems(changes: dict, message: str, arch: str) -> None:
    with pytest.raises(UnsupportedProblem, match=message):
        check_problem(replace(SERVED, arch=arch, **changes))


def test_what_is_served_on_both_chips() -> None:
    for arch in ("sm_100a", "sm_103a"):
        for dims in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)):
            for kv_dtype in ("auto", "float8_e4m3fn"):
                check_problem(replace(SERVED, arch=arch, head_dim=dims[0], head_dim_v=dims[1], page_size=784, kv_dtype=kv_dtype))


def test_strides_that_tma_cannot_take() -> None:
    built = PagedCase((4,), (20,), num_q_heads=8, head_dim=128, arch="emulated-sm_100a").build()
    wide = torch.zeros(*built.arguments.k_cache.shape[:-1], 132, dtype=torch.bfloat16)  # rows 264 bytes apart: no multiple of 16
    built.arguments = built.arguments._replace(k_cache=wide[..., :128])
    with pytest.raises(ValueError, match=r"k_cache: expected strides of a multiple of 16 bytes, got stride \d+ \(\d+ bytes\)"):
        built.run(built.case.plan(num_sms=1))
