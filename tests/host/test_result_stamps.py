"""Every result on file says which kernels it speaks of, and is known as old when they were edited."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pytest

from fa4_backend import compile_cache, kernel_stamp
from fa4_backend.arch import ARCHS
from fa4_backend.kernel_stamp import FAMILIES, UNKNOWN
from tests import conftest
from tests.device import proofs
from tests.device.proofs import Proof


def check_stamp(proof: Proof) -> None:
    """A result says when, on what and by which kernels it was made."""
    stamp = proof.stamp
    assert stamp is not None, f"{proof.name}: expected a stamp of its kernels (`fa4_backend.kernel_stamp`), found none"
    assert set(stamp) == {"date", "device", "kernels"} and stamp["device"], proof.name
    datetime.date.fromisoformat(stamp["date"][:10])
    if stamp["kernels"] != UNKNOWN:
        assert stamp["kernels"] and set(stamp["kernels"]) <= set(FAMILIES), proof.name
        assert all(len(digest) == kernel_stamp.DIGITS for digest in stamp["kernels"].values()), proof.name


@pytest.mark.parametrize("proof", proofs.find_proofs(), ids=lambda proof: proof.name)
def test_every_result_says_which_kernels_it_speaks_of(proof: Proof) -> None:
    check_stamp(proof)


def test_results_are_of_these_kernels() -> None:
    """No failure: kernels may be ahead of the last run on a GPU. An expected one, until the results are new; the run's end names them."""
    if old := proofs.old_proofs():
        pytest.xfail(f"{len(old)} results are older than the kernels")


def test_a_result_without_a_stamp_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "new_h100.json").write_text('{"date": "2026-11-27"}')
    (tmp_path / "results" / "new_h100.csv").write_text("batch,us\n")
    found = proofs.find_proofs(("results",))
    assert [proof.name for proof in found] == ["results/new_h100.csv", "results/new_h100.json"]
    for proof in found:
        with pytest.raises(AssertionError, match="expected a stamp"):
            check_stamp(proof)
    kernel_stamp.write_stamp(found[0].path, kernel_stamp.make_stamp("a GPU", ("decode",)))
    written = proofs.find_proofs(("results",))[0]
    check_stamp(written)
    assert written.aged == []


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package whose sources are fingerprinted in place of ours."""
    copy = tmp_path / "package"
    shutil.copytree(kernel_stamp.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "emulator", "bench"))
    monkeypatch.setattr(compile_cache, "_PACKAGE", copy)
    monkeypatch.setattr(kernel_stamp, "PACKAGE", copy)
    monkeypatch.setattr(kernel_stamp, "KERNELS", copy / "kernels")
    return copy


EDITS = {
    "kernels/sm100/softmax_warps.py": ["sm100"],
    "kernels/sm90/tuning.py": ["sm90"],
    "kernels/decode/scores.py": ["decode"],
    "kernels/mla_decode/merge.py": ["mla_decode", "mla_decode/sm100"],
    "kernels/mla_decode/sm100/work.py": ["mla_decode/sm100"],
    "kernels/schedule/kernel.py": ["schedule"],
    "kernels/common/mask.py": list(FAMILIES),
    "kernels/launch_abi.py": list(FAMILIES),
    "compile.py": list(FAMILIES),
    "kernels/torch_reference.py": [],
    "ops.py": [],
}


@pytest.mark.parametrize("edited", EDITS)
def test_an_edit_ages_the_results_of_its_family(edited: str, package: Path) -> None:
    """A family's own results where its folder is edited; all where what they share is; none for what no GPU runs."""
    stamp = kernel_stamp.make_stamp("a GPU", FAMILIES)
    assert kernel_stamp.aged(stamp) == []
    source = package / edited
    source.write_text(source.read_text() + "\n")
    assert kernel_stamp.aged(stamp) == EDITS[edited]
    assert kernel_stamp.aged({**stamp, "kernels": {"sm90": stamp["kernels"]["sm90"]}}) == [f for f in EDITS[edited] if f == "sm90"]


def test_every_source_of_a_kernel_is_in_some_fingerprint(package: Path) -> None:
    covered = {path for family in FAMILIES for path in kernel_stamp.sources(family)}
    left_out = {str(path.relative_to(package)) for path in set(compile_cache.fingerprinted_files()) - covered}
    assert left_out == set(kernel_stamp.NOT_ON_A_GPU)
    folders = {str(path.relative_to(package / "kernels")) for path in (package / "kernels").rglob("*") if path.is_dir()}
    assert folders == {*FAMILIES, "common"}, "a new family's folder ages every other family's results: name it in FAMILIES"


def test_figures_of_hopper_speak_of_the_conversion_too() -> None:
    assert kernel_stamp.all_families_of("sm_90a") == ("schedule", "decode", "sm90", "convert_kv")
    assert kernel_stamp.all_families_of("sm_100a") == kernel_stamp.families_of("sm_100a")


def test_the_families_of_an_arch() -> None:
    assert {arch: kernel_stamp.families_of(arch)[2] for arch in ("sm_90a", "sm_100a", "sm_103a")} == {
        "sm_90a": "sm90", "sm_100a": "sm100", "sm_103a": "sm100",
    }  # fmt: skip
    assert set(ARCHS) >= {"sm_90a", "sm_100a", "sm_103a"}


def test_a_test_run_names_old_results_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reporter:
        lines: list[str]

        def section(self, title: str, **_: bool) -> None:
            self.lines.append(title)

        def write_line(self, line: str) -> None:
            self.lines.append(line)

    reporter = Reporter()
    for old, expected in (([], 0), (["decode_h100.json: 2026-11-26 on a GPU, decode edited since"], 2)):
        reporter.lines = []
        monkeypatch.setattr(conftest, "old_proofs", lambda old=old: old)
        conftest.pytest_terminal_summary(reporter)  # type: ignore[arg-type]
        assert len(reporter.lines) == expected and (not old or reporter.lines[1] == old[0])
