"""`fa4 bench engine` around its engines: turns, the time's end, starts again, a backend that fails, kernels that did not run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fa4_backend.bench import engine
from fa4_backend.bench.engine import EngineBenchError, EngineRun
from fa4_backend.bench.engine_steps import ATTENTION_KERNELS, EngineFigure, Interval, device_times

LINE = "FA4: sm90 kernels on sm_90a, 32/8 heads, head_dim 128, bfloat16, page 16 device=cuda:0"
FP8_LINE = f"{LINE} (K and V float8_e4m3fn)"
ATTENTION_US = {"FA4": 90.0, "FLASH_ATTN": 100.0, "TRITON_ATTN": 180.0}
OPTIONS: dict[str, Any] = {"kv_cache_dtypes": ["auto"], "context": 4096, "mode": "0", "starts": False, "groups": ("1", "32")}


# Stands for `engine_steps` with its engine: answers a start and groups of cases as that does; FLASHINFER stops with words in its log, and
# so does FA4 when asked for the group "ragged"; "128" takes for ever.
ENGINE = """
import json, os, sys, time
from pathlib import Path
place, (lines, attention_us) = Path(sys.argv[-1]), json.loads(os.environ["FA4_TEST_ANSWERS"])
request = json.loads(place.read_text())
def write(figure, kernels):
    with Path(os.environ["FA4_TEST_ASKED"]).open("a") as file:
        file.write(json.dumps([request["backend"], figure["case"], os.environ.get("FA4_BACKEND_CACHE_DIR")]) + "\\n")
    figure = {"backend": request["backend"], "kv_cache_dtype": request["kv_cache_dtype"], **figure}
    with place.with_name("answers.jsonl").open("a") as file:
        file.write(json.dumps({"figures": [figure], "kernels": kernels}) + "\\n")
if request["backend"] == "FLASHINFER":
    sys.exit("no such kernel")
