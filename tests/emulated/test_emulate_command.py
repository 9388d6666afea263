"""`fa4 emulate`: its JSON, its verdicts, its timeline, and a program of the user's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fa4_backend.cli import main
from fa4_backend.commands.emulate import _print_table
from fa4_backend.commands.emulated_case import EmulatedCase, judge
from fa4_backend.kernels.torch_reference import run_reference
from fa4_backend.problem import FP8
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated
# Heads of 4 to 1, as most tests here have them, so that kernels are compiled once.
CASE = ["--heads", "4/1", "--q-lens", "3,35", "--kv-lens", "40,200", "--page-size", "16", "--num-sms", "2"]


def emulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["emulate", *arguments])
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out + captured.err


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_a_case_is_right_under_three_schedules(arch: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    code, text = emulate(capsys, "--arch", arch, *CASE, "--seeds", "2", "--trace", str(path), "--json")
    assert code == 0, text
    result: dict[str, Any] = json.loads(text)
    assert result["ok"] and result["races"] == [] and result["differing"] == 0
    assert 0 < result["max_err"] <= result["budget"]
    assert 0 < result["lse_err"] <= result["lse_budget"]
    assert result["instructions"] > 10_000 and result["seconds"] > 0
    assert sorted(name.split("-")[0] for name in result["kernels"]) == ["decode", "prefill", "schedule"]
    assert all(f"-{arch}-" in name for name in result["kernels"])
    prefill = next(k for name, k in result["kernels"].items() if "prefill" in name)
    assert prefill["units"]["MUFU"] > 0
    check_timeline(json.loads(path.read_text())["traceEvents"])


RIGHT = {
    "case": "a case", "max_err": 1e-3, "budget": 1e-2, "lse_err": 0.0, "lse_budget": 1e-4, "padding_is_zero": True,
    "empty_rows_are_zero": True, "races": [], "faults": [], "notes": [], "seconds": 1.0, "kernels": {}, "schedules": 3, "differing": 0,
    "ok": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ok": True}, "right\n"),
        ({"max_err": float("nan")}, "WRONG: out is off\n"),
        ({"lse_err": 1e-3, "differing": 2}, "WRONG: lse is off, other bits under 2 of the random schedules\n"),
        ({"padding_is_zero": False}, "WRONG: rows past the batch are not zero\n"),
        ({"empty_rows_are_zero": False}, "WRONG: rows that see no key are not zero\n"),
        ({"races": [f"race {i}" for i in range(7)]}, "race 4\n  and 2 more: --json prints all\nWRONG: 7 races\n"),
        # A fault is told whatever harmless notes come before it.
        ({"notes": [*(f"a {i}" for i in range(6)), "exit: z"], "faults": ["exit: z"]}, "exit: z\n  a 0\n"),
    ],
)
def test_the_table_says_why_a_run_is_wrong(changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    _print_table({**RIGHT, "ok": False, **changes})
    out = capsys.readouterr().out
    assert words in out and out.rstrip().split("\n")[-1].startswith("right" if changes.get("ok") else "WRONG: ")


@pytest.mark.parametrize("arch", with_slow(["sm_90a", "sm_100a", "sm_103a"], ["sm_103a"]))
def test_fp8_keys_and_values(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Right beside the oracle on what is stored times its scale."""
    code, text = emulate(capsys, "--arch", arch, *CASE, "--kv-dtype", "fp8", "--seeds", "1", "--json")
    assert code == 0, text
    result = json.loads(text)
    assert result["ok"] and result["races"] == [] and 0 < result["max_err"] <= result["budget"]
    assert all("kve4m3" in name for name in result["kernels"] if not name.startswith("schedule"))


@pytest.mark.parametrize("scale", ["k_scale", "v_scale"])
def test_fp8_cases_are_judged_with_their_scales(scale: str) -> None:
    """The torch kernel is right; with one scale 5% off it is not."""
    case = EmulatedCase(
        arch="sm_90a", heads="4/2", head_dim=64, q_lens=[3, 70], kv_lens=[40, 200], page_size=16, dtype="bfloat16", kv_dtype=FP8
    )
    plan, arguments = case.build()
    stored = arguments.k_cache.float()
    assert stored.isnan().any() and (stored.abs() == 448.0).any() and arguments.k_scale.unique().numel() == 2
    for error, is_right in ((1.0, True), (1.05, False)):
        run_reference(plan.problem, arguments._replace(**{scale: getattr(arguments, scale) * error}))
        assert judge(plan, arguments)["ok"] == is_right


def test_a_kernel_that_cannot_be_compiled_exits_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    code, text = emulate(capsys, "--arch", "sm_90a", "--heads", "5/1", "--q-lens", "1", "--kv-lens", "1")
    assert code == 1 and text.startswith("fa4 emulate: CompileError: ") and "no-such-compiler" in text


