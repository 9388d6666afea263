"""What `tests/device` recorded on a GPU says what the documents say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.device.serve_tokens import judge

RESULTS = Path(__file__).parents[1] / "device" / "results"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def test_prefill() -> None:
    seen = load("prefill_h100.json")
    assert sum(f["batches"] for f in seen["fuzz"]) > 20000 and not any(f["failures"] for f in seen["fuzz"])
    assert all(f["worst_out"] <= 1 and f["worst_lse"] <= 1 for f in seen["fuzz"])
    assert all(case["ok"] for case in seen["cases"]) and seen["page_sizes"]["ok"]
    assert seen["large_pool"]["ok"] and seen["large_pool"]["elements"] > 2**31


def test_decode() -> None:
    seen = load("decode_h100.json")
    for part, at_least in (("fuzz", 19000), ("mixed", 7000)):
        assert sum(f["batches"] for f in seen[part]) >= at_least and not any(f["failures"] for f in seen[part])
        assert all(f["worst_out"] <= 1 and f["worst_lse"] <= 1 for f in seen[part])
    assert all(seen[part]["ok"] for part in ("lists", "bits", "exact")) and seen["exact"]["tokens"] > 100000


def test_engines() -> None:
    runs = load("serve_h100.json")["runs"]
    assert judge(runs) == []
    assert {name.split(": ", 1)[1] for name in runs} >= {"FA4", "FA4, full graphs", "FA4, drafts", "FA4, pages of 64", "FA4, scale 5% off"}


def test_a_wrong_engine_is_noticed() -> None:
    """The judge's own control: an FA4 run with the answers of the scale that is off."""
    runs = load("serve_h100.json")["runs"]
    assert judge({**runs, "llama: FA4": {**runs["llama: FA4, scale 5% off"]}}) != []
    assert judge({**runs, "llama: FA4": {**runs["llama: FA4"], "kernels": []}}) != []


def test_sanitizer() -> None:
    assert all("SUMMARY: 0 " in run["summary"] for run in load("sanitizer_h100.json")["runs"])