write({"round_idx": 0, "case": "start", "seconds": 9.5}, [])
for line in sys.stdin:
    round_idx, group = line.split()
    if group == "ragged" and request["backend"] == "FA4":
        sys.exit("out of memory")
    if group == "128":
        time.sleep(60)
    us = attention_us[request["backend"]] * (0.5 if request["kv_cache_dtype"] == "fp8" else 1) + int(round_idx)
    figure = {"round_idx": int(round_idx), "case": f"decode step, {group} x 4096", "host_ms": 2.0, "device_ms": 1.5, "attention_us": us}
    write(figure, lines.get(request["kv_cache_dtype"], []) if request["backend"] == "FA4" else [])
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that holds a line for each answer of the engines that would have run."""
    program = tmp_path / "engine.py"
    program.write_text(ENGINE)
    monkeypatch.setattr(engine, "COMMAND", [sys.executable, str(program)])
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.005)
    monkeypatch.setenv("FA4_TEST_ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("FA4_TEST_ANSWERS", json.dumps([{"auto": [LINE], "fp8": [FP8_LINE]}, ATTENTION_US]))
    return tmp_path / "asked"


def figures_of(backends: list[str], **options: Any) -> list[EngineFigure]:
    return [figure for some in engine.run(EngineRun(backends=backends, **{**OPTIONS, "rounds": 1, **options})) for figure in some]


def test_engines_take_turns_in_each_group_of_cases(asked: Path) -> None:
    figures = figures_of(["FA4", "FLASH_ATTN"], rounds=3)
    assert [(figure.round_idx, figure.case, figure.backend) for figure in figures if figure.case != "start"] == [
        (round_idx, f"decode step, {rows} x 4096", backend)
        for round_idx in range(3)
        for rows in (1, 32)
        for backend in ("FA4", "FLASH_ATTN")
    ]
    starts = [figure for figure in figures if figure.case == "start"]
    assert len(starts) == 2, "an engine lives through all rounds"
    _, line, _ = engine.summary(figures).splitlines()
    expected = "decode step, 1 x 4096: FA4 2.00 / 1.50 ms / 91 us, FLASH_ATTN 2.00 / 1.50 ms / 101 us, best other / FA4 = 1.11"
    assert line == expected, "medians over rounds"
    words = "FA4 [0] decode step, 1 x 4096: 2 ms on the host, 1.5 ms on the device, 90 us of it attention"
    assert engine.format_line(figures[2:3]) == words


def test_every_dtype_has_engines_of_its_own_and_its_share(asked: Path) -> None:
    figures = figures_of(["FA4", "FLASH_ATTN"], kv_cache_dtypes=["auto", "fp8"], groups=("1",))
    *_, line = engine.summary(figures).splitlines()
    assert line.startswith("decode step, 1 x 4096 fp8: FA4 2.00 / 1.50 ms / 45 us, FLASH_ATTN 2.00 / 1.50 ms / 50 us")
    assert line.endswith("best other / FA4 = 1.11, 0.500 of FA4's 16 bits (goal at 128 x 2048: 0.55)")


def test_starts_share_a_cache_that_is_empty_at_first(asked: Path) -> None:
    figures = figures_of([], rounds=0, starts=True)
    (_, _, cold), (_, _, warm) = (json.loads(line) for line in asked.read_text().splitlines())
    assert cold == warm is not None
    assert [figure.case for figure in figures] == ["cold start", "warm start"]


def test_another_backend_that_fails_is_said_and_left_out(asked: Path, capsys: pytest.CaptureFixture) -> None:
    assert {figure.backend for figure in figures_of(["FLASHINFER", "FA4"])} == {"FA4"}
    assert "left out: FLASHINFER: exit status 1\nno such kernel" in capsys.readouterr().err


def test_what_others_measured_is_kept_when_ours_fails(asked: Path) -> None:
    figures = []
    with pytest.raises(EngineBenchError, match=r"^FA4: exit status 1\nout of memory"):
        for some in engine.run(EngineRun(backends=["FA4", "FLASH_ATTN"], rounds=1, **{**OPTIONS, "groups": ("ragged", "1")})):
            figures += some
    assert [(f.backend, f.case) for f in figures if f.case.startswith("decode")] == [
        ("FLASH_ATTN", "decode step, ragged x 4096"),
        ("FLASH_ATTN", "decode step, 1 x 4096"),
    ]


def test_an_engine_that_says_nothing_is_ended(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.2)
    monkeypatch.setattr(engine, "COMMAND", [sys.executable, "-c", "import time; print('far from ready', flush=True); time.sleep(60)"])
    with pytest.raises(EngineBenchError, match=r"^FA4: no answer within 0 s"):
        figures_of(["FA4"])


def test_the_time_ends_a_case_that_is_under_way_and_keeps_what_was_measured(asked: Path, capsys: pytest.CaptureFixture) -> None:
    begin = time.monotonic()
    figures = figures_of(["FA4"], groups=("1", "128"), seconds=3.0, rounds=2)
    assert time.monotonic() - begin < 20
    assert [figure.case for figure in figures] == ["start", "decode step, 1 x 4096"]
    assert "left out: FA4: no answer within" in capsys.readouterr().err


def test_other_kernels_than_ours_are_no_figures_of_ours(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 was asked for, and the kernels of 16 bits answered."""
    monkeypatch.setenv("FA4_TEST_ANSWERS", json.dumps([{"fp8": [LINE]}, ATTENTION_US]))
    with pytest.raises(EngineBenchError, match=r"expected our kernels with '\(K and V float8_e4m3fn\)' in their line, got \['FA4: sm90"):
        figures_of(["FA4"], kv_cache_dtypes=["fp8"])


def test_engines_logs_are_kept_where_they_are_wanted(asked: Path, tmp_path: Path) -> None:
    figures_of(["FLASHINFER"], logs=tmp_path / "logs")
    assert (tmp_path / "logs" / "FLASHINFER-auto" / "log").read_text() == "no such kernel\n"


