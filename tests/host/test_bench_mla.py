"""What `fa4 bench mla` times and how it judges; no time is made up here that could pass for a result."""

from __future__ import annotations

import pytest
import torch

from fa4_backend import plan_attention
from fa4_backend.bench import mla
from fa4_backend.bench.mla_batches import LARGEST_ERROR, MlaBatch, sets
from fa4_backend.bench.shapes import MEMORY, TENSOR, Ceilings
from fa4_backend.cli import main
from fa4_backend.problem import FP8

BATCHES = [batch for batches in sets().values() for batch in batches]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.label)
def test_our_kernels_serve_every_cell(batch: MlaBatch) -> None:
    plan = plan_attention(*batch.asked("sm_90a"))
    assert plan.kernels is not None and plan.limits.max_seqlen_k >= batch.kv_len


def test_the_cells_of_the_issue() -> None:
    goals = {(b.num_heads, b.rows, b.kv_len, b.queries, b.kv_dtype): b.goal_us for b in BATCHES if b.goal_us is not None}
    assert len({batch.label for batch in BATCHES}) == len(BATCHES) and len(goals) == 14
    assert goals[128, 64, 4096, 4, "bfloat16"] == 445 and goals[16, 64, 16384, 1, FP8] == 215


def test_work_by_count() -> None:
    batch = MlaBatch(16, 2, 5, 3, FP8)
    assert batch.latent_bytes == 2 * 5 * 576 and batch.moved_bytes == batch.latent_bytes + 2 * 3 * 16 * (576 + 512) * 2
    assert batch.flops == 2 * 2 * 16 * (576 + 512) * (3 + 4 + 5)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", FP8])
def test_the_check_passes_our_cpu_kernel_and_no_other_result(kv_dtype: str) -> None:
    torch.manual_seed(1)
    batch = MlaBatch(16, 2, 1040, 2, kv_dtype, 16)
    a = batch.tensors("cpu")
    out = mla.Ours.make(batch, a).call()
    assert isinstance(out, torch.Tensor) and batch.error(a, out) <= LARGEST_ERROR
    wrong = out.clone()
    wrong[-1, 3, 7] += 0.02
    assert batch.error(a, wrong) > LARGEST_ERROR
    scaled = mla.Ours.make(batch, a._replace(softmax_scale=a.softmax_scale * 1.05)).call()
    assert isinstance(scaled, torch.Tensor) and batch.error(a, scaled) > LARGEST_ERROR


def test_shares_and_ratios() -> None:
    batch, stored = MlaBatch(128, 64, 4096), MlaBatch(16, 64, 16384, kv_dtype=FP8)
    ours, fa3 = mla.judge(batch, {"fa4": 130.0, "fa3": 140.0}, {"fa4": 0.0, "fa3": 0.0}, Ceilings(3000.0, 750.0))
    assert ours.bound_by == MEMORY and ours.ratio_to_best_peer == pytest.approx(140 / 130) and fa3.ratio_to_best_peer == 1
    assert ours.gb_per_s == pytest.approx(batch.latent_bytes / 130e3)
    own, wide = mla.judge(stored, {"fa4": 200.0, "fa3 bf16": 400.0}, {"fa4": 0.0, "fa3 bf16": 0.0}, Ceilings(1e6, 1.0))
    assert own.bound_by == TENSOR and own.gb_per_s == pytest.approx(wide.gb_per_s)


def test_the_command_lists_the_cells(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "mla", "--list", "--batches", "fp8,short"])
    out = capsys.readouterr().out
    assert not stop.value.code and "16 heads" in out and out.index("fp8:") < out.index("short:") and "drafts" not in out
