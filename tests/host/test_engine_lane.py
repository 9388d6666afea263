"""What the scripts that run engines on a GPU notice, and how they cut engines into processes; without an engine."""

from __future__ import annotations

import json
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fa4_backend import BatchLimits, convert_room
from fa4_backend.kernels import loading
from fa4_backend.problem import FP8
from fa4_integration.common import start
from tests.device import engine_lane, serve_long
from tests.device.engine_groups import BOTH, GROUPS, PEERS, Group
from tests.device.engine_lane import Engine, faults, run_process, slow_parts
from tests.device.serve_matrix import NO_MULTICAST, keys_of, lanes, lone_references, run_lane, suite_of
from tests.device.serve_tokens import compare, judge
from tests.device.watch_converted import watch_converted
from tests.engines.random_load import RandomLoad
from tests.engines.tiny_models import write_llama, write_quantised_llama
from tests.support.problems import make_problem

RIGHT: dict[str, Any] = {
    "pids": [7], "config": {"graphs": BOTH, "is_async": True}, "preemptions": 2, "cached_tokens": [0, 128], "failed_kinds": {},
    "structured": [[2, 4, 6, 8, 10, 1]], "acceptance": {"draft_tokens": 9, "accepted_tokens": 4}, "rebuilds": None,
}  # fmt: skip
ENGINE = Engine("FA4", "FA4", {"async_scheduling": True}, graphs=BOTH, preempts=True, drafts=True)


def test_what_is_as_it_should_be_is_no_fault() -> None:
    assert faults(ENGINE, RIGHT) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pids": []}, "our kernels ran in processes []"),
        ({"config": {"graphs": "NONE", "is_async": True}}, f"expected {BOTH}, got NONE"),
        ({"config": {"graphs": BOTH, "is_async": False}}, "async scheduling"),
        ({"preemptions": 0}, "no request was preempted"),
        ({"failed_kinds": {"structured": "ImportError"}, "structured": []}, "structured failed: ImportError"),
        ({"structured": [[2, 4, 5, 6, 8]]}, "under a grammar"),
        ({"structured": [[2, 1]]}, "under a grammar"),
        ({"acceptance": {"draft_tokens": 9, "accepted_tokens": 0}}, "drafts of both fates"),
        ({"acceptance": {}}, "drafts of both fates"),
        ({"rebuilds": "cannot update draft decode metadata"}, "cannot update draft decode metadata"),
        ({"other_after": ["wake_from_level_2"]}, "other tokens after"),
    ],
)
def test_a_fault_is_noticed(change: dict[str, Any], words: str) -> None:
    (fault,) = faults(ENGINE, {**RIGHT, **change})
    assert words in fault


def test_room_for_converted_keys_is_there_before_plans_and_used() -> None:
    engine = Engine("FA4", "FA4", converts=True)
    right = {**RIGHT, "converted_steps": 3, "room_bytes": 2 << 20, "late_bytes": 0}
    assert faults(engine, right) == []
    assert faults(engine, {**right, "converted_steps": 0}) == ["no step converted K and V once a call"]
    (fault,) = faults(engine, {**right, "late_bytes": 5})
    assert "got 5 bytes with a plan" in fault


