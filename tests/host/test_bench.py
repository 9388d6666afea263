"""What `fa4 bench` times and how it judges: batches, work and ceilings by count, errors against our CPU kernel; no time is made up here
that could pass for a result."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fa4_backend import plan_attention
from fa4_backend.bench import figures, ours, shapes
from fa4_backend.bench.batch import BatchShape, BatchTensors, Mask
from fa4_backend.bench.decode_batches import DecodeBatch, issue_batches, uniform
from fa4_backend.bench.figures import write_csv
from fa4_backend.bench.more_cells import more_kinds
from fa4_backend.bench.ours import Ours, asked
from fa4_backend.bench.peers import WIDE
from fa4_backend.bench.prefill_batches import PrefillBatch, named_batches
from fa4_backend.bench.shape_cells import kinds, matching
from fa4_backend.cli import main
from fa4_backend.problem import FP8
from tests.device import measure_shares, measure_tiles

CELLS = [(name, batch) for name, kind in kinds().items() for batch in kind.batches]
# The cells of the issue that asked for them.
ASKED = (
    "32/8 d128 page 16: 1 x 16 of 64K",
    "32/8 d128 page 16: 1 x 64 of 32K",
    "32/8 d128 page 16: 1 x 256 of 64K",
    "64/8 d128 page 16: 16 x 4K, 8 queries",
    "16/1 d128 page 16: 16 x 4K, 4 queries",
    "71/1 d64 page 16: 8 x 4K",
    "96/1 d128 page 16: 8 x 4K",
    "8/4 d256 page 16: 8 x 4K prompts",
    "8/4 d256 page 16: 1 x 16K prompts",
    "16/8 d256 page 16 soft cap: 8 x 4K prompts",
    "16/16 d192/128 page 16: 4 x 4K prompts",
    "16/1 d128 page 16: 1 x 16K",
    "32/8 d128 page 16: 32 x 4K + 64 tokens of 32K",
)
MASKS = (
    Mask(), Mask(is_causal=False), Mask(window=5), Mask(window=40, softcap=2.0), Mask(window=3, has_sinks=True), Mask(has_sinks=True),
)  # fmt: skip


def test_every_kind_has_five_to_ten_cells_and_no_cell_stands_twice() -> None:
    for name, kind in kinds().items():
        assert 5 <= len(kind.batches) <= 10, name
    labels = [batch.title for _, batch in CELLS]
    assert not [label for label in labels if labels.count(label) > 1]
    assert set(ASKED) <= set(labels)


@pytest.mark.parametrize("batch", [batch for _, batch in CELLS], ids=lambda batch: batch.label)
@pytest.mark.parametrize("kv_dtype", ["bfloat16", FP8])
def test_our_kernels_serve_every_cell(kv_dtype: str, batch: BatchShape) -> None:
    plan = plan_attention(*asked(dataclasses.replace(batch, kv_dtype=kv_dtype), "sm_90a"))
    assert plan.kernels is not None and plan.limits.max_seqlen_k >= batch.max_kv_len


def test_more_cells_stand_in_no_other_list() -> None:
    """A number that was chosen by one of them would make the comparison say less."""
    more = [batch.title for kind in more_kinds().values() for batch in kind.batches]
    tables = [*issue_batches().values(), *named_batches().values(), *(kind.batches for kind in kinds().values())]
    tuned = [*measure_tiles.packed_rows(), *measure_tiles.packed_mixed(), *measure_shares.lone_cells(), *measure_shares.cells()]
    others = {batch.title for batches in (*tables, tuned) for batch in batches}
    assert len(more) == len(set(more)) and not set(more) & others, set(more) & others


def test_cells_with_fp8_are_the_same_cells() -> None:
    cells = [batch for kind in kinds(FP8).values() for batch in kind.batches]
    assert all(batch.kv_dtype == FP8 for batch in cells)
    assert [dataclasses.replace(batch, kv_dtype="bfloat16") for batch in cells] == [batch for _, batch in CELLS]


def test_a_peer_with_the_same_values_in_16_bits_moves_their_bytes() -> None:
    batch = dataclasses.replace(uniform(8, 4096), kv_dtype=FP8)
    ours, wide, narrow = shapes.judge(
        "ragged", batch, dict.fromkeys(("fa4", WIDE, "fa3"), 1.0), {"fa4": 0, WIDE: 0, "fa3": 0}, shapes.Ceilings(1, 1)
    )
    assert ours.gb_per_s == narrow.gb_per_s
    assert (wide.gb_per_s - ours.gb_per_s) * 1e3 == pytest.approx(batch.kv_bytes)


@pytest.mark.parametrize(("kv_dtype", "error", "is_timed"), [("bfloat16", 0.06, False), (FP8, 0.06, True), (FP8, 0.3, False)])
def test_a_wrong_peer_is_not_timed(kv_dtype: str, error: float, is_timed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FA3's weights are e4m3 beside K and V in FP8, which costs it 0.054 on a prompt's first rows."""
    tensors = SimpleNamespace(out=torch.zeros(1), worst_error=lambda batch, name, must_hold: 0.0 if name == "fa4" else error)
    monkeypatch.setattr(shapes.BatchTensors, "make", lambda batch: tensors)
    monkeypatch.setattr(shapes, "ready", lambda name, label, maker, must_run: lambda: None)
    monkeypatch.setattr(shapes, "capture", lambda call: call)
    monkeypatch.setattr(shapes, "cold_in_turns", lambda replays, rounds, flush: dict.fromkeys(replays, 1.0))
    us, _ = shapes._time(dataclasses.replace(uniform(8, 4096), kv_dtype=kv_dtype), ["fa3"], 2)
    assert list(us) == ["fa4", *["fa3"] * is_timed]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.label)
