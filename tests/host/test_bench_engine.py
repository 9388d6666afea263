"""`fa4 bench engine` around its engines: turns, starts with an empty and a full cache, a backend that fails, kernels that did not run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fa4_backend.bench import engine
from fa4_backend.bench.engine import EngineBenchError
from fa4_backend.bench.engine_steps import ATTENTION_KERNELS, EngineFigure

LINE = "FA4: sm90 kernels on sm_90a, 32/8 heads, head_dim 128, bfloat16, page 16 device=cuda:0"
ATTENTION_US = {"FA4": 90.0, "FLASH_ATTN": 100.0, "TRITON_ATTN": 180.0}
OPTIONS: dict[str, Any] = {"kv_cache_dtype": "auto", "context": 4096, "mode": "0"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Requests of the engines that would have run; each answers with one figure. FLASHINFER stops with words in its log."""
    requests: list[dict[str, Any]] = []

    def answer(command: list[str], env: dict[str, str], **more: Any) -> Any:
        place = Path(command[-1])
        request = json.loads(place.read_text())
        requests.append({**request, "cache": env.get("FA4_BACKEND_CACHE_DIR")})
        if request["backend"] == "FLASHINFER":
            return SimpleNamespace(returncode=1, stdout="", stderr="no such kernel")
        figure = {"backend": request["backend"], "round_idx": request["round_idx"], "case": "decode step, 1 x 4096"}
        figure |= {"attention_us": ATTENTION_US[request["backend"]] + request["round_idx"], "host_ms": 2.0}
        kernels = [LINE] if request["backend"] == "FA4" else []
        place.with_name("answer.json").write_text(json.dumps({"figures": [figure], "kernels": kernels}))
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", answer)
    return requests


def test_backends_take_turns(asked: list[dict[str, Any]]) -> None:
    figures = [figure for some in engine.run(["FA4", "FLASH_ATTN"], rounds=3, starts=False, **OPTIONS) for figure in some]
    assert [(request["backend"], request["round_idx"]) for request in asked] == [
        (backend, round_idx) for round_idx in range(3) for backend in ("FA4", "FLASH_ATTN")
    ]
    (line,) = engine.summary(figures).splitlines()
    assert line == "decode step, 1 x 4096: FA4 91 us, FLASH_ATTN 101 us, best other / FA4 = 1.11", "medians over rounds"
    assert engine.format_line(figures[:1]) == "FA4 [0] decode step, 1 x 4096: 2 ms on the host, 90 us of it attention"


def test_starts_share_a_cache_that_is_empty_at_first(asked: list[dict[str, Any]]) -> None:
    figures = [figure for some in engine.run([], rounds=0, starts=True, **OPTIONS) for figure in some]
    cold, warm = asked
    assert cold["is_start_only"] and warm["is_start_only"] and cold["cache"] == warm["cache"] is not None
    assert [figure.case.split()[0] for figure in figures] == ["cold", "warm"]


def test_another_backend_that_fails_is_said_and_left_out(asked: list[dict[str, Any]], capsys: pytest.CaptureFixture) -> None:
    figures = [figure for some in engine.run(["FLASHINFER", "FA4"], rounds=1, starts=False, **OPTIONS) for figure in some]
    assert [figure.backend for figure in figures] == ["FA4"]
    assert "FLASHINFER is left out: exit status 1\nno such kernel" in capsys.readouterr().err


def test_other_kernels_than_ours_are_no_figures_of_ours(asked: list[dict[str, Any]]) -> None:
    """FP8 was asked for, and the kernels of 16 bits answered."""
    with pytest.raises(EngineBenchError, match=r"expected our kernels with '\(K and V float8_e4m3fn\)' in their line, got \['FA4: sm90"):
        list(engine.run(["FA4"], rounds=1, starts=False, **{**OPTIONS, "kv_cache_dtype": "fp8"}))


def test_a_case_without_a_peer_has_no_ratio() -> None:
    assert engine.summary([EngineFigure("FA4", 0, "ragged load", attention_us=5e6)]) == "ragged load: FA4 5,000,000 us"


@pytest.mark.parametrize(
    "name", ["kernel_cutlass_kernel_fa4_backendkernelsdecode", "void flash::FlashAttnFwdCombine", "kernel_unified_attention_2d"]
)
def test_attention_is_told_by_its_kernels_names(name: str) -> None:
    assert ATTENTION_KERNELS.search(name)
    assert not ATTENTION_KERNELS.search("reshape_and_cache_flash_kernel")