def test_what_is_watched_of_converted_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that is reserved before a plan is not late; what a plan has to allocate is; a step that converts is counted."""
    monkeypatch.setattr(loading, "load", lambda key, *, emulated: lambda *arguments: None)
    monkeypatch.setattr(convert_room, "_rooms", weakref.WeakValueDictionary())
    problem = make_problem(8, 2, 128, 128, "bfloat16", 16, "emulated-sm_90a", kv_dtype=FP8)
    limits, cpu = BatchLimits(2, 1024, 1024, convert_keys=1024), torch.device("cpu")
    with watch_converted() as counts:
        held = start.reserve(problem, limits, cpu)
        step = start.allocate(problem, limits, cpu)
        assert held is not None and counts == {"converted_steps": 0, "room_bytes": held.storage.numel(), "late_bytes": 0}
        lengths = torch.tensor([0, 1024], dtype=torch.int32), torch.tensor([1024], dtype=torch.int32)
        for keys in (1024, None):
            step.refresh(cu_seqlens_q=lengths[0], seqused_k=lengths[1], max_seqlen_q=1024, max_seqlen_k=1024, prefill_keys=keys)
        assert counts["converted_steps"] == 1
        wide = replace(problem, num_kv_heads=4)
        later = start.allocate(wide, limits, cpu)
    assert later.converted is not None and counts["late_bytes"] == held_bytes(limits, 4) == held.storage.numel()


def held_bytes(limits: BatchLimits, kv_heads: int) -> int:
    """Of K and V of 128 elements in 16 bits."""
    return 2 * limits.convert_keys * kv_heads * 128 * 2


def test_a_cache_of_prefixes_that_is_off_or_not() -> None:
    engine = Engine("FA4", "FA4", {"enable_prefix_caching": False})
    (fault,) = faults(engine, RIGHT)
    assert "prefix caching is off" in fault
    assert faults(engine, {**RIGHT, "cached_tokens": [0, 0]}) == []


def test_silences_of_a_log_are_named() -> None:
    assert slow_parts(10.0, [(10.2, "weights"), (13.4, "graphs"), (13.5, "ready")]) == ["3.2 s until 'graphs'"]


def test_a_process_that_hangs_says_where(tmp_path: Path) -> None:
    hang = "import time\ndef wait_for_godot():\n    time.sleep(60)\nwait_for_godot()"
    assert not run_process([sys.executable, "-c", hang], {}, tmp_path / "log", 3.0)
    assert "wait_for_godot" in (tmp_path / "log").read_text()


def test_engines_are_cut_into_lanes_with_the_reference_first(tmp_path: Path) -> None:
    engines = [Engine(name, "FA4") for name in ("FA4", "more", "still more")]
    group = Group(write_llama, (*(Engine(name, name) for name in PEERS), *engines, Engine("apart", "FA4", is_alone=True)))
    found = [json.loads(path.read_text())["engines"] for _, path in lanes({"g": group}, tmp_path, per_lane=2)]
    assert [[engine["name"] for engine in engines] for engines in found] == [[*PEERS], ["FA4", "more"], ["still more"], ["apart"]]


def test_a_lane_that_ends_early_keeps_what_was_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"engines": [{"name": name, "environment": {}, "ranks": 1} for name in ("first", "second")]}))

    def dies(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> bool:
        assert environment.items() >= NO_MULTICAST.items()
        log.write_text("Killed")
        (tmp_path / "answers.jsonl").write_text('{"name": "first", "tokens": [[1]]}\n')
        return False

    monkeypatch.setattr("tests.device.serve_matrix.run_process", dies)
    monkeypatch.setattr("tests.device.serve_matrix.time.monotonic", lambda: 2.0)
    first, second = run_lane(request, 7.0)
    assert first == {"name": "first", "tokens": [[1]]}
    assert second == {"name": "second", "failed": "not done within 5.0 s\nKilled"}


@pytest.mark.parametrize(
    ("of_idle", "words"),
    [
        ('{"name": "FA4", "dummy_batches": 5}', None),
        ('{"name": "FA4", "dummy_batches": 0}', "rank 1 ran no dummy batch"),
        ('{"name": "FA4", "failed": "CUDA error"}', "rank 1 failed: CUDA error"),
        ("", "rank 1 failed: no answer"),
    ],
)
def test_idle_ranks_have_to_run_dummy_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_idle: str, words: str | None) -> None:
    """Each rank is a process, with its number in its environment and the same port."""
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"engines": [{"name": "FA4", "environment": {}, "ranks": 2}]}))
    seen = []

    def answers(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> bool:
        seen.append(command)
        log.write_text("")
        (tmp_path / "answers.jsonl").write_text('{"name": "FA4", "tokens": [[1]], "wrong": []}\n')
        (tmp_path / "answers1.jsonl").write_text(of_idle)
        return True

    monkeypatch.setattr("tests.device.serve_matrix.run_process", answers)
    (result,) = run_lane(request, 7.0)
    assert result["wrong"] == ([] if words is None else [words])
    shell, flag, line = seen[0]
    ports = re.findall(r"VLLM_DP_SIZE=2 VLLM_DP_MASTER_IP=127.0.0.1 VLLM_DP_MASTER_PORT=(\d+) VLLM_DP_RANK=([01]) ", line)
    assert (shell, flag, [rank for _, rank in ports]) == ("bash", "-c", ["0", "1"])
    assert ports[0][0] == ports[1][0]


def test_kernels_of_a_fused_quantisation_are_compiled_and_have_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.device.serve_matrix.arch", lambda: "sm_90a")
    groups = {"fused_output": GROUPS["fused_output"]}
    lanes(groups, tmp_path)
    written = {key.out_dtype for key in keys_of(groups, tmp_path) if hasattr(key, "out_dtype")}
    assert written == {"bfloat16", FP8}
    engine = next(engine for engine in groups["fused_output"].engines if engine.writes_fp8)
    result = {"config": {"graphs": "NONE"}, "cached_tokens": [1], "failed_kinds": {}, "structured": [[4] * 5], "preemptions": 0}
    for out, words in ((" (out float8_e4m3fn)", []), ("", ["expected kernels that write FP8, got ['FA4: sm90 kernels']"])):
        assert faults(engine, {**result, "pids": [1], "kernels": [f"FA4: sm90 kernels{out}"]}) == words


def test_a_model_in_fp8_has_a_scale_for_each_linear_layer_and_keeps_its_values(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(write_quantised_llama(tmp_path / "fp8") / "model.safetensors")
    wanted = load_file(write_llama(tmp_path / "llama") / "model.safetensors")
    linear = [name for name in wanted if "_proj." in name]
    assert len(linear) == 14 and set(stored) == set(wanted) | {
        other for name in linear for other in (f"{name}_scale", name.replace("weight", "input_scale"))
    }
    for name in linear:
        back = stored[name].float() * stored[f"{name}_scale"]
        assert ((back - wanted[name]).abs() <= wanted[name].abs() / 16 + stored[f"{name}_scale"] / 1024).all()


def runs_of(distances: dict[str, float]) -> dict[str, Any]:
    """Runs of the group "sinks", each a number away from the reference in every log-probability."""
    reference = {"tokens": [[1, 2]], "first_logprob": [-1.0], "prefill_logprobs": [-1.0, -2.0], "decode_logprobs": [-1.0, -1.5]}
    found = {}
    for engine in GROUPS["sinks"].engines:
        away = distances.get(engine.name, 0.0)
        run = {name: [value + away for value in reference[name]] for name in reference if name != "tokens"}
        run |= {"tokens": [[1, 2]], "kernels": ["FA4: sm90 kernels"] if engine.backend == "FA4" else []}
        found[f"sinks: {engine.name}"] = {**run, "against_flash_attn": compare(run, reference)}
    return found


def test_distances_are_judged_within_a_group() -> None:
    right = {"TRITON_ATTN": 0.1, "FA4": 0.12, "FA4, scale 5% off": 0.3}
    suite = suite_of({"sinks": GROUPS["sinks"]})
    assert judge(runs_of(right), suite) == []
    (wrong,) = judge(runs_of({**right, "FA4": 0.16}), suite)
    assert wrong.startswith("sinks: FA4: expected at most 1.5 times the distance of TRITON_ATTN")
    (wrong,) = judge(runs_of({**right, "FA4, scale 5% off": 0.14}), suite)
    assert wrong.startswith("sinks: FA4, scale 5% off: expected above")


def test_a_reference_that_is_apart_from_both_others_is_named() -> None:
    """Here TRITON_ATTN and FA4 are 0.01 apart, and 0.3 from FLASH_ATTN; then FA4 is the one that is apart."""
    (prefill, decode) = lone_references(runs_of({"TRITON_ATTN": 0.3, "FA4": 0.31}))
    assert prefill.startswith("sinks: FLASH_ATTN is apart in prefill_logprob_rms: 0.3 from TRITON_ATTN, FA4 0.01")
    assert "decode_logprob_rms" in decode
    assert lone_references(runs_of({"TRITON_ATTN": 0.01, "FA4": 0.31})) == []
    assert lone_references({**runs_of({"TRITON_ATTN": 0.3, "FA4": 0.31}), "sinks: FA4": {"failed": "a log"}}) == []


def test_every_group_starts_with_its_reference_and_has_a_control() -> None:
    for name, group in GROUPS.items():
        names = [engine.name for engine in group.engines]
        assert tuple(names[:2]) == PEERS and len(set(names)) == len(names), name
        controls = GROUPS[name.removesuffix("_default")].engines
        assert any(engine.scale_error != 1.0 for engine in controls), name
        assert all(engine.environment["FA4_BACKEND_STRICT"] == "1" for engine in group.engines if engine.backend == "FA4"), name


LOOK = {"device_bytes": 5, "host_bytes": 100, "late_compiles": 0, "plans": 1, "counters": [{}], "addresses": [[1, 2]]}
RUN: dict[str, Any] = {"looks": [LOOK, LOOK], "counts": {"preempted": 1}, "others": [], "probe_is_other": False}
RUN |= {"steps": 9, "expected_steps": 9, "compared": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device_bytes": 6}, "device memory: expected 5 bytes as at first, got 6"),
        ({"host_bytes": 100 + serve_long.HOST_BYTES + 1}, "host memory grew"),
        ({"late_compiles": 1}, "look 1: 1 compiles"),
        ({"counters": [{"arrivals": 3}]}, "counters not at rest"),
        ({"addresses": [[1, 3]]}, "lists that moved"),
        ({"plans": 0}, "no metadata of FA4"),
    ],
)
def test_a_long_run_notices_what_drifts(change: dict[str, Any], words: str) -> None:
    assert serve_long.judge(RUN) == []
    (wrong,) = serve_long.judge({**RUN, "looks": [LOOK, {**LOOK, **change}]})
    assert words in wrong
    assert serve_long.judge({**RUN, "others": ["12"]}) == ["request 12: another answer than alone"]
    assert serve_long.judge({**RUN, "steps": 8}) == ["expected 9 steps, the time was over after 8"]
    (wrong,) = serve_long.judge({**RUN, "compared": 0})
    assert "got none" in wrong


def test_a_random_load_is_what_it_says() -> None:
    load, again = (RandomLoad(3, longest_prompt=900, longest_answer=100) for _ in range(2))
    drawn = [load.next() for _ in range(400)]
    assert drawn == [again.next() for _ in range(400)]
    lengths = sorted(len(request.prompt) for request in drawn)
    assert lengths[0] >= 1 and lengths[-1] <= 900 and lengths[-1] > 512 > lengths[200], "chunks for some, not for most"
    assert sum(request.leaves_after is not None for request in drawn) > 20
    assert any(a.prompt == b.prompt for i, a in enumerate(drawn) for b in drawn[:i]), "nobody asks again"
    assert all(request.leaves_after is None or request.leaves_after < request.new_tokens for request in drawn)


def test_the_stand_in_is_for_what_is_missing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "lmformatenforcer", raising=False)
    engine_lane.stand_in_for_missing_packages()
    assert "lmformatenforcer" not in sys.modules
