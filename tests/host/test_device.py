"""What a plan takes from the device at hand: its SMs and the speed of its memory, and nothing from its name. What the driver tells."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits, device, driver, plan_attention
from fa4_backend.arch import ARCHS
from fa4_backend.kernels.schedule.rates import CHIP_RATES, decode_full_sms

LIMITS = BatchLimits(8, 8192, 131072)
# By their drivers: kHz and bits.
H100, H200 = (2619000, 5120), (3201000, 6144)


def problem(arch: str) -> AttentionProblem:
    return AttentionProblem(
        num_q_heads=32, num_kv_heads=8, head_dim=128, head_dim_v=128, dtype="bfloat16", page_size=16, arch=arch,
    )  # fmt: skip


class Driver:
    """Answers as libcuda does for one device; `fails` names the call that returns an error."""

    def __init__(self, answers: tuple[int, int], fails: str = "") -> None:
        self.answers = dict(zip((36, 37), answers, strict=True))
        self.fails = fails

    def cuInit(self, _flags: int) -> int:
        return int(self.fails == "cuInit")

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12090
        return int(self.fails == "cuDriverGetVersion")

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return int(self.fails == "cuDeviceGetCount")

    def cuDeviceGet(self, found: Any, index: int) -> int:
        found._obj.value = 10 + index
        return int(self.fails == "cuDeviceGet")

    def cuDeviceGetAttribute(self, value: Any, attribute: int, found: ctypes.c_int) -> int:
        assert found.value == 11, "the device that was asked for"
        value._obj.value = self.answers[attribute]
        return int(self.fails == f"attribute {attribute}")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    driver.peak_memory_gb.cache_clear()
    yield
    driver.peak_memory_gb.cache_clear()


@pytest.mark.parametrize(
    ("libcuda", "gb"),
    [
        (Driver(H100), 3352.32),
        (Driver(H200), 4916.7),
        (Driver((0, 5120)), None),
        *((Driver(H100, fails), None) for fails in ("cuInit", "cuDeviceGet", "attribute 36", "attribute 37")),
    ],
)
def test_the_driver_says_how_fast_the_memory_is(libcuda: Driver, gb: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libcuda)
    assert driver.peak_memory_gb(1) == (None if gb is None else pytest.approx(gb, rel=1e-4))


def test_without_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_name: str) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert (driver.peak_memory_gb(0), driver.cuda_version(), driver.num_gpus()) == (None, None, 0)


def test_the_driver_says_what_it_runs_and_how_many_gpus_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    for fails, version, count in (
        ("", (12, 9), 2),
        ("cuDriverGetVersion", None, 2),
        ("cuInit", (12, 9), 0),
        ("cuDeviceGetCount", (12, 9), 0),
    ):
        monkeypatch.setattr(ctypes, "CDLL", lambda _name, fails=fails: Driver(H100, fails))
        assert (driver.cuda_version(), driver.num_gpus()) == (version, count), fails


def test_a_cpu_plans_without_a_device() -> None:
    assert device.plan_on(problem("cpu"), LIMITS, torch.device("cpu")) == plan_attention(problem("cpu"), LIMITS)


def test_a_gpu_plans_with_its_own_sms_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        multi_processor_count = 114
        name = "a name that no table has"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: Properties)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Driver(H200))
    work = device.plan_on(problem("sm_90a"), LIMITS, torch.device("cuda", 1)).kernels.work
    assert work.num_sms == 114 and work.decode_full_sms == 78


@pytest.mark.parametrize(
    ("arch", "name", "capability", "words"),
    [
        ("sm_90a", "cpu", None, "device: expected cuda for a plan of arch sm_90a, got cpu"),
        ("cpu", "cuda:1", None, "device: expected cpu for a plan of arch cpu, got cuda:1"),
        ("emulated-sm_90a", "cuda", None, "device: expected cpu for a plan of arch emulated-sm_90a, got cuda"),
        ("sm_90a", "cuda:1", (10, 0), r"device: expected sm_90a \(H100, H200, GH200\), .* got card 1 of compute capability 10.0"),
        ("sm_100a", "cuda", (12, 0), r"device: expected sm_100a .* got card None of compute capability 12.0"),
    ],
)
def test_a_plan_is_allocated_on_its_own_kind_of_device(
    arch: str, name: str, capability: tuple[int, int] | None, words: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a kernel is compiled for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    plan = plan_attention(problem(arch), LIMITS)
    with pytest.raises(ValueError, match=words):
        AttentionMetadata.allocate(plan, name)
    assert not cache.exists()


@pytest.mark.parametrize("arch", ARCHS)
def test_a_faster_memory_keeps_more_sms_busy(arch: str) -> None:
    sms = [decode_full_sms(arch, 132, gb) for gb in (500, 2039, 3352, 4917, 8000)]
    assert sms == sorted(sms) and sms[0] < sms[-1]
    assert decode_full_sms(arch, 132) == decode_full_sms(arch, 132, CHIP_RATES[arch].published_memory_gb)


def test_the_measured_h100_stays_what_it_was() -> None:
    assert decode_full_sms("sm_90a", 132, 3352.32) == 53 == decode_full_sms("sm_90a", 132)


def test_memory_changes_work_and_no_kernel() -> None:
    slow, fast = (plan_attention(problem("sm_90a"), LIMITS, memory_gb=gb).kernels for gb in (3352, 4917))
    assert slow.keys == fast.keys and slow.work != fast.work
