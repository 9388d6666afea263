"""What `tests.device.read_counters` makes of a table of Nsight Compute's."""

from __future__ import annotations

import csv
import io

import pytest

from tests.device.measure_tiles import IN_USE, cells
from tests.device.read_counters import DEBTS, debts, kernels_of_calls, limit_of, short_name, shown

CEILINGS = {"tensor %": 95.0, "DRAM %": 90.0}
# As ncu 2025 writes them for an H200: nanoseconds, thousands with commas, and a metric that it has no number for.
METRICS = {
    "gpu__time_duration.sum": "13,728", "gpc__cycles_elapsed.max": "26,988", "sm__cycles_active.avg": "11,963.40",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "9.34",
    "sm__pipe_tensor_op_dmma_cycles_active.avg.pct_of_peak_sustained_active": "0",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "12.91", "lts__throughput.avg.pct_of_peak_sustained_elapsed": "no data",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "1.50",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": "2.25",
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": "9.00",
}  # fmt: skip
MARK, DECODE = "void at::native::triu_tril_kernel<float>(...)", "kernel_cutlass_kernel_DecodeKernelconfigDecodeConfigarchsm_90a"


def ncu_output(kernels: list[str]) -> str:
    """What ncu prints: lines of its own, then names, units and a row a kernel."""
    text = io.StringIO()
    table = csv.writer(text, quoting=csv.QUOTE_ALL)
    table.writerow(["ID", "Kernel Name", *METRICS])
    table.writerow(["", "", *("ns" if name.startswith("gpu__time") else "%" for name in METRICS)])
    for i, kernel in enumerate(kernels):
        table.writerow([i, kernel, *METRICS.values()])
    return f"==PROF== Connected\n{text.getvalue()}"


def test_marks_divide_kernels_into_calls() -> None:
    calls = kernels_of_calls(ncu_output([MARK, DECODE, MARK, "flash::main", "flash::combine", MARK]), 3)
    assert [[row["Kernel Name"] for row in rows] for rows in calls] == [[DECODE], ["flash::main", "flash::combine"], []]


@pytest.mark.parametrize("output", ["==ERROR== no counters", ncu_output([MARK, DECODE])])
def test_a_table_of_other_calls_is_refused(output: str) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        kernels_of_calls(output, 2)


def test_counters_have_their_units() -> None:
    counters = shown(kernels_of_calls(ncu_output([MARK, DECODE]), 1)[0][0])
    assert counters["us"] == pytest.approx(13.728)
    assert counters["SMs busy %"] == pytest.approx(100 * 11963.4 / 26988)
    assert counters["GHz"] == pytest.approx(26988 / 13728)
    assert counters["tensor %"] == 9.34, "of all tensor instructions, not of one kind of them"
    assert counters["L2 %"] is None and counters["MUFU %"] is None
    assert counters["stalls"] == "wait 2.25, long_scoreboard 1.50", "an issue is no stall"


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"DRAM %": 82.0}, "DRAM"),
        ({"DRAM %": 80.0, "L2 %": 87.0}, "L2"),
        ({"tensor %": 86.0, "DRAM %": 85.0}, "DRAM and tensor"),
        ({"SMs busy %": 44.0}, "no unit; SMs hold a CTA 44 % of the time: launch, uneven ends"),
        ({}, "no unit; latency: wait 2.00"),
    ],
)
def test_what_limits_a_kernel(changes: dict[str, float], limit: str) -> None:
    counters = {"DRAM %": 50.0, "L2 %": 40.0, "tensor %": 60.0, "SMs busy %": 95.0, "stalls": "wait 2.00", "MUFU %": None} | changes
    assert limit_of(counters, CEILINGS) == limit


def test_every_debt_has_cells_and_ours_come_first() -> None:
    assert all(cells(kinds, pattern) for kinds, pattern, _ in DEBTS)
    order = [call.variant == "fa3" for call in debts()]
    assert order == sorted(order) and any(call.variant == IN_USE for call in debts())


def test_a_kernel_is_told_by_a_short_name() -> None:
    assert [short_name(name) for name in (DECODE, "kernel_cutlass_kernel_PrefillKernelconfig", "void flash::f<int>(x)")] == [
        "decode", "prefill", "flash::f",
    ]  # fmt: skip
