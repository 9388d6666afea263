"""What adapters share: it imports no engine, names the kernels of a device, and opens and ends the warm-up."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from fa4_backend import AttentionProblem, BatchLimits, UnsupportedProblem, compile_cache
from fa4_integration.common import start
from fa4_integration.common.serving_device import DeviceFacts, arch_of_device
from tests.host.test_layers import imported_modules

INTEGRATION = Path(__file__).parents[2] / "integration"
ENGINES = ("vllm", "sglang", "transformers")


def test_common_imports_no_engine_and_no_adapter() -> None:
    files = sorted((INTEGRATION / "common").glob("*.py"))
    assert len(files) >= 3
    for path in files:
        found = [name for name in imported_modules(path) if name.split(".")[0] in ENGINES]
        found += [
            name for name in imported_modules(path) if name.startswith("fa4_integration.") and not name.startswith("fa4_integration.common")
        ]
        assert not found, f"{path.name} imports {found}"


def test_adapters_know_no_kernels() -> None:
    """They call the operator; what runs is the plan's matter."""
    for path in sorted(INTEGRATION.rglob("*.py")):
        found = [name for name in imported_modules(path) if name.startswith(("fa4_backend.kernels", "fa4_backend.emulator", "cutlass"))]
        assert not found, f"{path.relative_to(INTEGRATION)} imports {found}"


@pytest.mark.parametrize(
    ("device", "arch"),
    [
        (DeviceFacts(False, (9, 0), "NVIDIA H100"), "sm_90a"),
        (DeviceFacts(False, (10, 0), "NVIDIA B200"), "sm_100a"),
        (DeviceFacts(False, (10, 3), "NVIDIA B300"), "sm_103a"),
        (DeviceFacts(True, None, "CPU"), "emulated-sm_90a"),
    ],
)
def test_devices_have_their_kernels(device: DeviceFacts, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_BACKEND_CPU", "emulate-sm90")
    assert arch_of_device(device) == arch


@pytest.mark.parametrize(
    ("device", "got"),
    [
        (DeviceFacts(False, (8, 0), "NVIDIA A100"), "compute capability 8.0"),
        (DeviceFacts(False, (12, 0), "NVIDIA RTX"), "compute capability 12.0"),
        (DeviceFacts(False, None, "AMD Instinct"), "AMD Instinct"),
    ],
)
def test_other_devices_are_refused_with_a_sentence(device: DeviceFacts, got: str) -> None:
    with pytest.raises(UnsupportedProblem, match=rf"device: expected H100, .* or a CPU, got {got}; use another attention backend"):
        arch_of_device(device)


def test_warm_up_opens_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second engine of a process compiles in its own warm-up, not after the first one's."""
    monkeypatch.setattr(compile_cache, "_sealed", False)
    start.open_warm_up()
    start.seal_warm_up()
    assert compile_cache._sealed
    start.open_warm_up()
    assert not compile_cache._sealed


def test_an_engine_starts_with_no_setting_that_means_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FA4_BACKEND_STRCIT", "1")
    with caplog.at_level(logging.WARNING, "fa4_backend"):
        start.open_warm_up()
    assert [line.partition(":")[0] for line in caplog.messages] == ["FA4_BACKEND_STRCIT"]
    monkeypatch.setenv("FA4_BACKEND_STRICT", "yes")
    with pytest.raises(ValueError, match="FA4_BACKEND_STRICT: expected 0 or 1, got 'yes'"):
        start.open_warm_up()


def test_allocate_plans_for_the_device() -> None:
    problem = AttentionProblem(2, 1, 64, 64, "bfloat16", 16, "cpu")
    metadata = start.allocate(problem, BatchLimits(1, 1, 1), torch.device("cpu"))
    assert metadata.plan.problem == problem and metadata.device == torch.device("cpu")


def test_log_lines_go_where_the_engines_go(monkeypatch: pytest.MonkeyPatch) -> None:
    core, engine = logging.getLogger("fa4_backend"), logging.getLogger("an_engine")
    monkeypatch.setattr(core, "parent", core.parent)
    start.show_log_lines("an_engine")
    assert core.parent is engine
