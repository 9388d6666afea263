"""`fa4` as a user types it: exit codes, JSON, and a matrix that the refusing code made."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from fa4_backend import compile_cache, driver, envs
from fa4_backend.arch import ARCHS
from fa4_backend.cli import VERBS, main
from fa4_backend.commands import compile as compile_command
from fa4_backend.commands import doctor, features
from fa4_backend.plan import AttentionPlan, plan_attention
from fa4_backend.problem import FP8, LATENT, AttentionProblem, BatchLimits, MaskFeatures, UnsupportedProblem
from fa4_backend.support import SUPPORT

GEMMA_2 = {
    "model_type": "gemma2", "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2304, "head_dim": 256,
    "num_hidden_layers": 26, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "torch_dtype": "bfloat16",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_doctor_finds_torch_and_the_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    by_subject = {f["subject"]: f for f in report["findings"]}
    assert by_subject["torch"]["status"] == "ok"
    if by_subject["GPU"]["status"] == "note":
        assert by_subject["CPU kernel"]["detail"] == f"torch reference, K and V in the dtype of q or {FP8}"
    assert by_subject["vllm.general_plugins"]["detail"] == "fa4 = fa4_integration.vllm_backend.plugin:register"
    assert by_subject["sglang.srt.plugins"]["detail"] == "fa4_plugin = fa4_integration.sglang_backend.plugin:register"
    assert code == (0 if report["healthy"] else 1)


def test_doctor_exits_1_on_an_unusable_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", "/proc/nowhere")
    monkeypatch.setenv("FA4_BACKEND_SPEED", "11")
    code, out, _ = run(capsys, "doctor", "--json")
    broken = {f["subject"] for f in json.loads(out)["findings"] if f["status"] == "broken"}
    assert code == 1 and {"cache", "FA4_BACKEND_SPEED"} <= broken


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *((name, "true", "expected 0 or 1, got 'true'") for name in envs.FLAGS),
        ("FA4_BACKEND_CPU", "fastest", "expected one of reference, "),
        ("FA4_BACKEND_CONVERT_MIB", "32k", "expected 0 to "),
        ("FA4_BACKEND_CACHE_GIB", "-1", "expected a positive number of GiB, got '-1'"),
        ("FA4_BACKEND_TRACE_FILE", "/nowhere/trace", "expected a file in a folder that is there, got /nowhere/trace"),
        ("FA4_BACKEND_TRACE_FILE", "/", "expected a file in a folder"),
        ("FA4_BACKEND_STRCIT", "1", "expected one of FA4_BACKEND_STRICT, "),
    ],
)
def test_what_a_variable_may_not_hold_is_told(name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `fa4 doctor` for all, and by `envs.faults` to an engine that starts; a flag that says "true" was off."""
    assert envs.faults() == {}
    monkeypatch.setenv(name, value)
    assert list(envs.faults()) == [name] and envs.faults()[name].startswith(f"{name}: {words}")
    (finding,) = (finding for finding in doctor._environment() if finding.subject == name)
    assert finding.status == "broken" and finding.detail.startswith(words)


def test_doctor_tells_where_the_cache_is_how_full_and_whether_it_is_trusted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    core = folder / "emulator" / "core-0"
    core.mkdir(parents=True)
    (core / "core.so").write_bytes(bytes(3 << 20))
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(folder))
    monkeypatch.setenv("FA4_BACKEND_CACHE_GIB", "2.5")
    _, out, _ = run(capsys, "doctor", "--json")
    findings = {f["subject"]: f for f in json.loads(out)["findings"]}
    assert findings["cache"] == {
        "subject": "cache",
        "status": "ok",
        "detail": f"{folder}: trusted, 1 entries, 3.0 MiB of compiled code, at most 2.5 GiB",
    }
    assert set(envs.VARIABLES) <= set(findings), "every variable has its line"
    folder.chmod(0o777)
    code, out, _ = run(capsys, "doctor", "--json")
    findings = {f["subject"]: f for f in json.loads(out)["findings"]}
    assert code == 1 and findings["cache"]["status"] == "broken"
    assert findings["cache"]["detail"].startswith(f"not trusted: {folder}: expected a folder of")
    folder.chmod(0o755)


