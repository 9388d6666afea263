"""Prefill kernels over K and V without pages: the bits of pages, poison at both edges of a sequence, no races, on both chips.

A box of the ragged source is a whole tile of keys, so it reaches into the sequence behind (NaN where that one has no query), into rows that
belong to nobody (NaN) or past the tensor (zeros).
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fa4_backend.cli import main
from fa4_backend.problem import FP8, RAGGED
from tests.support.emulated_prefill import Cuts, run_built, run_prefill
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

ARCHS = ("sm_90a", "sm_100a")
# The second sequence has keys that nobody sees, the last none at all; the third ends on a tile's edge. Heads and features are those of
# paged kernels that other tests compile, where a case has the bits of pages.
BASE = PagedCase((5, 0, 33, 4), (133, 30, 128, 0), num_q_heads=4, num_kv_heads=1, head_dim=128, kv_source=RAGGED)
CASES = {
    "d128": replace(BASE, layout="nhd"),
    "d128, the last row is the tensor's": replace(BASE, query_lens=(9, 3), kv_lens=(20, 131), padding_rows=0, layout="hnd"),
    "d128, windows on both sides": replace(BASE, query_lens=(40, 3), kv_lens=(290, 20), is_causal=False, window_left=20, window_right=9),
    "d192 and 128": replace(BASE, query_lens=(40, 3), kv_lens=(290, 20), num_q_heads=1, head_dim=192, head_dim_v=128),
    "d96, more queries than keys": replace(BASE, query_lens=(50, 2), kv_lens=(20, 3), head_dim=96),
    "FP8": replace(BASE, query_lens=(5, 0, 9), kv_lens=(133, 30, 20), kv_dtype=FP8),
}
ALL_FEATURES = replace(BASE, head_dim=64, window_left=60, sinks=True, alibi=True, softcap=20.0)
HOPPER_ONLY = {"d256": replace(BASE, query_lens=(9, 0, 2), kv_lens=(90, 5, 81), num_q_heads=2, num_kv_heads=1, head_dim=256)}


# Boxes and masks are the same code in every head dim; Hopper's kernel of (192, 128) without pages runs in `test_the_command_runs_it`.
SLOW = [
    ("sm_90a", "d128, windows on both sides"),
    ("sm_90a", "d192 and 128"),
    ("sm_90a", "d96, more queries than keys"),
    ("sm_100a", "d96, more queries than keys"),
    ("sm_90a", "FP8"),
    ("sm_100a", "FP8"),
    ("sm_90a", "d256"),
]


@pytest.mark.parametrize(
    ("arch", "name"), with_slow([*((arch, name) for arch in ARCHS for name in CASES), *(("sm_90a", name) for name in HOPPER_ONLY)], SLOW)
)
def test_bits_are_those_of_pages(arch: str, name: str) -> None:
    case = replace((CASES | HOPPER_ONLY)[name], arch=f"emulated-{arch}")
    ragged, paged = run_prefill(case), run_prefill(replace(case, kv_source="paged"))
    ragged.check()
    assert torch.equal(ragged.out.nan_to_num(7.0), paged.out.nan_to_num(7.0 if paged.zeroes_padding else 0.0))
    rows = slice(0, ragged.built.total_q)
    assert torch.equal(ragged.lse[:, rows], paged.lse[:, rows])


@pytest.mark.parametrize("arch", with_slow(ARCHS, ["sm_90a"]))
def test_all_score_features(arch: str) -> None:
    run_prefill(replace(ALL_FEATURES, arch=f"emulated-{arch}")).check()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("seed", range(2))
def test_no_race_under_random_schedules(arch: str, seed: int) -> None:
    run_prefill(replace(BASE, arch=f"emulated-{arch}"), seed=seed).check()


def test_tiles_cut_along_kv() -> None:
    case = replace(BASE, query_lens=(5, 0, 9), kv_lens=(300, 30, 140), arch="emulated-sm_90a")
    cuts = Cuts(parts=(3, 1, 2))
    ragged, paged = run_prefill(case, cuts=cuts), run_prefill(replace(case, kv_source="paged"), cuts=cuts)
    ragged.check()
    rows = slice(0, ragged.built.total_q)
    assert torch.equal(ragged.out[rows], paged.out[rows]) and torch.equal(ragged.lse[:, rows], paged.lse[:, rows])


@pytest.mark.parametrize("arch", ARCHS)
def test_lengths_past_the_tensor_are_cut(arch: str) -> None:
    """As an engine's dummy batches have them: the last sequence claims 131 keys of which the tensor ends at 100."""
    built = replace(CASES["d128, the last row is the tensor's"], arch=f"emulated-{arch}").build()
    a = built.arguments
    built.arguments = a._replace(k_cache=a.k_cache[:120], v_cache=a.v_cache[:120])
    run_built(built).check()


@pytest.mark.parametrize("arch", ARCHS)
def test_the_command_runs_it(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Schedule and operator included: no decode kernel, whatever the length of a row."""
    shape = ["--heads", "2/2", "--head-dim", "192", "--head-dim-v", "128", "--q-lens", "1,40", "--kv-lens", "40,150"]
    with pytest.raises(SystemExit) as stopped:
        main(["emulate", "--kind", "ragged", "--arch", arch, *shape, "--seeds", "1", "--json"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0, text
    result = json.loads(text)
    assert result["ok"] and result["races"] == [] and result["differing"] == 0 and 0 < result["max_err"] <= result["budget"]
    assert sorted(name.split("-")[0] for name in result["kernels"]) == ["prefill", "schedule"]
    assert any(name.startswith("prefill") and "-ragged" in name for name in result["kernels"])