def test_the_cache_holds_what_the_largest_batch_keeps() -> None:
    """128 rows of 2048 tokens and what they generate, and a prefix of 32K: 4 layers, 8 heads of 128, K and V in 2 bytes; half in FP8."""
    tokens = engine.kv_cache_bytes(2048, "auto") / (4 * 2 * 8 * 128 * 2)
    assert 128 * 2048 + 32768 < tokens < 1.4 * 128 * 2048 + 32768
    assert engine.kv_cache_bytes(2048, "fp8") * 2 == engine.kv_cache_bytes(2048, "auto")
    assert engine.kv_cache_bytes(2048, "auto", num_layers=8) == 2 * engine.kv_cache_bytes(2048, "auto")


def test_kernels_are_compiled_for_a_machine_that_has_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(engine, "find_prebuilt", lambda key: None)
    monkeypatch.setattr(engine, "ensure_objects", asked.extend)
    names = engine.compile_kernels(["auto", "fp8"], "sm_90a")
    assert names == [key.name for key in asked]
    assert [sum(word in name for name in names) for word in ("schedule", "decode", "prefill", "kve4m3", "convert-sm")] == [
        1,
        2,
        4,
        3,
        1,
    ]  # one of messages in FP8


def test_kernels_of_latent_attention_are_those_of_decode_and_of_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ensure_objects", lambda keys: None)
    names = engine.compile_kernels(["auto", "fp8"], "sm_90a", "mla128")
    assert [sum(word in name for name in names) for word in ("schedule", "mladecode", "h128", "ragged", "kve4m3")] == [
        2,
        2,
        2,
        2,
        1,
    ]  # a schedule more of messages
    assert engine.kv_cache_bytes(2048, "auto", model="mla128") * 2 * 8 * 128 == engine.kv_cache_bytes(2048, "auto") * 576
    config = engine.MODELS["mla128"].config_of(3)
    assert config["first_k_dense_replace"] == config["num_hidden_layers"] == 3, "no layer has experts"


def test_latents_in_fp8_are_told_by_their_line(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = LINE.replace("32/8 heads", "16 heads of latent attention") + " (latents float8_e4m3fn)"
    monkeypatch.setenv("FA4_TEST_ANSWERS", json.dumps([{"fp8": [line]}, ATTENTION_US]))
    assert len(figures_of(["FA4"], kv_cache_dtypes=["fp8"], groups=("1",), model="mla16")) == 2
    with pytest.raises(EngineBenchError, match=r"expected our kernels with '\(K and V float8_e4m3fn\)'"):
        figures_of(["FA4"], kv_cache_dtypes=["fp8"], groups=("1",))


def test_a_case_without_a_peer_has_no_ratio() -> None:
    alone = [EngineFigure("FA4", 0, "ragged load", device_ms=6e3, attention_us=5e6)]
    assert engine.summary(alone).splitlines()[1] == "ragged load: FA4 nan / 6000.00 ms / 5,000,000 us"
    assert engine.summary([]) == ""


def test_kernels_that_run_side_by_side_count_once() -> None:
    """Decode from 0 to 400 us, prefill from 10 to 420, one inside both; then a product apart, and a kernel that follows at once."""
    ours = "kernel_cutlass_kernel_decode"
    kernels = [
        Interval(500_000, 600_000, "nvjet"), Interval(10_000, 420_000, ours), Interval(0, 400_000, ours), Interval(50_000, 60_000, ours),
        Interval(600_000, 620_000, ours),
    ]  # fmt: skip
    assert device_times(kernels, parts=2) == {"device_ms": 0.27, "attention_us": 220.0, "attention_sum_us": 420.0}
    assert device_times([], parts=2) == {"device_ms": 0.0, "attention_us": 0.0, "attention_sum_us": 0.0}


@pytest.mark.parametrize(
    "name",
    [
        "kernel_cutlass_kernel_fa4_backendkernelsdecode",
        "void flash::FlashAttnFwdCombine",
        "kernel_unified_attention_2d",
        "void smxx::decode::flash_fwd_mla_combine_kernel",
        "_fwd_grouped_kernel_stage1",
    ],
)
def test_attention_is_told_by_its_kernels_names(name: str) -> None:
    assert ATTENTION_KERNELS.search(name)
    assert not ATTENTION_KERNELS.search("reshape_and_cache_flash_kernel")
    assert not ATTENTION_KERNELS.search("triton_poi_fused_unified_attention_with_output_0")