def test_compile_names_what_is_wrong_with_the_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No traceback, and nothing compiled first."""
    tmp_path.chmod(0o777)
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(tmp_path))
    code, out, err = run(capsys, "compile", "--arch", "sm_90a", "--json")
    assert code == 1 and not out and err.startswith(f"fa4 compile: UntrustedCacheError: {tmp_path}: expected a folder of")
    tmp_path.chmod(0o700)


def test_every_environment_variable_is_read_in_envs() -> None:
    """`os.environ` and `os.getenv` are read nowhere else in what is installed; writing one for a library is no reading."""
    root = Path(envs.__file__).parents[1]
    for path in (*(root / "fa4_backend").rglob("*.py"), *(root / "integration").rglob("*.py")):
        if path == Path(envs.__file__):
            continue
        tree = ast.parse(path.read_text())
        written = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(tree):
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and id(node) not in written
            imports = isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & {"environ", "getenv"}
            assert not reads and not imports, f"{path}:{node.lineno} reads an environment variable"  # type: ignore[attr-defined]
    source = Path(envs.__file__).read_text()
    for name in envs.VARIABLES:
        assert source.count(f'"{name}"') >= 2, f"{name} is in the table and read by nobody"


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's number that no user database knows."""
    for name in ("HOME", "XDG_CACHE_HOME", "FA4_BACKEND_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    finding = doctor._cache_folder()
    assert finding.status == "broken" and finding.detail.startswith("FA4_BACKEND_CACHE_DIR: expected a folder, since user ")
    assert list(envs.faults()) == ["FA4_BACKEND_CACHE_DIR"]
    monkeypatch.setenv("FA4_BACKEND_CACHE_DIR", str(tmp_path))
    assert envs.faults() == {} and envs.cache_dir() == tmp_path


def test_features_come_from_the_code_that_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking a feature away from the table that validates takes its 'yes' away from the matrix."""
    assert features.support_matrix()["attention sinks"]["cpu"] is None
    poorer = dataclasses.replace(SUPPORT["cpu"], masks=SUPPORT["cpu"].masks - {"has_sinks"})
    monkeypatch.setitem(SUPPORT, "cpu", poorer)
    code, out, _ = run(capsys, "features", "--json")
    matrix = json.loads(out)
    assert code == 0 and "has_sinks" in matrix["attention sinks"]["cpu"]
    assert set(matrix["causal"]) == {"cpu", *ARCHS}
    served = {arch for arch, reason in matrix["K and V in FP8 (e4m3)"].items() if reason is None}
    assert served == {arch for arch, support in SUPPORT.items() if FP8 in support.quantised_kv} and "cpu" in served


def test_a_refusal_says_what_was_expected_what_came_and_what_to_do() -> None:
    """Of every row that some arch does not serve, and of limits that none does."""
    reasons = [reason for by_arch in features.support_matrix().values() for reason in by_arch.values() if reason]
    assert len(reasons) > 20
    latent = AttentionProblem(8, 1, 576, 512, "bfloat16", 64, "sm_90a", kv_source=LATENT)
    ordinary = AttentionProblem(8, 8, 128, 128, "bfloat16", 16, "sm_90a")
    for problem, limits in (
        (ordinary, BatchLimits(1, 1 << 30, 1)),
        (ordinary, BatchLimits(1, 1, 1 << 30)),
        (ordinary, BatchLimits(1 << 20, 1, 1)),
        (latent, BatchLimits(1, 9, 1, 9)),
        (replace(latent, mask=MaskFeatures(is_causal=False)), BatchLimits(1, 1, 1)),
        (replace(latent, out_dtype=FP8), BatchLimits(1, 1, 1)),
    ):
        with pytest.raises(UnsupportedProblem) as refusal:
            plan_attention(problem, limits)
        reasons.append(str(refusal.value))
    assert [reason for reason in reasons if not re.fullmatch(r"[^:]+: expected .+, got [^;]+; .+", reason)] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_compile_takes_fp8_keys_and_values(
    arch: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the option, or as a model's checkpoint declares it: the plans that are compiled have it. Refused where the arch has no kernel."""
    plans: list[AttentionPlan] = []
    monkeypatch.setattr(compile_command, "compile_plans", lambda given: plans.extend(given) or [])
    declaring = {**GEMMA_2, "head_dim": 128, "quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "config.json").write_text(json.dumps(declaring))
    for asked in (("--kv-dtype", "fp8"), ("--model", str(tmp_path))):
        for served in ((), (FP8,)):
            monkeypatch.setitem(SUPPORT, arch, dataclasses.replace(SUPPORT[arch], quantised_kv=served))
            plans.clear()
            code, _, err = run(capsys, "compile", "--arch", arch, *asked)
            if served:
                assert code == 0 and plans and {plan.problem.kv_dtype for plan in plans} == {FP8}
            else:
                assert code == 1 and f"kv_dtype on {arch}: expected bfloat16 with q in bfloat16, got {FP8}" in err


def test_plan_of_gemma_2_has_two_groups(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_2))
    code, out, _ = run(capsys, "plan", "--model", str(tmp_path), "--json")
    rows = json.loads(out)
    assert code == 0
    assert [(r["num_layers"], r["window"]) for r in rows] == [(13, 4096), (13, None)]
    assert all(r["problem"]["has_softcap"] and "torch reference on cpu" in r["plan"] for r in rows)


def test_plan_names_the_compile_keys_of_an_arch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_2))
    code, out, _ = run(capsys, "plan", "--model", str(tmp_path), "--arch", "sm_90a", "--json")
    rows = json.loads(out)
    assert code == 0
    for row in rows:
        kinds = [name.split("-")[0] for name in row["kernels"]]
        assert "prefill" in kinds and "schedule" in kinds
        assert all("windowleft" in name for name in row["kernels"] if name.startswith("prefill")) == (row["window"] is not None)


