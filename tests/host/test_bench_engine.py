"""`fa4 bench engine` around its engines: turns, starts with an empty and a full cache, a backend that fails, kernels that did not run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fa4_backend.bench import engine
from fa4_backend.bench.engine import EngineBenchError
from fa4_backend.bench.engine_steps import ATTENTION_KERNELS, EngineFigure

LINE = "FA4: sm90 kernels on sm_90a, 32/8 heads, head_dim 128, bfloat16, page 16 device=cuda:0"
ATTENTION_US = {"FA4": 90.0, "FLASH_ATTN": 100.0, "TRITON_ATTN": 180.0}
OPTIONS: dict[str, Any] = {"kv_cache_dtype": "auto", "context": 4096, "mode": "0"}


# Stands for `engine_steps` with its engine: answers a start and rounds as that does; FLASHINFER stops with words in its log.
ENGINE = """
import json, os, sys
from pathlib import Path
place, (ours, line, attention_us) = Path(sys.argv[-1]), json.loads(os.environ["FA4_TEST_ANSWERS"])
request = json.loads(place.read_text())
def write(figure, kernels):
    with Path(os.environ["FA4_TEST_ASKED"]).open("a") as file:
        file.write(json.dumps([request["backend"], figure.get("round_idx", -1), os.environ.get("FA4_BACKEND_CACHE_DIR")]) + "\\n")
    with place.with_name("answers.jsonl").open("a") as file:
        file.write(json.dumps({"figures": [{"backend": request["backend"], **figure}], "kernels": kernels}) + "\\n")
if request["backend"] == "FLASHINFER":
    sys.exit("no such kernel")
write({"round_idx": 0, "case": "start", "seconds": 9.5}, [])
for round_idx in map(int, sys.stdin):
    figure = {"round_idx": round_idx, "case": "decode step, 1 x 4096", "host_ms": 2.0}
    write({**figure, "attention_us": attention_us[request["backend"]] + round_idx}, [line] if request["backend"] == ours else [])
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that holds a line for each answer of the engines that would have run."""
    program = tmp_path / "engine.py"
    program.write_text(ENGINE)
    monkeypatch.setattr(engine, "COMMAND", [sys.executable, str(program)])
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.005)
    monkeypatch.setenv("FA4_TEST_ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("FA4_TEST_ANSWERS", json.dumps(["FA4", LINE, ATTENTION_US]))
    return tmp_path / "asked"


def answers(asked: Path) -> list[list[Any]]:
    """(backend, round or -1 for a start, folder of the cache) of each answer."""
    return [json.loads(line) for line in asked.read_text().splitlines()]


def test_backends_take_turns(asked: Path) -> None:
    figures = [figure for some in engine.run(["FA4", "FLASH_ATTN"], rounds=3, starts=False, **OPTIONS) for figure in some]
    assert [(figure.backend, figure.round_idx) for figure in figures if figure.case != "start"] == [
        (backend, round_idx) for round_idx in range(3) for backend in ("FA4", "FLASH_ATTN")
    ]
    starts = [figure for figure in figures if figure.case == "start"]
    assert len(starts) == 2, "an engine lives through all rounds"
    (line,) = engine.summary(figures).splitlines()
    assert line == "decode step, 1 x 4096: FA4 91 us, FLASH_ATTN 101 us, best other / FA4 = 1.11", "medians over rounds"
    assert engine.format_line(figures[2:3]) == "FA4 [0] decode step, 1 x 4096: 2 ms on the host, 90 us of it attention"


def test_starts_share_a_cache_that_is_empty_at_first(asked: Path) -> None:
    figures = [figure for some in engine.run([], rounds=0, starts=True, **OPTIONS) for figure in some]
    (_, _, cold), (_, _, warm) = answers(asked)
    assert cold == warm is not None
    assert [figure.case for figure in figures] == ["cold start", "warm start"]


def test_another_backend_that_fails_is_said_and_left_out(asked: Path, capsys: pytest.CaptureFixture) -> None:
    figures = [figure for some in engine.run(["FLASHINFER", "FA4"], rounds=1, starts=False, **OPTIONS) for figure in some]
    assert {figure.backend for figure in figures} == {"FA4"}
    assert "FLASHINFER is left out: exit status 1\nno such kernel" in capsys.readouterr().err


def test_an_engine_that_says_nothing_is_ended(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.2)
    monkeypatch.setattr(engine, "COMMAND", [sys.executable, "-c", "import time; print('far from ready', flush=True); time.sleep(60)"])
    with pytest.raises(EngineBenchError, match=r"^no answer within 0 s"):
        list(engine.run(["FA4"], rounds=1, starts=False, **OPTIONS))


def test_no_round_begins_after_the_time(asked: Path, capsys: pytest.CaptureFixture) -> None:
    figures = [figure for some in engine.run(["FA4"], rounds=3, starts=False, seconds=0.0, **OPTIONS) for figure in some]
    assert [figure.case for figure in figures] == ["start"]
    assert "the time is over before FA4's round 0" in capsys.readouterr().err


def test_other_kernels_than_ours_are_no_figures_of_ours(asked: Path) -> None:
    """FP8 was asked for, and the kernels of 16 bits answered."""
    with pytest.raises(EngineBenchError, match=r"expected our kernels with '\(K and V float8_e4m3fn\)' in their line, got \['FA4: sm90"):
        list(engine.run(["FA4"], rounds=1, starts=False, **{**OPTIONS, "kv_cache_dtype": "fp8"}))


def test_the_cache_holds_what_the_largest_batch_keeps() -> None:
    """128 rows of 2048 tokens and what they generate, 8 layers, 8 heads of 128, K and V in 2 bytes; half of it in FP8."""
    tokens = engine.kv_cache_bytes(2048, "auto") / (8 * 2 * 8 * 128 * 2)
    assert 128 * 2048 < tokens < 1.4 * 128 * 2048
    assert engine.kv_cache_bytes(2048, "fp8") * 2 == engine.kv_cache_bytes(2048, "auto")


def test_a_case_without_a_peer_has_no_ratio() -> None:
    assert engine.summary([EngineFigure("FA4", 0, "ragged load", attention_us=5e6)]) == "ragged load: FA4 5,000,000 us"


@pytest.mark.parametrize(
    "name", ["kernel_cutlass_kernel_fa4_backendkernelsdecode", "void flash::FlashAttnFwdCombine", "kernel_unified_attention_2d"]
)
def test_attention_is_told_by_its_kernels_names(name: str) -> None:
    assert ATTENTION_KERNELS.search(name)
    assert not ATTENTION_KERNELS.search("reshape_and_cache_flash_kernel")