@pytest.mark.parametrize(("query_len", "kv_len"), [(1, 7), (4, 4), (4, 9), (9, 40), (3, 3)])
def test_work_is_what_a_count_of_pairs_says(mask: Mask, query_len: int, kv_len: int) -> None:
    pairs = {
        (query, key)
        for query in range(query_len)
        for key in range(kv_len)
        if not mask.is_causal or key <= query + kv_len - query_len
        if not mask.window or key > query + kv_len - query_len - mask.window
    }
    assert mask.seen(query_len, kv_len) == len(pairs)
    assert mask.keys(query_len, kv_len) == len({key for _, key in pairs})
    batch = PrefillBatch(2, query_len, kv_len, num_q_heads=6, num_kv_heads=3, head_dim=64, head_dim_v=32, mask=mask)
    assert batch.flops == 2 * 2 * 6 * (64 + 32) * len(pairs)
    moved = 2 * len({key for _, key in pairs}) * 3 * (64 + 32) + 2 * query_len * 6 * (64 + 32)
    assert batch.moved_bytes == 2 * moved  # bf16


def small_batches() -> list[BatchShape]:
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    mixed = DecodeBatch("3 x 40 + 70 of 90", (40, 33, 7, 90), (2, 2, 2, 70), **heads)
    prompt = PrefillBatch(2, 70, 90, head_dim_v=16, **heads)
    return [dataclasses.replace(batch, mask=mask) for batch in (mixed, prompt) for mask in MASKS]


@pytest.mark.parametrize("batch", small_batches(), ids=lambda batch: batch.label)
def test_the_check_passes_our_cpu_kernel_and_no_other_result(batch: BatchShape) -> None:
    torch.manual_seed(1)
    tensors = BatchTensors.make(batch, device="cpu")
    Ours.of_plan(plan_attention(*asked(batch, "cpu")), batch, tensors).call()
    assert tensors.worst_error(batch, "fa4", must_hold=True) <= 0.02
    for row in batch.checked_rows:  # one head of one checked token, and each checked row is looked at
        right = tensors.out.clone()
        last = int(tensors.cu_seqlens_q[row + 1]) - 1
        tensors.out[last, 1] += 0.1
        with pytest.raises(RuntimeError, match=f"row {row}"):
            tensors.worst_error(batch, "fa4", must_hold=True)
        tensors.out = right
    tensors.out[int(tensors.cu_seqlens_q[min(batch.checked_rows)])] = float("nan")
    with pytest.raises(RuntimeError, match="got nan"):
        tensors.worst_error(batch, "fa4", must_hold=True)


def test_a_mixed_step_is_checked_in_both_of_its_kinds() -> None:
    batch = next(b for b in issue_batches()["mixed"] if "64 tokens of 32K" in b.name)
    assert batch.checked_rows == {0: 0.02, 32: 0.04}


def judged(us: dict[str, float]) -> list[shapes.Timing]:
    """Two ceilings that make sums easy: one byte and one operation a picosecond."""
    batch = next(b for b in named_batches()["prefix"] if b.query_len == 16)
    return shapes.judge("prefix", batch, us, dict.fromkeys(us, 0.0), shapes.Ceilings(1000.0, 1.0))


def test_shares_and_ratios_are_of_the_least_time_and_the_best_peer() -> None:
    batch = next(b for b in named_batches()["prefix"] if b.query_len == 16)
    flops = 4 * 32 * 128 * (16 * 65536 - 120)
    assert batch.flops == flops and batch.moved_bytes < flops
    ours, *others = judged({"fa4": flops / 0.5e6, "fa3": flops / 0.4e6, "triton": flops / 0.1e6})
    assert ours.bound_by == shapes.TENSOR and ours.share_of_roofline == pytest.approx(0.5)
    assert ours.ratio_to_best_peer == pytest.approx(0.5 / 0.4)
    assert [t.ratio_to_best_peer for t in others] == pytest.approx([1.0, 0.25])
    assert judged({"fa4": 1.0})[0].ratio_to_best_peer is None
    ceilings = shapes.Ceilings(1.0, 1e6)
    assert ceilings.least_us(batch) == (shapes.MEMORY, batch.moved_bytes / 1e3)