def check_timeline(events: list[dict[str, Any]]) -> None:
    """Every row's slices follow each other; copies, products and softmax are there, and products overlap softmax."""
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    slices: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            slices.setdefault((event["pid"], event["tid"]), []).append(event)
    for row, found in slices.items():
        assert row in rows
        ends = 0.0
        for event in sorted(found, key=lambda e: e["ts"]):
            assert event["ts"] >= ends - 0.25, f"{rows[row]}: slices overlap at {event['ts']}"
            ends = event["ts"] + event["dur"]
    names = {e["name"].split(":")[0] for e in events if e["ph"] == "X"}
    assert {"MMA", "copy", "softmax", "wait"} <= names
    roles = {name.split(":")[0] for name in rows.values()}
    assert {"softmax", "tensor core", "copy engine (TMA)"} <= roles


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
# No query, no key, more queries than keys, for decode rows and prefill rows; a step of nothing else.
@pytest.mark.parametrize(("q_lens", "kv_lens"), [("0", "0"), ("0,1,1", "20,0,3"), ("9,1,70,0", "5,2,0,0")])
def test_rows_without_queries_or_keys(arch: str, q_lens: str, kv_lens: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lengths = ["--q-lens", q_lens, "--kv-lens", kv_lens, "--trace", str(tmp_path / "timeline.json")]
    code, text = emulate(capsys, "--arch", arch, *CASE[:2], *CASE[-4:], *lengths, "--seeds", "1", "--json")
    assert code == 0, text
    result = json.loads(text)
    assert result["ok"] and result["empty_rows_are_zero"] and result["padding_is_zero"] and result["races"] == []


def test_an_empty_row_that_is_not_zero_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the verdict: the oracle's rows without a key are 0, and a 1 is told apart from it whatever the budget of others."""
    from fa4_backend import ops

    attend = ops.paged_attention

    def spoilt(*tensors: Any, out: Any, **values: Any) -> Any:
        result = attend(*tensors, out=out, **values)
        out[0] = 1e-4  # far below the budget of the other rows
        return result

    monkeypatch.setattr(ops, "paged_attention", spoilt)
    code, text = emulate(capsys, "--arch", "sm_90a", *CASE[:2], *CASE[-4:], "--q-lens", "9,1", "--kv-lens", "5,40", "--json")
    assert code == 1 and not json.loads(text)["empty_rows_are_zero"]


def test_fewer_slots_than_are_added_up_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A lone decode row on two CTAs: its two slots come to a ring of which nothing else was written."""
    code, text = emulate(capsys, "--arch", "sm_90a", "--heads", "8/2", "--q-lens", "1", "--kv-lens", "100", "--page-size", "16", "--json")
    assert code == 0, text


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_many_decode_rows_of_unequal_length(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    """More rows than a warp has lanes: threads of the schedule sort and cut them together, under any order of the warps."""
    kv_lens = ",".join(str(1 + 37 * i % 101) for i in range(40))
    lengths = ["--q-lens", ",".join(["1"] * 40), "--kv-lens", kv_lens]
    code, text = emulate(capsys, "--arch", arch, *CASE[:2], *CASE[-4:], *lengths, "--seeds", "2", "--json")
    assert code == 0, text
    assert json.loads(text)["races"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--heads", "3/2"], ["--q-lens", "1,x"], ["--q-lens", "9,1", "--kv-lens", "5"], ["--q-lens", "-1", "--kv-lens", "5"],
        ["--q-lens", "", "--kv-lens", "5"], ["--arch", "sm_80"], ["--kv-dtype", "fp4"], ["no_such_module:f"], ["no_colon"],
    ],
)  # fmt: skip
def test_a_wrong_call_exits_2_with_a_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, text = emulate(capsys, *arguments)
    assert code == 2 and text.startswith("fa4 emulate: "), text


PROGRAM = '''
import numpy as np

PTX = """.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 out) {
    .reg .b64 %d<4>;
    .reg .b32 %r<4>;
    ld.param.u64 %d0, [out];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, smem;
    mad.lo.u32 %r2, %r0, 4, %r1;
    st.shared.u32 [%r2], %r0;
    BARRIER
    xor.b32 %r2, %r2, 128;
    ld.shared.u32 %r3, [%r2];
    mad.wide.u32 %d1, %r0, 4, %d0;
    st.global.u32 [%d1], %r3;
    ret;
}
"""

def launch(session, barrier):
    session.launch(PTX.replace("BARRIER", barrier), 1, 64, [np.zeros(64, np.uint32)], smem=256)

def right(session):
    launch(session, "bar.sync 0;")

def racy(session):
    launch(session, "")

def stuck(session):
    launch(session, "bar.sync 0, 96;")

def own_mistake(session):
    raise ValueError("rows of unlike length")

def direct(session):
    raise RuntimeError("cudaErrorInsufficientDriver")
'''


def test_a_program_of_the_user(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, text = emulate(capsys, "own_program:right", "--arch", "sm_90a", "--json", "--seeds", "1")
    assert code == 0 and json.loads(text)["races"] == []
    code, text = emulate(capsys, "own_program:racy", "--arch", "sm_90a")
    assert code == 1 and "race" in text and "WRONG" in text
    code, text = emulate(capsys, "own_program:stuck", "--arch", "sm_90a")
    assert code == 1 and "Deadlock" in text
    # What the user's own code raises is no wrong call, and its place is shown.
    code, text = emulate(capsys, "own_program:own_mistake", "--arch", "sm_90a")
    assert code == 1 and "own_program.py" in text and "rows of unlike length" in text and "session.run" not in text
    code, text = emulate(capsys, "own_program:direct", "--arch", "sm_90a")
    assert code == 1 and "session.run(compiled, ...)" in text


README = Path(__file__).parents[2] / "fa4_backend/emulator/README.md"


def emulate_alone(folder: Path, program: str, *options: str) -> tuple[int, str]:
    """`fa4 emulate` in a process of its own, as a stranger starts it: the compiler is imported by the program."""
    command = [sys.executable, "-m", "fa4_backend.cli", "emulate", program, "--arch", "sm_90a", *options]
    paths = os.pathsep.join([str(README.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_readmes_example_runs_as_it_stands(tmp_path: Path) -> None:
    example = re.search(r"```python\n(# my_module\.py\n.*?)```", README.read_text(), re.DOTALL)
    assert example
    (tmp_path / "my_module.py").write_text(example.group(1))
    code, text = emulate_alone(tmp_path, "my_module:right", "--seeds", "1")
    assert code == 0 and "right" in text, text
    code, text = emulate_alone(tmp_path, "my_module:racy")
    assert code == 1 and "is read before its write is known" in text, text


FIRST_TRIES = """
import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import from_dlpack