@pytest.mark.parametrize(
    ("flags", "kinds", "mode"),
    [
        ((), {"schedule", "decode", "prefill"}, ""),
        (("--batch-invariant",), {"schedule", "decode", "prefill"}, "batch-invariant"),
        (("--exact",), {"schedule", "prefill"}, "exact"),
    ],
    ids=["normal", "batch invariant", "exact"],
)
def test_plan_of_a_mode(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[str, ...], kinds: set[str], mode: str) -> None:
    """Each mode has its kernels and says its name."""
    config = {**GEMMA_2, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "plan", "--model", str(tmp_path), "--arch", "sm_90a", "--json", *flags)
    assert code == 0
    for row in json.loads(out):
        assert {name.split("-")[0] for name in row["kernels"]} == kinds
        assert row["plan"].endswith(f", {mode}" if mode else ", page 16")
        assert [name.endswith("pieces") for name in row["kernels"] if name.startswith("decode")] == [bool(flags)] * ("decode" in kinds)


@pytest.mark.parametrize(("mib", "room"), [("256", 256.0), ("8", 8.0), ("0", 0.0)])
def test_plan_says_how_much_room_converted_keys_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mib: str, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GEMMA_2, "head_dim": 128}))
    flags = ("--model", str(tmp_path), "--arch", "sm_90a", "--kv-dtype", "fp8")
    monkeypatch.setenv("FA4_BACKEND_CONVERT_MIB", mib)
    code, out, _ = run(capsys, "plan", *flags, "--json")
    rows = json.loads(out)
    assert code == 0 and {row["room_mib"] for row in rows} == {room}
    assert all(any(name.startswith("convert-") for name in row["kernels"]) == (room > 0) for row in rows)
    monkeypatch.setenv("FA4_BACKEND_CONVERT_MIB", "much")
    for command in (("plan", *flags), ("compile", *flags)):
        code, _, err = run(capsys, *command)
        assert code == 2 and "FA4_BACKEND_CONVERT_MIB: expected 0 to" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected a model_type or architectures"),
        (json.dumps({**GEMMA_2, "torch_dtype": "int4"}), "dtype: expected one of"),
    ],
)
def test_plan_of_a_bad_config(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "config.json").write_text(content)
    code, _, err = run(capsys, "plan", "--model", str(tmp_path))
    assert code == 2 and words in err


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("0.31.2", "broken"),
        ("0.9", "broken"),
        ("0.32.0+cpu", "ok"),
        ("0.33.0rc1", "ok"),
        ("1.0", "ok"),
        ("0.1.dev7+g1a2b", "ok"),
        (None, "note"),
    ],
)
def test_doctor_knows_the_oldest_engine_that_serves(version: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm": version}.get)
    findings = {finding.subject: finding for finding in doctor._engines()}
    assert findings["vLLM"].status == status and findings["SGLang"].status == "note"
    assert (f"vllm {version}: expected >=0.32, whose" in findings["vLLM"].detail) == (status == "broken")


def test_doctor_asks_for_the_engines_of_the_package() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [extras[names[0]] for _, names, _ in doctor.ENGINES] == [[names[0] + served] for _, names, served in doctor.ENGINES]


@pytest.mark.parametrize(
    ("name", "version", "fits"),
    [
        ("torch", "2.8.0", False),
        ("torch", "2.9.0a0+nv25.9", True),  # a vendor's build of a release
        ("torch", "2.14.1+cu130", True),
        ("nvidia-cutlass-dsl", "4.7.2", False),
        ("nvidia-cutlass-dsl", "4.8.1", True),
        ("nvidia-cutlass-dsl", "4.9.0.dev0", False),
        ("apache-tvm-ffi", "0.1.11", True),
        ("apache-tvm-ffi", "0.2.0", False),
    ],
)
def test_doctor_holds_versions_to_what_the_package_requires(name: str, version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    required = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]
    monkeypatch.setattr("importlib.metadata.requires", {"fa4-backend": [*required, f"{name}<0 ; extra == 'x'"]}.get)
    monkeypatch.setattr("importlib.metadata.version", {name: version}.get)
    finding = doctor._distribution(name, "does something")
    assert finding.status == ("ok" if fits else "broken")
    assert (": expected " in finding.detail) != fits and finding.detail.startswith(f"{version} (does something)")


def test_doctor_says_why_torch_finds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the driver shows and torch cannot use is broken, with torch's reason; a machine without one is not."""
    import torch

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    why = "shows 2, torch cannot use them: RuntimeError: The NVIDIA driver on your system is too old"
    for num_gpus, status, words in ((0, "note", "none found"), (2, "broken", why)):
        monkeypatch.setattr(driver, "num_gpus", lambda num_gpus=num_gpus: num_gpus)
        findings = {finding.subject: finding for finding in doctor._torch_and_device()}
        assert findings["GPU"].status == status and words in findings["GPU"].detail


def test_doctor_takes_no_gpu_of_rocm_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MI250 is of compute capability 9.0 to torch, as an H100 is."""
    import torch

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    findings = {finding.subject: finding for finding in doctor._torch_and_device()}
    assert findings["GPU"].status == "broken" and "expected a build for CUDA" in findings["GPU"].detail
    assert findings["torch"].detail.endswith("ROCm 6.4")


def test_doctor_wants_a_launch_runtime_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise FileNotFoundError("libcute_dsl_runtime.so: expected in the package")

    monkeypatch.setattr(compile_cache, "find_runtime", none)
    for num_gpus, status in ((0, "note"), (1, "broken")):
        monkeypatch.setattr(driver, "num_gpus", lambda num_gpus=num_gpus: num_gpus)
        finding = doctor._launch_runtime()
        assert finding.status == status and finding.detail.startswith("libcute_dsl_runtime.so: expected")


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "dance")
    assert code == 2 and "expected a verb of doctor" in err


def test_help_says_what_each_verb_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", out, re.MULTILINE))
    assert code == 0 and listed == VERBS


CHIPS = "expected one of sm_90a (H100, H200, GH200), sm_100a (B200, GB200), sm_103a (B300, GB300), got"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compile --arch cpu", f"fa4 compile: --arch: {CHIPS} 'cpu'"),
        ("compile --arch sm_90a --heads 32", "fa4 compile: --heads: expected query heads / KV heads such as 32/8, got '32'"),
        ("compile --arch sm_90a --head-dim 128x128", "fa4 compile: --head-dim: expected elements such as 128, or of keys/values"),
        ("emulate --arch sm_80", f"fa4 emulate: --arch: {CHIPS} 'sm_80'"),
        ("emulate --softcap -1", "fa4 emulate: --softcap: expected 0 (off) or more, got -1.0"),
        ("emulate --dtype fp32", "fa4 emulate: dtype"),
        ("model --arch h100", f"fa4 model: --arch: {CHIPS} 'h100'"),
        ("model --kind mla", "fa4 model: --kind: expected one of prefill, decode, latent, got 'mla'"),
        ("plan --model meta/llama", "fa4 plan: meta/llama: expected a config.json or the folder that holds it"),
        ("bench shapes --compile-for h100", f"fa4 bench: --compile-for: {CHIPS} 'h100'"),
        ("bench prefill --peers fa4", "fa4 bench: --peers: expected names of fa3, fa3 invariant, "),
        ("bench decode --peers fa3,cudnn", "fa4 bench: --peers: expected names of fa3, fa3 invariant, "),
        ("bench mla --peers flash_mla", "fa4 bench: --peers: expected names of fa3, flashmla, got flash_mla"),
        ("bench shapes --peers x", "fa4 bench: --peers: expected names of fa3, fa3 invariant, "),
        ("bench prefill --kind latent", "fa4 bench: --kind: expected one of paged, ragged, got latent"),
    ],
)
def test_a_wrong_call_is_told_what_was_expected(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *command.split())
    assert (code, out) == (2, "") and err.startswith(message)