def test_figures_cannot_be_written_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(_families: object) -> dict[str, object]:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(figures, "gpu_stamp", no_gpu)
    with pytest.raises(RuntimeError, match="no GPU"):
        write_csv(tmp_path / "shapes.csv", judged({"fa4": 1.0}))
    assert not list(tmp_path.iterdir())


def test_a_line_a_kernel_and_cell_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "gpu_stamp", lambda _families: {"device": "none, times made up by a test"})
    timings = judged({"fa4": 1.0, "fa3": 1.2}) + judged({"fa4": 1.0})
    write_csv(tmp_path / "shapes.csv", timings)
    rows = list(csv.DictReader((tmp_path / "shapes.csv").open()))
    assert [row["kernel"] for row in rows] == ["fa4", "fa3", "fa4"]
    assert list(rows[0]) == [f.name for f in dataclasses.fields(shapes.Timing)]
    assert rows[2]["ratio_to_best_peer"] == "" and "made up" in (tmp_path / "shapes.csv.stamp.json").read_text()
    shapes.write_plot(tmp_path / "plot.png", timings)
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize("arguments", [("--kinds", "prefix,none"), ("--kinds", "prefix")], ids=["unknown kind", "no GPU"])
def test_the_command_refuses(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments == ("--kinds", "prefix") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "shapes", *arguments])
    assert stop.value.code == 2 and "expected" in capsys.readouterr().err


def test_the_command_lists_the_cells(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "shapes", "--list", "--kinds", "drafts,prefix"])
    out = capsys.readouterr().out
    assert not stop.value.code and ASKED[3] in out and out.index("drafts:") < out.index("prefix:")
    with pytest.raises(SystemExit):
        main(["bench", "shapes", "--list", "--kinds", "mixed", "--kv-dtype", "fp8"])
    assert "32/8 d128 e4m3 KV page 16: 32 x 4K + 64 tokens of 32K" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "shapes", "--list", "--more", "--kinds", "pages"])
    assert capsys.readouterr().out.splitlines()[0] == "pages: pages of 64, 128 and 256 tokens"


def test_a_run_ends_in_its_time_and_says_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A clock that goes on by a second a round: in 20 of them kinds take turns, a late run takes two rounds, and what is left is named."""
    clock, rounds_of = [0.0], []

    def time_one(_batch: BatchShape, _peers: list[str], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
        clock[0] += rounds
        rounds_of.append(rounds)
        return {"fa4": 1.0}, {"fa4": 0.0}

    monkeypatch.setattr(shapes, "_time", time_one)
    monkeypatch.setattr(shapes, "compile_all", lambda _kinds: None)
    monkeypatch.setattr(shapes.Ceilings, "measure", classmethod(lambda cls: cls(1.0, 1.0)))
    monkeypatch.setattr(shapes.time, "monotonic", lambda: clock[0])
    chosen = {name: kind for name, kind in kinds().items() if name in ("prefix", "d96")}
    timed = [cell[0] for cell in shapes.run(chosen, peers=[], seconds=20)]
    assert [cell.kind for cell in timed[:4]] == ["prefix", "d96"] * 2 and len(timed) == len(rounds_of) < 18
    assert rounds_of[0] == shapes.ROUNDS and set(rounds_of[1:]) == {shapes.FEWEST_ROUNDS} and 20 <= clock[0] <= 22
    said = capsys.readouterr().err
    assert all((batch.title in said) == (batch.title not in [t.batch for t in timed]) for kind in chosen.values() for batch in kind.batches)
    assert len([*shapes.run(chosen, peers=[])]) == sum(len(kind.batches) for kind in chosen.values())


def test_the_table_has_what_is_furthest_behind_first() -> None:
    *slow, fast, alone = (*judged({"fa4": 2.0, "fa3": 1.0}), judged({"fa4": 1.0, "fa3": 1.2})[0], judged({"fa4": 1.0})[0])
    lines = shapes.summary([alone, fast, *slow]).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["0.50", "1.20"] and lines[-1] == "3 cells, 1 below 1.00"


def test_cells_are_chosen_by_their_titles() -> None:
    chosen = matching(kinds(), r"16/1 d128.*1 x (16|64)K$")
    assert {name: len(kind.batches) for name, kind in chosen.items()} == {"long-row": 2}
    with pytest.raises(ValueError, match="expected a regular expression"):
        matching(kinds(), "no such cell")


@pytest.mark.parametrize(
    ("command", "batches", "requests"),
    # As it is planned, batch-invariant and exact; FP8, and the same values in bfloat16.
    [("decode", "quantised", 3 * 11), ("prefill", "whole,chunked", 2 * 6)],
)
def test_kernels_of_a_benchmark_are_compiled_for_a_machine_that_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, batches: str, requests: int
) -> None:
    monkeypatch.setattr(ours, "compile_all", lambda asked_of: len([plan_attention(*request) for request in asked_of]))
    with pytest.raises(SystemExit) as end:
        main(["bench", command, "--batches", batches, "--kv-dtype", "fp8", "--compile-for", "sm_90a"])
    assert not end.value.code
    assert capsys.readouterr().out == f"{requests} kernels for sm_90a\n"