@cute.kernel
def add_one(x: cute.Tensor, y: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    y[thread] = x[thread] + cutlass.Float32(1.0)

@cute.jit
def host(x: cute.Tensor, y: cute.Tensor):
    add_one(x, y).launch(grid=[1, 1, 1], block=[32, 1, 1])

def attempt(session, options, change):
    x, y = torch.arange(32.0), torch.zeros(32)
    compiled = cute.compile(host, from_dlpack(x), from_dlpack(y), **options)
    session.run(compiled, change(x), change(y))
    assert torch.equal(y, x + 1), y

def all_of_them(session):
    attempt(session, {}, from_dlpack)
    attempt(session, {}, lambda tensor: tensor)
    attempt(session, {"options": "--enable-tvm-ffi"}, lambda tensor: tensor)
"""


def test_functions_compiled_for_cpu_tensors_work(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(FIRST_TRIES)
    code, text = emulate_alone(tmp_path, "first:all_of_them")
    assert code == 0, text


LEAK = PROGRAM.replace("sm_90a", "sm_100a").replace(
    "    st.shared.u32 [%r2], %r0;\n", "    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;\n"
)
UNWRITTEN = PROGRAM.replace("    st.shared.u32 [%r2], %r0;\n", "")


@pytest.mark.parametrize(("text", "arch", "words"), [(LEAK, "sm_100a", "not deallocated"), (UNWRITTEN, "sm_90a", "nobody wrote")])
def test_a_note_that_matters_is_a_failure(
    text: str, arch: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"noted_{arch}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, printed = emulate(capsys, f"{name}:right", "--arch", arch, "--json")
    result = json.loads(printed)
    assert code == 1 and any(words in fault for fault in result["faults"]), printed


# Of kernels that `test_mla_decode.py` compiles.
@pytest.mark.parametrize(("kv_dtype", "q_lens", "page_size"), [("auto", "4,1", "16"), ("fp8", "1,1", "64")])
def test_latents(kv_dtype: str, q_lens: str, page_size: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Drafts and single queries over latents, by the schedule and one kernel; Blackwell refuses FP8 beside float16 queries by name."""
    case = ("--kind", "latent", "--heads", "16/1", "--head-dim", "576", "--head-dim-v", "512", "--kv-lens", "70,130")
    case += ("--q-lens", q_lens, "--page-size", page_size)
    code, text = emulate(capsys, "--arch", "sm_90a", *case, "--kv-dtype", kv_dtype, "--json")
    assert code == 0, text
    result = json.loads(text)
    assert result["ok"] and result["races"] == [] and 0 < result["max_err"] <= result["budget"]
    assert sorted(name.split("-")[0] for name in result["kernels"]) == ["mladecode", "schedule"]
    if kv_dtype != "auto":
        code, text = emulate(capsys, "--arch", "sm_100a", *case, "--kv-dtype", kv_dtype, "--dtype", "float16")
        assert code == 2 and "kv_dtype on sm_100a: expected float16 with q in float16, got float8_e4m3fn" in text
